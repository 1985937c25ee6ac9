"""Decoder families of Transformers: outcomes as documented in ``docs/architectures.md``, from end to end."""

import re
from pathlib import Path

import decoder_families
import pytest
import torch
import transformers
from architectures_page import DOCS, WHY, documented, documented_kind, row
from decoder_families import NOT_TRIED, REFUSED, SUPPORTED, outcome_of
from shared import ROOT
from small_configs import KINDS

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("gpt_bigcode", "phimoe")  # supported
REFUSALS = ("gemma3n_text", "reformer", "mllama", "prophetnet")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.mark.architectures
@pytest.mark.slow  # make test-fast has a choice of markers of its own
@pytest.mark.parametrize("family", KINDS)
def test_every_family_has_the_documented_outcome(family: str, tmp_path: Path, shared: Path) -> None:
    assert row(outcome_of(family, tmp_path, shared)) == documented()[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", QUICK)
def test_some_supported_families(family: str, tmp_path: Path, shared: Path) -> None:
    outcome = outcome_of(family, tmp_path, shared)
    assert outcome.kind == SUPPORTED
    assert row(outcome) == documented()[family]


@pytest.mark.parametrize("family", REFUSALS)
def test_some_refused_families(family: str, tmp_path: Path, shared: Path) -> None:
    outcome = outcome_of(family, tmp_path, shared)
    assert outcome.kind == REFUSED
    assert row(outcome) == documented()[family]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "factor"), [("q_proj", 1.02), ("down_proj", 0.98)])
def test_wrong_weights_are_no_supported_family(
    name: str, factor: float, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference of the comparison has a wrong layer, so the packed model differs from it."""
    original = decoder_families._set_weights

    def wrong(model: torch.nn.Module, *rest: object) -> None:
        original(model, *rest)  # type: ignore[arg-type]
        for path, parameter in model.named_parameters():
            if name in path:
                parameter.mul_(factor)

    monkeypatch.setattr(decoder_families, "_set_weights", torch.no_grad()(wrong))
    with pytest.raises(AssertionError):
        outcome_of("llama", tmp_path, shared)


def test_the_page_lists_every_family_once() -> None:
    version = re.search(r"Transformers ([\d.]+),", DOCS.read_text())
    assert version is not None
    if version[1] != transformers.__version__:
        pytest.skip(f"docs/architectures.md is of Transformers {version[1]}; `make architectures` writes it anew")
    kinds = {kind: documented_kind(kind) for kind in (SUPPORTED, REFUSED, NOT_TRIED)}
    listed = [family for families in kinds.values() for family in families]
    assert sorted(listed) == sorted(KINDS)
    text = DOCS.read_text()
    assert ", ".join(f"{len(families)} {kind}" for kind, families in kinds.items()) in text
    assert len(kinds[SUPPORTED]) >= 40
    assert sorted(WHY) == sorted(kinds[REFUSED] + kinds[NOT_TRIED])
    assert all(WHY.values())


def test_the_readme_names_the_page() -> None:
    assert "(docs/architectures.md)" in (ROOT / "README.md").read_text()

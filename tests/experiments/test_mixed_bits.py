"""Refined slices among layers of other bit-widths, after a prefill and as drafts: the script against plain computations."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from packing import Opened, read
from shared import ROOT, load_script
from transformers import AutoModelForCausalLM

FOLDER = ROOT / "experiments" / "benchmarks" / "real"
IDS = torch.arange(64).view(2, 32) * 37 % 128

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "mixed_bits.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Full-precision and packed folder."""
    folder = tmp_path_factory.mktemp("mixed")
    full = save(make_model("llama"), folder / "full")
    return full, Opened(full, folder / "store").pack(folder / "packed")


@pytest.fixture
def models(script: Any, folders: tuple[Path, Path]) -> tuple[Any, Any]:
    exact = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32).eval()
    model = read(folders[1])
    script.keep_dequantized(model, script.WIDTHS)
    return exact, model


def test_half_of_the_layers_keep_the_bit_width(script: Any) -> None:
    names = [f"layer{index}" for index in range(20)]
    found = script.draw(names, 3, [2, 8], 0)
    assert sum(bits == 3 for bits in found.values()) == 10
    assert set(found.values()) == {2, 3, 8}
    assert found == script.draw(names, 3, [2, 8], 0) != script.draw(names, 3, [2, 8], 1)


def test_kl_and_acceptance_are_those_of_the_logits(script: Any, models: tuple[Any, Any], folders: Any) -> None:
    exact, model = models
    found = {(row["case"], row["bits"]): row for row in script.measure(exact, model, IDS, [2, 8])}
    plain = read(folders[1])

    @torch.inference_mode()
    def log_p(bits: Any, tokens: slice = slice(None), first: Any = None) -> torch.Tensor:
        """Log-probabilities [windows, positions, vocabulary] with the layers themselves."""
        cache = None
        if first is not None:
            plain.set_bits(first)
            cache = plain(IDS[:, :16], use_cache=True).past_key_values
        plain.set_bits(bits)
        return plain(IDS[:, tokens], past_key_values=cache).logits.log_softmax(-1)

    with torch.inference_mode():
        full = exact(IDS).logits.log_softmax(-1)

    def kl(reference: torch.Tensor, other: torch.Tensor) -> Any:
        return pytest.approx((reference.exp() * (reference - other)).sum(-1).mean().item(), rel=1e-3, abs=1e-9)

    assert found["alone", 2]["kl"] == kl(full, log_p(2))
    names = list(script.nested_layers(model))
    drawn = [log_p(script.draw(names, 2, [8], seed)) for seed in range(script.DRAWS)]
    assert found["among 8", 2]["kl"] == kl(full, torch.stack(drawn))
    half = slice(16, None)
    assert found["after itself", 2]["kl"] == kl(full[:, half], log_p(2)[:, half])
    after = log_p(2, half, first=8)
    assert found["after 8", 2]["kl"] == kl(full[:, half], after)
    common = torch.minimum(log_p(8, half, first=8), after).exp().sum(-1).mean().item()
    assert found["after 8", 2]["acceptance"] == pytest.approx(common, rel=1e-4)
    assert 0 < common < 1
    assert found["after 8", 8]["acceptance"] == pytest.approx(1.0, abs=1e-5)
    assert found["among 8", 8]["kl"] == pytest.approx(found["alone", 8]["kl"], rel=1e-5)
    assert found["after 8", 8]["kl"] == pytest.approx(found["after itself", 8]["kl"], rel=1e-3)


@pytest.mark.slow
def test_records_of_all_parents_are_written(
    script: Any, models: tuple[Any, Any], folders: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "texts_of", lambda _: {"source": None, "prose": None})
    monkeypatch.setattr(script, "windows", lambda *_: IDS)
    given = argparse.Namespace(
        model=Path("m.gguf"),
        parents=[f"a={folders[1]}", f"b={folders[1]}"],
        bits=[3],
        texts=["source", "prose"],
        windows=1,
        device="cpu",
    )
    records = script.run(given, models[0], None, None, tmp_path / "found" / "m.json")
    assert json.loads((tmp_path / "found" / "m.json").read_text()) == records
    assert [(r["parent"], r["text"]) for r in records[::5]] == [
        (parent, text) for parent in ("a", "b") for text in ("source", "prose")
    ]
    lines = script.table(records).splitlines()
    assert len(lines) == 11
    assert all(line.split()[4 + line.count("among") + line.count("after")] == "1.000" for line in lines[1:])
    accepted = [line.split()[-2:] for line in lines if "after 8" in line]
    assert accepted == [[f"{r['acceptance']:.3f}"] * 2 for r in records[4:10:5]]


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        (["nothing"], "nothing is no NAME=FOLDER of a packed folder"),
        (["a=missing"], "a=missing is no NAME=FOLDER"),
        (["a={}", "a={}"], "two parents have the same name"),
    ],
)
def test_wrong_parents_end_the_script_before_it_reads_a_model(
    script: Any, folders: Any, parents: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(script, "open_reference", None)
    monkeypatch.setattr("sys.argv", ["mixed_bits.py", "m.gguf", *(one.format(folders[1]) for one in parents)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert message in capsys.readouterr().err

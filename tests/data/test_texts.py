import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from matquant.data import texts
from matquant.data.config import TextConfig
from matquant.data.sources import SOURCES, TextSource, stdlib
from matquant.data.sources.base import DOCUMENTS_PER_BATCH
from matquant.errors import UserError
from matquant.paths import resource_root

END = 999


class Characters:
    """A tokenizer whose tokens are characters."""

    def __init__(self, end: int | None = END) -> None:
        self.eos_token_id = end

    def __call__(self, batch: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in batch]}


class Counted:
    """A tokenizer that makes the tokens 0, 1, 2, ... of every document."""

    eos_token_id = None

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, batch: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(range(self.tokens)) for _ in batch]}


class OneDocument(TextSource):
    """The smallest source."""

    name = "one"

    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        yield split


def config(**settings: Any) -> TextConfig:
    defaults = {"dataset": "local", "path": None, "sequences": 2, "sequence_length": 4, "seed": None, "batch_size": 1}
    return TextConfig(**(defaults | settings))


def characters(row: torch.Tensor) -> str:
    return "".join("$" if i == END else chr(i) for i in row.flatten().tolist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b.txt").write_text("bbbb")
    (tmp_path / "a.md").write_text("aaaé", encoding="utf-8")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "notes.rst").write_text("not read")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("cccc")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "d.txt").write_text("hidden")
    return tmp_path


def test_documents_are_sorted_and_each_followed_by_the_end_token(folder: Path) -> None:
    found = texts.windows(config(path=str(folder), sequences=3, sequence_length=5), "evaluation", Characters())
    assert found.dtype == torch.int64
    assert characters(found) == "aaaé$bbbb$cccc$"


def test_a_tokenizer_without_end_token_and_a_single_file(folder: Path) -> None:
    found = texts.windows(config(path=str(folder / "b.txt"), sequences=2, sequence_length=2), "train", Characters(None))
    assert characters(found) == "bbbb"


@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_drawn_windows_are_different_ones_in_order(seed: int, sequences: int, length: int) -> None:
    drawn = config(dataset="one", sequences=sequences, sequence_length=length, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOURCES, "one", OneDocument())
        found, again = (texts.windows(drawn, "train", Counted(100)) for _ in range(2))
    assert torch.equal(found, again)
    starts = found[:, 0]
    assert (starts % length == 0).all()
    assert (starts.diff() > 0).all()
    assert torch.equal(found, starts[:, None] + torch.arange(length))


def test_other_seeds_draw_other_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "one", OneDocument())
    drawn = [texts.windows(config(dataset="one", sequences=8, seed=seed), "train", Counted(4000)) for seed in (0, 1)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("sequences", [1, 2, 50, 500])
def test_only_as_many_documents_as_needed_are_read_without_a_seed(
    monkeypatch: pytest.MonkeyPatch, sequences: int
) -> None:
    """Less than twice as many, and less than a batch more."""
    read = []

    class Endless(TextSource):
        name = "endless"

        def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
            while True:
                read.append(1)
                yield "text"

    monkeypatch.setitem(SOURCES, "endless", Endless())
    found = texts.windows(config(dataset="endless", sequences=sequences), "train", Characters())
    assert found.shape == (sequences, 4)
    assert found.flatten().tolist() == ([*map(ord, "text"), END] * sequences)[: 4 * sequences]
    needed = math.ceil(4 * sequences / 5)
    assert len(read) < min(2 * needed, needed + DOCUMENTS_PER_BATCH)


def test_the_standard_library_with_a_real_tokenizer_warns_of_nothing(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resource_root() / "experiments" / "models" / "tiny")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = texts.windows(config(dataset="stdlib", sequences=4, sequence_length=256), "evaluation", tokenizer)
    text = next(stdlib.documents("evaluation"))
    ids = [*tokenizer(text[:800], add_special_tokens=False)["input_ids"]]
    assert found.flatten()[:200].tolist() == ids[:200]
    assert not caplog.records
    assert "longer than" not in capsys.readouterr().err


def test_too_little_text_says_how_much_there_is(folder: Path) -> None:
    with pytest.raises(UserError, match=r"5 windows of 4 tokens .*20 tokens.*15 tokens, which make 3\. Lower"):
        texts.windows(config(path=str(folder), sequences=5), "train", Characters())


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no text at .*nowhere"):
        texts.windows(config(path=str(tmp_path / "nowhere")), "train", Characters())


def test_an_empty_file_and_an_empty_folder(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        texts.windows(config(path=str(empty)), "train", Characters())
    with pytest.raises(UserError, match="holds no text"):
        texts.windows(config(path=str(tmp_path)), "train", Characters())


@pytest.mark.parametrize("inside", [True, False])
def test_a_file_that_is_not_utf8_is_named(tmp_path: Path, inside: bool) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    path = tmp_path if inside else tmp_path / "latin.txt"
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8: byte 3"):
        texts.windows(config(path=str(path)), "train", Characters())


def test_the_fingerprint_knows_ids_and_shape() -> None:
    ids = torch.arange(12)
    prints = {texts.fingerprint(w) for w in (ids.view(3, 4), ids.view(4, 3), ids.view(3, 4) + 1)}
    assert len(prints) == 3
    assert texts.fingerprint(ids.view(3, 4)) == texts.fingerprint(ids.view(4, 3).clone().view(3, 4))


def test_an_unknown_dataset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"calibration\.dataset must be one of stdlib, .*mix; found 'wiki'"):
        texts.check_text(config(dataset="wiki"), "calibration")


@given(
    sequences=st.integers(1, 40),
    weights=st.dictionaries(st.sampled_from(["stdlib", "local", "self"]), st.floats(0.1, 9), min_size=1),
)
def test_sequences_that_a_model_writes_are_left_out_of_those_that_are_read(
    sequences: int, weights: dict[str, float]
) -> None:
    text = TextConfig(dataset="mix", mix=weights, path="folder", sequences=sequences, sequence_length=8)
    read, written = texts.split_self(text)
    shares = {part.dataset: part.sequences for part in texts.shares(text)}
    assert written == shares.get("self", 0)
    assert (0 if read is None else read.sequences) == sequences - written
    if read is not None:
        assert set(read.mix) == set(weights) - {"self"}
        for part in texts.shares(read):
            assert abs(part.sequences - shares.get(part.dataset, 0)) <= 1


@pytest.mark.parametrize(("dataset", "expected"), [("self", (None, 5)), ("stdlib", (5, 0))])
def test_a_text_of_one_kind_is_read_or_written(dataset: str, expected: tuple[int | None, int]) -> None:
    read, written = texts.split_self(TextConfig(dataset=dataset, sequences=5))
    assert (read and read.sequences, written) == expected

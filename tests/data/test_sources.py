"""Texts from the hub (faked), tables, chats and mixes; and that nothing is measured on what it was calibrated on."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from matquant.data import texts
from matquant.data.config import TextConfig
from matquant.data.sources import SOURCES
from matquant.errors import UserError
from matquant.store import Store


class Characters:
    """A tokenizer whose tokens are characters; with ``bos`` it begins a text with 1 by itself."""

    eos_token_id = None
    chat_template = None

    def __init__(self, bos: bool = False) -> None:
        self.bos_token_id = 1 if bos else None
        self.calls = 0

    def __call__(self, text: Any, add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        self.calls += 1
        first = [1] if add_special_tokens and self.bos_token_id is not None else []
        ids = [first + [ord(c) for c in t] for t in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}


class Chats(Characters):
    chat_template = "a template"

    def apply_chat_template(self, messages: list[dict], tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


def config(**settings: Any) -> TextConfig:
    defaults = {"dataset": "local", "path": None, "sequences": 2, "sequence_length": 4, "seed": None, "batch_size": 1}
    return TextConfig(**(defaults | settings))


def read(row: torch.Tensor) -> str:
    return "".join(chr(i) if i > 1 else "^" for i in row.flatten().tolist())


class Rows(list):
    """Rows of a dataset, as far as it is used."""

    def __getitem__(self, what: Any) -> Any:
        if what == "text":
            return [row["text"] for row in self]
        found = list.__getitem__(self, what)
        return Rows(found) if isinstance(what, slice) else found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Requests to the hub, which answers with a few rows."""
    found: list[dict] = []

    def load_dataset(repository: str, **settings: Any) -> Rows:
        found.append({"repository": repository, **settings})
        return Rows({"text": f"{settings['split']} {i} " + "abcdefgh" * (i % 3)} for i in range(60))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return found


def test_wikitext_is_measured_from_its_start_at_a_pinned_revision(asked: list[dict]) -> None:
    found = texts.windows(config(dataset="wikitext2", sequences=3, sequence_length=10), "evaluation", Characters())
    assert read(found) == "test 0 \n\ntest 1 abcdefgh\n\ntest"[:30]
    (request,) = asked
    assert (request["repository"], request["name"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert len(request["revision"]) == 40


@pytest.mark.parametrize("dataset", ["wikitext2", "c4"])
def test_published_calibration_windows_are_from_random_places_of_the_train_split(
    dataset: str, asked: list[dict]
) -> None:
    one, same, other = (
        texts.windows(config(dataset=dataset, sequences=8, sequence_length=6, seed=seed), "calibration", Characters())
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    whole = "\n\n".join(f"train {i} " + "abcdefgh" * (i % 3) for i in range(60))
    assert all(read(row) in whole for row in one)
    assert {request["split"] for request in asked} == {"train"}


def test_c4_is_measured_on_the_first_documents_of_the_validation_split(asked: list[dict]) -> None:
    found = texts.windows(config(dataset="c4", sequences=2, sequence_length=12), "evaluation", Characters())
    assert read(found) == "validation 0  validation 1 abcde"[:24]
    assert asked[0]["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


def test_fineweb_splits_do_not_overlap_and_stream(asked: list[dict]) -> None:
    source, text = SOURCES["fineweb_edu"], config(dataset="fineweb_edu")
    one, two = (set(source.documents(text, split, Characters())) for split in ("calibration", "evaluation"))
    assert not one & two
    assert len(one | two) == 60
    assert len(one) > len(two) > 0
    assert all(request["streaming"] for request in asked)


def test_offline_is_one_sentence_that_names_the_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route.\nmore")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        UserError, match=r"wikitext2 \(Salesforce/wikitext on the hub\).*no route\..*dataset=local and path="
    ):
        texts.windows(config(dataset="wikitext2"), "evaluation", Characters())


def test_published_windows_keep_the_tokenizers_own_first_token_only_at_the_start(asked: list[dict]) -> None:
    wanted = config(dataset="wikitext2", sequences=2, sequence_length=4)
    assert read(texts.windows(wanted, "evaluation", Characters(bos=True))) == "^test 0 "[:8]
    every = config(dataset="wikitext2", sequences=2, sequence_length=4, bos=True)
    assert read(texts.windows(every, "evaluation", Characters(bos=True))) == "^tes^ 0 "


def test_windows_begin_with_the_first_token_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abcdefghij")
    for tokenizer, bos, expected in (
        (Characters(bos=True), None, "^abc^def"),
        (Characters(bos=True), False, "abcdefgh"),
        (Characters(), None, "abcdefgh"),
    ):
        assert read(texts.windows(config(path=str(file), bos=bos), "calibration", tokenizer)) == expected
    with pytest.raises(UserError, match="no beginning-of-text token"):
        texts.windows(config(path=str(file), bos=True), "calibration", Characters())


def write_table(file: Path, rows: list[dict]) -> str:
    if file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return str(file)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_tables_of_texts_and_of_chats(kind: str, tmp_path: Path) -> None:
    plain = write_table(tmp_path / f"a.{kind}", [{"n": 1, "text": "abcd"}, {"n": 2, "text": "efgh"}])
    assert read(texts.windows(config(path=plain), "calibration", Characters())) == "abcdefgh"
    named = write_table(tmp_path / f"b.{kind}", [{"body": "ABCDEFGH", "text": "no"}])
    assert read(texts.windows(config(path=named, field="body"), "calibration", Characters())) == "ABCDEFGH"
    chat = write_table(tmp_path / f"c.{kind}", [{"messages": [{"role": "user", "content": "hi, you"}]}])
    assert read(texts.windows(config(path=chat), "calibration", Chats())) == "<user>hi"
    with pytest.raises(UserError, match="tokenizer has no chat template"):
        texts.windows(config(path=chat), "calibration", Characters())
    with pytest.raises(UserError, match=r"row 1 has no field nothing; found"):
        texts.windows(config(path=plain, field="nothing"), "calibration", Characters())


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is no JSON"):
        texts.windows(config(path=str(tmp_path / "a.jsonl")), "calibration", Characters())
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"b\.parquet cannot be read as Parquet"):
        texts.windows(config(path=str(tmp_path / "b.parquet")), "calibration", Characters())


@pytest.mark.parametrize(
    ("mix", "expected"), [({"c4": 1, "wikitext2": 3}, [2, 5]), ({"c4": 2, "wikitext2": 1}, [5, 2]), ({"c4": 1}, [7])]
)
def test_a_mix_shares_out_the_sequences_by_weight(mix: dict, expected: list[int], asked: list[dict]) -> None:
    wanted = config(dataset="mix", mix=mix, sequences=7, seed=0)
    assert [part.sequences for part in texts.shares(wanted)] == expected
    assert len(texts.windows(wanted, "calibration", Characters())) == 7


def test_a_text_is_tokenized_once(tmp_path: Path) -> None:
    file, store = tmp_path / "a.txt", Store(tmp_path / "store")
    file.write_text("abcdefgh")
    first, second = Characters(), Characters()
    found = [texts.windows(config(path=str(file)), "calibration", t, store) for t in (first, second)]
    assert torch.equal(*found)
    assert (first.calls, second.calls) == (1, 0)
    file.write_text("ABCDEFGH")
    assert read(texts.windows(config(path=str(file)), "calibration", Characters(), store)) == "ABCDEFGH"


@pytest.mark.parametrize("inside", [False, True])
def test_measuring_on_what_was_calibrated_on_is_refused(tmp_path: Path, inside: bool) -> None:
    one, two = config(path=str(tmp_path)), config(path=str(tmp_path / "a.txt" if inside else tmp_path))
    with pytest.raises(UserError, match="are the same text, so that figures would flatter"):
        texts.check_apart(one, {"mine": two})
    texts.check_apart(one, {"mine": config(path="/elsewhere"), "other": config(dataset="wikitext2")})

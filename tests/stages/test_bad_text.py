"""Texts, prompts and tasks that a tokenizer or a model cannot read are refused before any work."""

import json
import shutil
from pathlib import Path

import pytest
from shared import SMALL
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

ADDED = "<extra>"  # token 2048 of a tokenizer whose model has 2048 embeddings
LOCAL = ("calibration=local", "calibration.sequences=2", "calibration.sequence_length=8", "calibration.seed=null")
MINE = ("+eval.datasets.mine.dataset=local", "+eval.datasets.mine.sequences=2", "+eval.datasets.mine.sequence_length=8")
GENERATE = ("stages=[quantize,generate]", "max_new_tokens=2")


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> str:
    """Override that names the small model with a tokenizer of one token more."""
    folder = shutil.copytree(small_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([ADDED])
    tokenizer.save_pretrained(folder)
    return f"model.path={folder}"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matquant.stages.job.quantize", lambda *_: pytest.fail("the model was quantized"))


def refused(matquant, *overrides: str) -> str:
    status, _, err = matquant(*SMALL, "method.group_size=64", *overrides)
    assert status == 2
    assert "Traceback" not in err
    return err


def task_folder(folder: Path, question: str) -> Path:
    """Folder with an lm-eval task of one question."""
    folder.mkdir()
    (folder / "data.jsonl").write_text(json.dumps({"q": question, "c": ["no", "yes"], "a": 0}) + "\n")
    (folder / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}, "
        f"cache_dir: {folder}/cache}}\noutput_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{{{q}}}}'\n"
        "doc_to_choice: '{{c}}'\ndoc_to_target: a\n"
    )
    return folder


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["calibration.path={with_token}"], "The text of calibration"),
        (
            ["calibration.path={plain}", *MINE, "+eval.datasets.mine.path={with_token}"],
            "The text of eval.datasets.mine",
        ),
        (["calibration.path={plain}", *GENERATE, "prompt='a <extra> b'"], "The prompt"),
        (["calibration.path={plain}", "eval.tasks=[mine]", "eval.task_folder={tasks}"], "The task mine of eval.tasks"),
    ],
)
def test_a_token_without_an_embedding_is_named(
    matquant, model: str, no_work, tmp_path: Path, overrides: list[str], where: str
) -> None:
    places = {"plain": tmp_path / "plain.txt", "with_token": tmp_path / "token.txt", "tasks": tmp_path / "tasks"}
    places["plain"].write_text("def add(a, b): return a + b\n" * 20)
    places["with_token"].write_text(f"def {ADDED}(a, b): return a + b\n" * 20)
    task_folder(places["tasks"], f"def {ADDED}")
    err = refused(matquant, model, *LOCAL, *(override.format(**places) for override in overrides))
    assert f"{where} has the token 2048 ('<extra>'), but model has embeddings for ids below 2048 only" in err


def test_a_tokenizer_of_another_model_is_refused(matquant, no_work, tmp_path: Path) -> None:
    from architectures import make_model, save

    folder = save(make_model("llama"), tmp_path / "model")  # 128 embeddings
    assert "The text of eval.datasets.stdlib has the token" in refused(
        matquant, f"model.path={folder}", "method.group_size=32"
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("caf\udce9", "The prompt holds half a character (\\udce9, a lone surrogate) at position 3"),
        ("\ud83d", "The prompt holds half a character (\\ud83d, a lone surrogate) at position 0"),
        ("word " * 300, "is longer than the context of 256 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_refused(matquant, model: str, no_work, prompt: str, message: str) -> None:
    assert message in refused(matquant, model, *GENERATE, f"prompt='{prompt}'")


@pytest.mark.parametrize(
    ("name", "content", "overrides", "message"),
    [
        ("a.json", '[{"body": "x"}]', [], "a.json, row 1 has no field text or messages or content; found body"),
        ("a.jsonl", '{"text": "\\ud83d"}', [], "a.jsonl, row 1 holds half a character"),
        ("a.docx", "text", [], "kind that is not understood (.docx)"),
        ("a.txt", "text", ["calibration.field=body"], "field=body is the column of a table"),
        ("a.csv", 'text\n"open', [], "a.csv cannot be read as Csv"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(
    matquant, model: str, no_work, tmp_path: Path, name: str, content: str, overrides: list[str], message: str
) -> None:
    (tmp_path / name).write_text(content)
    assert message in refused(matquant, model, *LOCAL, f"calibration.path={tmp_path / name}", *overrides)


def test_a_path_without_calibration_local_is_refused(matquant, no_work) -> None:
    assert "Set calibration.dataset=local" in refused(matquant, "calibration.path=mine.txt")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.json", "b.jsonl"])
def test_a_model_is_calibrated_on_the_texts_of_a_table(matquant, small_model: Path, tmp_path: Path, name: str) -> None:
    rows = [{"body": f"def number_{i}(): return {i}\u2028\n" * 4, "text": "no"} for i in range(40)]
    content = json.dumps(rows) if name == "a.json" else "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    (tmp_path / name).write_text(content)
    (tmp_path / "same.txt").write_text("")
    status, _, err = matquant(
        *SMALL,
        f"model.path={small_model}",
        "method.group_size=64",
        "bits=4",
        *LOCAL,
        f"calibration.path={tmp_path / name}",
        "calibration.field=body",
    )
    assert status == 0, err
    windows = next((tmp_path / "store" / "windows").glob("*/windows.safetensors"))
    from safetensors.torch import load_file

    ids = load_file(windows)["windows"]
    assert AutoTokenizer.from_pretrained(small_model).decode(ids[0]).startswith("def number_0()")

"""The stage on the command line: what it writes, and what it refuses before any work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import SMALL
from transformers import AutoTokenizer

from matquant.inference import nested_layers

pytestmark = pytest.mark.slow

QUICK = (*SMALL, "method=rtn", "method.per_bit_models=false", "method.group_size=64")


@pytest.fixture
def job(matquant: Any, tmp_path: Path, small_model: Path) -> Any:
    def run(*overrides: str) -> dict[str, Any]:
        status, _, err = matquant(f"model.path={small_model}", *QUICK, *overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())

    return run


def test_a_job_packs_what_it_measured(job: Any, tmp_path: Path, small_model: Path) -> None:
    from packing import read

    results = job("pack=nested", "bits=[2,3]", "pack.prefill_bits=4", "pack.max_bits=5")
    folder = tmp_path / "run" / "packed"
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    assert results["pack"] == {
        "format": "nested",
        "folder": str(folder),
        "bytes": pytest.approx(size, abs=4096),
        "bits": 5,
        "max_bits": 5,
    }
    assert results["seconds"]["pack"] > 0
    card = (folder / "README.md").read_text()
    for entry in results["slices"]:
        assert f"| {entry['bits']} | {entry['bits']}.0 |" in card
    assert "from_pretrained" in card
    model = read(folder)
    assert {(layer.bits, layer.prefill_bits) for layer in nested_layers(model).values()} == {(5, 4)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("def f").input_ids == AutoTokenizer.from_pretrained(small_model)("def f").input_ids


def test_one_width_is_the_default_and_a_stage_alone_reuses_the_parent(job: Any, tmp_path: Path) -> None:
    assert job("bits=3", "pack=nested", f"pack.path={tmp_path}/three")["pack"]["bits"] == 3
    results = job("bits=3", "stages=[pack]", "pack=nested", f"pack.path={tmp_path}/again", "pack.bits=4")
    assert results["pack"]["bits"] == 4
    assert results["parent"]["reused"]
    assert "Nothing was measured" in (tmp_path / "again" / "README.md").read_text()


def test_an_allocation_is_what_a_reader_begins_with(job: Any, tmp_path: Path, small_model: Path) -> None:
    from packing import read
    from transformers import AutoModelForCausalLM

    linear = AutoModelForCausalLM.from_pretrained(small_model).model.named_modules(prefix="model")
    names = [name for name, module in linear if isinstance(module, torch.nn.Linear)]
    widths = {name: 2 + i % 7 for i, name in enumerate(names)}
    (tmp_path / "a.txt").write_text("".join(f"{name}: {bits}\n" for name, bits in widths.items()))
    results = job(f"bits={tmp_path}/a.txt", "stages=[quantize,pack]", "pack=nested")
    assert results["pack"]["bits"] == "allocation"
    model = read(tmp_path / "run" / "packed")
    assert {name: layer.bits for name, layer in nested_layers(model).items()} == widths
    results = job("bits=2", f"pack.bits={tmp_path}/a.txt", "stages=[pack]", "pack=nested", f"pack.path={tmp_path}/b")
    assert {name: layer.bits for name, layer in nested_layers(read(tmp_path / "b")).items()} == widths


def test_a_folder_that_is_there_is_not_replaced_unless_asked(
    job: Any, matquant: Any, small_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    arguments = ("stages=[quantize,pack]", "bits=2", "pack=nested", f"pack.path={tmp_path}/mine")
    status, _, err = matquant(f"model.path={small_model}", *QUICK, *arguments)
    assert status == 2
    assert "mine is there already. Give another, or set pack.overwrite=true" in err
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    job(*arguments, "pack.overwrite=true", "pack.max_bits=2")
    assert (tmp_path / "mine" / "config.json").is_file()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["stages=[pack]"], "stages names pack, but pack=none; choose a format"),
        (["pack=nested", "pack.bits=9"], "pack.bits: a bit-width must lie in 2..8 bits; found 9"),
        (["pack=nested", "pack.bits=four"], "pack.bits is a bit-width or an allocation's file"),
        (["pack=nested", "pack.bits=nowhere.yaml"], "There is no allocation at nowhere.yaml"),
        (["pack=nested", "pack.max_bits=1"], "pack.max_bits: a bit-width must lie in 2..8 bits; found 1"),
        (["pack=nested", "pack.bits=4", "pack.max_bits=3"], "4 bits need more planes than are written"),
        (["pack=nested", "pack.prefill_bits=4", "pack.max_bits=3"], "4 bits need more planes than are written"),
        (["pack=nested", "pack.shard_gb=0"], "pack.shard_gb must be more than 0"),
        (
            ["pack=nested", "method=gptq", "bits=[2,3]"],
            "makes 2 models, one for each bit-width, and a folder holds one",
        ),
        (["pack=matgptq_v1"], "that are cut by msb"),
        (["pack=zip"], "matgptq_v1"),
        (["stages=[generate]"], "stages=[generate] needs a prompt"),
        (["stages=[generate]", "prompt=x", "method=gptq", "bits=[2,3]"], "and 2 models"),
        (["stages=[generate]", "prompt=x", "max_new_tokens=5000"], "with max_new_tokens=5000 that is longer than the"),
    ],
)
def test_what_is_refused(matquant: Any, small_model: Path, tmp_path: Path, overrides: list[str], sentence: str) -> None:
    status, _, err = matquant(
        f"model.path={small_model}", *SMALL, "method.group_size=64", "stages=[quantize]", *overrides
    )
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "store").exists()  # before any work


def test_a_prompt_goes_on_at_every_width_as_the_packed_model_does(job: Any, tmp_path: Path) -> None:
    from packing import read

    stages = ("stages=[quantize,pack,generate]", "pack=nested", "bits=[2,8]")
    results = job(*stages, "prompt='def f('", "max_new_tokens=6", "runtime.device=cpu")
    model = read(tmp_path / "run" / "packed")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "packed")
    prompt = tokenizer("def f(", return_tensors="pt")
    found = results["generate"]["slices"]
    assert [row["bytes"] for row in found] == [entry["bytes"] for entry in results["slices"]]
    for row in found:
        model.set_bits(int(row["name"]))
        tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0]
        assert row["text"] == tokenizer.decode(tokens[prompt.input_ids.shape[1] :], skip_special_tokens=True)
        assert row["tokens_per_second"] > 0

"""``pack=gguf`` on the command line, and its files as ``model.path``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from matquant.data.config import TextConfig
from matquant.data.texts import windows
from matquant.store import Store

pytestmark = pytest.mark.slow

QUICK = (*SMALL, "method=rtn", "method.per_bit_models=false", "method.slicing=msb", "method.zero_point_offset=8")


@pytest.fixture
def job(matquant: Any, tmp_path: Path) -> Any:
    def run(model: Path, *overrides: str) -> dict[str, Any]:
        status, _, err = matquant(f"model.path={model}", *QUICK, *overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())

    return run


@torch.no_grad()
def divergence(exact: Any, other: Any, ids: torch.Tensor) -> float:
    """Mean KL over the tokens of all windows that predict a token."""
    p, q = (model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for model in (exact, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("group_size", [32, 64])
def test_a_file_evaluates_to_its_slice(job: Any, small_model: Path, tmp_path: Path, group_size: int) -> None:
    group = f"method.group_size={group_size}"
    first = job(small_model, group, "bits=4", "pack=gguf", "pack.dense_type=F32")
    assert first["pack"]["types"] == {"F32": 10, "Q4_0": 28}
    assert (first["pack"]["exact"], first["pack"]["error"], first["pack"]["dense_error"]) == (True, None, 0)
    assert "kl" not in first["pack"]
    folder = tmp_path / "run" / "packed"
    file = folder / first["pack"]["file"]
    assert "library_name: gguf" in (folder / "README.md").read_text()
    (row,) = first["slices"]
    text = TextConfig(dataset="stdlib", sequences=4, sequence_length=64, seed=None)
    ids = windows(text, "evaluation", AutoTokenizer.from_pretrained(small_model), Store(tmp_path / "store"))
    original = AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    assert divergence(original, again, ids) == pytest.approx(row["kl"]["stdlib"], rel=1e-3)
    second = job(file, group, "bits=4", "pack=gguf", f"pack.path={tmp_path}/second")
    assert second["baseline"]["perplexity"]["stdlib"] == pytest.approx(row["perplexity"]["stdlib"], rel=1e-5)


def test_the_vocabulary_of_a_file_comes_from_the_file_it_was_made_of(
    job: Any, small_model: Path, tmp_path: Path
) -> None:
    import gguf

    job(
        small_model,
        "method.group_size=64",
        "bits=4",
        "pack=gguf",
        f"pack.path={tmp_path}/first",
        "stages=[quantize,pack]",
    )
    (first,) = (tmp_path / "first").glob("*.gguf")
    job(first, "method.group_size=64", "bits=3", "pack=gguf", f"pack.path={tmp_path}/second", "stages=[quantize,pack]")
    (second,) = (tmp_path / "second").glob("*.gguf")
    fields = [gguf.GGUFReader(file).fields for file in (first, second)]
    keys = [{key for key in found if key.startswith("tokenizer.")} for found in fields]
    assert keys[0] == keys[1]
    assert len(keys[0]) >= 8
    for key in keys[0]:
        assert fields[0][key].contents() == fields[1][key].contents(), key


def test_packed_weights_that_differ_from_the_slice_are_evaluated(job: Any, small_model: Path) -> None:
    results = job(
        small_model, "method.group_size=64", "bits=8", "pack=gguf", "pack.stored_bits=4", "pack.rounding=nearest"
    )
    packed, (row,) = results["pack"], results["slices"]
    assert packed["exact"] is False
    assert 0.01 < packed["error"]["mean"] < 0.2
    assert packed["kl"]["stdlib"] > 10 * row["kl"]["stdlib"]
    near = job(
        small_model, "method.group_size=64", "bits=8", "pack=gguf", "pack.rounding=nearest", "pack.overwrite=true"
    )
    assert near["pack"]["kl"]["stdlib"] < 0.1 * packed["kl"]["stdlib"]
    assert near["pack"]["perplexity"]["stdlib"] == pytest.approx(row["perplexity"]["stdlib"], rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["pack.bits=8"], "the 8-bit slice of model.layers.0.self_attn.q_proj"),
        (["bits=7"], "the 7-bit slice of model.layers.0.self_attn.q_proj"),
        (["bits=[3,4]"], "the 8-bit slice of model.layers.0.self_attn.q_proj"),
        (["pack.shard_gb=1"], "pack.shard_gb has no meaning"),
        (["pack.prefill_bits=2"], "pack.prefill_bits has no meaning"),
    ],
)
def test_what_is_refused_before_any_work(
    matquant: Any, small_model: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    arguments = (f"model.path={small_model}", *QUICK, "method.group_size=64", "stages=[pack]", "pack=gguf")
    status, _, err = matquant(*arguments, *overrides)
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "store").exists()

"""Linear layers that stay in full precision: their weight is read by other modules, or shared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from packing import logits, read
from shared import SMALL
from torch import Tensor, nn
from torch.nn import functional as F

from matquant.inference import nested_layers
from matquant.models.blocks import BlockModel
from matquant.models.fixed_layers import READ_ELSEWHERE, SHARED, fixed_layers, unsplit_notes

CPU = torch.device("cpu")


def fixed_in(model: Any, **settings: Any) -> dict[str, str]:
    return fixed_layers(BlockModel(model), CPU, torch.float32, **settings)


def llama_with_mlp(forward: Callable[[Any, Tensor], Tensor]) -> Any:
    """Llama whose second block's MLP computes its output from the usual inner values by this function."""
    model = make_model("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: forward(mlp, mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    mlp.register_parameter("own", nn.Parameter(torch.zeros(1)))  # so that the blocks are of two kinds
    return model


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (lambda mlp, x: mlp.down_proj(x), []),
        (lambda mlp, x: mlp.down_proj(x.to(mlp.down_proj.weight.dtype, copy=True).to(mlp.down_proj.weight.device)), []),
        (lambda mlp, x: mlp.down_proj(x[..., : mlp.down_proj.weight.shape[1]]), []),
        (lambda mlp, x: F.linear(x, mlp.down_proj.weight), [DOWN]),
        (lambda mlp, x: x @ mlp.down_proj.weight.t(), [DOWN]),
        (lambda mlp, x: mlp.down_proj(x / mlp.down_proj.weight.abs().max()), [DOWN]),
        (lambda mlp, x: torch.einsum("oi,bti->bto", mlp.down_proj._parameters["weight"], x), [DOWN]),
    ],
)
def test_layers_whose_values_are_read_are_found(forward: Any, names: list[str]) -> None:
    assert fixed_in(llama_with_mlp(forward)) == dict.fromkeys(names, READ_ELSEWHERE)


def test_layers_that_share_a_weight_are_found() -> None:
    model = make_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    second.self_attn.k_proj.weight = second.self_attn.v_proj.weight
    names = [f"model.layers.{name}_proj" for name in ("0.mlp.up", "1.self_attn.k", "1.self_attn.v", "1.mlp.up")]
    assert fixed_in(model) == dict.fromkeys(names, SHARED)


def test_a_head_that_is_read() -> None:
    model = make_model("llama")
    head = model.lm_head

    def subtract(_: nn.Module, __: Any, output: Any) -> None:
        output.logits = output.logits - head.weight.mean()

    model.register_forward_hook(subtract)
    assert fixed_in(model) == {}
    assert fixed_in(model, lm_head=True) == {"lm_head": READ_ELSEWHERE}


def own_experts(count: int) -> Any:
    """Llama with own experts in its second block: one tensor of three dimensions, no linear layers."""
    model = make_model("llama")
    model.model.layers[1].mlp.register_parameter("experts", nn.Parameter(torch.zeros(count, 64, 64)))
    return model


@pytest.mark.parametrize(
    ("model", "sentences"),
    [
        (lambda: make_model("llama4_text"), ["67% of the parameters in the blocks of Llama4ForCausalLM are no linear"]),
        (lambda: make_model("dbrx"), ["80% of the parameters in the blocks of DbrxForCausalLM are no linear"]),
        (lambda: own_experts(16), ["57% of the parameters in the blocks of LlamaForCausalLM are no linear"]),
        (lambda: own_experts(1), []),
        (lambda: make_model("mixtral"), []),
        (lambda: make_model("mamba"), []),
    ],
    ids=["llama4", "dbrx", "own", "small", "mixtral", "mamba"],
)
def test_a_large_share_of_other_matrices_is_said(model: Callable[[], Any], sentences: list[str]) -> None:
    notes = unsplit_notes(BlockModel(model()))
    assert len(notes) == len(sentences)
    assert all(note.startswith(sentence) for note, sentence in zip(notes, sentences, strict=True))


@pytest.mark.parametrize(("kind", "count", "shown"), [("mamba", 2, "mixer.dt_proj"), ("zamba", 14, "shared_transf")])
@pytest.mark.slow
def test_a_job_leaves_them_alone_and_says_so(kind: str, count: int, shown: str, matquant: Any, tmp_path: Path) -> None:
    folder = save(make_model(kind), tmp_path / "model")
    stages = "stages=[quantize,evaluate,pack,generate]"
    job = (*SMALL, "method=rtn", "method.per_bit_models=false", "method.group_size=32", "bits=[2,8]", stages)
    status, _, err = matquant(*job, "pack=nested", "prompt=def", "max_new_tokens=4", f"model.path={folder}")
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (warning,) = [one for one in results["warnings"] if "stay in full precision, each since" in one]
    assert warning.startswith(f"{count} linear layers")
    assert shown in warning
    assert any(shown in row["name"] and row["reason"] in (READ_ELSEWHERE, SHARED) for row in results["unquantized"])
    assert 0 < results["slices"][1]["kl"]["stdlib"] < results["slices"][0]["kl"]["stdlib"]
    model = read(tmp_path / "run" / "packed")
    assert not any(shown in name for name in nested_layers(model))
    assert torch.isfinite(logits(model)).all()

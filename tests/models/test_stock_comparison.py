"""Equality of what is read here with what ``from_pretrained`` loads: computed tensors, stored tensors, logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from own_model import save_own_model
from shared import SMALL
from small_configs import VOCABULARY
from transformers import AutoModelForCausalLM

from matquant.errors import UserError
from matquant.models import loading
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig
from matquant.models.loading import open_model
from matquant.models.stock_comparison import check_against_stock
from matquant.models.tensor_swap import named_tensors, set_tensor

# Rotary frequencies of several kinds, multipliers set by a parent module, masks, biases of experts.
KINDS = ("llama", "falcon_h1", "gemma3", "gemma4_text", "gpt2", "gpt_oss", "deepseek_v3", "mamba2", "zamba2", "bert")


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def config(folder: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), trust_remote_code=True, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_and_the_logits_are_those_of_a_stock_load(kind: str, dtype: str, tmp_path: Path) -> None:
    folder = save(make_model(kind), tmp_path / "model")
    opened = open_model(config(folder, dtype=dtype))
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    expected = dict(named_tensors(stock))
    computed = {name: tensor for name, tensor in named_tensors(opened.model) if not tensor.is_meta}
    assert {name for name, _ in named_tensors(opened.model)} == expected.keys()
    for name, tensor in computed.items():
        assert (name, tensor.dtype) == (name, expected[name].dtype)
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)
    for name, tensor in opened.checkpoint.read(expected.keys() - computed.keys()):
        assert torch.equal(tensor, expected[name]), name
    assert check_against_stock(opened, BlockModel(opened.model, opened.checkpoint))


def test_tensors_that_the_model_computes_for_modules_far_below(tmp_path: Path) -> None:
    body = """
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("own", torch.zeros(1), persistent=False)
        for layer in self.model.layers:
            layer.mlp.down_proj.register_buffer("factor", torch.empty(3), persistent=False)

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, OwnModel):
            self.own.zero_()
            for index, layer in enumerate(module.model.layers):
                layer.mlp.down_proj.factor.copy_(torch.tensor([index, 7.0, float("nan")]))
"""
    opened = open_model(config(save_own_model(tmp_path / "model", "far", body)))
    for index in (0, 1):
        factor = opened.model.get_buffer(f"model.layers.{index}.mlp.down_proj.factor")
        torch.testing.assert_close(factor, torch.tensor([index, 7.0, torch.nan]), equal_nan=True)


def test_a_tensor_that_nothing_computes_is_named(tmp_path: Path) -> None:
    body = """
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("scale", torch.ones(4), persistent=False)

    def _init_weights(self, module):
        super()._init_weights(module)
        if module is self:
            self.scale[:3] = 1.0
"""
    with pytest.raises(UserError, match="OwnModel gives no values to scale, .* whatever is in memory"):
        open_model(config(save_own_model(tmp_path / "model", "unset", body)))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.rotary_emb.inv_freq", "the values of model.rotary_emb.inv_freq"),
        ("model.layers.0.self_attn.sinks", "the values of model.layers.0.self_attn.sinks"),
        ("model.layers.1.mlp.experts.down_proj", "the logits"),  # split into a layer for each expert
    ],
)
@pytest.mark.slow
def test_a_job_stops_at_a_tensor_that_differs(
    name: str, what: str, matquant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(make_model("gpt_oss", vocab_size=VOCABULARY), tmp_path / "model")
    compute = loading.compute_tensors

    def wrong(model: Any, checkpoint: Any) -> None:
        compute(model, checkpoint)
        set_tensor(model, name, torch.zeros_like(model.get_parameter_or_buffer(name), device="cpu"))

    monkeypatch.setattr(loading, "compute_tensors", wrong)
    status, _, err = matquant(*SMALL, "method=rtn", "method.group_size=32", f"model.path={folder}")
    assert status == 2
    assert f"differs from what Transformers loads in {what}, so its results would be wrong" in err
    assert not (tmp_path / "store" / "parent").exists()


def test_a_model_that_from_pretrained_changes_afterwards_is_refused(tmp_path: Path) -> None:
    body = """
    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        found = super().from_pretrained(folder, *args, **kwargs)
        if folder is not None:
            found.model.norm.variance_epsilon = 10.0
        return found
"""
    opened = open_model(config(save_own_model(tmp_path / "model", "changed", body)))
    with pytest.raises(UserError, match="differs from what Transformers loads in the logits"):
        check_against_stock(opened, BlockModel(opened.model, opened.checkpoint))


def test_a_large_model_is_not_loaded_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_model(config(save(make_model("llama"), tmp_path / "model")))
    monkeypatch.setattr("matquant.machine.host_free", lambda: 100_000)
    assert not check_against_stock(opened, BlockModel(opened.model, opened.checkpoint))

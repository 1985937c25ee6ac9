"""Experts of Transformers models that are computed together, on the CPU, against the same model an expert at a time."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make_model, save
from nesting import nest
from packing import Opened
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant.errors import UserError
from matquant.inference import NestedLinear, NestedPlanes, expert_reference, experts, nested_layers, set_bits
from matquant.inference.experts import PerExpertLinears

IDS = torch.tensor([[17, 101, 5, 120, 44, 9], [3, 3, 90, 41, 7, 66]])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def products(monkeypatch) -> list[list[int]]:
    """Bit-widths of the grouped products so far, on a CPU that is taken for a device with kernels."""
    found: list[list[int]] = []
    grouped_linear = expert_reference.grouped_linear

    def counted(call: Any) -> Tensor:
        found.append(list(call.bits))
        return grouped_linear(call)

    monkeypatch.setattr(expert_reference, "grouped_linear", counted)
    monkeypatch.setattr(experts, "uses_kernels", lambda x: True)
    return found


@pytest.fixture
def one_at_a_time(monkeypatch) -> Callable[..., Tensor]:
    """Function that calls a model an expert at a time."""

    @torch.no_grad()
    def call(model: Any, *args: Any, **kwargs: Any) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(experts, "uses_kernels", lambda x: False)
            return model(*args, **kwargs).logits

    return call


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def near(found: Tensor, expected: Tensor) -> bool:
    """True up to differences in the order of sums."""
    return bool((found.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max())


def mixed_widths(model: Any) -> dict[str, int]:
    return {name: 2 + i % 7 for i, name in enumerate(nested_layers(model))}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_logits_are_those_of_a_loop(kind, dtype, products, one_at_a_time):
    model = nest(make_model(kind)).to(dtype)
    blocks = sum(isinstance(module, PerExpertLinears) for module in model.modules())
    seen = []
    for widths in (8, 2, mixed_widths(model)):
        set_bits(model, widths)
        products.clear()
        found = logits(model)
        assert len(products) == 2 * blocks
        assert near(found, one_at_a_time(model, IDS))
        seen.append(found)
    assert not near(seen[0], seen[1])  # the test could not fail if all widths were alike
    assert len(set(products[0])) > 1


def test_widths_are_those_of_the_phase(products, one_at_a_time):
    model = nest(make_model("mixtral")).half()
    set_bits(model, 2, prefill=8)
    with torch.no_grad():
        prompt = model(IDS, use_cache=True)
        assert {bits for call in products for bits in call} == {8}
        products.clear()
        cache = copy.deepcopy(prompt.past_key_values)
        decoded = model(IDS[:, :1], past_key_values=prompt.past_key_values).logits
    assert {bits for call in products for bits in call} == {2}
    assert near(decoded, one_at_a_time(model, IDS[:, :1], past_key_values=cache))


def first_experts(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, PerExpertLinears))


def add_hook(model: Any) -> None:
    first_experts(model)[2].down_proj.register_forward_hook(lambda layer, args, out: out + 1)


def add_pre_hook(model: Any) -> None:
    first_experts(model)[0].gate_up_proj.register_forward_pre_hook(lambda layer, args: (2 * args[0],))


def replace_forward(model: Any) -> None:
    layer = first_experts(model)[1].down_proj
    layer.forward = lambda x: NestedLinear.forward(layer, x) + 1


def make_dense(model: Any) -> None:
    layer = first_experts(model)[1].down_proj
    dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float16)
    first_experts(model)[1].down_proj = dense


def keep_fewer_planes(model: Any) -> None:
    layer = first_experts(model)[3].down_proj
    layer.planes = layer.planes[:4].clone()
    layer.set_bits(4)


@pytest.mark.parametrize("change", [add_hook, add_pre_hook, replace_forward, make_dense, keep_fewer_planes])
def test_experts_that_are_no_plain_nested_layers_are_called_one_by_one(change, products, one_at_a_time):
    """Before and after they were computed together once."""
    for stacked_before in (False, True):
        model = nest(make_model("mixtral")).half()
        if stacked_before:
            logits(model)
        change(model)
        products.clear()
        assert near(logits(model), one_at_a_time(model, IDS))
        assert len(products) == 2  # of the other block


def test_experts_with_biases_or_float32_are_called_one_by_one(products):
    for kind, dtype in (("gpt_oss", torch.float16), ("mixtral", torch.float32)):
        logits(nest(make_model(kind)).to(dtype))
        assert not products


def test_many_tokens_are_computed_one_expert_at_a_time(products):
    """More than 64 for an expert on average: 128 tokens of 2 of 4 experts at most."""
    model = nest(make_model("mixtral", max_position_embeddings=256)).half()
    for tokens, calls in ((128, 4), (129, 0)):
        products.clear()
        logits(model, torch.randint(2, 120, (1, tokens)))
        assert len(products) == calls


@pytest.mark.parametrize("tokens", [4, 300])
def test_a_capture_of_what_it_cannot_hold_is_refused(monkeypatch, products, tokens):
    """Experts that have not run yet, and more tokens than are computed together."""
    block = first_experts(nest(make_model("mixtral")).half())
    x, ids, weights = torch.randn(tokens, 64).half(), torch.tensor([[0, 1]] * tokens), torch.ones(tokens, 2).half()
    monkeypatch.setattr(experts, "is_capturing", lambda x: True)
    with pytest.raises(UserError, match="Run the model once" if tokens == 4 else "64 tokens for an expert"):
        block(x, ids, weights)
    assert not products


def test_gradients_flow(products):
    model = nest(make_model("mixtral")).bfloat16()
    experts_of_block = first_experts(model)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    ids, weights = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5, dtype=torch.bfloat16)
    experts_of_block(x, ids, weights).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not products
    experts_of_block(x.detach(), ids, weights)
    assert len(products) == 2


def overwrite(layer: NestedLinear, other: NestedLinear) -> None:
    layer.load_state_dict(other.state_dict())


def assign(layer: NestedLinear, other: NestedLinear) -> None:
    layer.load_state_dict(other.state_dict(), assign=True)


def set_attributes(layer: NestedLinear, other: NestedLinear) -> None:
    layer.planes, layer.scales = other.planes.clone(), other.scales.clone()


@pytest.mark.parametrize("change", [overwrite, assign, set_attributes])
def test_weights_that_were_changed_are_used(change, products, one_at_a_time):
    model, other = nest(make_model("mixtral")).half(), nest(make_model("mixtral", seed=1)).half()
    before = logits(model)
    for index in range(4):
        for name in ("gate_up_proj", "down_proj"):
            change(getattr(first_experts(model)[index], name), getattr(first_experts(other)[index], name))
    after = logits(model)
    assert len(products) == 8
    assert near(after, one_at_a_time(model, IDS))
    assert not near(after, before)


def test_the_device_may_change(products):
    """A round trip leaves tensors that stand alone; they are joined again."""
    model = nest(make_model("mixtral")).half()
    before = logits(model)
    layer = first_experts(model)[1].down_proj
    for name, tensor in layer._buffers.items():
        layer._buffers[name] = None if tensor is None else tensor.clone()
    assert torch.equal(logits(model), before)
    assert not first_experts(model)[1].down_proj.planes.is_contiguous()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    opened = Opened(save(make_model("mixtral", torch.float16), path / "model"), path / "store", scale_shares={2: 1.1})
    return opened.pack(path / "packed", widths=3)


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)


def test_stacked_models_are_saved(folder, tmp_path, products):
    model = read(folder)
    expected = logits(model)
    assert products
    model.save_pretrained(tmp_path / "saved")
    again = read(tmp_path / "saved")
    for bits in (3, 2):
        again.set_bits(bits)
        model.set_bits(bits)
        assert torch.equal(logits(again), logits(model))
    model.set_bits(3)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_stacked_models_are_copied(folder, way, products):
    model = read(folder)
    expected, size = logits(model), len(pickle.dumps(read(folder)))
    found = way(model)
    assert torch.equal(logits(found), expected)
    assert len(pickle.dumps(model)) < 1.1 * size
    for layer in nested_layers(found).values():
        layer.planes.zero_()
    assert torch.equal(logits(model), expected)  # nothing is shared
    stream = io.BytesIO()
    torch.save(model, stream)
    assert stream.tell() < 1.2 * size


def test_stacking_moves_the_tensors_and_keeps_nothing_else(products):
    model = nest(make_model("mixtral")).half()
    layers = [one for name, one in nested_layers(model).items() if ".experts." in name]
    before = [one.nested_planes().dequantize(5) for one in layers]
    with torch.inference_mode():
        model(IDS)
    storages = {one.planes.untyped_storage().data_ptr(): one.planes.untyped_storage().nbytes() for one in layers}
    assert len(storages) == 4  # two layers in each of two blocks
    assert sum(storages.values()) == sum(one.planes.nbytes for one in layers)
    for one, dense in zip(layers, before, strict=True):
        assert torch.equal(one.nested_planes().dequantize(5), dense)
        assert isinstance(one.nested_planes(), NestedPlanes)
        assert not one.planes.is_inference()

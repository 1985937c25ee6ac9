"""Nested layers, and models of them: the same tokens as with dense weights, at every bit-width and while it changes."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import TINY
from torch import nn
from weights import make_weight, rounded_weight

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.parent import Parent, block_file, write_block
from matquant.inference import NestedLinear, NestedPlanes, nested_layers, replace_linears, set_bits
from matquant.store import Store

LAYER = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread: the matrices are so small that synchronization would dominate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_layer(rows=70, columns=96, **options) -> tuple[NestedLinear, NestedWeight, torch.Tensor]:
    weight = make_weight(rows, columns, 32, **options)
    bias = torch.randn(rows, generator=torch.Generator().manual_seed(3))
    return NestedLinear.from_planes(weight, bias), weight, bias


def inputs(*shape) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def assert_output(layer, weight, bias, x, bits, call_bits=None):
    torch.testing.assert_close(
        layer(x, bits=call_bits), nn.functional.linear(x, weight.dequantize(bits), bias), rtol=1e-5, atol=1e-4
    )


# The layer


def test_the_weight_is_served_to_code_that_reads_it():
    layer, weight, bias = make_layer()
    layer.bits = 3
    dense, x = weight.dequantize(3), inputs(4, 96)
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == (dense.shape, torch.float16, "cpu")
    layer.float()
    assert layer.weight.dtype == torch.float32
    assert layer.scales.dtype == torch.float16
    assert torch.equal(layer.weight + 0, dense)
    assert torch.equal(nn.functional.linear(x, layer.weight, bias), nn.functional.linear(x, dense, bias))
    assert torch.equal(layer.weight[2:5].t() @ x.new_ones(3), dense[2:5].t() @ x.new_ones(3))
    assert type(layer.weight.clone()) is torch.Tensor
    layer.bits = 8
    assert torch.equal(layer.weight + 0, weight.dequantize(8))
    assert layer.bfloat16().weight.dtype == torch.bfloat16
    assert layer.to("meta").weight.is_meta


def test_metadata_of_the_weight_cost_no_dequantization(monkeypatch):
    layer, _, _ = make_layer()
    monkeypatch.setattr("matquant.inference.ops.dequantize", None)
    weight = layer.weight
    assert weight.numel() * weight.element_size() == 70 * 96 * 2
    assert (weight.size(1), weight.dim(), weight.is_cuda, weight.requires_grad) == (96, 2, False, False)
    assert "[70, 96]" in repr(weight)


@pytest.mark.parametrize("change", [lambda w: w.mul_(2), nn.init.zeros_, lambda w: torch.add(w, w, out=w)])
def test_the_weight_cannot_be_changed(change):
    layer, weight, _ = make_layer()
    with pytest.raises(UserError, match="weight of a nested layer cannot be changed"), torch.no_grad():
        change(layer.weight)
    assert torch.equal(layer.float().weight + 0, weight.dequantize(8))


def test_code_that_reads_the_weight_compiles():
    layer, weight, _ = make_layer()
    layer.float()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def read(x):
        return layer(x.to(layer.weight.dtype)) + x @ layer.weight.t()

    x = inputs(4, 96)
    torch.testing.assert_close(read(x), layer(x) + x @ weight.dequantize(8).t(), rtol=1e-4, atol=1e-4)


def test_bits_change_without_moving_data():
    layer, weight, bias = make_layer()
    addresses = [t.data_ptr() for t in (layer.planes, layer.scales)]
    assert layer.bits == layer.max_bits == 8
    x = inputs(3, 96)
    for bits in (8, 2, 5, 3, 7):
        layer.bits = bits
        assert_output(layer, weight, bias, x, bits)
        assert_output(layer, weight, bias, x, 4, call_bits=4)
        assert layer.bits == bits
    assert addresses == [t.data_ptr() for t in (layer.planes, layer.scales)]


class LayerInModel(nn.Module):
    """Model that passes hidden states of any shape to one layer."""

    def __init__(self, layer: NestedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden)


@pytest.mark.parametrize(("tokens", "bits"), [((1, 7), 6), ((4, 3), 6), ((4, 1), 2), ((1, 1), 2)])
def test_call_of_the_model_decides_between_prefill_and_decoding(tokens, bits):
    layer, weight, bias = make_layer()
    model = LayerInModel(layer)
    set_bits(model, 2, prefill=6)
    assert (layer.bits, layer.decode_bits, layer.prefill_bits) == (2, 2, 6)
    for shape in [(4, 3, 96), (4, 1, 96), (1, 96), (7, 96), (96,)]:
        expected = nn.functional.linear(inputs(*shape), weight.dequantize(bits), bias)
        found = model(torch.zeros(tokens, dtype=torch.int64), inputs(*shape))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    layer.bits = 3
    assert_output(layer, weight, bias, inputs(4, 3, 96), 3)


def test_unavailable_bits_raise_and_change_nothing():
    layer = NestedLinear.from_planes(NestedPlanes.pack(make_weight(70, 96, 32), max_bits=4), bits=3)
    for wrong in (5, 9, 1, 2.0):
        with pytest.raises(UserError, match="cannot be read|must be a whole number"):
            layer.bits = wrong
    with pytest.raises(UserError, match="5 bits cannot be read"):
        layer.set_bits(2, prefill=5)
    assert (layer.decode_bits, layer.prefill_bits) == (3, 3)
    with pytest.raises(UserError, match="5 bits cannot be read"):
        layer(inputs(1, 96), bits=5)
    with pytest.raises(UserError, match=r"A bias for 70 output features .* found \[71\]"):
        NestedLinear.from_planes(make_weight(70, 96, 32), torch.zeros(71))


@pytest.mark.parametrize("zeros", [False, True])
def test_state_dict_round_trip_in_safetensors(tmp_path, zeros):
    layer, weight, bias = make_layer(slicing="round", zeros=zeros)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = NestedLinear(
        96,
        70,
        bias=True,
        device="meta",
        format=WeightFormat(
            group_size=32, slicing="round", zero_point_offset=layer.format.zero_point_offset, has_zero_points=zeros
        ),
    )
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert_output(other, weight, bias, inputs(2, 96), 3, call_bits=3)


@pytest.mark.parametrize("other", [{"slicing": "round"}, {"zero_point_offset": 4.0}, {"stretch": 1.25}])
def test_state_dict_of_another_format_raises(other):
    layer, _, _ = make_layer()
    fmt = WeightFormat(**{"group_size": 32, "slicing": "msb", "zero_point_offset": 8.0} | other)
    with pytest.raises(UserError, match="The state dict belongs to another layer"):
        NestedLinear(96, 70, format=fmt, bias=True).load_state_dict(layer.state_dict())


def test_change_of_dtype_keeps_the_weights():
    layer, _, _ = make_layer()
    scales = layer.scales.clone()
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.scales, scales)
    x = inputs(3, 96).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert layer.to("meta").scales.is_meta


def test_copy_has_bits_of_its_own():
    layer, weight, bias = make_layer()
    other = copy.deepcopy(layer)
    other.bits = 2
    assert layer.bits == 8
    assert_output(other, weight, bias, inputs(2, 96), 2)


def test_repr_and_bytes_read():
    layer = NestedLinear.from_planes(NestedPlanes.pack(make_weight(70, 96, 32), max_bits=4))
    layer.set_bits(2, prefill=4)
    assert "96, 70, bits=2, prefill_bits=4, master_bits=8, planes=4" in repr(layer)
    assert layer.bytes_read() == layer.bytes_read(2) < layer.bytes_read(4)


@pytest.mark.slow
def test_compiled_layer_follows_its_bits():
    """Inductor compiles the whole layer into one graph."""
    layer, weight, bias = make_layer()
    compiled = torch.compile(layer, fullgraph=True)
    for bits in (2, 8, 2, 3):
        layer.bits = bits
        assert_output(compiled, weight, bias, inputs(2, 3, 96), bits)


# Whole models


def load_model(folder) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def make_parent(model, folder) -> Parent:
    """Parent with all linear layers of the blocks but one."""

    def build(draft):
        blocks = []
        for index, block in enumerate(model.model.layers):
            linears = {f"model.layers.{index}.{n}": m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            linears.pop("model.layers.1.self_attn.k_proj", None)
            record = {
                "layers": {n: {"shape": list(m.weight.shape), "errors": {}} for n, m in linears.items()},
                "notes": [],
            }
            write_block(draft, block_file(index), {n: rounded_weight(m.weight) for n, m in linears.items()}, record)
            blocks.append(record | {"file": block_file(index)})
        return {"label": "rounded", "blocks": blocks}

    return Parent(Store(folder).open_or_build("parent", {}, build))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Shipped model with nested layers, the same with dense layers, and the parent."""
    dense = load_model(TINY)
    parent = make_parent(load_model(TINY), tmp_path_factory.mktemp("parent"))
    nested = load_model(TINY)
    replace_linears(nested, parent)
    return nested, dense, parent


@torch.no_grad()
def fill(dense, parent, bits):
    """Copy dequantized weights of the parent into the dense model; ``bits`` is one number, or one for each layer."""
    for index in range(len(parent.blocks)):
        for name, weight in parent.block(index).items():
            value = bits[name] if isinstance(bits, dict) else bits
            dense.get_submodule(name).weight.copy_(weight.dequantize(value))


@torch.no_grad()
def generate(model, prompt, before_step, steps=10):
    """Greedy tokens with a KV cache; ``before_step`` is called with the number of each step."""
    tokens, cache, step_input = [], None, prompt
    for step in range(steps):
        before_step(step)
        out = model(input_ids=step_input, past_key_values=cache, use_cache=True)
        cache, step_input = out.past_key_values, out.logits[:, -1:].argmax(-1)
        tokens.append(step_input.item())
    return tokens


PROMPT = torch.tensor([[17, 301, 5, 1200, 44, 9, 820, 33]])


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
def test_tokens_equal_those_of_dense_weights(tiny, bits):
    nested, dense, parent = tiny
    assert set(set_bits(nested, bits).values()) == {bits}
    fill(dense, parent, bits)
    # The loop of Transformers also passes masks, positions and a cache.
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert nested.generate(PROMPT, **settings).tolist() == dense.generate(PROMPT, **settings).tolist()


@pytest.mark.slow
def test_bits_change_between_tokens(tiny):
    nested, dense, parent = tiny
    order = [4, 2, 8, 3, 6, 5, 7, 2, 4, 8]
    found = generate(nested, PROMPT, lambda step: set_bits(nested, order[step]))
    assert found == generate(dense, PROMPT, lambda step: fill(dense, parent, order[step]))
    # The test could not fail if all bit-widths gave the same tokens.
    assert generate(nested, PROMPT, lambda _: set_bits(nested, 2), steps=5) != found[:5]


def test_prefill_at_8_bits_and_decoding_at_2(tiny):
    nested, dense, parent = tiny
    set_bits(nested, 2, prefill=8)
    found = generate(nested, PROMPT, lambda step: None)
    assert found == generate(dense, PROMPT, lambda step: fill(dense, parent, 2 if step else 8))


def test_bits_by_layer(tiny, tmp_path):
    nested, dense, parent = tiny
    names = list(nested_layers(nested))
    allocation = {name: 2 + i % 7 for i, name in enumerate(names)}
    assert set_bits(nested, allocation) == allocation
    fill(dense, parent, allocation)
    assert generate(nested, PROMPT, lambda _: None) == generate(dense, PROMPT, lambda _: None)
    set_bits(nested, 8)
    file = tmp_path / "allocation.txt"
    file.write_text("".join(f"{name}: {bits}\n" for name, bits in allocation.items()))
    assert set_bits(nested, file) == allocation
    assert set_bits(nested, {names[0]: 8}) == allocation | {names[0]: 8}


@pytest.mark.slow
@torch.no_grad()
def test_compiled_model_follows_its_bits(small_model, tmp_path):
    parent = make_parent(load_model(small_model), tmp_path)
    nested, dense = load_model(small_model), load_model(small_model)
    replace_linears(nested, parent)
    # aot_eager: the test concerns the traced graph, not the generated code.
    forward = torch.compile(
        lambda ids: nested(input_ids=ids, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    ids = PROMPT
    for bits in (3, 8, 2, 3):
        set_bits(nested, bits)
        fill(dense, parent, bits)
        logits = forward(ids)
        expected = dense(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_only_layers_of_the_parent_are_replaced(tiny):
    nested, _, parent = tiny
    names = {name for block in parent.blocks for name in block["layers"]}
    assert set(nested_layers(nested)) == names
    kept = nested.get_submodule("model.layers.1.self_attn.k_proj")
    assert type(kept) is nn.Linear
    assert type(nested.lm_head) is nn.Linear


def test_replace_linears_from_a_folder_with_fewer_planes(tiny):
    _, dense, parent = tiny
    model = load_model(TINY)
    layers = replace_linears(model, parent.artifact.path, max_bits=3)
    assert {layer.max_bits for layer in layers.values()} == {layer.bits for layer in layers.values()} == {3}
    assert {layer.planes.shape[0] for layer in layers.values()} == {3}
    fill(dense, parent, 3)
    assert generate(model, PROMPT, lambda _: None) == generate(dense, PROMPT, lambda _: None)
    with pytest.raises(UserError, match="model.layers.0.self_attn.q_proj: 4 bits cannot be read"):
        set_bits(model, 4)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"model.layers.0.mlp.down": 4}, "The name closest to model.layers.0.mlp.down is model.layers.0.mlp.down_proj"),
        ({f"lm_head{i}": 4 for i in range(5)} | {LAYER: 4}, "5 of 6 layers that are no nested layers.* and 2 more"),
        ({LAYER: 9}, f"bits of {LAYER}: a bit-width must be a whole number in 2..8; found 9"),
        (11, r"bits: a bit-width must be a whole number in 2..8; found 11"),
        ("4", "found '4'"),
    ],
)
def test_invalid_bits_raise_and_change_nothing(tiny, bits, message):
    nested = tiny[0]
    before = set_bits(nested, 5)
    with pytest.raises(UserError, match=message):
        set_bits(nested, bits)
    assert {name: layer.bits for name, layer in nested_layers(nested).items()} == before
    with pytest.raises(UserError, match="Call replace_linears first"):
        set_bits(nn.Linear(2, 2), 4)


def test_parent_of_another_model_raises_and_changes_nothing(tiny, small_model, tmp_path):
    parent = tiny[2]
    other = load_model(small_model)
    with pytest.raises(UserError, match=r"is \(\d+, \d+\) in the model and \(\d+, \d+\) in the parent"):
        replace_linears(other, parent)
    assert not nested_layers(other)
    with pytest.raises(UserError, match="this model has no layer of that name"):
        replace_linears(nn.Sequential(nn.Linear(2, 2)), parent)
    with pytest.raises(UserError, match="is a NestedLinear, not a linear layer"):
        replace_linears(tiny[0], parent)
    with pytest.raises(UserError, match=f"{tmp_path} is no parent"):
        replace_linears(other, tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"kind": "parent"}))
    with pytest.raises(UserError, match=f"{tmp_path} is no parent"):
        replace_linears(other, str(tmp_path))

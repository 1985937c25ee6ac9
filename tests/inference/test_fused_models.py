"""Fused layers that are hooked, moved, replaced, copied or saved, and whole models with fused layers."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from architectures import make_model, save
from fused_attention import COLUMNS, SEPARATE, TOGETHER, assert_near, calls, expected, make_attention
from nesting import nest
from packing import IDS, Opened, logits, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from matquant.inference import NestedLinear, nested_layers, set_bits
from matquant.inference.fused_layers import FusedLayers
from matquant.inference.model_surgery import fuse_layers


def test_hooks_on_one_layer_see_its_call(launches):
    attention, weights = make_attention()
    x, seen = torch.randn(2, COLUMNS), []
    wanted = expected(attention, x, weights, (8, 8, 8))
    attention.k_proj.register_forward_hook(lambda module, args, y: seen.append((args[0], y)) or y * 2)
    attention.v_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert_near(attention(x), [wanted[0], 2 * wanted[1], expected(attention, 2 * x, weights, (8, 8, 8))[2]])
    assert seen[0][0] is x
    assert_near([seen[0][1]], [wanted[1]])


def test_hooks_of_accelerate_keep_the_outputs(launches):
    hooks = pytest.importorskip("accelerate.hooks")
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    wanted = expected(attention, x, weights, (8, 8, 8))
    hooks.add_hook_to_module(attention.k_proj, hooks.AlignDevicesHook("cpu", io_same_device=True))
    assert_near(attention(x), wanted)
    assert launches == TOGETHER
    hooks.add_hook_to_module(attention.v_proj, hooks.AlignDevicesHook("cpu", offload=True, offload_buffers=True))
    for _ in range(2):
        assert_near(attention(x), wanted)


def test_a_layer_with_other_tensors_is_separate_and_a_move_fuses_again(launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    attention.k_proj._buffers["planes"] = attention.k_proj.planes.clone()
    attention(x)
    assert calls(attention, x, launches) == SEPARATE
    attention.to(torch.device("cpu"))
    attention(x)
    assert calls(attention, x, launches) == TOGETHER
    for change in (lambda: attention.float(), lambda: attention.double().float(), lambda: attention.k_proj.to("cpu")):
        change()
        assert calls(attention, x, launches) == TOGETHER
        assert_near(attention(x), expected(attention, x, weights, (8, 8, 8)))
    attention.k_proj.bias = nn.Parameter(torch.ones(70), requires_grad=False)
    assert_near(attention(x), expected(attention, x, weights, (8, 8, 8)))


def test_layers_that_leave_for_another_device_take_the_memory_along():
    attention, _ = make_attention()
    storage = weakref.ref(attention.q_proj.planes.untyped_storage())
    attention.to("meta")
    assert storage() is None
    assert attention.q_proj.planes.shape[1] == 2
    assert not attention.q_proj.fused.is_packed


@pytest.mark.slow
@pytest.mark.parametrize("replace", [lambda layer: nn.Linear(COLUMNS, 70), lambda layer: copy.copy(layer)])
def test_a_replaced_layer_leaves_the_others_right(replace, launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    wanted = expected(attention, x, weights, (8, 8, 8))
    attention.k_proj = replace(attention.k_proj)
    gc.collect()
    for _ in range(2):
        q, k, v = attention(x)
        assert_near([q, v], [wanted[0], wanted[2]])
        if isinstance(attention.k_proj, NestedLinear):
            assert_near([k], [wanted[1]])
    assert (320, 8) not in launches


class Adapter(nn.Module):
    """Low-rank adapter around a layer, as LoRA adds it."""

    def __init__(self, base: NestedLinear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.down(x)


def test_a_layer_within_an_adapter_stays_fused(launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    wanted = expected(attention, x, weights, (8, 8, 8))
    attention.k_proj = Adapter(attention.k_proj)
    with torch.no_grad():
        assert_near(attention(x), [wanted[0], wanted[1] + attention.k_proj.down(x), wanted[2]])
    assert launches == TOGETHER


def test_state_dict_has_tensors_of_its_own(tmp_path, launches):
    attention, weights = make_attention(zeros=True)
    save_file(attention.state_dict(), tmp_path / "state.safetensors")
    assert (tmp_path / "state.safetensors").stat().st_size < 1.2 * sum(
        t.nbytes for t in attention.state_dict().values()
    )
    other, _ = make_attention(zeros=True)
    for layer in nested_layers(other).values():
        layer.planes.zero_()
        layer.scales.zero_()
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    x = torch.randn(2, COLUMNS)
    assert calls(other, x, launches) == TOGETHER
    assert_near(other(x), expected(attention, x, weights, (8, 8, 8)))
    other.load_state_dict(load_file(tmp_path / "state.safetensors"), assign=True)
    assert_near(other(x), expected(attention, x, weights, (8, 8, 8)))


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_fused_and_hold_the_tensors_once(way, launches):
    attention, weights = make_attention()
    found = way(attention)
    x = torch.randn(2, COLUMNS)
    for one in (found, way(found)):
        assert calls(one, x, launches) == TOGETHER
        assert_near(one(x), expected(attention, x, weights, (8, 8, 8)))
        assert len({layer.planes.untyped_storage().data_ptr() for layer in nested_layers(one).values()}) == 1
        assert one.q_proj.planes.data_ptr() != attention.q_proj.planes.data_ptr()
        one.k_proj.bias.data.fill_(3)
        assert_near(one(x), expected(one, x, weights, (8, 8, 8)))
    assert (attention.k_proj.bias != 3).all()
    assert len(pickle.dumps(attention)) < 1.2 * sum(tensor.nbytes for tensor in attention.state_dict().values())
    layer = way(attention.v_proj)  # alone
    assert_near([layer(x)], [expected(attention, x, weights, (8, 8, 8))[2]])


def test_a_shallow_copy_of_one_layer_is_separate(launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    other = copy.copy(attention.k_proj)
    q, k, v = expected(attention, x, weights, (8, 8, 8))
    assert_near([attention.q_proj(x), other(x), attention.k_proj(x), attention.v_proj(x)], [q, k, k, v])
    assert launches == [*TOGETHER, (70, 8)]


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "qwen2",
        "opt",
        "gpt2",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gemma2", "qwen2_moe", "deepseek_v3", "gpt_oss")),
    ],
)
def test_logits_of_models_are_those_of_separate_layers(kind, launches):
    model = nest(make_model(kind))
    allocation = {name: 2 + index % 3 for index, name in enumerate(nested_layers(model))}
    kept = copy.deepcopy(model)
    fused = fuse_layers(model, ["cpu"])
    for bits in (8, 3, allocation):
        set_bits(model, bits, prefill=4)
        set_bits(kept, bits, prefill=4)
        outputs, counts = [], []
        for one in (model, kept):
            launches.clear()
            with torch.no_grad():
                prompt = one(IDS.expand(2, -1), use_cache=True)
                step = one(torch.tensor([[4], [9]]), past_key_values=prompt.past_key_values).logits
            outputs.append(torch.cat([prompt.logits, step], 1))
            counts.append(len(launches))
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
        saved = 2 * sum(len(one.rows) - 1 for one in fused)
        if isinstance(bits, int):
            assert counts[1] - counts[0] == saved
    assert bool(fused) == (kind != "gpt2")  # which stores q, k and v as one matrix


@pytest.mark.slow
def test_packed_and_replaced_models_are_fused_and_saved(tmp_path, launches):
    opened = Opened(save(make_model("qwen2"), tmp_path / "model"), tmp_path / "store")
    folder = opened.pack(tmp_path / "packed")
    packed, in_memory = read(folder), opened.in_memory()
    wanted = {bits: logits(read(folder, bits=bits)) for bits in (2, 8)}
    for model in (packed, in_memory):
        assert {type(layer.fused) for name, layer in nested_layers(model).items() if "q_proj" in name} == {FusedLayers}
        fuse_layers(model, ["cpu"])
        for bits in (2, 8):
            set_bits(model, bits)
            launches.clear()
            torch.testing.assert_close(logits(model), wanted[bits], rtol=1e-4, atol=1e-4)
            assert len(launches) == 2 * 4  # q+k+v, o, gate+up, down
    packed.set_bits(2)
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(read(tmp_path / "again")), wanted[2])

"""Repeated calls of a layer on the CPU emulator: bound weights, prepared launches, and what makes them invalid."""

import copy
import dataclasses
import gc
import io
import itertools
import threading
import weakref

import pytest
import torch
from emulated_device import activations, assert_close, make_layer
from torch import nn
from weights import make_weight

from matquant.cuda import PreparedLaunch
from matquant.errors import UserError
from matquant.inference import NestedLinear, NestedPlanes, bound_weight, cuda_ops
from matquant.inference.fused_layers import FusedLayers
from tests.kernels.emulator import have_compiler

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")


@pytest.mark.parametrize("device", ["sm_86", "sm_90a"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"zeros": True}, {"scale_bits": (2, 3)}], ids=str)
def test_repeated_calls_of_a_layer_give_the_same_product(emulated, options):
    """The product of 70 tokens is by strips without WGMMA, and with TMA descriptors of the weight with it."""
    layer, weight = make_layer(bias=True, **options)
    for shape, bits in itertools.product([(2,), (5, 4), (70,)], (4, 2)):
        x = activations(*shape, 128)
        layer.bits = bits
        first = layer(x)
        exact = x.double() @ weight.dequantize(bits).double().T + layer.bias.double()
        assert (first.double() - exact).norm() < 2**-10 * exact.norm()
        for _ in range(2):
            assert torch.equal(layer(x), first)


@pytest.mark.parametrize("options", [{}, {"zeros": True, "bias": True}], ids=["plain", "zeros and bias"])
def test_repeated_calls_take_a_prepared_launch_for_some_numbers_of_tokens(emulated, monkeypatch, options):
    """Beyond these numbers the products are the same, by full launches."""
    prepared = []
    launch = PreparedLaunch.launch
    monkeypatch.setattr(
        PreparedLaunch, "launch", lambda self, *arrays: prepared.append(arrays) or launch(self, *arrays)
    )
    layer, weight = make_layer(**options)
    for tokens in range(1, 12):
        x = activations(tokens, 128)
        for call in range(3):
            prepared.clear()
            assert_close(layer(x), x, weight, 4, layer.bias)
            assert len(prepared) == (call > 1 and tokens <= bound_weight._MAX_CALLS)  # after a check, and a plan
            for arrays in prepared:
                assert arrays[0] == x.data_ptr()
                assert arrays[1] == (0 if layer.bias is None else layer.bias.data_ptr())
    assert len(emulated) == 33


def test_a_repeated_call_is_not_checked_again(emulated, monkeypatch):
    layer, _ = make_layer(zeros=True)
    checked = []
    by_key = cuda_ops.linear
    monkeypatch.setattr(cuda_ops, "linear", lambda x, *rest: checked.append(len(x)) or by_key(x, *rest))
    for tokens in (2, 2, 3, 2, 3):
        layer(activations(tokens, 128))
    assert checked == [2, 3]
    make_layer(zeros=True, seed=3)[0](activations(2, 128))  # of the same shape
    assert checked == [2, 3]
    assert len(emulated) == 6


def change_planes(layer, other):
    layer.planes, layer.scales = other.planes, other.scales


def change_in_place(layer, other):
    layer.planes.copy_(other.planes)
    layer.scales.copy_(other.scales)


def change_memory(layer, other):
    layer.planes.data, layer.scales.data = other.planes.clone(), other.scales.clone()


def change_storage(layer, other):
    for one, new in ((layer.planes, other.planes), (layer.scales, other.scales)):
        one.set_(new.clone())


def load(layer, other):
    layer.load_state_dict(NestedLinear.from_planes(other).state_dict())


def load_assigned(layer, other):
    layer.load_state_dict(NestedLinear.from_planes(other).state_dict(), assign=True)


def load_swapped(layer, other):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load(layer, other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def move(layer, other):
    load(layer, other)
    layer.to("meta").to_empty(device="cpu")
    load(layer, other)


CHANGES = [change_planes, change_in_place, change_memory, change_storage, load, load_assigned, load_swapped, move]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("device", "tokens"), [("sm_86", 2), ("sm_90a", 70)], indirect=["device"])
def test_a_weight_that_changes_is_read_anew(emulated, change, tokens):
    """The kernel takes addresses of the weight for 2 tokens, TMA descriptors of it for 70."""
    layer, _ = make_layer()
    x = activations(tokens, 128)
    for seed in (5, 6):
        layer(x)
        layer(x)
        weight = make_weight(70, 128, 64, seed=seed)
        change(layer, NestedPlanes.pack(weight))
        for _ in range(2):
            assert_close(layer(x), x, weight, 4, rounds_weights=tokens > 16)


def test_a_bias_that_changes_is_read_anew(emulated):
    layer, weight = make_layer(bias=True)
    x = activations(2, 128)
    layer(x)
    for bias in (
        activations(70) * 3,
        activations(70, dtype=torch.bfloat16),
        torch.randn(70),
        torch.full((1,), 2.5, dtype=torch.float16).expand(70),
        activations(140)[::2],
    ):
        layer.bias.data = bias
        assert_close(layer(x), x, weight, 4, bias)
        layer.bias = nn.Parameter(bias * 2, requires_grad=False)
        assert_close(layer(x), x, weight, 4, bias * 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.bfloat16):
        layer.to(dtype)
        assert_close(layer(x), x, weight, 4, layer.bias)
    layer.bias = None
    assert_close(layer(x), x, weight, 4)


def test_weights_that_do_not_fit_are_refused_also_after_good_calls(emulated):
    layer, weight = make_layer(bias=True)
    x, planes, scales, bias = activations(2, 128), layer.planes, layer.scales, layer.bias
    transposed = planes.transpose(-1, -2).contiguous().transpose(-1, -2)
    calls = 0
    for name, wrong, sentence in (
        ("planes", planes[:3], "4 bits cannot be read; 3 of 8 planes"),  # at the same address
        ("planes", planes[:3].clone(), "4 bits cannot be read; 3 of 8 planes"),
        ("planes", planes.view(torch.float32), "must be contiguous int32"),
        ("planes", transposed, "must be contiguous int32"),
        ("scales", scales.view(torch.int16), "Scales of groups"),
        ("scales", scales[..., :1], "Scales of groups"),
        ("scales", scales.to("meta"), "must be on one device"),
        ("bias", nn.Parameter(bias[:64], requires_grad=False), r"The bias must be .*\[70\]"),
        ("bias", nn.Parameter(bias.expand(2, 70), requires_grad=False), r"The bias must be .*\[70\]"),
    ):
        setattr(layer, name, wrong)
        for _ in range(2):
            with pytest.raises(UserError, match=sentence):
                layer(x)
        setattr(layer, name, {"planes": planes, "scales": scales, "bias": bias}[name])
        assert_close(layer(x), x, weight, 4, bias)
        calls += 1
    assert len(emulated) == calls
    bias.data = bias.double()
    with pytest.raises(UserError, match="The bias must be .* found torch.float64"):
        layer(x)


def test_wrong_activations_are_refused_also_after_good_calls(emulated):
    layer, _ = make_layer()
    x = activations(2, 128)
    layer(x)
    for wrong, sentence in (
        (activations(2, 64), r"x must be \[..., 128\]"),
        (torch.tensor(1.0), "without dimensions"),
        (x.double(), "found torch.float64"),
    ):
        for _ in range(2):
            with pytest.raises(UserError, match=sentence):
                layer(wrong)
    assert layer(activations(0, 128)).shape == (0, 70)
    assert len(emulated) == 1


def test_replaced_tensors_are_freed(emulated):
    layer, _ = make_layer(bias=True)
    layer(activations(2, 128))
    kept = [weakref.ref(tensor) for tensor in (layer.planes, layer.scales, layer.bias)]
    other, _ = make_layer()
    layer.planes, layer.scales, layer.bias = other.planes, other.scales, None
    gc.collect()
    assert [one() for one in kept] == [None] * 3


def test_copies_of_a_layer_read_their_own_weight(emulated):
    layer, _ = make_layer(bias=True)
    x = activations(2, 128)
    y = layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), copy.copy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), y)
        other.planes = torch.zeros_like(layer.planes)
        assert not torch.equal(other(x), y)
        assert torch.equal(layer(x), y)


def test_fused_layers_read_their_ranges_of_the_shared_weight(emulated):
    """Layers of unequal bit-widths are multiplied one by one, those of equal ones together."""
    weights = [make_weight(rows, 128, 64, seed=rows) for rows in (64, 70)]
    layers = [NestedLinear.from_planes(weight, activations(len(weight.codes))) for weight in weights]
    x = activations(2, 128)
    for layer in layers:
        layer(x)  # bound to its own tensors
    assert FusedLayers(layers, ["cpu"]).is_packed
    for bits, launches in (((3, 4), 2), ((3, 3), 1), ((3, 4), 2)):
        emulated.clear()
        for layer, width in zip(layers, bits, strict=True):
            layer.bits = width
        for layer, weight in zip(layers, weights, strict=True):
            assert_close(layer(x), x, weight, layer.bits, layer.bias)
        assert len(emulated) == launches


def test_repeated_calls_of_fused_layers_take_a_prepared_launch(emulated, monkeypatch):
    prepared = []
    launch = PreparedLaunch.launch
    monkeypatch.setattr(PreparedLaunch, "launch", lambda self, *arrays: prepared.append(self) or launch(self, *arrays))
    weights = [make_weight(rows, 128, 64, seed=rows, scale_bits=(2,)) for rows in (64, 70)]
    layers = [NestedLinear.from_planes(weight, activations(len(weight.codes)), bits=2) for weight in weights]
    fused = FusedLayers(layers, ["cpu"])

    def check():
        x = activations(2, 128)
        for layer, weight in zip(layers, weights, strict=True):
            assert_close(layer(x), x, weight, layer.bits, layer.bias)

    for bits in (2, 3, 2):
        for layer in layers:
            layer.bits = bits
        for _ in range(3):
            check()
    assert len(emulated) == 9  # a launch for both layers
    assert len(prepared) == 1 + 1 + 3
    layers[0].scales = layers[0].scales * 2  # no longer a range of the shared tensor
    weights[0] = dataclasses.replace(weights[0], scales=weights[0].scales * 2)
    for layer in layers:
        layer.bits = 3
    check()
    fused.pack()
    prepared.clear()
    for _ in range(3):
        check()
    assert len(prepared) == 2  # the shared weight is bound anew


def test_a_layer_may_be_called_by_several_threads_at_several_widths(emulated):
    layer, _ = make_layer()
    x = activations(2, 128)
    expected = {bits: layer(x, bits=bits) for bits in (2, 3, 4)}
    failed = []

    def work(bits):
        for _ in range(20):
            if not torch.equal(layer(x, bits=bits), expected[bits]):
                failed.append(bits)

    threads = [threading.Thread(target=work, args=(bits,)) for bits in expected]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not failed

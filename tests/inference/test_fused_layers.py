"""Nested layers that share their input in one launch: outputs, launches, and the end of the sharing."""

import gc
import threading
import weakref

import pytest
import torch
from fused_attention import (
    COLUMNS,
    GROUP,
    NAMES,
    SEPARATE,
    TOGETHER,
    Attention,
    assert_near,
    calls,
    expected,
    make_attention,
)
from torch import Tensor, nn
from weights import make_weight

from matquant.errors import UserError
from matquant.formats.planes import NestedPlanes
from matquant.inference import NestedLinear, fused_layers, nested_layers, ops, set_bits
from matquant.inference.fused_layers import MAX_TOKENS, FusedLayers
from matquant.inference.model_surgery import fuse_layers


class Model(nn.Module):
    """Model whose arguments tell prefill from decoding."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, input_ids: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return self.attention(x)


@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (False, True, False)])
@pytest.mark.parametrize(
    "options", [{}, {"zeros": True}, {"scale_bits": (2, 4)}, {"stretch": 1.25}, {"slicing": "round"}]
)
def test_neighbours_of_equal_bit_width_share_a_launch(options, biases, launches):
    attention, weights = make_attention(biases=biases, **options)
    for bits, products in (
        ((8, 8, 8), [(320, 8)]),
        ((4, 4, 4), [(320, 4)]),
        ((2, 2, 8), [(256, 2), (64, 8)]),
        ((2, 8, 8), [(128, 2), (192, 8)]),
        ((3, 2, 3), [(128, 3), (70, 2), (64, 3)]),
    ):
        for name, width in zip(NAMES, bits, strict=True):
            attention.get_submodule(name).bits = width
        for shape in ((COLUMNS,), (1, COLUMNS), (2, 3, COLUMNS)):
            x = torch.randn(*shape)
            launches.clear()
            assert_near(attention(x), expected(attention, x, weights, bits))
            assert launches == products


def test_layers_are_called_in_any_order(launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    wanted = expected(attention, x, weights, (8, 8, 8))
    for order in ((2, 0, 1), (1, 2, 0)):
        found = {index: attention.get_submodule(NAMES[index])(x) for index in order}
        assert_near([found[index] for index in range(3)], wanted)
    assert launches == TOGETHER * 2


def test_only_the_very_same_tensor_shares_a_launch(launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    wanted = expected(attention, x, weights, (8, 8, 8))
    attention.q_proj(x)
    assert_near([attention.k_proj(x.clone()), attention.v_proj(x.view(2, COLUMNS))], wanted[1:])
    assert launches == [*TOGETHER, *SEPARATE[1:]]


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), lambda x: x[0].zero_(), lambda x: x.view(-1).add_(1)])
def test_a_changed_tensor_is_multiplied_anew(change, launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    attention.q_proj(x)
    change(x)
    assert_near([attention.k_proj(x), attention.v_proj(x)], expected(attention, x, weights, (8, 8, 8))[1:])
    assert len(launches) == 3


def test_bit_widths_that_change_within_a_pass_are_read(launches):
    attention, weights = make_attention()
    x = torch.randn(2, COLUMNS)
    attention.q_proj(x)
    attention.k_proj.bits = 3
    found = [attention.k_proj(x), attention.v_proj(x, bits=4), attention.v_proj(x)]
    k, v = expected(attention, x, weights, (8, 3, 4))[1:]
    assert_near(found, [k, v, expected(attention, x, weights, (8, 8, 8))[2]])
    assert launches == [*TOGETHER, (70, 3), (64, 4)]


def test_outputs_that_are_not_taken_end_the_sharing_until_all_layers_get_one_tensor(launches):
    attention, weights = make_attention()
    x, y = torch.randn(2, COLUMNS), torch.randn(3, COLUMNS)
    for _ in range(3):  # cross-attention: keys and values come from other states
        found = [attention.q_proj(x), attention.k_proj(y), attention.v_proj(y)]
        q, k, v = (expected(attention, one, weights, (8, 8, 8)) for one in (x, y, y))
        assert_near(found, [q[0], k[1], v[2]])
    assert launches == [*TOGETHER, *SEPARATE[1:], *SEPARATE, *SEPARATE]
    assert calls(attention, x, launches) == SEPARATE
    assert calls(attention, x, launches) == TOGETHER


def test_many_tokens_gradients_and_inference_mode_are_separate_and_end_no_sharing(launches):
    attention, weights = make_attention()
    tokens = torch.randn(MAX_TOKENS + 1, COLUMNS)
    assert calls(attention, tokens, launches) == SEPARATE
    assert calls(attention, tokens[:0], launches) == SEPARATE
    assert calls(attention, tokens[1:], launches) == TOGETHER
    x = torch.randn(2, COLUMNS, requires_grad=True)
    assert calls(attention, x, launches) == SEPARATE
    sum(y.sum() for y in attention(x)).backward()
    torch.testing.assert_close(x.grad[0], sum(weight.dequantize(8).sum(0) for weight in weights), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert calls(attention, x, launches) == TOGETHER
    with torch.inference_mode():
        assert calls(attention, torch.randn(2, COLUMNS), launches) == SEPARATE
    attention.k_proj.bias.requires_grad_(True)
    attention(x.detach())[1].sum().backward()
    torch.testing.assert_close(attention.k_proj.bias.grad, torch.full((70,), 2.0))


@pytest.mark.slow
def test_outputs_live_no_longer_than_the_tensor_or_until_they_are_taken():
    attention, _ = make_attention()
    x = torch.randn(2, COLUMNS)
    outputs = attention(x)
    kept = weakref.ref(outputs[0].untyped_storage())
    del outputs
    gc.collect()
    assert kept() is None
    kept = weakref.ref(attention.q_proj(x).untyped_storage())
    assert kept() is not None  # for k and v
    del x
    gc.collect()
    assert kept() is None


def test_layers_are_freed_with_their_model():
    attention, _ = make_attention()
    storage = weakref.ref(attention.q_proj.planes.untyped_storage())
    gc.disable()
    try:
        del attention
        assert storage() is None
    finally:
        gc.enable()


def test_a_call_in_another_thread_ends_no_round(launches):
    attention, weights = make_attention()
    x, y = torch.randn(2, COLUMNS), torch.randn(3, COLUMNS)
    found = [attention.q_proj(x)]
    for one in (x, y):
        thread = threading.Thread(target=attention, args=(one,))
        thread.start()
        thread.join()
        found.append(attention.get_submodule(NAMES[len(found)])(x))
    assert_near(found, expected(attention, x, weights, (8, 8, 8)))
    assert launches == TOGETHER * 3


def test_threads_do_not_take_each_others_outputs():
    attention, weights = make_attention()
    shared, wrong = torch.randn(2, COLUMNS), []
    barrier = threading.Barrier(4, timeout=60)

    def work(seed: int) -> None:
        own = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(seed))
        for x in (own, shared) * 20:
            barrier.wait()
            found = attention(x)
            for one, other in zip(found, expected(attention, x, weights, (8, 8, 8)), strict=True):
                if not torch.allclose(one, other, rtol=1e-4, atol=1e-3):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_layers_are_separate(launches):
    attention, weights = make_attention()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for bits in (8, 3):
        set_bits(attention, bits)
        x = torch.randn(2, COLUMNS)
        assert_near(compiled(x), expected(attention, x, weights, (bits,) * 3))
    assert [rows for rows, _ in launches] == [128, 70, 64] * 2
    set_bits(attention, 8)
    assert calls(attention, x, launches) == TOGETHER


def test_prefill_and_decoding_read_their_bit_widths(launches):
    attention, weights = make_attention()
    model = Model(attention)
    set_bits(model, 2, prefill=8)
    for tokens, bits in ((3, 8), (1, 2)):
        x = torch.randn(1, tokens, COLUMNS)
        assert_near(model(torch.zeros(1, tokens), x), expected(attention, x, weights, (bits,) * 3))
    assert launches == [(320, 8), (320, 2)]
    attention.q_proj.bits = 4
    with pytest.raises(UserError, match="outside of the forward pass"):
        attention.k_proj(x)
    assert_near([attention.q_proj(x)], expected(attention, x, weights, (4,) * 3)[:1])


def test_layers_that_differ_stay_separate():
    weights = [make_weight(64, COLUMNS, GROUP), make_weight(64, COLUMNS, 32), make_weight(64, COLUMNS, GROUP)]
    attention = Attention(*map(NestedLinear.from_planes, weights))
    (fused,) = fuse_layers(attention, ["cpu"])
    assert (attention.q_proj.fused, attention.k_proj.fused, attention.v_proj.fused) == (fused, None, fused)
    assert fuse_layers(attention, ["cpu"]) == []
    few = [NestedLinear.from_planes(NestedPlanes.pack(weights[0], max_bits=bits)) for bits in (4, 8)]
    assert not FusedLayers(few, ["cpu"]).is_packed
    assert not FusedLayers([NestedLinear.from_planes(weights[0]) for _ in range(2)]).is_packed  # GPUs alone by default


def test_a_graph_captures_launches_that_have_run(monkeypatch, launches):
    """Kernels are loaded at the first launch of a shape, which must not be during a capture."""
    capturing = [False]
    monkeypatch.setattr(fused_layers, "_current_stream", lambda x: fused_layers._Stream(1, capturing[0]))
    for first_inputs in (1, 2):
        attention, _ = make_attention()
        x, y = torch.randn(2, COLUMNS), torch.randn(2, COLUMNS)
        capturing[0] = False

        def run(inputs: int, x: Tensor = x, y: Tensor = y, attention: Attention = attention) -> None:
            attention.q_proj(x)
            attention.k_proj(x if inputs == 1 else y)
            attention.v_proj(x if inputs == 1 else y)

        run(first_inputs)
        ran = set(launches)
        capturing[0] = True
        launches.clear()
        run(first_inputs)
        assert set(launches) <= ran


@pytest.mark.parametrize("bits", [2, 8])
def test_fused_products_equal_those_of_the_operator(bits):
    attention, weights = make_attention(rows=(64, 64, 128))
    x = torch.randn(5, COLUMNS, dtype=torch.float32)
    set_bits(attention, bits)
    for y, weight, layer in zip(attention(x), weights, nested_layers(attention).values(), strict=True):
        torch.testing.assert_close(y, ops.linear(x, NestedPlanes.pack(weight), bits, layer.bias), rtol=1e-5, atol=1e-5)

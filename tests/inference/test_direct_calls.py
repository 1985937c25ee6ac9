"""Calls without the dispatcher, with the CPU emulator as the device, and calls that must still take the operator."""

import pytest
import torch
from emulated_device import activations, make_layer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from matquant.errors import UserError
from matquant.inference import cuda_ops, direct_calls, linear, ops

OPERATOR = torch.ops.matquant.nested_linear.default


@pytest.fixture
def on_cuda(monkeypatch):
    """Tensors on the CPU count as tensors on a CUDA device. Returns the tokens of each direct call."""
    seen = []

    def called_directly(x, *arguments):
        seen.append(x.shape[:-1].numel())
        return ops._linear(x, *arguments)

    monkeypatch.setattr(direct_calls, "is_on_cuda", lambda tensor: True)
    monkeypatch.setattr(cuda_ops, "linear", called_directly)
    monkeypatch.setattr(cuda_ops, "launch_cache", {})
    return seen


class Seen(TorchDispatchMode):
    """Record of the operators that run."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def callers():
    """Both ways to a product: the layer, and the function for planes."""
    layer, _ = make_layer()
    planes = layer.nested_planes()
    return [layer, lambda x: linear(x, planes, 4)]


def test_plain_calls_on_a_cuda_device_take_no_dispatcher(on_cuda):
    for call in callers():
        with torch.no_grad():
            assert not call(activations(3, 128)).requires_grad
        assert not call(activations(2, 128)).requires_grad
        with torch.inference_mode():
            assert call(activations(1, 128)).is_inference()
    assert on_cuda == [3, 2, 1] * 2


def test_calls_on_the_cpu_take_the_operator(monkeypatch):
    monkeypatch.setattr(cuda_ops, "linear", None)
    for call in callers():
        with Seen() as seen:
            call(activations(2, 128))
        call(activations(2, 128))
        assert OPERATOR in seen.operators


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_modes_see_the_operator(on_cuda, mode):
    for call in callers():
        with mode() as seen:
            call(activations(2, 128))
        assert OPERATOR in seen.operators
    assert not on_cuda


def test_fake_tensors_and_traces_see_the_operator(on_cuda):
    for call in callers():
        x = activations(2, 128)
        graph = make_fx(call)(x).graph
        assert OPERATOR in [node.target for node in graph.nodes]
        graph = make_fx(call, tracing_mode="fake", _allow_non_fake_inputs=True)(x).graph
        assert OPERATOR in [node.target for node in graph.nodes]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert call(mode.from_tensor(x)).shape == (2, 70)
        traced = torch.jit.trace(call, (x,), check_trace=False)
        assert "nested_linear" in str(traced.graph)
    assert not on_cuda


@pytest.mark.slow
def test_compiled_calls_see_the_operator(on_cuda):
    for call in callers():
        graphs = []
        torch._dynamo.reset()

        def keep(module, inputs, graphs=graphs):
            graphs.append([node.target for node in module.graph.nodes])
            return module

        torch.compile(call, fullgraph=True, backend=keep)(activations(2, 128))
        assert [OPERATOR in targets for targets in graphs] == [True]
    program = torch.export.export(make_layer()[0], (activations(2, 128),))
    assert OPERATOR in [node.target for node in program.graph.nodes]


def ops_by_batch(call, x):
    with Seen():
        return torch.stack([call(one) for one in x])


def test_transforms_see_the_operator(on_cuda):
    for call in callers():
        x = activations(3, 2, 128)
        torch.testing.assert_close(torch.func.vmap(call)(x), ops_by_batch(call, x))
        torch.func.functionalize(call)(x)
        y, gradient = torch.func.vjp(call, x)
        assert gradient(torch.ones_like(y))[0].shape == x.shape
    assert not on_cuda


def test_profilers_see_the_operator(on_cuda):
    for call in callers():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call(activations(2, 128))
        assert "matquant::nested_linear" in [event.key for event in profile.key_averages()]
        assert not on_cuda
    call(activations(2, 128))
    assert on_cuda


def test_gradients_take_the_operator(on_cuda):
    layer, weight = make_layer(bias=True)
    for call in (layer, lambda x: linear(x, layer.nested_planes(), 4)):
        x = activations(2, 128).requires_grad_()
        with Seen() as seen:
            y = call(x)
        assert OPERATOR in seen.operators
        y = call(x)
        y.sum().backward()
        torch.testing.assert_close(x.grad.float(), weight.dequantize(4).sum(0).expand(2, -1), rtol=1e-2, atol=1e-2)
        with torch.no_grad():
            assert not call(x).requires_grad
    layer.bias.requires_grad_()
    assert layer(x.detach()).requires_grad
    layer.bias.requires_grad_(False)
    layer.scales.requires_grad_()
    with pytest.raises(UserError, match="records no gradient"):
        layer(x.detach())
    assert len(on_cuda) == 2  # under no_grad


def test_tensors_without_values_at_their_address_take_the_operator(on_cuda):
    layer, _ = make_layer()
    x = activations(2, 128)
    y = layer(x)
    assert on_cuda == [2]
    torch.testing.assert_close(layer(torch._neg_view(x)), -y)
    assert not layer(torch._efficientzerotensor((2, 128), dtype=torch.float16)).any()
    assert on_cuda == [2]


class Sub(torch.Tensor):
    """Subclass whose operators run under torch_function."""


@pytest.mark.parametrize("name", ["x", "planes", "scales", "zeros", "bias"])
def test_subclasses_take_the_operator(on_cuda, name):
    layer, _ = make_layer(zeros=True, bias=True)
    x = activations(2, 128)
    expected = layer(x)
    if name == "x":
        x = x.as_subclass(Sub)
    elif name == "bias":
        layer.bias = nn.Parameter(layer.bias.data.as_subclass(Sub), requires_grad=False)
    else:
        layer._buffers[name] = layer._buffers[name].as_subclass(Sub)
    on_cuda.clear()
    y = layer(x)
    assert type(y) is Sub
    assert torch.equal(y.as_subclass(torch.Tensor), expected)
    assert not on_cuda

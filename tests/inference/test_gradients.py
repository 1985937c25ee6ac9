"""Gradients through nested layers: equal to those of the dequantized weight."""

from typing import Any

import pytest
import torch
from architectures import make_model
from nesting import dequantized_copy, nest
from torch import Tensor, nn
from torch.autograd import gradcheck
from weights import make_weight

from matquant.errors import UserError
from matquant.inference import NestedLinear, NestedPlanes, linear, set_bits

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS: list[dict[str, Any]] = [{}, {"slicing": "round"}, {"zeros": True}]


def gradient(*shape: int, seed: int = 0) -> Tensor:
    """Random tensor that requires a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.filterwarnings("ignore:Input #.*double precision")
@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_gradcheck(options, bits):
    """The function is linear, so that large differences in float32 are exact up to rounding."""
    planes = NestedPlanes.pack(make_weight(6, 64, 32, **options))
    assert gradcheck(
        lambda x, bias: linear(x, planes, bits, bias), (gradient(2, 64), gradient(6)), eps=1.0, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("options", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64)], ids=str)
def test_gradients_equal_those_of_the_dense_weight(options, dtype, shape):
    weight = make_weight(70, 64, 32, **options)
    for bits in (2, 8):
        x, bias = gradient(*shape).detach().to(dtype).requires_grad_(), gradient(70).detach().to(dtype).requires_grad_()
        dense_x, dense_bias = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
        outer = torch.randn(*shape[:-1], 70, generator=torch.Generator().manual_seed(1)).to(dtype)
        linear(x, NestedPlanes.pack(weight), bits, bias).backward(outer)
        nn.functional.linear(dense_x, weight.dequantize(bits, dtype), dense_bias).backward(outer)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(x.grad, dense_x.grad, **tolerance)
        torch.testing.assert_close(bias.grad, dense_bias.grad, **tolerance)


@pytest.mark.parametrize("kind", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("bits", [2, 6])
def test_gradients_of_a_model_equal_those_of_dense_weights(kind, bits):
    model = nest(make_model(kind))
    set_bits(model, bits)
    dense = dequantized_copy(model, bits)
    ids = torch.arange(12).view(2, 6) * 9 + 2
    gradients = []
    for one in (model, dense):
        embeddings = one.get_input_embeddings().weight.requires_grad_()
        one(ids, labels=ids).loss.backward()
        gradients.append(embeddings.grad)
    assert gradients[1].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


class Adapter(nn.Module):
    """Low-rank adapter around a layer, as LoRA adds it."""

    def __init__(self, base: NestedLinear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 4, bias=False)
        self.up = nn.Linear(4, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_trained_on_nested_layers(checkpointing):
    torch.manual_seed(0)
    model = nest(make_model("llama"))
    set_bits(model, 2)
    for block in model.model.layers:
        block.mlp.down_proj = Adapter(block.mlp.down_proj)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    ids = torch.arange(24).view(2, 12) * 5 + 2
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_compiled_layer_has_gradients():
    weight = make_weight(70, 64, 32)
    layer = NestedLinear.from_planes(weight, bits=3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = gradient(5, 64)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dequantize(3).sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


def test_no_graph_is_kept_without_gradients():
    layer = NestedLinear.from_planes(make_weight(70, 64, 32))
    assert not layer(gradient(5, 64).detach()).requires_grad
    with torch.no_grad():
        assert not layer(gradient(5, 64)).requires_grad


def test_gradients_that_do_not_exist_raise():
    planes = NestedPlanes.pack(make_weight(70, 64, 32))
    x, op_args = gradient(5, 64), planes.format.op_args
    scales = planes.scales.clone().requires_grad_()
    operator = torch.ops.matquant.nested_linear.default
    for arguments in (
        (x, planes.planes, planes.scales, None, None),
        (x.detach(), planes.planes, scales, None, None),
        (x.detach(), planes.planes, planes.scales, None, gradient(70)),
    ):
        with pytest.raises(
            UserError, match=r"nested_linear records no gradient, but x, the scales or the bias require one"
        ):
            operator(*arguments, 4, 70, 64, *op_args)
    layer = NestedLinear.from_planes(planes)
    layer.scales.requires_grad_()
    with pytest.raises(UserError, match="The scales of a nested layer require a gradient, but have none"):
        layer(x)
    with pytest.raises(UserError, match="records no gradient"):
        layer(x.detach())

"""Gradients of a linear map with the weight of a slice: equal to those of plain autograd through the dense weight."""

import pytest
import torch
from weights import make_weight

from matquant.formats.groups import expand_groups
from matquant.refine.scaled_linear import scaled_linear

pytestmark = pytest.mark.usefixtures("one_thread")


def plain_linear(x, scales, weight, bits, bias):
    """Compute ``scaled_linear`` by differentiable torch operations."""
    zero = (
        weight.format.zero_point
        if weight.zeros is None
        else expand_groups(weight.zeros.float(), x.shape[-1], weight.format.group_size)
    )
    levels = weight.format.levels(bits)[weight.codes.int()] - zero
    dense = levels * expand_groups(scales, x.shape[-1], weight.format.group_size)
    return torch.nn.functional.linear(x, dense, bias)


@pytest.mark.parametrize(
    "options", [{}, {"zeros": True}, {"slicing": "round"}, {"stretch": 1.25}, {"scale_bits": (2, 3)}], ids=str
)
@pytest.mark.parametrize(("columns", "group_size"), [(64, 32), (72, 64), (40, 40)])
@pytest.mark.parametrize("bits", [2, 6])
def test_output_and_gradients_equal_those_of_plain_autograd(options, columns, group_size, bits):
    weight = make_weight(10, columns, group_size, **options)
    generator = torch.Generator().manual_seed(bits)
    found, expected = [], []
    for results, function in ((found, scaled_linear), (expected, plain_linear)):
        generator.manual_seed(bits)
        x = torch.randn(2, 5, columns, generator=generator).requires_grad_()
        scales = (torch.randn(weight.scales.shape, generator=generator) * 0.01).requires_grad_()
        bias = torch.randn(10, generator=generator).requires_grad_()
        y = function(x, scales, weight, bits, bias)
        (y * torch.randn(y.shape, generator=generator)).sum().backward()
        results += [y.detach(), x.grad, scales.grad, bias.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_only_the_gradients_that_are_needed_are_computed():
    weight = make_weight(6, 64, 32)
    scales, x = weight.scales.float(), torch.randn(3, 64)
    assert not scaled_linear(x, scales, weight, 3, None).requires_grad
    own = scales.clone().requires_grad_()
    scaled_linear(x, own, weight, 3, None).sum().backward()
    assert own.grad is not None
    y = x.clone().requires_grad_()
    scaled_linear(y, scales, weight, 3, None).sum().backward()
    assert y.grad is not None


def test_half_precision_inputs_keep_their_dtype():
    weight = make_weight(6, 64, 32)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    scales = weight.scales.float().requires_grad_()
    y = scaled_linear(x, scales, weight, 3, torch.zeros(6, dtype=torch.bfloat16))
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, scales.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)

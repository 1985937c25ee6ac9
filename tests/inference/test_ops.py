"""Operators on the CPU: against float64, with the checks of torch, and with invalid arguments."""

import itertools

import pytest
import torch
from weights import make_weight

from matquant.errors import UserError
from matquant.formats.planes import CPU_STRIP_WEIGHTS, NestedPlanes
from matquant.inference import dequantize, linear, torch_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPSILON = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def assert_near_float64(x, weight, bias, bits):
    """Compare elementwise; the error bound is the rounding of the output plus that of float32 sums."""
    y = linear(x, NestedPlanes.pack(weight), bits, bias)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], weight.codes.shape[0]))
    assert y.is_contiguous()
    dense = weight.dequantize(bits).double()
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    terms = x.double().abs() @ dense.abs().T
    allowed = EPSILON[x.dtype] * exact.abs() + 1e-6 * terms
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("slicing", "zeros", "group_size"),
    [*itertools.product(["msb", "round"], [False, True], [32, 64, 128]), ("msb", False, 384), ("msb", True, 48)],
)
def test_values_for_all_formats_and_bits(bits, slicing, zeros, group_size):
    weight = make_weight(130, 384, group_size, slicing=slicing, zeros=zeros, seed=bits)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3, 384, generator=generator) + 0.3
    assert_near_float64(x, weight, torch.randn(130, generator=generator), bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (2, 1), (1, 3, 2), (0, 4), ()], ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_dtypes_and_leading_dimensions(dtype, shape, scale_dtype):
    weight = make_weight(65, 100, 20, dtype=scale_dtype)
    x = torch.randn(*shape, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_near_float64(x, weight, torch.ones(65, dtype=dtype), 3)
    assert_near_float64(x, weight, None, 5)


def test_non_contiguous_inputs():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0)).t()
    assert_near_float64(x, make_weight(64, 100, 50), None, 4)
    assert_near_float64(x[::2], make_weight(64, 100, 50), None, 4)


def test_dense_weight_is_never_whole_in_memory():
    """No intermediate tensor has more elements than a strip."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class LargestFloatTensor(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.is_floating_point():
                largest = max(largest, result.numel())
            return result

    packed = NestedPlanes.pack(make_weight(2048, 1024, 64))
    x = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    with LargestFloatTensor():
        torch_reference.linear(x, packed, None, 4)
    assert largest == CPU_STRIP_WEIGHTS < packed.out_features * packed.in_features


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"slicing": "round", "zeros": True}, {"stretch": 1.25}], ids=str)
def test_dequantize_equals_that_of_the_format(dtype, options):
    weight = make_weight(70, 96, 32, **options)
    for bits in range(2, 9):
        assert torch.equal(dequantize(NestedPlanes.pack(weight), bits, dtype), weight.dequantize(bits, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("zeros", "dtype", "shape"), [(True, torch.float16, (2, 3)), (False, torch.float32, (1,))])
def test_opcheck(zeros, dtype, shape):
    packed = NestedPlanes.pack(make_weight(66, 96, 32, zeros=zeros))
    x = torch.randn(*shape, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = (packed.planes, packed.scales, packed.zeros)
    bias = torch.zeros(66, dtype=dtype) if zeros else None
    for op, args in (
        (torch.ops.matquant.nested_linear.default, (x, *tensors, bias, 3, 66, 96, *packed.format.op_args)),
        (torch.ops.matquant.nested_dequantize.default, (*tensors, 3, 66, 96, *packed.format.op_args, dtype)),
    ):
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


BAD_CALLS = [
    ({"x": torch.zeros(2, 96, dtype=torch.float64)}, "x must be float16, bfloat16 or float32; found torch.float64"),
    ({"x": torch.zeros(2, 96, dtype=torch.int32)}, "found torch.int32"),
    ({"x": torch.tensor(1.0)}, "found a tensor without dimensions"),
    ({"x": torch.zeros(2, 160)}, r"x must be \[..., 96\]; found \[2, 160\]"),
    ({"x": torch.zeros(2, 97)}, r"x must be \[..., 96\]; found \[2, 97\]"),  # of as many tiles and groups
    ({"x": torch.zeros(96, 2)}, r"x must be \[..., 96\]; found \[96, 2\]"),
    ({"x": torch.zeros(2, 96, device="meta")}, "x is on meta, the planes are on cpu"),
    ({"bias": torch.zeros(65)}, r"The bias must be .*\[66\] on cpu; found torch.float32 \[65\]"),
    ({"bias": torch.zeros(66, dtype=torch.int64)}, "found torch.int64"),
    ({"bits": 9}, r"in 2..8; found 9"),
    ({"bits": 5}, "5 bits cannot be read; 4 of 8 planes .* at most 4 bits"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_CALLS)
@pytest.mark.parametrize("fake", [False, True], ids=["run", "traced"])
def test_invalid_arguments_raise(wrong, message, fake):
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = NestedPlanes.pack(make_weight(66, 96, 32), max_bits=4)
    call = {"x": torch.zeros(2, 96), "weight": packed, "bits": 4, "bias": None} | wrong
    if not fake:
        with pytest.raises(UserError, match=message):
            linear(**call)
        return
    mode = FakeTensorMode()
    tensors = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    weight = [mode.from_tensor(t) for t in (packed.planes, packed.scales)]
    with mode, pytest.raises(UserError, match=message):
        torch.ops.matquant.nested_linear.default(
            tensors["x"], *weight, None, tensors["bias"], call["bits"], 66, 96, *packed.format.op_args
        )

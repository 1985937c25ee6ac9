"""The operators on CUDA devices: launches of ``kernels/gemm.cu``, and strips through cuBLAS for many tokens.

Everything that follows from shapes, dtypes and numbers alone is checked and planned once and kept; a call then looks its
launch up.
"""

import ctypes
import functools
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from matquant.cuda import Kernel, load
from matquant.errors import UserError
from matquant.formats.nested import Slicing, WeightFormat
from matquant.formats.planes import NestedPlanes
from matquant.formats.tile_layout import TILE
from matquant.inference import torch_reference
from matquant.inference.argument_checks import check_x
from matquant.inference.gemm_shape import Device, Problem, centred_exactly, supported
from matquant.inference.launch_config import (
    MOST_TOKENS,
    STRIP_WEIGHTS,
    Plan,
    dequantize_launch,
    in_two,
    most_tokens,
    plan,
)
from matquant.inference.tile_configs import FIRST_OF_WGMMA
from matquant.inference.workspace import Scratch

_ALIGNMENT = 16  # bytes, of x's rows
_WITH_WGMMA = 9  # the major compute capability

logger = logging.getLogger(__name__)


class _Launch(NamedTuple):
    """What is done for calls that agree in all but addresses: a kernel, or two calls of half the tokens, or strips."""

    kernel: Kernel | None = None
    plan: Plan | None = None
    halves: bool = False


_launches: dict[tuple, _Launch] = {}
_scratch: dict[int, Scratch] = {}


def linear(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    out_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
) -> Tensor:
    """``nested_linear`` on a CUDA device. Raises what ``inference.ops`` says."""
    shape, device = x.shape, x.get_device()
    tokens = x.numel() // shape[-1] if shape and shape[-1] else 0
    about = (bits, out_features, group_size, master_bits, slicing, offset)
    key = (
        min(tokens, MOST_TOKENS + 1),
        shape[-1:],
        x.dtype,
        device,
        planes.shape,
        planes.dtype,
        planes.get_device(),
        scales.shape,
        scales.dtype,
        None if zeros is None else (zeros.shape, zeros.dtype),
        None if bias is None else (bias.shape, bias.dtype),
        about,
    )
    launch = _launches.get(key)
    contiguous = planes.is_contiguous() and scales.is_contiguous() and (zeros is None or zeros.is_contiguous())
    if launch is None or not contiguous:
        launch = _launches[key] = _prepare(x, planes, scales, zeros, bias, tokens, about)
    if launch.halves:
        parts = x.reshape(tokens, -1).split(-(-tokens // 2))
        halves = [linear(part, planes, scales, zeros, bias, *about) for part in parts]
        return torch.cat(halves).view(*shape[:-1], out_features)
    y = x.new_empty((*shape[:-1], out_features))
    if not tokens:
        return y
    if launch.kernel is None or launch.plan is None:
        weight = _weight(planes, scales, zeros, shape[-1], about)
        return _many(x, weight, bias, bits, y)
    rows = _aligned(x, tokens)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    tickets, workspace = _scratch[device].now(launch.plan.tickets, launch.plan.workspace)
    arguments = launch.plan.arguments(planes, scales, zeros, rows, bias, y, workspace, tickets, tokens)
    launch.kernel.launch(launch.plan.grid, launch.plan.block, arguments, launch.plan.shared_bytes)
    return y


def _weight(planes: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, about: tuple) -> NestedPlanes:
    _, out_features, *fmt = about
    return NestedPlanes(
        planes=planes,
        scales=scales,
        zeros=zeros,
        out_features=out_features,
        in_features=in_features,
        format=WeightFormat.from_op_args(scales, zeros, *fmt),
    )


def _prepare(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, tokens: int, about: tuple
) -> _Launch:
    """Check a call, and compile and load its kernel. Raises UserError."""
    check_x(x, planes, bias, about[1])
    weight = _weight(planes, scales, zeros, x.shape[-1], about)
    weight.check_bits(about[0])
    problem = _problem(weight, about[0], x.dtype, tokens)
    if not supported(problem):
        logger.warning(
            f"The CUDA kernels take float16 and bfloat16, and groups of 32 or a multiple of 64. A layer of "
            f"{x.dtype} with {scales.dtype} scales and groups of {weight.format.group_size} is computed by torch, slowly."
        )
        return _Launch()
    if not tokens:
        return _Launch()
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            "A CUDA graph is being captured, and this shape and width have not been run yet: their kernel would have to be "
            "loaded now. Run the model once at this width and batch size before the capture."
        )
    index = x.get_device()
    device = about_device(index)
    if device.wgmma and tokens >= FIRST_OF_WGMMA and not centred_exactly(problem):
        _say_without_wgmma(x.dtype, weight.format.zero_point_offset)
    if tokens > most_tokens(problem, device):
        _load_dequantize(problem, index)
        return _Launch(halves=not device.wgmma and in_two(tokens, problem.rows, problem.depth))
    launch = plan(problem, device)
    kernel = load(
        launch.source, launch.function, defines=launch.defines, device=index, prefer_shared=True, overlap=True
    )
    if index not in _scratch:
        _scratch[index] = Scratch(x.device)
    return _Launch(kernel, launch)


@functools.cache
def _say_without_wgmma(dtype: torch.dtype, offset: float) -> None:
    logger.warning(
        f"{dtype} does not hold codes with an offset of {offset} and their zero points exactly: such layers are multiplied "
        f"without this GPU's faster instructions for {FIRST_OF_WGMMA} tokens and more."
    )


def about_device(index: int) -> Device:
    """What plans need to know of a CUDA device."""
    about = torch.cuda.get_device_properties(index)
    return Device(
        multiprocessors=about.multi_processor_count,
        shared_bytes=about.shared_memory_per_multiprocessor,
        wgmma=torch.cuda.get_device_capability(index)[0] == _WITH_WGMMA,
    )


def _aligned(x: Tensor, tokens: int) -> Tensor:
    """x, or where need be a copy, with rows one after the other from multiples of 16 bytes on; what is added is 0."""
    depth = x.shape[-1]
    if depth % 8:
        return torch.nn.functional.pad(x.reshape(tokens, depth), (0, -depth % 8))
    if x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _problem(weight: NestedPlanes, bits: int, dtype: torch.dtype, tokens: int) -> Problem:
    return Problem(
        tokens=tokens, rows=weight.out_features, depth=weight.in_features, bits=bits, format=weight.format, dtype=dtype
    )


def dequantize(
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
    dtype: torch.dtype,
) -> Tensor:
    """``nested_dequantize`` on a CUDA device."""
    weight = _weight(planes, scales, zeros, in_features, (bits, out_features, group_size, master_bits, slicing, offset))
    weight.check_bits(bits)
    if not supported(_problem(weight, bits, dtype, 1)):
        return weight.dequantize(bits, dtype)
    dense = scales.new_empty(out_features, in_features, dtype=dtype)
    _dequantize_rows(weight, bits, 0, dense)
    return dense


def _load_dequantize(problem: Problem, device: int) -> Kernel:
    return load("dequant.cu", "nested_dequantize", defines=problem.defines(), device=device, prefer_shared=True)


def _dequantize_rows(weight: NestedPlanes, bits: int, first_tile: int, out: Tensor) -> None:
    """The rows from a tile of 64 on, as many as ``out`` has."""
    problem = _problem(weight, bits, out.dtype, 1)
    kernel = _load_dequantize(problem, out.get_device())
    grid, block, shared_bytes, numbers = dequantize_launch(problem, out.shape[0], first_tile)
    planes = weight.planes.contiguous()
    stride = ctypes.c_uint64(planes.stride(0) * planes.element_size() // _ALIGNMENT)
    zeros = None if weight.zeros is None else weight.zeros.contiguous()
    kernel.launch(grid, block, (planes, stride, weight.scales.contiguous(), zeros, out, *numbers), shared_bytes)


def _strips(weight: NestedPlanes, bits: int, dtype: torch.dtype, size: int) -> Iterator[tuple[slice, Tensor]]:
    """The dense weight about ``size`` weights at a time, all in the same memory: rows, and their values."""
    if not supported(_problem(weight, bits, dtype, 1)):
        yield from weight.dequantize_strips(bits, dtype, size)
        return
    step = max(TILE, size // weight.in_features // TILE * TILE)
    values = weight.scales.new_empty(min(step, weight.out_features), weight.in_features, dtype=dtype)
    for start in range(0, weight.out_features, step):
        strip = slice(start, min(start + step, weight.out_features))
        _dequantize_rows(weight, bits, start // TILE, values[: strip.stop - start])
        yield strip, values[: strip.stop - start]


def _many(x: Tensor, weight: NestedPlanes, bias: Tensor | None, bits: int, y: Tensor) -> Tensor:
    """Decode some rows, multiply all tokens with them by cuBLAS, and go on."""
    if x.dtype == torch.float32:
        return torch_reference.linear(x, weight, bias, bits)
    rows = x.reshape(-1, weight.in_features)
    result = y.view(-1, weight.out_features)
    for strip, values in _strips(weight, bits, x.dtype, STRIP_WEIGHTS):
        torch.mm(rows, values.t(), out=result[:, strip])
    if bias is not None:
        result += bias
    return y

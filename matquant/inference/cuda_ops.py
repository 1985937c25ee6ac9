"""Operators on CUDA devices: GEMM kernels for few tokens, strips through cuBLAS for many.

Everything that follows from shapes, dtypes and settings alone is checked and planned once and cached; a call then looks up its
launch.
"""

import functools
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matquant.cuda import Kernel, PreparedLaunch, load
from matquant.errors import UserError
from matquant.formats.nested import Slicing, WeightFormat
from matquant.formats.planes import NestedPlanes, holds_row_tiles
from matquant.formats.tile_layout import TILE
from matquant.inference import torch_reference
from matquant.inference.argument_checks import check_no_gradient, check_x
from matquant.inference.gemm_shape import DeviceLimits, GemmShape, folds_zero_point_exactly, is_supported
from matquant.inference.kernel_families.wgmma import WGMMA_MIN_M
from matquant.inference.launch_config import (
    MAX_M,
    STRIP_WEIGHTS,
    LaunchConfig,
    WeightArguments,
    dequantize_launch,
    make_launch_config,
    max_tokens,
    plane_stride,
    prefers_two_launches,
    scale_row_tiles,
)
from matquant.inference.workspace import Workspace

_ALIGNMENT = 16  # bytes, of rows of x
_WGMMA_CAPABILITY = 9  # major compute capability with WGMMA
_MIN_CLUSTER_CAPABILITY = 9  # first major compute capability with thread block clusters

logger = logging.getLogger(__name__)


class CallSettings(NamedTuple):
    """Flat settings of a call: bit-width, size of the weight, and the operator arguments of its format."""

    bits: int
    out_features: int
    in_features: int
    group_size: int
    master_bits: int
    slicing: Slicing
    offset: float
    stretch: float


class CachedLaunch(NamedTuple):
    """Launch of all calls that differ in addresses only: a kernel, two calls with half of the tokens, or strips."""

    kernel: Kernel | None = None
    config: LaunchConfig | None = None
    two_launches: bool = False


Launches = dict[tuple[Any, ...], CachedLaunch]  # of weights of one layout and bit-width, see ``call_key``
launch_cache: dict[tuple[Any, ...], Launches] = {}  # by layout and bit-width
workspaces: dict[int, Workspace] = {}  # by device index


def linear(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, *settings: Any
) -> Tensor:
    """Operator ``nested_linear`` on a CUDA device; errors as in ``inference.ops``.

    Args:
        settings: values of ``CallSettings``.
    """
    check_no_gradient(x, scales, bias)
    launches = launches_of(planes, scales, zeros, bias, settings)
    key = call_key(x)
    launch = launches.get(key)
    readable = holds_row_tiles(planes) and holds_row_tiles(scales) and (zeros is None or holds_row_tiles(zeros))
    if launch is None or not readable:
        launch = _plan_launch(x, planes, scales, zeros, bias, key[0], CallSettings(*settings))
        launches[key] = launch
    if launch.config is None:
        return _linear_without_gemm(x, planes, scales, zeros, bias, launch, CallSettings(*settings))
    return multiply(launch, x, launch.config.weight_arguments(planes, scales, zeros), bias, key[0])


def launches_of(
    planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, settings: tuple[Any, ...]
) -> Launches:
    """Launches that are planned for weights and biases of this layout, at one bit-width."""
    layout = (
        planes.shape,
        planes.dtype,
        planes.get_device(),
        scales.shape,
        scales.dtype,
        None if zeros is None else (zeros.shape, zeros.dtype),
        None if bias is None else (bias.shape, bias.dtype),
        settings,
    )
    launches = launch_cache.get(layout)
    return launch_cache.setdefault(layout, {}) if launches is None else launches


def call_key(x: Tensor) -> tuple[Any, ...]:
    """Tokens (MAX_M + 1 for all numbers above), columns, dtype and device of a call; the launch depends on no more of ``x``."""
    shape = x.shape
    columns = shape[-1] if shape else None
    tokens = x.numel() // columns if columns else 0
    return tokens if tokens <= MAX_M else MAX_M + 1, columns, x.dtype, x.get_device()


def multiply(
    launch: CachedLaunch,
    x: Tensor,
    weight: WeightArguments,
    bias: Tensor | None,
    tokens: int,
    prepared: PreparedLaunch | None = None,
) -> Tensor:
    """Launch a GEMM kernel for a checked call.

    Args:
        prepared: the same launch prepared for ``weight`` and ``tokens``, see ``prepare``.
    """
    kernel, config = launch.kernel, launch.config
    assert kernel is not None
    assert config is not None
    rows = aligned_rows(x, tokens)
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    y = x.new_empty(*x.shape[:-1], config.sizes[0])
    semaphores = workspace = None  # CTAs that compute whole tiles, alone or in clusters, need none
    if config.workspace:
        semaphores, workspace = workspaces[x.get_device()].acquire(config.tile_semaphores, config.workspace)
    if prepared is not None:
        prepared.launch(
            rows.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
            0 if semaphores is None else semaphores.data_ptr(),
        )
        return y
    arguments = config.arguments(weight, rows, bias, y, workspace, semaphores, tokens)
    kernel.launch(config.grid, config.block, arguments, config.shared_bytes)
    return y


def prepare(launch: CachedLaunch, weight: WeightArguments, tokens: int) -> PreparedLaunch | None:
    """Prepare the launches for a weight given by addresses; None where each needs a TMA descriptor of its activations."""
    kernel, config = launch.kernel, launch.config
    if not isinstance(kernel, Kernel) or config is None or (config.descriptors and config.descriptors[3] is not None):
        return None
    arguments, changing = config.arguments_of_weight(weight, tokens)
    return kernel.prepare(config.grid, config.block, arguments, config.shared_bytes, changing)


def _linear_without_gemm(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    launch: CachedLaunch,
    settings: CallSettings,
) -> Tensor:
    """Product that no single launch of a GEMM kernel computes: of no or many tokens, or of an unsupported shape."""
    shape = (*x.shape[:-1], settings.out_features)
    if launch.two_launches:
        rows = x.reshape(-1, settings.in_features)
        halves = [linear(part, planes, scales, zeros, bias, *settings) for part in rows.split(-(-len(rows) // 2))]
        return torch.cat(halves).view(shape)
    y = x.new_empty(shape)
    if not y.numel():
        return y
    return _linear_by_strips(x, checked_weight(planes, scales, zeros, settings), bias, settings.bits, y)


def checked_weight(planes: Tensor, scales: Tensor, zeros: Tensor | None, settings: CallSettings) -> NestedPlanes:
    """Weight of a call. Raises UserError for tensors that do not fit together."""
    return NestedPlanes(
        planes=planes,
        scales=scales,
        zeros=zeros,
        out_features=settings.out_features,
        in_features=settings.in_features,
        format=WeightFormat.from_op_args(scales, zeros, *settings[3:]),
    )


def _plan_launch(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    tokens: int,
    settings: CallSettings,
) -> CachedLaunch:
    """Check a call, and compile and load its kernel. Raises UserError."""
    check_x(x, planes, bias, settings.out_features, settings.in_features)
    weight = checked_weight(planes, scales, zeros, settings)
    weight.check_bits(settings.bits)
    shape = _gemm_shape(weight, settings.bits, x.dtype, tokens)
    if not is_supported(shape):
        logger.warning(
            f"The CUDA kernels support float16 and bfloat16, and groups of 32, a multiple of 64, or whole rows. A layer of "
            f"{x.dtype} with {scales.dtype} scales and groups of {weight.format.group_size} is computed by torch, slowly."
        )
        return CachedLaunch()
    if not tokens:
        return CachedLaunch()
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            "A CUDA graph is being captured, and this shape and bit-width have not been run yet: their kernel would have to be "
            "loaded now. Run the model once at these bits and this batch size before the capture."
        )
    index = x.get_device()
    device = device_limits(index)
    if device.wgmma and tokens >= WGMMA_MIN_M and not folds_zero_point_exactly(shape):
        _warn_without_wgmma(x.dtype, weight.format.zero_point_offset)
    if tokens > max_tokens(shape, device):
        _load_dequantize(shape, index)
        two = not device.wgmma and prefers_two_launches(tokens, shape.rows, shape.depth)
        return CachedLaunch(two_launches=two)
    config = make_launch_config(shape, device)
    kernel = load(config.source, config.function, defines=config.defines, device=index, prefer_shared=True, pdl=True)
    if index not in workspaces:
        workspaces[index] = Workspace(x.device)
    return CachedLaunch(kernel, config)


@functools.cache
def _warn_without_wgmma(dtype: torch.dtype, offset: float) -> None:
    logger.warning(
        f"{dtype} does not represent codes with a zero-point offset of {offset} and their zero points exactly: such layers are "
        f"computed without WGMMA, which this GPU has for {WGMMA_MIN_M} tokens and more."
    )


def device_limits(index: int) -> DeviceLimits:
    """Limits of a CUDA device."""
    properties = torch.cuda.get_device_properties(index)
    major = torch.cuda.get_device_capability(index)[0]
    return DeviceLimits(
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_multiprocessor,
        wgmma=major == _WGMMA_CAPABILITY,
        clusters=major >= _MIN_CLUSTER_CAPABILITY,
    )


def aligned_rows(x: Tensor, tokens: int) -> Tensor:
    """Return x, or a copy if its rows are not contiguous at multiples of 16 bytes; columns are padded with 0."""
    depth = x.shape[-1]
    if depth % 8:
        return torch.nn.functional.pad(x.reshape(tokens, depth), (0, -depth % 8))
    if x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _gemm_shape(weight: NestedPlanes, bits: int, dtype: torch.dtype, tokens: int) -> GemmShape:
    return GemmShape(
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
    stretch: float,
    dtype: torch.dtype,
) -> Tensor:
    """Operator ``nested_dequantize`` on a CUDA device."""
    settings = CallSettings(bits, out_features, in_features, group_size, master_bits, slicing, offset, stretch)
    weight = checked_weight(planes, scales, zeros, settings)
    weight.check_bits(bits)
    if not is_supported(_gemm_shape(weight, bits, dtype, 1)):
        return weight.dequantize(bits, dtype)
    dense = scales.new_empty(out_features, in_features, dtype=dtype)
    _dequantize_rows(weight, bits, 0, dense)
    return dense


def _load_dequantize(shape: GemmShape, device: int) -> Kernel:
    return load("dequant.cu", "nested_dequantize", defines=shape.defines(), device=device, prefer_shared=True)


def _dequantize_rows(weight: NestedPlanes, bits: int, first_tile: int, out: Tensor) -> None:
    """Dequantize the rows from a tile of 64 rows on, as many as ``out`` has."""
    shape = _gemm_shape(weight, bits, out.dtype, 1)
    kernel = _load_dequantize(shape, out.get_device())
    grid, block, shared_bytes, numbers = dequantize_launch(
        shape, out.shape[0], first_tile, scale_row_tiles(weight.scales)
    )
    arrays = (weight.planes, plane_stride(weight.planes), weight.scales, weight.zeros, out)
    kernel.launch(grid, block, (*arrays, *numbers), shared_bytes)


def _dense_strips(weight: NestedPlanes, bits: int, dtype: torch.dtype, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the dense weight about ``size`` weights at a time, in one buffer: rows, and their values."""
    if not is_supported(_gemm_shape(weight, bits, dtype, 1)):
        yield from weight.dequantize_strips(bits, dtype, size)
        return
    step = max(TILE, size // weight.in_features // TILE * TILE)
    values = weight.scales.new_empty(min(step, weight.out_features), weight.in_features, dtype=dtype)
    for start in range(0, weight.out_features, step):
        strip = slice(start, min(start + step, weight.out_features))
        _dequantize_rows(weight, bits, start // TILE, values[: strip.stop - start])
        yield strip, values[: strip.stop - start]


def _linear_by_strips(x: Tensor, weight: NestedPlanes, bias: Tensor | None, bits: int, y: Tensor) -> Tensor:
    """Dequantize strips of rows one after the other, and multiply all tokens with each by cuBLAS."""
    if x.dtype == torch.float32:
        return torch_reference.linear(x, weight, bias, bits)
    rows = x.reshape(-1, weight.in_features)
    result = y.view(-1, weight.out_features)
    for strip, values in _dense_strips(weight, bits, x.dtype, STRIP_WEIGHTS):
        if bias is None:
            torch.mm(rows, values.t(), out=result[:, strip])
        else:  # added before the result is rounded
            torch.addmm(bias[strip].to(x.dtype), rows, values.t(), out=result[:, strip])
    return y

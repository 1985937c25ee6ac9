"""Operators of mixtures of experts on CUDA devices: launches of ``kernels/moe_route.cu`` and ``kernels/moe_gemm.cu``.

What follows from shapes, dtypes and bit-widths alone is checked and planned once and cached, as in ``cuda_ops``.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matquant.cuda import Kernel, load
from matquant.errors import UserError
from matquant.formats.nested import WeightFormat
from matquant.formats.tile_layout import TILE
from matquant.inference import expert_reference, gemm_shape
from matquant.inference.argument_checks import check_no_gradient
from matquant.inference.cuda_ops import aligned_rows, device_limits
from matquant.inference.expert_reference import GroupedCall
from matquant.inference.gemm_shape import GemmShape
from matquant.inference.launch_config import plane_stride, scale_row_tiles
from matquant.inference.moe_launch import (
    MoeLaunch,
    expert_mask,
    make_moe_launch,
    max_items,
    route_shared_bytes,
    route_threads,
)

_COLUMN_MULTIPLE = 8  # columns of x that a kernel loads at a time
_NOT_LOADED = (
    "A CUDA graph is being captured, and experts of this shape and these bit-widths have not been run yet: their kernel would "
    "have to be loaded now. Run the model once at these bits and this batch size before the capture."
)

logger = logging.getLogger(__name__)


class PlannedLaunch(NamedTuple):
    """Launch for the experts that read a range of their rows at one bit-width.

    Attributes:
        mask: those experts, see ``moe_launch.expert_mask``.
        bits: their bit-width.
        first_tile: first row tile of the range in the first expert.
        column: first column of the outputs.
        rows: of one expert.
    """

    kernel: Kernel
    launch: MoeLaunch
    mask: bytes
    bits: int
    first_tile: int
    column: int
    rows: int


launch_cache: dict[tuple[Any, ...], list[PlannedLaunch] | None] = {}  # None: computed by plain torch
route_cache: dict[tuple[Any, ...], tuple[Kernel, bytes]] = {}


def is_supported(out_features: Sequence[int], in_features: int, fmt: WeightFormat, dtype: torch.dtype) -> bool:
    """Return True if the kernels support the matrices of experts and activations of a dtype."""
    shape = GemmShape(tokens=1, rows=TILE, depth=in_features, bits=fmt.master_bits, format=fmt, dtype=dtype)
    whole_tiles = all(rows % TILE == 0 for rows in out_features)
    return whole_tiles and in_features % _COLUMN_MULTIPLE == 0 and gemm_shape.is_supported(shape)


def route(experts: Tensor, held: Sequence[int], block_m: int) -> tuple[Tensor, Tensor]:
    """Operator ``route_experts`` on a CUDA device."""
    device, threads = experts.get_device(), route_threads(len(held))
    key = (experts.dtype, experts.ndim, device, tuple(held), block_m)
    if key not in route_cache:
        expert_reference.check_routing(experts, held, block_m)
        _check_no_capture()
        defines = {"WIDE_IDS": int(experts.dtype == torch.int64), "BLOCK_M": block_m, "THREADS": threads}
        route_cache[key] = load("moe_route.cu", "moe_route", defines=defines, device=device), expert_mask(held)
    kernel, mask = route_cache[key]
    count = experts.numel()
    pairs = experts.new_empty(count, dtype=torch.int32)
    items = experts.new_empty(max_items(count, len(held), block_m), 4, dtype=torch.int32)
    if count:
        arguments = (experts.contiguous(), count, mask, pairs, items, len(items))
        kernel.launch(1, threads, arguments, route_shared_bytes(threads))
    return pairs, items


def grouped_linear(call: GroupedCall) -> Tensor:
    """Operator ``nested_grouped_linear`` on a CUDA device."""
    check_no_gradient(call.x, call.scales[0], None)
    key = _key(call)
    if key not in launch_cache:
        launch_cache[key] = _plan(call)
    launches, per_row = launch_cache[key], call.pairs_per_row
    if launches is None:
        return expert_reference.grouped_linear(call)
    rows_of_expert = sum(call.out_features)
    y = call.x.new_zeros(len(call.pairs), rows_of_expert)
    if not len(call.items):
        return y
    x = aligned_rows(call.x, len(call.x))
    for one in launches:
        scales = call.scales_at(one.bits)
        arguments = (
            call.planes,
            plane_stride(call.planes),
            scales,
            call.zeros,
            x,
            y[:, one.column :],
            call.pairs,
            call.items,
            one.mask,
            per_row,
            one.rows,
            call.in_features,
            rows_of_expert,
            one.first_tile,
            rows_of_expert // TILE,
            scale_row_tiles(scales),
            *one.launch.affine,
        )
        one.kernel.launch((one.launch.row_tiles, len(call.items)), one.launch.block, arguments, one.launch.shared_bytes)
    return y


def _key(call: GroupedCall) -> tuple[Any, ...]:
    """Everything that the launches depend on but the numbers of tokens, pairs and items."""
    tensors = (call.planes, *call.scales, *(() if call.zeros is None else (call.zeros,)))
    layouts = tuple((one.dtype, one.shape, one.stride(), one.get_device()) for one in tensors)
    routing = tuple((one.dtype, one.shape[1:], one.stride(), one.get_device()) for one in (call.pairs, call.items))
    x = (call.x.dtype, call.x.shape[1:], call.x.get_device())
    return x, routing, layouts, tuple(call.scale_bits), tuple(call.bits), tuple(call.out_features), call[-7:]


def _plan(call: GroupedCall) -> list[PlannedLaunch] | None:
    """Check a call, and compile and load its kernels; None if they do not support it. Raises UserError."""
    expert_reference.check_grouped(call)
    fmt = call.format
    if not is_supported(call.out_features, call.in_features, fmt, call.x.dtype):
        logger.warning(
            f"The CUDA kernels support experts in float16 and bfloat16, in groups of 32, a multiple of 64, or whole rows, and "
            f"a multiple of {_COLUMN_MULTIPLE} columns. Experts of {call.x.dtype} with {fmt.scale_dtype} scales, groups of "
            f"{fmt.group_size} and {call.in_features} columns are computed by torch, slowly."
        )
        return None
    _check_no_capture()
    index = call.x.get_device()
    device, planned = device_limits(index), []
    for first, rows, by_expert in _ranges(call):
        for bits in sorted(set(by_expert)):
            shape = GemmShape(
                tokens=call.block_m, rows=rows, depth=call.in_features, bits=bits, format=fmt, dtype=call.x.dtype
            )
            launch = make_moe_launch(shape, device)
            kernel = load(
                launch.source, launch.function, defines=launch.defines, device=index, prefer_shared=True, pdl=True
            )
            mask = expert_mask(expert for expert, own in enumerate(by_expert) if own == bits)
            planned.append(PlannedLaunch(kernel, launch, mask, bits, first // TILE, first, rows))
    return planned


def _ranges(call: GroupedCall) -> list[tuple[int, int, tuple[int, ...]]]:
    """First row, number of rows, and bit-width by expert, of neighbouring matrices that each expert reads at one bit-width."""
    parts = len(call.out_features)
    bits = [tuple(call.bits[part::parts]) for part in range(parts)]
    ranges, first = [], 0
    for of_experts, run in itertools.groupby(zip(bits, call.out_features, strict=True), lambda one: one[0]):
        rows = sum(count for _, count in run)
        ranges.append((first, rows, of_experts))
        first += rows
    return ranges


def _check_no_capture() -> None:
    """Raise UserError while a CUDA graph is captured: no kernel can be loaded then."""
    if torch.cuda.is_current_stream_capturing():
        raise UserError(_NOT_LOADED)

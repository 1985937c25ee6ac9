"""The operators on CUDA devices: launches of ``kernels/gemm.cu``, and strips through cuBLAS for many tokens.

Everything that follows from shapes, dtypes and numbers alone is checked and planned once and kept; a call then looks its
launch up. The workspace comes from torch's allocator in each call, so that it belongs to the call's stream or CUDA graph.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from matquant.cuda import Kernel, load
from matquant.errors import UserError
from matquant.inference import blocked
from matquant.inference.checks import check_x
from matquant.inference.plan import TOKENS, Device, Plan, Problem, plan, strip_weights, supported
from matquant.inference.planes import NestedPlanes
from matquant.inference.tickets import Tickets
from matquant.nested import Slicing

_ALIGNMENT = 16  # bytes, of x's rows

logger = logging.getLogger(__name__)


class _Launch(NamedTuple):
    """What is done for calls that agree in all but addresses. Without a kernel they go through ``_many``."""

    kernel: Kernel | None
    plan: Plan | None


_launches: dict[tuple, _Launch] = {}
_tickets: dict[int, Tickets] = {}


def linear(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, out_features: int,
    group_size: int, master_bits: int, slicing: Slicing, offset: float,
) -> Tensor:  # fmt: skip
    """``nested_linear`` on a CUDA device. Raises what ``inference.ops`` says."""
    shape, device = x.shape, x.get_device()
    tokens = x.numel() // shape[-1] if shape and shape[-1] else 0
    about = (bits, out_features, group_size, master_bits, slicing, offset)
    key = (
        min(tokens, TOKENS + 1), shape[-1:], x.dtype, device, planes.shape, planes.dtype, planes.get_device(),
        scales.shape, scales.dtype, None if zeros is None else (zeros.shape, zeros.dtype),
        None if bias is None else (bias.shape, bias.dtype), about,
    )  # fmt: skip
    launch = _launches.get(key)
    contiguous = planes.is_contiguous() and scales.is_contiguous() and (zeros is None or zeros.is_contiguous())
    if launch is None or not contiguous:
        launch = _launches[key] = _prepare(x, planes, scales, zeros, bias, tokens, about)
    y = x.new_empty((*shape[:-1], out_features))
    if not tokens:
        return y
    if launch.kernel is None or launch.plan is None:
        weight = _weight(planes, scales, zeros, shape[-1], about)
        return _many(x, weight, bias, bits, y)
    rows = _aligned(x, tokens)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    workspace = x.new_empty(launch.plan.workspace, dtype=torch.float32)
    tickets = _tickets[device].now(launch.plan.tickets)
    arguments = launch.plan.arguments(planes, scales, zeros, rows, bias, y, workspace, tickets, tokens)
    launch.kernel.launch(launch.plan.grid, launch.plan.block, arguments, launch.plan.shared_bytes)
    return y


def _weight(planes: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, about: tuple) -> NestedPlanes:
    _, out_features, group_size, master_bits, slicing, offset = about
    return NestedPlanes(
        planes=planes, scales=scales, zeros=zeros, out_features=out_features, in_features=in_features,
        group_size=group_size, master_bits=master_bits, slicing=slicing, offset=offset,
    )  # fmt: skip


def _prepare(
    x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, tokens: int, about: tuple
) -> _Launch:
    """Check a call, and compile and load its kernel. Raises UserError."""
    check_x(x, planes, bias, about[1])
    weight = _weight(planes, scales, zeros, x.shape[-1], about)
    weight.check_bits(about[0])
    problem = Problem(
        tokens=tokens, rows=weight.out_features, depth=weight.in_features, bits=about[0], group_size=weight.group_size,
        zeros=zeros is not None, dtype=x.dtype, scale_dtype=scales.dtype, master_bits=weight.master_bits,
        slicing=weight.slicing, offset=weight.offset,
    )  # fmt: skip
    if not supported(problem):
        logger.warning(
            f"The CUDA kernels take float16 and bfloat16, and groups of 32 or a multiple of 64. A layer of "
            f"{x.dtype} with {scales.dtype} scales and groups of {weight.group_size} is computed by torch, slowly."
        )
        return _Launch(None, None)
    if tokens > TOKENS or not tokens:
        return _Launch(None, None)
    if torch.cuda.is_current_stream_capturing():
        raise UserError(
            "A CUDA graph is being captured, and this shape and width have not been run yet: their kernel would have to be "
            "loaded now. Run the model once at this width and batch size before the capture."
        )
    device = x.get_device()
    about_device = torch.cuda.get_device_properties(device)
    multiprocessors, shared = about_device.multi_processor_count, about_device.shared_memory_per_multiprocessor
    launch = plan(problem, Device(multiprocessors=multiprocessors, shared_bytes=shared))
    kernel = load("gemm.cu", "nested_gemm", defines=launch.defines, device=device)
    if device not in _tickets:
        _tickets[device] = Tickets(x.device)
    return _Launch(kernel, launch)


def _aligned(x: Tensor, tokens: int) -> Tensor:
    """x, or where need be a copy, with rows one after the other from multiples of 16 bytes on; what is added is 0."""
    depth = x.shape[-1]
    if depth % 8:
        return torch.nn.functional.pad(x.reshape(tokens, depth), (0, -depth % 8))
    if x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _many(x: Tensor, weight: NestedPlanes, bias: Tensor | None, bits: int, y: Tensor) -> Tensor:
    """Decode as many rows as stay in the second-level cache, multiply all tokens with them, and go on."""
    if x.dtype == torch.float32:
        return blocked.linear(x, weight, bias, bits)
    rows = x.reshape(-1, weight.in_features)
    result = y.view(-1, weight.out_features)
    strip_size = strip_weights(torch.cuda.get_device_properties(x.device).L2_cache_size)
    for strip, values in weight.decode_strips(bits, x.dtype, strip_size):
        torch.mm(rows, values.t(), out=result[:, strip])
    if bias is not None:
        result += bias
    return y

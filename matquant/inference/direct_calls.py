"""Decision to call the CUDA implementation of an operator directly, without torch's dispatcher.

The dispatcher converts each argument of an operator, 13 for ``nested_linear``, which takes longer than to launch the kernel. A
direct call gives the same tensor; only what follows operators would miss it. A profiler of torch shows
``matquant::nested_linear``, because calls take the operator while it runs; one of the whole system, such as Nsight Systems,
shows the kernels alone.
"""

import operator

import torch
from torch import Tensor, nn
from torch.autograd import profiler

_BIAS_TYPES = (nn.Parameter, Tensor, type(None))

is_on_cuda = operator.attrgetter("is_cuda")


def takes_direct_call(x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> bool:
    """Return True if the operator of these tensors would only run its CUDA implementation, and nothing follows it.

    False under ``torch.compile``, where ``operators_are_followed``, where a gradient is recorded, for subclasses of ``Tensor``,
    and for an ``x`` that a kernel cannot read at its address: the lazy negative of a tensor, and zeros without memory.
    """
    if torch.compiler.is_dynamo_compiling() or not is_on_cuda(x) or operators_are_followed():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or scales.requires_grad or getattr(bias, "requires_grad", False)):
        return False
    are_plain = type(x) is type(planes) is type(scales) is Tensor and (zeros is None or type(zeros) is Tensor)
    return are_plain and type(bias) in _BIAS_TYPES and not (x.is_neg() or x._is_zerotensor())


def operators_are_followed() -> bool:
    """Return True if something follows the operators of this thread.

    Such as modes of ``torch_dispatch`` and ``torch_function`` (fake tensors, ``make_fx``, ``torch.device`` as a context),
    transforms of ``torch.func``, ``torch.jit.trace``, and profilers.
    """
    # Functions that torch itself calls, in autograd.Function and before operators; it has no public ones.
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or profiler._is_profiler_enabled
    )

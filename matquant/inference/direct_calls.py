"""Decision to call the CUDA implementation of an operator directly, without torch's dispatcher.

The dispatcher converts each argument of an operator, which takes 7 µs for the 13 of ``nested_linear`` (H200 host), about half
as long as a whole ``F.linear``. A direct call gives the same tensor; only those who follow operators would miss it.
"""

import operator

import torch
from torch import Tensor, nn
from torch.autograd import profiler

_PLAIN_TYPES = frozenset({Tensor, nn.Parameter, type(None)})

is_on_cuda = operator.attrgetter("is_cuda")


def takes_direct_call(x: Tensor, *others: Tensor | None) -> bool:
    """Return True if the operator of these arguments would run its CUDA implementation, and nothing would follow it.

    False under ``torch.compile``, in tracing, in modes of ``torch_function`` and ``torch_dispatch`` (fake tensors, ``make_fx``),
    in transforms of ``torch.func``, while a profiler runs, for subclasses of ``Tensor``, and for an ``x`` that a kernel cannot
    read at its address: the lazy negative of a tensor, and zeros without memory. Gradients are the caller's concern.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and is_on_cuda(x)
        and _PLAIN_TYPES.issuperset(map(type, (x, *others)))
        and not operators_are_followed()
        and not x.is_neg()
        and not x._is_zerotensor()
    )


def operators_are_followed() -> bool:
    """Return True if a mode, a transform, a tracer or a profiler follows the operators of this thread."""
    # torch asks these functions itself, in autograd.Function and in its operators; it has no public ones.
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or profiler._is_profiler_enabled
    )

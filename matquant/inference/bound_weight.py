"""Weight of a layer on a CUDA device, prepared for repeated calls: checked and encoded for the kernels once."""

import weakref
from typing import Any, NamedTuple

from torch import Tensor

from matquant.cuda import Kernel, PreparedLaunch
from matquant.inference import cuda_ops
from matquant.inference.cuda_ops import CachedLaunch
from matquant.inference.launch_config import WeightArguments

_MAX_CALLS = 8  # numbers of tokens for which a layer prepares its launches


class BoundCall(NamedTuple):
    """Launch of calls with one ``call_key``."""

    launch: CachedLaunch
    weight: WeightArguments
    prepared: PreparedLaunch | None


class BoundWeight:
    """Weight and bias of a layer at one bit-width.

    Holds addresses and weak references: a tensor that the layer replaces is freed, and one whose memory was replaced is noticed
    by ``reads``. May be called from several threads at once.

    Args:
        settings: values of ``cuda_ops.CallSettings``.

    Raises:
        UserError: the tensors do not fit together.
    """

    def __init__(
        self, settings: tuple[Any, ...], planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
    ) -> None:
        cuda_ops.checked_weight(planes, scales, zeros, cuda_ops.CallSettings(*settings))
        self._planes, self._scales, self._zeros, self._bias = map(_reference, (planes, scales, zeros, bias))
        self._addresses = tuple(None if one is None else one.data_ptr() for one in (planes, scales, zeros))
        self._arguments: dict[
            Kernel, WeightArguments
        ] = {}  # the macros of a kernel decide its TMA descriptors of a weight
        self._bias_dtype = None if bias is None else bias.dtype
        self._calls: dict[tuple[Any, ...], BoundCall] = {}
        self._settings = settings
        self._launches = cuda_ops.launches_of(planes, scales, zeros, bias, settings)

    def reads(self, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> bool:
        """Return True if these are the tensors that were bound, in the same memory."""
        of_planes, of_scales, of_zeros = self._addresses
        return (
            self._planes() is planes
            and self._scales() is scales
            and self._zeros() is zeros
            and self._bias() is bias
            and planes.data_ptr() == of_planes
            and scales.data_ptr() == of_scales
            and (zeros is None or zeros.data_ptr() == of_zeros)
            and (bias is None or bias.dtype is self._bias_dtype)  # the data of a parameter changes with its dtype
        )

    def linear(self, x: Tensor, planes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute x W^T + bias for tensors that ``reads`` accepted; errors as in ``inference.ops``."""
        key = cuda_ops.call_key(x)
        call = self._calls.get(key)
        if call is not None:
            return cuda_ops.multiply(call.launch, x, call.weight, bias, key[0], call.prepared)
        launch = self._launches.get(key)
        if launch is None or launch.kernel is None or launch.config is None:
            return cuda_ops.linear(x, planes, scales, zeros, bias, *self._settings)
        weight = self._arguments.get(launch.kernel)
        if weight is None:
            weight = launch.config.weight_arguments(planes, scales, zeros).by_address()
            self._arguments[launch.kernel] = weight
        if len(self._calls) < _MAX_CALLS:
            self._calls[key] = BoundCall(launch, weight, cuda_ops.prepare(launch, weight, key[0]))
        return cuda_ops.multiply(launch, x, weight, bias, key[0])


def _reference(tensor: Tensor | None) -> Any:
    return _nothing if tensor is None else weakref.ref(tensor)


def _nothing() -> None:
    """Reference to a tensor that the layer does not have."""

"""Layers of one module that share their input (q, k and v; gate and up), multiplied by one launch for few tokens.

Each layer is still called by itself. The first one that is called with a tensor computes the outputs of all, and the others
take theirs if they are called with the very same tensor, unchanged, on the same stream of the same thread. A layer is
multiplied on its own, as if it were not fused:

  - for more than 64 tokens,
  - where gradients are recorded, under ``torch.compile``, and in ``torch.inference_mode``, which counts no changes of a tensor,
  - at a bit-width that the call names, and where no neighbour reads the same bit-width,
  - while one of the layers has tensors on another device, or was deleted,
  - after an output was not taken, until all layers have been called with one tensor again.

Outputs of fused layers are ranges of columns of one tensor. They equal those of separate launches up to the rounding of partial
sums: a launch divides the columns of a matrix among thread blocks by its number of rows.
"""

import dataclasses
import functools
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matquant.formats.nested import WeightFormat
from matquant.formats.planes import read_scales
from matquant.formats.tile_layout import TILE, tiles
from matquant.inference import ops
from matquant.inference.bound_weight import BoundWeight
from matquant.inference.direct_calls import takes_direct_call
from matquant.inference.kernel_families.mma import GEMM_MAX_M
from matquant.inference.row_ranges import empty_whole, equal_runs, multiply_ranges, tile_ranges

MAX_TOKENS = GEMM_MAX_M  # the outputs of more tokens take more memory than a launch is worth
_BIAS = "bias"


class FusedLayers:
    """Layers whose planes, scales, zero points and biases are ranges of shared tensors while all are on one device.

    The shared tensors are made when the layers are fused or moved to a device, never in a call, so that captured CUDA graphs
    stay valid. Copies and pickles of the layers hold them once, and are fused too.

    Args:
        members: ``NestedLinear`` layers with equal formats and input features. Only weak references are held.
        device_types: types of devices on which the layers are fused; elsewhere their tensors remain their own.
    """

    def __init__(self, members: Sequence[Any], device_types: Iterable[str] = ("cuda",)) -> None:
        first = members[0]
        sizes = _Sizes(first.format, first.in_features, tuple(member.out_features for member in members))
        self._set_state(list(members), sizes, frozenset(device_types), {})
        for member in members:
            member.fused = self
        self.pack()

    def _set_state(
        self, members: list[Any], sizes: "_Sizes", device_types: frozenset[str], whole: dict[str, Tensor]
    ) -> None:
        self._members = [weakref.ref(member) if member is not None else _nothing for member in members]
        self._sizes, self._device_types = sizes, device_types
        self._whole = whole  # shared tensors by name of the buffer, or "bias"; empty while the layers are separate
        self._ranges: list[dict[str, Tensor]] = [{} for _ in members]  # parts of the shared tensors, by member
        self._biases: list[Tensor | None] = [None] * len(members)
        self._operands: tuple[Any, ...] | None = None
        self._bound: dict[int, BoundWeight] = {}  # shared weight by bit-width
        self._shares = True  # False after an output was not taken
        self._launched: set[tuple[Any, ...]] = set()  # launches that have run, which a CUDA graph can capture
        self._thread = _Thread()

    def __getstate__(self) -> tuple[Any, ...]:
        return [ref() for ref in self._members], self._sizes, self._device_types, self._whole

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._set_state(*state)
        for index, member in enumerate(state[0]):
            if member is not None and "_buffers" in vars(member):  # the others call restore when they have a state
                self.restore(index, member)

    @property
    def device_types(self) -> frozenset[str]:
        """Types of devices on which the layers are fused."""
        return self._device_types

    @property
    def rows(self) -> tuple[int, ...]:
        """Output features of each member."""
        return self._sizes.out_features

    @property
    def is_packed(self) -> bool:
        """True while the tensors of the layers are ranges of shared ones."""
        return bool(self._whole)

    def index_of(self, layer: nn.Module) -> int | None:
        """Position of a member; None for any other layer, such as a shallow copy of a member."""
        for index, ref in enumerate(self._members):
            if ref() is layer:
                return index
        return None

    def shared_names(self, layer: nn.Module) -> set[str]:
        """Names of the buffers of a member that are ranges of shared tensors."""
        index = self.index_of(layer)
        ranges = {} if index is None else self._ranges[index]
        return {name for name, tensor in ranges.items() if layer._buffers.get(name) is tensor}

    def restore(self, index: int, layer: nn.Module) -> None:
        """Set the shared tensors of an unpickled layer. This object may have its state before the layer or after it."""
        if vars(self).get("_whole"):
            self._set_ranges(index, layer)

    def pack(self) -> None:
        """Make the tensors of all members ranges of shared ones, if they are on one device of ``device_types``.

        Copies them, and frees the memory of the originals. Otherwise the tensors of each member become its own.
        """
        members: list[Any] = [ref() for ref in self._members]
        if all(self._is_intact(index, member) for index, member in enumerate(members)):
            return
        self._set_state(members, self._sizes, self._device_types, {})
        if not self._can_pack(members):
            return
        with torch.no_grad():
            for name in _tensor_names(members[0]):
                whole = self._whole[name] = empty_whole([member._buffers[name] for member in members])
                for member, part in zip(members, self._sizes.parts, strict=True):
                    whole[:, part].copy_(member._buffers[name])
                    member._buffers[name] = whole[:, part]  # frees the original before the next is copied
            biases = [member.bias for member in members if member.bias is not None]
            if biases:
                self._whole[_BIAS] = biases[0].new_zeros(sum(self._sizes.rows))
        for index, member in enumerate(members):
            self._set_ranges(index, member)

    def _can_pack(self, members: Sequence[Any]) -> bool:
        """True if all members exist, and their tensors fit into shared ones."""
        if any(member is None for member in members):
            return False
        names = [_tensor_names(member) for member in members]
        tensors = [member._buffers[name] for member in members for name in _tensor_names(member)]
        biases = [member.bias for member in members if member.bias is not None]
        devices = {tensor.device for tensor in (*tensors, *biases)}
        return (
            all(one == names[0] for one in names)
            and len({member.planes.shape[0] for member in members}) == 1
            and len({bias.dtype for bias in biases}) <= 1
            and len(devices) == 1
            and devices.pop().type in self._device_types
        )

    def _set_ranges(self, index: int, layer: Any) -> None:
        """Let the tensors of one member be its ranges of the shared ones, with the values of its bias."""
        part = self._sizes.parts[index]
        for name, whole in self._whole.items():
            if name != _BIAS:
                layer._buffers[name] = self._ranges[index].setdefault(name, whole[:, part])
        if layer.bias is not None and self._biases[index] is None:
            first = part.start * TILE
            own = self._biases[index] = self._whole[_BIAS][first : first + self._sizes.out_features[index]]
            own.copy_(layer.bias.data)
            layer.bias.data = own

    def _is_intact(self, index: int, layer: Any) -> bool:
        """True if the tensors of a member still are its ranges of the shared ones."""
        ranges = self._ranges[index]
        if layer is None or not ranges:
            return False
        buffers = layer._buffers
        for name, one in ranges.items():
            if buffers.get(name) is not one:
                return False
        bias, own = layer._parameters.get(_BIAS), self._biases[index]
        return own is bias is None or (own is not None and bias is not None and bias.data_ptr() == own.data_ptr())

    def output(self, layer: Any, x: Tensor) -> Tensor | None:
        """Output [..., out_features] of a member that is called with ``x``; None if it must be multiplied on its own."""
        index = self.index_of(layer)
        if index is None or type(x) is not Tensor or not self._is_intact(index, layer):
            return None
        if torch.is_grad_enabled() and _records_gradients(x, layer.bias):
            return None
        stream, current = _current_stream(x), self._thread.round
        if current is not None and current.continues(index, x, stream):
            return self._continue_round(current, index, layer.current_bits(), x)
        return self._start_round(index, x, stream) if self._fits(x) else None

    def _fits(self, x: Tensor) -> bool:
        """True if an output for x can be shared: see the conditions of the module."""
        columns, device = self._sizes.in_features, x.device
        if x.is_inference() or not x.ndim or x.shape[-1] != columns or not 0 < x.numel() <= MAX_TOKENS * columns:
            return False
        return device == self._whole["planes"].device and device.type in self._device_types

    def _tokens(self, x: Tensor) -> int:
        return x.numel() // self._sizes.in_features

    def _continue_round(self, current: "_SharedCalls", index: int, bits: int | None, x: Tensor) -> Tensor | None:
        """Output of a further member, if the first one computed it at the same bit-width."""
        current.remaining.discard(index)
        if not current.remaining:
            self._thread.round, self._shares = None, True
        computed_at, y = current.outputs.pop(index, (None, None))
        if computed_at == bits:
            return y
        if not current.stream.is_capturing:
            self._launched.add((self._tokens(x), x.dtype, index, bits))
        return None

    def _start_round(self, index: int, x: Tensor, stream: "_Stream") -> Tensor | None:
        """Output of the first member that is called with a tensor. Computes those of all if they are likely to be taken."""
        previous, self._thread.round = self._thread.round, None
        if previous is not None and previous.remaining:
            self._shares = False
        bits, outputs = self._current_bits(), {}
        if bits is not None and self._fuses(index, x, bits, stream.is_capturing):
            outputs = dict(enumerate(zip(bits, self._multiply(x, bits), strict=True)))
        _, y = outputs.pop(index, (None, None))
        remaining = set(range(len(self._members)))
        remaining.discard(index)
        self._thread.round = _SharedCalls(x, stream, remaining, outputs)
        return y

    def _current_bits(self) -> tuple[int, ...] | None:
        """Bit-width of each member in the current phase; None if one was deleted or moved, or its phase is unknown."""
        found = []
        for index, ref in enumerate(self._members):
            member: Any = ref()
            bits = member.current_bits() if self._is_intact(index, member) else None
            if bits is None:
                return None
            found.append(bits)
        return tuple(found)

    def _fuses(self, index: int, x: Tensor, bits: tuple[int, ...], is_capturing: bool) -> bool:
        """Decide whether to compute all outputs. A CUDA graph captures what has run before, in which kernels were loaded."""
        tokens, dtype = self._tokens(x), x.dtype
        together, alone = (tokens, dtype, bits), (tokens, dtype, index, bits[index])
        fuses = self._shares and len(equal_runs(bits, self._sizes.rows)) < len(bits)
        if is_capturing:
            return together in self._launched and (fuses or alone not in self._launched)
        self._launched.add(together if fuses else alone)
        return fuses

    def _multiply(self, x: Tensor, bits: tuple[int, ...]) -> list[Tensor]:
        """Outputs of all members, one launch for neighbours of equal bit-width."""
        sizes = self._sizes
        if self._operands is None:
            self._operands = self._make_operands()
        if len(set(bits)) == 1:
            products = [self._multiply_all(x, bits[0], *self._operands)]
        else:
            products = multiply_ranges(x, *self._operands, bits, sizes.rows, sizes.in_features, *sizes.format.op_args)
        outputs: list[Tensor] = []
        for product, (_, rows) in zip(products, equal_runs(bits, sizes.rows), strict=True):
            outputs += product.split(rows, -1)
        if sizes.is_padded:
            return [y[..., :count] for y, count in zip(outputs, sizes.out_features, strict=True)]
        return outputs

    def _multiply_all(
        self,
        x: Tensor,
        bits: int,
        planes: Tensor,
        scales: Sequence[Tensor],
        scale_bits: Sequence[int],
        zeros: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Outputs of all members at one bit-width in one tensor; arguments as of ``multiply_ranges``."""
        sizes, tensors = self._sizes, (planes, read_scales(scales, scale_bits, bits), zeros, bias)
        settings = (bits, sum(sizes.rows), sizes.in_features, *sizes.format.op_args)
        if not takes_direct_call(x, *tensors):
            product: Tensor = ops.nested_linear(x, *tensors, *settings)
            return product
        bound = self._bound.get(bits)
        if bound is None or not bound.reads(*tensors):
            bound = self._bound[bits] = BoundWeight(settings, *tensors)
        return bound.linear(x, *tensors)

    def _make_operands(self) -> tuple[Any, ...]:
        """Arguments of ``multiply_ranges`` that do not change from call to call: the shared tensors."""
        whole = self._whole
        scale_bits = [bits for bits in self._sizes.format.scale_bits if f"scales{bits}" in whole]
        scales = [whole["scales"], *(whole[f"scales{bits}"] for bits in scale_bits)]
        return whole["planes"], scales, scale_bits, whole.get("zeros"), whole.get(_BIAS)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Format and sizes of fused layers.

    Attributes:
        parts: row tiles of each layer in the shared tensors.
        rows: rows of each layer with those that fill its last tile, whose outputs are dropped.
    """

    format: WeightFormat
    in_features: int
    out_features: tuple[int, ...]

    @functools.cached_property
    def parts(self) -> list[slice]:
        return tile_ranges(self.out_features)

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        return tuple(tiles(count) * TILE for count in self.out_features)

    @functools.cached_property
    def is_padded(self) -> bool:
        return self.rows != self.out_features


class _Stream(NamedTuple):
    """CUDA stream of a call, 0 on the CPU, and whether a graph is captured on it."""

    handle: int
    is_capturing: bool


_HOST = _Stream(0, False)


def _current_stream(x: Tensor) -> _Stream:
    if not x.is_cuda:
        return _HOST
    return _Stream(torch._C._cuda_getCurrentRawStream(x.get_device()), torch.cuda.is_current_stream_capturing())


def _records_gradients(x: Tensor, bias: Tensor | None) -> bool:
    return x.requires_grad or (bias is not None and bias.requires_grad)


class _SharedCalls:
    """Calls of fused layers with one tensor.

    Attributes:
        remaining: members that have not been called with it.
        outputs: bit-width and output of members that have not taken it, by position; dropped with the tensor.
    """

    def __init__(self, x: Tensor, stream: _Stream, remaining: set[int], outputs: dict[int, tuple[int, Tensor]]) -> None:
        self.remaining, self.outputs, self.stream = remaining, outputs, stream
        self._x = weakref.ref(x, lambda _: outputs.clear())
        self._version = x._version

    def continues(self, index: int, x: Tensor, stream: _Stream) -> bool:
        """True if a member that was not called yet is called with the same tensor, unchanged, on the same stream."""
        same = self._x() is x and self._version == x._version
        return same and self.stream == stream and index in self.remaining


class _Thread(threading.local):
    """Current round of the current thread."""

    round: _SharedCalls | None = None


def _nothing() -> None:
    """Reference to a layer that was deleted."""


def _tensor_names(layer: nn.Module) -> list[str]:
    return [name for name, buffer in layer._buffers.items() if buffer is not None]

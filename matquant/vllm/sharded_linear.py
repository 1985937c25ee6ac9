"""Shard of one stored layer on one device: sliced tensor by tensor while loading, and read at a bit-width that may change."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError, shorten
from matquant.formats.groups import group_count
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.formats.planes import NestedPlanes
from matquant.formats.tile_layout import group_shape, plane_shape
from matquant.inference.linear import scale_buffers
from matquant.inference.shard import WeightShard
from matquant.vllm import vllm_ops
from matquant.vllm.plane_memory import PlaneMemory

_DUMMY_WEIGHT = 1e-3  # largest magnitude of dummy weights, that of vLLM's own


class ShardedDenseLinear(nn.Module):
    """Shard of a dense layer that vLLM fuses with nested ones."""

    weight: Tensor

    def __init__(self, name: str, shard: WeightShard, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.shard = name, shard
        self.stored = {"weight": TensorSpec((shard.out_features, shard.in_features), dtype)}
        self.register_buffer("weight", torch.empty(shard.shape, dtype=dtype), persistent=False)
        self.expected = set(self.stored)

    def load(self, kind: str, tensor: Tensor) -> None:
        """Load the stored tensor ``weight`` [out_features, in_features] of the whole layer. Raises UserError."""
        wanted = [self.shard.out_features, self.shard.in_features]
        if list(tensor.shape) != wanted:
            raise UserError(f"{self.name}.{kind} is {list(tensor.shape)} in the checkpoint; the model needs {wanted}.")
        self.weight.copy_(self.shard.slice_matrix(tensor))
        self.expected.discard(kind)

    def load_dummy(self) -> None:
        """Fill the layer with small random values."""
        self.weight.uniform_(-_DUMMY_WEIGHT, _DUMMY_WEIGHT, generator=_dummy_generator(self.weight))
        self.expected.clear()

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map [..., columns] to [..., rows]."""
        return nn.functional.linear(x, self.weight, bias)


class ShardedNestedLinear(nn.Module):
    """Shard of a nested layer on one device.

    Args:
        name: name of the layer in the checkpoint.
        spec: size and format of the whole layer.
        stored: its tensors in the checkpoint by last part of their name: ``scales``, ``zeros``, ``plane0``, ...; or ``qweight``
            and unpacked ``scales`` of a MatGPTQ checkpoint.
        shard: rows and columns to hold.
        num_planes: number of planes to keep; other stored planes are dropped.
        bits, prefill: initial bit-widths of decoding and of prefill.
        decode_tokens: see ``vllm_ops.new_step_bits``.

    Attributes:
        planes, scales, scales2, ..., zeros: buffers as in ``NestedLinear``, for the shard.
        step_bits: int64 [3] on the host, see ``vllm_ops.new_step_bits``. Setting bit-widths writes to it and moves no weights.
        format: meaning of the codes, with the group size of the shard.
        expected: names of stored tensors that have not been loaded yet.
        is_reader: True if the tensors are those of another layer, see ``reader``.
        fused: holds the tensors, of which those of this layer are ranges; None if they stand alone.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor | None
    step_bits: Tensor

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        stored: Mapping[str, TensorSpec],
        shard: WeightShard,
        *,
        num_planes: int,
        bits: int,
        prefill: int,
        decode_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.name, self.spec, self.stored, self.shard = name, spec, stored, shard
        self.is_reader = False
        self.__dict__["fused"] = None  # no submodule: it stands beside this layer
        self.format = dataclasses.replace(spec.format, group_size=shard.group_size(spec.format.group_size))
        grid = (num_planes, *plane_shape(*shard.shape))
        side = group_shape(*shard.shape, self.format.group_size)
        zeros = torch.empty(side, dtype=torch.uint8) if spec.format.has_zero_points else None
        self.register_buffer("planes", torch.empty(grid, dtype=torch.int32), persistent=False)
        self._memory: PlaneMemory | None = None  # made when the planes are at their place
        self.scale_bits = self.format.scale_bits_within(num_planes)
        for buffer in scale_buffers(self.format, num_planes):
            self.register_buffer(buffer, torch.empty(side, dtype=spec.format.scale_dtype), persistent=False)
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("step_bits", vllm_ops.new_step_bits(bits, prefill, decode_tokens), persistent=False)
        self.set_bits(bits, prefill)
        self.expected = {kind for kind in stored if kind in self._buffers or 0 <= _plane_index(kind) < num_planes}
        self.expected |= stored.keys() & {"qweight"}

    def reader(self, bits: int) -> "ShardedNestedLinear":
        """Layer that shares all tensors of this one and reads them at a bit-width of its own. It loads nothing.

        Raises:
            UserError: the planes do not hold ``bits`` bits.
        """
        self.check_bits(bits)
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.step_bits = vllm_ops.new_step_bits(bits, bits, int(self.step_bits[2]))
        other.is_reader, other.expected = True, set()
        return other

    def share(self, fused: nn.Module, memory: PlaneMemory) -> None:
        """Take the tensors as ranges of those of ``fused``, whose planes ``memory`` holds."""
        self.__dict__["fused"], self._memory = fused, memory

    def load(self, kind: str, tensor: Tensor) -> None:
        """Load a stored tensor of the whole layer, for example ``plane0``.

        Raises:
            UserError: the shape or dtype differs from the checkpoint's config.
        """
        if self.is_reader:
            return
        found, size = TensorSpec(tuple(tensor.shape), tensor.dtype), self.spec.format.group_size
        if found != self.stored.get(kind):
            raise UserError(
                f"{self.name}.{kind} is {found.dtype} {list(found.shape)}, but the checkpoint's config says "
                f"{self.stored.get(kind)}. The folder is damaged; copy or download it again."
            )
        if kind == "qweight":
            self._load_codes(tensor)
        elif tensor.ndim == 2:
            self.scales.copy_(self.shard.slice_groups(tensor, size))
        elif kind in self._buffers:
            getattr(self, kind).copy_(self.shard.slice_packed_groups(tensor, size))
        elif 0 <= (index := _plane_index(kind)) < self.planes.shape[0]:
            self.planes[index].copy_(self.shard.slice_plane(tensor, index))
        self.expected.discard(kind)

    def load_dummy(self) -> None:
        """Fill the layer with random codes and small scales: finite weights of both signs at every bit-width."""
        if self.is_reader:
            return
        generator = _dummy_generator(self.planes)
        self.planes.random_(-(2**31), 2**31, generator=generator)
        for name in scale_buffers(self.format, self.planes.shape[0]):
            getattr(self, name).fill_(_DUMMY_WEIGHT / 2 ** (self.format.master_bits - 1))
        if self.zeros is not None:
            self.zeros.random_(0, 2**self.format.master_bits, generator=generator)
        self.expected.clear()

    def _load_codes(self, codes: Tensor) -> None:
        """Load the codes of a MatGPTQ checkpoint: uint8 [out_features, in_features] of the whole layer."""
        rows, columns = self.shard.shape
        weight = NestedWeight(
            codes=self.shard.slice_matrix(codes),
            scales=torch.zeros(rows, group_count(columns, self.format.group_size), dtype=self.format.scale_dtype),
            zeros=None,
            format=self.format,
        )
        self.planes.copy_(NestedPlanes.pack(weight).planes[: self.planes.shape[0]])

    @property
    def bits(self) -> tuple[int, int]:
        """Bit-widths of decoding and of prefill."""
        decode, prefill, _ = self.step_bits.tolist()
        return decode, prefill

    def set_bits(self, bits: int, prefill: int) -> None:
        """Set the bit-widths of decoding and of prefill. Raises UserError, and changes nothing, if the planes lack one."""
        self.check_bits(bits)
        self.check_bits(prefill)
        self.step_bits[0], self.step_bits[1] = bits, prefill

    def check_bits(self, bits: int) -> None:
        """Check that the planes hold ``bits`` bits. Raises UserError."""
        self.format.check_bits(bits, self.planes.shape[0], self.name)

    @property
    def memory(self) -> PlaneMemory:
        """Storage of the planes, the same for all readers."""
        if self._memory is None:
            self._memory = PlaneMemory(self.planes)
        return self._memory

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map [..., columns] to [..., rows] at the bit-width of the current step."""
        return multiply(self, x, bias, [self.step_bits], [self.shard.shape[0]], self.shard.shape[1])


def multiply(
    layer: Any, x: Tensor, bias: Tensor | None, step_bits: Sequence[Tensor], rows: Sequence[int], columns: int
) -> Tensor:
    """Product with the planes of a layer at the bit-widths of the current step.

    Args:
        layer: module with ``planes``, sets of scales, ``zeros`` and ``format``.
        x: [..., in_features].
        step_bits: bit-widths of each range of rows, see ``vllm_ops.new_step_bits``.
        rows: rows of each range.
        columns: in_features.

    Returns:
        [..., rows of all ranges].
    """
    out: Tensor = torch.ops.matquant.nested_linear_runtime_bits.default(
        x,
        layer.planes,
        [layer.scales, *(getattr(layer, f"scales{bits}") for bits in layer.scale_bits)],
        list(layer.scale_bits),
        layer.zeros,
        bias,
        step_bits,
        rows,
        columns,
        *layer.format.op_args,
    )
    return out


ShardedLinear = ShardedNestedLinear | ShardedDenseLinear


def finish_loading(layers: Sequence[ShardedLinear], is_dummy: bool = False) -> None:
    """Check that all tensors of the layers were loaded, else vLLM would compute with uninitialized memory. Raises UserError.

    Args:
        is_dummy: True for ``load_format=dummy``, which loads nothing: fill the layers with dummy values instead.
    """
    if is_dummy:
        for layer in layers:
            layer.load_dummy()
    missing = [f"{layer.name}.{kind}" for layer in layers for kind in sorted(layer.expected)]
    if missing:
        raise UserError(
            f"The checkpoint's files do not hold {shorten(missing)}. They are damaged or incomplete; copy or download the "
            "folder again."
        )


def _dummy_generator(tensor: Tensor) -> torch.Generator:
    """Generator with a fixed seed, so that every start has the same dummy values."""
    return torch.Generator(tensor.device).manual_seed(0)


def _plane_index(kind: str) -> int:
    """Index of a stored plane; -1 for tensors that every bit-width reads."""
    return int(kind.removeprefix("plane")) if kind.startswith("plane") else -1


def share_equal_parameters(draft: nn.Module, target: nn.Module) -> None:
    """Let a draft model use the target's parameters where both are equal, so that memory holds them once."""
    known = dict(target.named_parameters())
    for name, parameter in draft.named_parameters():
        other = known.get(name)
        if other is None or other.shape != parameter.shape or other.dtype != parameter.dtype:
            continue
        if parameter.numel() and torch.equal(parameter, other):
            parameter.data = other.data

"""Linear layer that holds all bit planes of its weight and reads as many as its bit-width needs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.planes import NestedPlanes
from matquant.formats.tile_layout import group_shape, plane_shape
from matquant.inference import ops
from matquant.inference.bound_weight import BoundWeight
from matquant.inference.direct_calls import takes_direct_call
from matquant.inference.forward_phase import ForwardPhase
from matquant.inference.fused_layers import FusedLayers
from matquant.inference.ops import differentiable_linear
from matquant.inference.weight_view import WeightView

_STATE_VERSION = 1
_STATE_FIELDS = ("format", "out_features", "in_features", "group_size", "master_bits", "round", "offset", "stretch")


class NestedLinear(nn.Module):
    """Linear layer y = x W^T + bias with W at any bit-width of one set of planes.

    The bit-width is an attribute and moves no data: it may be set at any time and differ from call to call. A captured CUDA
    graph keeps the bit-width of its capture. ``torch.compile`` makes one graph per bit-width.

    Gradients flow to ``x`` and to a bias that requires one; see ``ops.differentiable_linear``.

    The constructor leaves the weight uninitialized, to be filled from a state dict; ``from_planes`` takes existing planes.

    Args:
        format: meaning of the codes.
        bias: True for a bias.
        num_planes: number of planes to hold; None for all ``master_bits``.
        dtype: of the dense weight and of the bias.

    Attributes:
        planes, scales, zeros: buffers as in ``NestedPlanes``. ``.half()`` and the like do not change the dtype of ``scales``.
        scales2, scales3, ...: buffers of the bit-widths that have scales of their own.
        bias: parameter [out_features], or None.
        decode_bits: bit-width while the model decodes, see ``forward_phase``.
        prefill_bits: bit-width while the model reads prompts.
        weight_dtype: dtype of ``weight``; ``.half()`` and the like change it.
        phase: phase of the model that the layer belongs to; None outside of a model.
        fused: layers that share its input, and this one; None if it is never multiplied together with others.

    Raises:
        UserError: sizes that do not fit together.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None
    phase: ForwardPhase | None
    fused: FusedLayers | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: WeightFormat,
        bias: bool = False,
        num_planes: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format = format
        self.phase = None
        self._bound: dict[int, BoundWeight] = {}  # by bit-width
        count = format.master_bits if num_planes is None else num_planes
        grid = (count, *plane_shape(out_features, in_features))
        side = group_shape(out_features, in_features, format.group_size)
        self.register_buffer("planes", torch.empty(grid, dtype=torch.int32, device=device))
        for name in scale_buffers(format, count):
            self.register_buffer(name, torch.empty(side, dtype=format.scale_dtype, device=device))
        zeros = torch.empty(side, dtype=torch.uint8, device=device) if format.has_zero_points else None
        self.register_buffer("zeros", zeros)
        self.weight_dtype = dtype or torch.get_default_dtype()
        empty = torch.empty(out_features, dtype=self.weight_dtype, device=device) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)
        self.bits = self.nested_planes().max_bits

    @classmethod
    def from_planes(
        cls,
        weight: NestedPlanes | NestedWeight,
        bias: Tensor | None = None,
        bits: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "NestedLinear":
        """Layer that shares the tensors of ``weight`` and ``bias``; a ``NestedWeight`` is packed first.

        Args:
            bits: initial bit-width; the largest that the planes hold if None.
            dtype: of the dense weight; that of the scales if None.

        Raises:
            UserError: the bias has another size, or the planes do not hold ``bits`` bits.
        """
        if isinstance(weight, NestedWeight):
            weight = NestedPlanes.pack(weight)
        if bias is not None and bias.shape != (weight.out_features,):
            raise UserError(
                f"A bias for {weight.out_features} output features must have that size; found {list(bias.shape)}."
            )
        layer = cls(
            weight.in_features,
            weight.out_features,
            format=weight.format,
            bias=bias is not None,
            num_planes=weight.planes.shape[0],
            dtype=dtype or weight.format.scale_dtype,
            device="meta",
        )
        layer.planes, layer.scales, layer.zeros = weight.planes, weight.scales, weight.zeros
        for own_bits, scales in weight.own_scales.items():
            setattr(layer, f"scales{own_bits}", scales)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        if bits is not None:
            layer.bits = bits
        return layer

    @property
    def bits(self) -> int:
        """Bit-width of decoding. Setting it sets that of prefill too, and raises UserError if the planes do not hold it."""
        return self.decode_bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self.set_bits(bits)

    def set_bits(self, bits: int, prefill: int | None = None) -> None:
        """Set the bit-width of decoding and of prefill, by default the same.

        Raises:
            UserError: the planes do not hold a bit-width. Nothing has changed then.
        """
        prefill = bits if prefill is None else prefill
        for value in (bits, prefill):
            self.check_bits(value)
        self.decode_bits, self.prefill_bits = bits, prefill

    def check_bits(self, bits: int, name: str = "bits") -> None:
        """Check that the planes hold ``bits`` bits; ``name`` is for the message. Raises UserError."""
        self.format.check_bits(bits, self.planes.shape[0], name)

    @property
    def max_bits(self) -> int:
        """Largest bit-width that the planes hold."""
        return self.format.max_bits(self.planes.shape[0])

    def forward(self, x: Tensor, bits: int | None = None) -> Tensor:
        """Map [..., in_features] to [..., out_features], in the dtype of ``x``.

        Args:
            bits: bit-width of this call only; None for that of the phase.

        Raises:
            UserError: see ``inference.ops`` and ``phase_bits``.
        """
        if bits is None:
            if not torch.compiler.is_compiling() and self.fused is not None and self.fused.is_packed:
                y = self.fused.output(self, x)
                if y is not None:
                    return y
            bits = self.phase_bits()
        buffers: dict[str, Any] = self._buffers  # nn.Module.__getattr__ would search for each of them
        tensors: tuple[Any, ...] = (buffers["planes"], self.scales_at(bits), buffers["zeros"], self.bias)
        if takes_direct_call(x, *tensors):
            return self._bound_weight(bits, tensors).linear(x, *tensors)
        return differentiable_linear(x, *tensors, *self._settings(bits))

    def _settings(self, bits: int) -> tuple[Any, ...]:
        """Arguments of the operator after the tensors."""
        return bits, self.out_features, self.in_features, *self.format.op_args

    def _bound_weight(self, bits: int, tensors: tuple[Any, ...]) -> BoundWeight:
        """Weight at ``bits`` bits prepared for the kernels; bound again when a tensor was replaced or moved."""
        bound = self._bound.get(bits)
        if bound is None or not bound.reads(*tensors):
            bound = self._bound[bits] = BoundWeight(self._settings(bits), *tensors)
        return bound

    def scales_at(self, bits: int) -> Tensor:
        """Set of scales that ``bits`` bits read."""
        buffers: dict[str, Any] = self._buffers
        scales: Tensor = buffers[f"scales{bits}" if bits in self.format.scale_bits else "scales"]
        return scales

    def phase_bits(self) -> int:
        """Bit-width of the phase in which the layer's model is.

        Raises:
            UserError: the bit-widths of prefill and decoding differ, and the model's forward pass does not run.
        """
        bits = self.current_bits()
        if bits is None:
            raise UserError(
                f"A layer with {self.prefill_bits} bits for prefill and {self.decode_bits} bits for decoding was called "
                "outside of the forward pass of a model that takes input_ids, so its phase is unknown. Call the model, pass "
                "bits= to the layer, or set one bit-width for both."
            )
        return bits

    def current_bits(self) -> int | None:
        """Bit-width of the phase in which the layer's model is; None where ``phase_bits`` raises."""
        if self.decode_bits == self.prefill_bits:
            return self.decode_bits
        decoding = None if self.phase is None else self.phase.is_decoding
        if decoding is None:
            return None
        return self.decode_bits if decoding else self.prefill_bits

    @property
    def weight(self) -> Tensor:
        """Dense weight [out_features, in_features] at the bit-width of decoding, for code that reads it: read-only.

        Its values are dequantized by each operator that reads them.
        """
        if torch.compiler.is_compiling():
            return self._dequantize()
        shape, device = (self.out_features, self.in_features), self.planes.device
        return WeightView(shape, self.weight_dtype, device, self._dequantize)

    def _dequantize(self) -> Tensor:
        return ops.dequantize(self.nested_planes(), self.decode_bits, self.weight_dtype)

    def nested_planes(self) -> NestedPlanes:
        """Weight of the layer; the tensors are shared."""
        return NestedPlanes(
            planes=self.planes,
            scales=self.scales,
            zeros=self.zeros,
            out_features=self.out_features,
            in_features=self.in_features,
            format=self.format,
            own_scales={b: self.scales_at(b) for b in self.format.scale_bits_within(self.planes.shape[0])},
        )

    def bytes_read(self, bits: int | None = None) -> int:
        """Bytes of the weight that a call at ``bits`` bits reads; at the bit-width of decoding if None."""
        return self.nested_planes().bytes_read(self.decode_bits if bits is None else bits)

    def extra_repr(self) -> str:
        count, master_bits = self.planes.shape[0], self.format.master_bits
        prefill = "" if self.prefill_bits == self.decode_bits else f", prefill_bits={self.prefill_bits}"
        planes = "" if count == master_bits else f", planes={count}"
        return (
            f"{self.in_features}, {self.out_features}, bits={self.decode_bits}{prefill}, master_bits={master_bits}{planes}, "
            f"slicing={self.format.slicing}, group_size={self.format.group_size}, bias={self.bias is not None}"
        )

    def get_extra_state(self) -> Tensor:
        """Sizes and format, so that planes are never read with another meaning: float64 [7], or [8] with a stretch.

        Excludes the bit-width.
        """
        group_size, master_bits, slicing, offset, stretch = self.format.op_args
        sizes = (self.out_features, self.in_features, group_size, master_bits)
        stretches = () if stretch == 1 else (stretch,)
        return torch.tensor([_STATE_VERSION, *sizes, slicing == "round", offset, *stretches], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Compare the sizes and format of a state dict with those of this layer. Raises UserError if they differ."""
        own = self.get_extra_state()
        if not isinstance(state, Tensor) or state.shape != own.shape or state.cpu().tolist() != own.tolist():
            found = dict(zip(_STATE_FIELDS, state.tolist(), strict=False)) if isinstance(state, Tensor) else state
            wanted = dict(zip(_STATE_FIELDS, own.tolist(), strict=False))
            raise UserError(f"The state dict belongs to another layer: expected {wanted}; found {found}.")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the tensors to a state dict; a range of a larger tensor is copied, so that files hold it alone."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._buffers:
            if (tensor := destination.get(prefix + name)) is not None:
                destination[prefix + name] = _own_storage(tensor)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._bound.clear()  # torch may swap tensors, and refuses that for those with weak references
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NestedLinear":
        """Move to a device like any module; a change of dtype applies to ``weight`` and the bias only."""
        self._bound.clear()
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.planes.device)).dtype
        names = scale_buffers(self.format, self.planes.shape[0])
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        for name, scales in before.items():
            moved = getattr(self, name)
            if moved.dtype != scales.dtype:
                setattr(self, name, scales.to(moved.device))
        if self.fused is not None:
            self.fused.pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles.

        Tensors that are shared with fused layers are in the state of ``fused`` alone; a range of another larger tensor becomes
        a tensor of its own.
        """
        shared = self.fused.shared_names(self) if self.fused is not None else set()
        own = {
            name: None if one is None or name in shared else _own_storage(one) for name, one in self._buffers.items()
        }
        state = {**self.__dict__, "_buffers": own}
        del state["_bound"]
        if self.fused is not None:
            state["_shared_index"] = self.fused.index_of(self) if shared else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        index = state.pop("_shared_index", None)
        super().__setstate__(state)
        self._bound = {}
        if self.fused is not None and index is not None:
            self.fused.restore(index, self)


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if its storage holds more."""
    return tensor if tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def scale_buffers(format: WeightFormat, planes: int) -> list[str]:
    """Names of the buffers that hold the sets of scales of a layer with so many planes, the base set first."""
    return ["scales", *(f"scales{bits}" for bits in format.scale_bits_within(planes))]

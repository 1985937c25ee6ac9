"""A linear layer that holds all planes of its weight and reads as many as it is told to."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.planes import NestedPlanes, check_bits, group_count
from matquant.formats.tile_layout import tiles
from matquant.inference import ops  # noqa: F401 - defines torch.ops.matquant

_FORMAT = 1  # of the extra state


class NestedLinear(nn.Module):
    """y = x W^T + bias, with W at any width of one set of planes.

    The width is a number in this object and moves no data: it may be set at any time, and differ from call to call. A
    captured CUDA graph keeps the width that it was captured with; ``torch.compile`` makes a graph for each width once.

    The constructor leaves the weights unset, to be filled from a state dict; ``from_planes`` takes them.

    Args:
        planes: how many planes are held; None for all ``master_bits``.
        format: meaning of the codes. ``.half()`` and the like leave the dtype of the scales as it is.
        dtype: of the bias.

    Attributes:
        planes, scales, zeros: buffers as in ``NestedPlanes``.
        bias: parameter [out_features], or None.
        decode_bits: the width for calls with one token per sequence, [..., 1, in_features] or [in_features].
        prefill_bits: the width for all other calls.

    Raises:
        UserError: sizes that do not go together.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        format: WeightFormat,
        bias: bool = False,
        planes: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.format = format
        count = format.master_bits if planes is None else planes
        side = (group_count(in_features, format.group_size), tiles(out_features), 8, 4, 2)
        grid = (count, tiles(out_features), tiles(in_features), 32, 4)
        self.register_buffer("planes", torch.empty(grid, dtype=torch.int32, device=device))
        self.register_buffer("scales", torch.empty(side, dtype=format.scale_dtype, device=device))
        zeros = torch.empty(side, dtype=torch.uint8, device=device) if format.has_zero_points else None
        self.register_buffer("zeros", zeros)
        given = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if given is None else nn.Parameter(given, requires_grad=False)
        self.bits = self.nested().max_bits

    @classmethod
    def from_planes(
        cls, weight: NestedPlanes | NestedWeight, bias: Tensor | None = None, bits: int | None = None
    ) -> "NestedLinear":
        """A layer that holds these planes (or those of a parent's layer) and this bias, without a copy.

        Args:
            bits: the width to begin with; the largest one if None.

        Raises:
            UserError: the bias has another size, or the planes of that width are not there.
        """
        if isinstance(weight, NestedWeight):
            weight = NestedPlanes.pack(weight)
        if bias is not None and bias.shape != (weight.out_features,):
            raise UserError(f"A bias for {weight.out_features} output features cannot be {list(bias.shape)}.")
        layer = cls(
            weight.in_features,
            weight.out_features,
            format=weight.format,
            bias=bias is not None,
            planes=weight.planes.shape[0],
            device="meta",
        )
        layer.planes, layer.scales, layer.zeros = weight.planes, weight.scales, weight.zeros
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        if bits is not None:
            layer.bits = bits
        return layer

    @property
    def bits(self) -> int:
        """The width of decoding. Setting it sets that of prefill too. Raises UserError for a width that is not there."""
        return self.decode_bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self.set_bits(bits)

    def set_bits(self, bits: int, prefill: int | None = None) -> None:
        """Set the width, and another one for prefill if given.

        Raises:
            UserError: the planes of a width are not there; nothing has changed then.
        """
        prefill = bits if prefill is None else prefill
        for width in (bits, prefill):
            self.check_bits(width)
        self.decode_bits, self.prefill_bits = bits, prefill

    def check_bits(self, bits: int) -> None:
        """Raises UserError if the planes of that width are not there."""
        check_bits(bits, self.planes.shape[0], self.format)

    @property
    def max_bits(self) -> int:
        """The largest width that the planes allow."""
        return self.nested().max_bits

    def forward(self, x: Tensor, bits: int | None = None) -> Tensor:
        """[..., in_features] to [..., out_features], in the dtype of ``x``.

        Args:
            bits: the width of this call alone.

        Raises:
            UserError: what ``inference.ops`` says.
        """
        if bits is None:
            one_token = x.ndim < 2 or x.shape[-2] == 1
            bits = self.decode_bits if one_token else self.prefill_bits
        return torch.ops.matquant.nested_linear.default(
            x, self.planes, self.scales, self.zeros, self.bias, bits, self.out_features, *self.format.op_args
        )

    def nested(self) -> NestedPlanes:
        """What the layer holds; the tensors are shared."""
        return NestedPlanes(
            planes=self.planes,
            scales=self.scales,
            zeros=self.zeros,
            out_features=self.out_features,
            in_features=self.in_features,
            format=self.format,
        )

    def bytes_read(self, bits: int | None = None) -> int:
        """Bytes of the weight that a call at ``bits`` bits reads; at the width of decoding if None."""
        return self.nested().bytes_read(self.decode_bits if bits is None else bits)

    def extra_repr(self) -> str:
        kept = "" if self.max_bits == self.format.master_bits else f" of which {self.planes.shape[0]} planes are here"
        width = f"bits={self.decode_bits}"
        if self.prefill_bits != self.decode_bits:
            width += f", prefill_bits={self.prefill_bits}"
        return (
            f"{self.in_features}, {self.out_features}, {width}, master_bits={self.format.master_bits}{kept}, "
            f"slicing={self.format.slicing}, group_size={self.format.group_size}, bias={self.bias is not None}"
        )

    def get_extra_state(self) -> Tensor:
        """What the tensors mean, so that planes are never read in another sense: float64 [7]. The width is not among it."""
        group_size, master_bits, slicing, offset = self.format.op_args
        sizes = (self.out_features, self.in_features, group_size, master_bits)
        return torch.tensor([_FORMAT, *sizes, slicing == "round", offset], dtype=torch.float64)

    def set_extra_state(self, state: Any) -> None:
        """Compare a state dict's meaning with this layer's. Raises UserError when they differ."""
        mine = self.get_extra_state()
        if not isinstance(state, Tensor) or state.shape != mine.shape or state.cpu().tolist() != mine.tolist():
            names = ("format", "out_features", "in_features", "group_size", "master_bits", "round", "offset")
            found = dict(zip(names, state.tolist(), strict=False)) if isinstance(state, Tensor) else state
            wanted = dict(zip(names, mine.tolist(), strict=True))
            raise UserError(f"The state dict is of another layer: {found}; this one is {wanted}.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NestedLinear":
        """Moves to a device as any module; a change of dtype is for the bias alone."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

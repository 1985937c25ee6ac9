"""What one device holds of one stored layer: loaded tensor by tensor, cut on the way, and read at a width that may change."""

import dataclasses

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.formats.planes import NestedPlanes, check_bits, group_count
from matquant.formats.tile_layout import tiles
from matquant.inference.shard import WeightShard
from matquant.vllm import vllm_ops


class ShardedDenseLinear(nn.Module):
    """A layer that is not quantized, as a part of a fused layer whose other parts are."""

    weight: Tensor

    def __init__(self, name: str, cut: WeightShard, dtype: torch.dtype) -> None:
        super().__init__()
        self.name, self.cut = name, cut
        self.register_buffer("weight", torch.empty(cut.shape, dtype=dtype), persistent=False)
        self.expected = {"weight"}

    def load(self, kind: str, tensor: Tensor) -> None:
        """Take the stored tensor ``weight`` [out_features, in_features] of the whole layer. Raises UserError."""
        if tensor.shape != (self.cut.out_features, self.cut.in_features):
            raise UserError(f"{self.name}.{kind} is {list(tensor.shape)}, and the model wants another size.")
        self.weight.copy_(self.cut.codes(tensor))
        self.expected.discard(kind)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, bias)


class ShardedNestedLinear(nn.Module):
    """The rows and columns of a nested layer that one device holds.

    Args:
        name: of the layer in the checkpoint.
        spec: of the whole layer.
        stored: its tensors in the checkpoint by the end of their name: ``scales``, ``zeros``, ``plane0``, ...; or
            ``qweight`` and plain ``scales`` of a published one.
        cut: what is held.
        planes: how many planes are kept; stored ones beyond them are passed over.
        bits, prefill: the widths to begin with.
        decode_tokens: see ``vllm_ops.new_widths``.

    Attributes:
        planes, scales, zeros: as in ``NestedPlanes``, for the part.
        widths: int64 [3] on the host, see ``vllm_ops.new_widths``. Setting a width writes numbers here and moves nothing.
        expected: tensors that have not come yet.
    """

    planes: Tensor
    scales: Tensor
    zeros: Tensor | None
    widths: Tensor

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        stored: dict[str, TensorSpec],
        cut: WeightShard,
        *,
        planes: int,
        bits: int,
        prefill: int,
        decode_tokens: int = 1,
    ) -> None:
        super().__init__()
        self.name, self.spec, self.cut = name, spec, cut
        self.stored = stored
        self.rows, columns = cut.shape
        self.group_size = cut.group_size(spec.format.group_size)
        self.format = dataclasses.replace(spec.format, group_size=self.group_size)
        side = (group_count(columns, self.group_size), tiles(self.rows), 8, 4, 2)
        grid = (planes, tiles(self.rows), tiles(columns), 32, 4)
        zeros = torch.empty(side, dtype=torch.uint8) if spec.format.has_zero_points else None
        self.register_buffer("planes", torch.empty(grid, dtype=torch.int32), persistent=False)
        self.register_buffer("scales", torch.empty(side, dtype=spec.format.scale_dtype), persistent=False)
        self.register_buffer("zeros", zeros, persistent=False)
        self.register_buffer("widths", vllm_ops.new_widths(bits, prefill, decode_tokens), persistent=False)
        self.set_bits(bits, prefill)
        self.expected = {kind for kind in stored if self._plane(kind) < planes}

    def load(self, kind: str, tensor: Tensor) -> None:
        """Take a stored tensor of the whole layer, for example ``plane0``.

        Raises:
            UserError: it has another shape or dtype than the checkpoint's config says.
        """
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if found != self.stored.get(kind):
            raise UserError(
                f"{self.name}.{kind} is {found.dtype} {list(found.shape)}, and the checkpoint's config says "
                f"{self.stored.get(kind)}. The folder is damaged; copy or download it again."
            )
        if kind == "qweight":
            self._load_codes(tensor)
        elif tensor.ndim == 2:
            self.scales.copy_(self.cut.pack_plain_groups(tensor, self.spec.format.group_size))
        elif kind in ("scales", "zeros"):
            getattr(self, kind).copy_(self.cut.groups(tensor, self.spec.format.group_size))
        elif (index := self._plane(kind)) < self.planes.shape[0]:
            self.planes[index].copy_(self.cut.plane(tensor, index))
        self.expected.discard(kind)

    def _load_codes(self, codes: Tensor) -> None:
        """Take the codes of a published checkpoint: uint8 [out_features, in_features] of the whole layer."""
        part = self.cut.codes(codes)
        weight = NestedWeight(
            codes=part,
            scales=torch.zeros(self.rows, part.shape[1] // self.group_size, dtype=self.format.scale_dtype),
            zeros=None,
            format=self.format,
        )
        self.planes.copy_(NestedPlanes.pack(weight).planes[: self.planes.shape[0]])

    def set_bits(self, bits: int, prefill: int) -> None:
        """Set the widths. Raises UserError, and changes nothing, when the planes of one are not there."""
        self.check_bits(bits)
        self.check_bits(prefill)
        self.widths[0], self.widths[1] = bits, prefill

    def check_bits(self, bits: int) -> None:
        """Raises UserError if the planes of that width are not there."""
        try:
            check_bits(bits, self.planes.shape[0], self.spec.format)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., columns] to [..., rows], at the width of the step that is under way."""
        return torch.ops.matquant.nested_linear_at.default(
            x, self.planes, self.scales, self.zeros, bias, self.widths, self.rows, *self.format.op_args
        )

    @staticmethod
    def _plane(kind: str) -> int:
        """The number of a plane; -1 of all that is read at every width."""
        return int(kind.removeprefix("plane")) if kind.startswith("plane") else -1


Part = ShardedNestedLinear | ShardedDenseLinear


def check_complete(parts: "list[Part]") -> None:
    """Raises UserError when tensors of a layer did not come: Transformers and vLLM would go on with what memory holds."""
    missing = [f"{part.name}.{kind}" for part in parts for kind in sorted(part.expected)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"The checkpoint's files do not hold {', '.join(missing[:3])}{more}. They are damaged or incomplete; copy or "
            "download the folder again."
        )

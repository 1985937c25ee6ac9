"""Settings that every quantization method shares, and the objective."""

import dataclasses
import fnmatch
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from matquant.errors import UserError
from matquant.formats.bits import MAX_BITS, MIN_BITS, STRETCHES

if TYPE_CHECKING:
    from matquant.quantize.base import BlockQuantizer, QuantizerTask

GROUP_SIZES = (32, 64, 128, -1)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """Bit-widths that count, and the weight (lambda) of the squared output error of each.

    Attributes:
        name: of the preset.
        weights: lambda of each bit-width.
        per_bit_factor: factor on the weight for each bit above two; above 1 it favours high bit-widths.
    """

    name: str = "balanced"
    weights: Mapping[int, float] = dataclasses.field(default_factory=dict)
    per_bit_factor: float = 1.0

    @property
    def lambdas(self) -> dict[int, float]:
        """Weight of each bit-width, with ``per_bit_factor`` applied."""
        return {bits: weight * self.per_bit_factor ** (bits - 2) for bits, weight in self.weights.items()}

    @property
    def bits(self) -> tuple[int, ...]:
        """Bit-widths of the objective, ascending."""
        return tuple(sorted(self.weights))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerOverride:
    """Settings of the layers that match a pattern; null: the setting of the method or the objective."""

    group_size: int | None = None
    weights: Mapping[int, float] | None = None  # of the objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Settings that every method has. A method adds its own in a subclass and implements ``build``.

    Attributes:
        name: of the preset.
        per_bit_models: one model per bit-width (a baseline) instead of one parent for all.
        slicing: rule that takes a slice from a code: msb, its first bits, or round, as MatGPTQ v1, which reads one bit more.
        master_bits: bits of a code, 4 to 8.
        group_size: consecutive input features that share a scale; -1 for one scale per row.
        symmetric: one zero point for all groups, instead of one per group.
        zero_point_offset: of symmetric weights, in steps of an 8-bit code; a group may mirror it by a negative scale.
        stretch: factor of the steps of the fifth and later planes of msb codes, 1, 1.25 or 1.5: eight bits then reach beyond
            the cell that the first four bits choose. Does not change slices of up to four bits.
        skip: patterns of layer names that stay unquantized.
        quantize_lm_head: quantize the output head too; a head that is tied to the embeddings becomes a layer of its own.
        overrides: settings by pattern of layer names; the first match counts.
    """

    uses_calibration: ClassVar[bool] = True  # False for a method that needs no calibration text

    name: str = "method"
    per_bit_models: bool = False
    slicing: Literal["msb", "round"] = "msb"
    master_bits: int = 8
    group_size: int = 128
    symmetric: bool = True
    zero_point_offset: float = 8.0
    stretch: float = 1.0
    skip: tuple[str, ...] = ()
    quantize_lm_head: bool = False
    overrides: Mapping[str, LayerOverride] = dataclasses.field(default_factory=dict)

    def build(self, task: "QuantizerTask") -> "BlockQuantizer":
        """Construct the quantizer of this method for one parent."""
        raise TypeError(f"{type(self).__name__} does not implement build(task)")

    def check(self) -> None:
        """Check the method's own settings; ``check_method`` checks the shared ones. Raises UserError."""

    def override_of(self, layer: str) -> LayerOverride:
        """Settings of one layer that differ from the method's."""
        matches = (own for pattern, own in self.overrides.items() if fnmatch.fnmatch(layer, pattern))
        return next(matches, LayerOverride())

    def group_size_of(self, layer: str) -> int:
        """Group size of one layer; -1 for one scale per row."""
        return self.override_of(layer).group_size or self.group_size

    def skips(self, layer: str) -> bool:
        """Return True for a layer that stays unquantized."""
        return any(fnmatch.fnmatch(layer, pattern) for pattern in self.skip)


def check_bits(bits: int, where: str, master_bits: int) -> None:
    """Raise UserError unless ``bits`` is a bit-width of codes of ``master_bits`` bits."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise UserError(f"{where}: a bit-width must lie in {MIN_BITS}..{MAX_BITS}; found {bits}.")
    if bits > master_bits:
        raise UserError(f"{where}: {bits} bits are more than the parent's method.master_bits={master_bits}.")


def check_distillation(distilled_bits: tuple[int, ...], distill_only: bool, group: str, master_bits: int) -> None:
    """Raise UserError for bit-widths that cannot be distilled from the slice of ``master_bits``.

    Args:
        group: of the settings, for the message.
    """
    for bits in distilled_bits:
        check_bits(bits, f"{group}.distilled_bits", master_bits)
    if len(set(distilled_bits)) != len(distilled_bits) or master_bits in distilled_bits:
        raise UserError(
            f"{group}.distilled_bits names each bit-width once, and only those below {master_bits}, whose slice is the "
            f"target; found {list(distilled_bits)}."
        )
    if distill_only and not distilled_bits:
        raise UserError(f"{group}.distill_only=true needs {group}.distilled_bits, for example [2].")


def check_objective(objective: ObjectiveConfig, master_bits: int) -> None:
    """Raise UserError for an objective without a positive weight, or with a weight or bit-width out of range."""
    if not objective.weights:
        raise UserError(
            "objective.weights names no bit-width; give at least one, for example ++objective.weights={2:1,4:4}."
        )
    for bits, weight in objective.weights.items():
        check_bits(bits, "objective.weights", master_bits)
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"objective.weights.{bits} must be a number that is not negative; found {weight}.")
    if not 0.01 <= objective.per_bit_factor <= 100:
        raise UserError(
            f"objective.per_bit_factor must lie in 0.01..100, 1 for none; found {objective.per_bit_factor}."
        )
    if not any(objective.weights.values()):
        raise UserError(
            "objective.weights are all zero, so nothing is optimised. Give at least one bit-width a weight."
        )


def check_method(method: MethodConfig) -> None:
    """Raise UserError for a shared setting out of range; then check the method's own settings."""
    if not 4 <= method.master_bits <= MAX_BITS:
        raise UserError(f"method.master_bits must lie in 4..{MAX_BITS}; found {method.master_bits}.")
    _check_group_size(method.group_size, "method.group_size")
    for pattern, layer in method.overrides.items():
        if layer.group_size is not None:
            _check_group_size(layer.group_size, f"method.overrides.{pattern}.group_size")
        if layer.weights is not None:
            check_objective(ObjectiveConfig(name=pattern, weights=layer.weights), method.master_bits)
    if method.zero_point_offset and method.symmetric and method.slicing != "msb":
        raise UserError(
            "method.zero_point_offset is for msb slices: the grid of round slices has no mirror image. Set it to 0."
        )
    if not 0 <= method.zero_point_offset <= 32:
        raise UserError(
            f"method.zero_point_offset must lie in 0..32 steps of an 8-bit code; found {method.zero_point_offset}."
        )
    allowed = STRETCHES if method.slicing == "msb" else STRETCHES[:1]
    if method.stretch not in allowed:
        raise UserError(
            f"method.stretch must be {' or '.join(map(str, allowed))} with method.slicing={method.slicing}; found "
            f"{method.stretch}."
        )
    method.check()


def _check_group_size(group_size: int, where: str) -> None:
    if group_size not in GROUP_SIZES:
        raise UserError(
            f"{where} must be one of {', '.join(map(str, GROUP_SIZES))} (-1: one scale per row); found {group_size}."
        )

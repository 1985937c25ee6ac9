"""Settings of MatQuant on OmniQuant."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from matquant.errors import UserError
from matquant.quantize.config import MethodConfig, check_distillation

if TYPE_CHECKING:
    from matquant.quantize.base import QuantizerTask
    from matquant.quantize.omniquant.quantizer import OmniQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class OmniQuantConfig(MethodConfig):
    """Settings of MatQuant (arXiv 2502.06786) on the learnable weight clipping of OmniQuant (arXiv 2308.13137).

    The clipping is trained on the weighted sum of the squared errors of all slices' block outputs, one batch for each step.
    OmniQuant's learnable shift and scale of activations are left out: they become part of norms and biases, which a parent
    does not hold. So only the clipping of the published method is here.

    Attributes:
        epochs: passes over the calibration text for each block. 38 of 128 sequences of 2048 tokens are the published 10
            million tokens.
        learning_rate: of the clipping logits (AdamW without weight decay), constant.
        inputs: inputs of a block while it is trained: full_precision, those of the full-precision model (MatQuant, equation
            7), or quantized, for each bit-width the outputs of its own slices of the blocks before, as OmniQuant's public
            code does for one bit-width. Targets are the outputs of the full-precision model in both.
        distilled_bits: bit-widths that aim at the outputs of the slice of master_bits too, with equal weight
            (co-distillation; [2] is the published 8→2).
        distill_only: let distilled_bits aim at these outputs alone.
    """

    name: str = "matquant_omniquant"
    slicing: Literal["msb", "round"] = "round"
    symmetric: bool = False
    zero_point_offset: float = 0.0
    epochs: int = 38
    learning_rate: float = 1e-3
    inputs: Literal["full_precision", "quantized"] = "full_precision"
    distilled_bits: tuple[int, ...] = ()
    distill_only: bool = False

    def build(self, task: "QuantizerTask") -> "OmniQuantizer":
        from matquant.quantize.omniquant.quantizer import OmniQuantizer

        return OmniQuantizer(self, task)

    def check(self) -> None:
        if self.slicing != "round" or self.symmetric:
            raise UserError(
                f"method={self.name} trains round slices with a zero point for each group; found method.slicing="
                f"{self.slicing} and method.symmetric={str(self.symmetric).lower()}. Leave both at their defaults."
            )
        if weighted := [pattern for pattern, own in self.overrides.items() if own.weights is not None]:
            raise UserError(
                f"method={self.name} trains all layers of a block on one objective, so method.overrides.{weighted[0]} cannot "
                "have weights of its own. Give it a group_size only."
            )
        if self.epochs < 1 or not 0 < self.learning_rate < 1:
            raise UserError(
                "method.epochs must be at least 1, and method.learning_rate lies between 0 and 1; found "
                f"{self.epochs} and {self.learning_rate}."
            )
        check_distillation(self.distilled_bits, self.distill_only, "method", self.master_bits)
        if self.distilled_bits and self.per_bit_models:
            raise UserError(
                "method.distilled_bits needs one parent: a model of a single bit-width has no wider slice to aim at. Set "
                "method.per_bit_models=false."
            )

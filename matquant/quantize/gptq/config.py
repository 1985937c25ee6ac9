"""Settings of GPTQ and its extension to all bit-widths at once."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from matquant.errors import UserError
from matquant.quantize.config import MethodConfig, check_bits

if TYPE_CHECKING:
    from matquant.quantize.base import QuantizerTask
    from matquant.quantize.gptq.quantizer import GptqQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqConfig(MethodConfig):
    """Settings of GPTQ: each field toggles one technique; the presets matgptq, matgptq_v1 and gptq only set these fields.

    Attributes:
        error_feedback: per_bit keeps one compensated target per bit-width; mean keeps one for all and feeds back the mean
            error of the bit-widths, as MatGPTQ v1 does.
        scale: minmax, or search for the clip ratio (and zero point) of the least nested rounding error.
        act_order: columns of a group by falling diagonal of the Hessian.
        cd_passes: passes of coordinate descent over the codes after the solve.
        calibration_bits: bit-widths whose slices are propagated while calibrating; none: the parent at all its bits.
        asymmetric_calibration: aim at the full-precision model's outputs (GPTAQ), not at those for the quantized model's
            inputs.
        correction: share of the way to that aim, from 0 to 1. All of it disturbs high bit-widths, since the targets of low
            ones differ most from the weights.
        scale_bits: bit-widths with a set of scales of their own, fitted in closed form; a bit-width that is the objective's
            highest, or above, reads the base set.
        true_sequential: calibrate later layers of a block on the quantized earlier ones.
        damp: fraction of the Hessian's mean diagonal that is added to it.
        block_size: columns between two lazy updates of the rest; a block ends with its group.
    """

    name: str = "matgptq"
    error_feedback: Literal["per_bit", "mean"] = "per_bit"
    scale: Literal["minmax", "search"] = "search"
    act_order: bool = False
    cd_passes: int = 2
    calibration_bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    asymmetric_calibration: bool = True
    correction: float = 0.5
    scale_bits: tuple[int, ...] = (2, 3, 4)
    stretch: float = 1.25
    true_sequential: bool = True
    damp: float = 0.01
    block_size: int = 128

    def build(self, task: "QuantizerTask") -> "GptqQuantizer":
        from matquant.quantize.gptq.quantizer import GptqQuantizer

        return GptqQuantizer(self, task)

    def check(self) -> None:
        if not 0 < self.damp < 1:
            raise UserError(
                f"method.damp is a fraction of the Hessian's mean diagonal, above 0 and below 1; found {self.damp}."
            )
        if self.block_size < 1:
            raise UserError(f"method.block_size must be at least 1 column; found {self.block_size}.")
        for bits in self.calibration_bits:
            check_bits(bits, "method.calibration_bits", self.master_bits)
        if self.cd_passes < 0:
            raise UserError(f"method.cd_passes cannot be negative; found {self.cd_passes}.")
        for bits in self.scale_bits:
            check_bits(bits, "method.scale_bits", self.master_bits)
        if len(set(self.scale_bits)) != len(self.scale_bits):
            raise UserError(f"method.scale_bits names a bit-width twice: {list(self.scale_bits)}.")
        if not 0 <= self.correction <= 1:
            raise UserError(f"method.correction is a share from 0 to 1; found {self.correction}.")
        if self.error_feedback == "mean" and (
            self.asymmetric_calibration or self.scale_bits or len(self.calibration_bits) > 1
        ):
            raise UserError(
                "method.error_feedback=mean keeps one target for all bit-widths: it needs method.asymmetric_calibration=false, "
                "method.scale_bits=[] and at most one of method.calibration_bits."
            )

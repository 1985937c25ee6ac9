"""Settings of round to nearest."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from matquant.quantize.config import MethodConfig

if TYPE_CHECKING:
    from matquant.quantize.base import QuantizerTask
    from matquant.quantize.rtn.quantizer import RtnQuantizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class RtnConfig(MethodConfig):
    """Settings of round to nearest.

    Attributes:
        scale: minmax, or search for the clip ratio (and zero point) of the least nested rounding error.
    """

    uses_calibration = False

    name: str = "rtn"
    per_bit_models: bool = True
    slicing: Literal["msb", "round"] = "round"
    zero_point_offset: float = 0.0
    scale: Literal["minmax", "search"] = "minmax"

    def build(self, task: "QuantizerTask") -> "RtnQuantizer":
        from matquant.quantize.rtn.quantizer import RtnQuantizer

        return RtnQuantizer(self, task)

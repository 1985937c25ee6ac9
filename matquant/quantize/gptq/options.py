"""Options of one solve, from the settings of a method, and the options of layers that override them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from matquant.formats.groups import fit_group_size
from matquant.formats.nested import Slicing, WeightFormat, levels
from matquant.quantize.base import QuantizerTask, normalized
from matquant.quantize.config import MethodConfig

# Names in a parent's key, which older stores hold: they never change.
_KEY_NAMES = {"lambdas": "weights", "error_feedback": "feedback", "zero_point_offset": "offset", "cd_passes": "sweeps"}
_KEY_VALUES = {"per_bit": "per_width"}
# Fields that older keys lack, each with the value that it had then.
_LATER_FIELDS = {"correction": 1.0, "scale_bits": (), "stretch": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SolverOptions:
    """Settings of a solve besides its tensors; techniques as in ``GptqConfig``.

    Attributes:
        lambdas: weight of each bit-width; bit-widths of weight zero are left out.
        zero_point_offset: of symmetric weights from the middle of the codes, in code steps. With an offset each group takes
            the better of the grid and its mirror image, which a negative scale stands for.
        cd_passes: passes of coordinate descent after the solve.
        correction: share of the correction of asymmetric calibration that targets get.
        scale_bits: bit-widths with scales of their own; only those below the highest bit-width of the objective count.
        stretch: of the steps of later planes, see ``formats.nested``.
        scale_dtype: dtype in which scales are stored; codes are chosen with the stored values.
    """

    lambdas: Mapping[int, float]
    master_bits: int = 8
    slicing: Slicing = "msb"
    error_feedback: Literal["per_bit", "mean"] = "per_bit"
    group_size: int = 128
    symmetric: bool = True
    zero_point_offset: float = 0.0
    scale: Literal["minmax", "search"] = "search"
    act_order: bool = False
    cd_passes: int = 0
    damp: float = 0.01
    block_size: int = 128
    scale_dtype: torch.dtype = torch.float16
    correction: float = 1.0
    scale_bits: tuple[int, ...] = ()
    stretch: float = 1.0

    def levels(self, bits: int) -> Tensor:
        """Value of each code at ``bits`` bits in units of its scale, before the zero point: float32 [2^master_bits]."""
        return levels(bits, self.master_bits, self.slicing, self.stretch)

    @property
    def own_scale_bits(self) -> tuple[int, ...]:
        """Bit-widths that get scales of their own, ascending."""
        return tuple(sorted(bits for bits in self.scale_bits if bits < self.bits[-1]))

    @property
    def bits(self) -> tuple[int, ...]:
        """Bit-widths with a positive weight, ascending."""
        return tuple(sorted(b for b, weight in self.lambdas.items() if weight > 0))

    def weight_format(self, in_features: int) -> WeightFormat:
        """Format of a weight of ``in_features`` input features."""
        return WeightFormat(
            group_size=fit_group_size(self.group_size, in_features),
            master_bits=self.master_bits,
            slicing=self.slicing,
            zero_point_offset=self.zero_point_offset if self.symmetric else 0.0,
            has_zero_points=not self.symmetric,
            scale_dtype=self.scale_dtype,
            scale_bits=self.own_scale_bits,
            stretch=self.stretch,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-able options for a parent's key."""
        fields = {_KEY_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        fields["feedback"] = _KEY_VALUES.get(fields["feedback"], fields["feedback"])
        weights = {str(bits): weight for bits, weight in self.lambdas.items()}
        later = {name for name, default in _LATER_FIELDS.items() if fields[name] == default}
        fields = {name: value for name, value in fields.items() if name not in later}
        return fields | {"weights": weights, "scale_dtype": str(self.scale_dtype)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerOptions:
    """Options of all layers of a parent; layers that match the same pattern share one object."""

    default: SolverOptions
    own: Mapping[str, SolverOptions]

    @classmethod
    def of(cls, method: MethodConfig, task: QuantizerTask, **techniques: Any) -> "LayerOptions":
        """Options for a task, with the techniques that the method sets."""
        default = SolverOptions(
            lambdas=task.lambdas,
            master_bits=task.master_bits,
            slicing=method.slicing,
            stretch=method.stretch,
            group_size=method.group_size,
            symmetric=method.symmetric,
            zero_point_offset=method.zero_point_offset * 2.0 ** (task.master_bits - 8) if method.symmetric else 0.0,
            scale_dtype=task.scale_dtype,
            **techniques,
        )
        made: dict[int, SolverOptions] = {}
        own: dict[str, SolverOptions] = {}
        for name in task.layers:
            override = method.override_of(name)
            if (override.group_size, override.weights) == (None, None):
                continue
            if id(override) not in made:
                lambdas = dict(default.lambdas)
                if override.weights is not None and not method.per_bit_models:
                    lambdas = normalized(override.weights)
                group_size = override.group_size or default.group_size
                made[id(override)] = dataclasses.replace(default, lambdas=lambdas, group_size=group_size)
            own[name] = made[id(override)]
        return cls(default=default, own=own)

    def of_layer(self, name: str) -> SolverOptions:
        """Options of one layer."""
        return self.own.get(name, self.default)

    def cache_key(self) -> dict[str, Any]:
        """JSON-able options for a parent's key; overrides only where there are some."""
        key: dict[str, Any] = {"options": self.default.to_json()}
        return key | ({"overrides": {name: own.to_json() for name, own in self.own.items()}} if self.own else {})

"""Training of codes and of the scales of low bit-widths together, with the full-precision model as the teacher.

The first planes of a code, as many as the largest of ``refine.bits``, are its prefix. Each weight has a latent position on the
axis of codes, which begins at the centre of its code and chooses the prefix. The gradient of the dense weight of every trained
bit-width moves it, as with the straight-through estimator (arXiv 1308.3432), but times the mean slope of the slice's value from
the first to the last prefix that the weight may take: a bit-width that reads the same with all of them does not count, and one
whose value changes by four cells of the prefix counts four times.

The later planes are not trained: they are those with which the held bit-widths read most nearly what they read before. With a
stretch, cells of neighbouring prefixes overlap at higher bit-widths, so many weights have a second prefix that eight bits can
hardly tell from the first. A weight only takes prefixes whose value at all bits lies within a tolerance of the value before.

All bit-widths share the positions, so there is one state. The best is kept: the least mean log-ratio of the held-out KL at the
trained bit-widths to that at the start, among states whose held bit-widths are within ``refine.held_increase`` of the start.

Positions are float16 offsets from the code at the start, and the momentum is bfloat16: with the codes at the start and the
present ones, 6 bytes for a weight. Gradients are added to the momentum layer by layer in the backward pass; no others are kept.

A layer's step is normalized to its root mean square. Before, the momentum may be divided by a power of its mean square,
factored into rows and columns (Adafactor, arXiv 1804.04235), which stands for the curvature.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.formats.groups import scale_groups
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.refine.block_passes import Trained
from matquant.refine.config import LEAST_CODE_TOLERANCE
from matquant.refine.scale_refinement import ScaleRefinement
from matquant.refine.scaled_linear import scaled_linear
from matquant.refine.slice_model import SliceModel
from matquant.refine.trained_scales import TrainedScales, rate_at

_MOMENTUM_DECAY = 0.95
_SQUARES_DECAY = 0.99  # of the mean squares of the momentum
_LEAST_SQUARE = 1e-3  # of a row or column, as a share of the mean over all
_TINY = 1e-30  # in place of a zero to divide by
_TENSORS = ("offset", "momentum", "rows", "columns", "best")


@dataclasses.dataclass(frozen=True, slots=True)
class MoveTable:
    """Code with another prefix that the held bit-widths read most nearly like the code before.

    Attributes:
        codes: uint8 [2^master_bits, prefixes], by the code before and the prefix; a code's own prefix gives the code itself.
        errors: float32, in the shape of ``codes``: distance of the values of all bits, in steps of that grid.
    """

    codes: Tensor
    errors: Tensor

    @classmethod
    def of(cls, fmt: WeightFormat, prefix_bits: int, held_bits: tuple[int, ...]) -> "MoveTable":
        """Table of a format, from a search over all later planes.

        The least sum over ``held_bits`` and all bits of the squared distance in steps of each grid counts.
        """
        master, count = fmt.master_bits, 2**fmt.master_bits
        cost, error = torch.zeros(count, count), torch.zeros(count, count)  # [code before, code after]
        for bits in sorted({*held_bits, master}):
            levels, step = fmt.levels(bits), 2.0 ** (master - bits) * fmt.stretch_at(bits)
            error = (levels[None] - levels[:, None]).abs() / step
            cost += error**2
        by_prefix = cost.unflatten(1, (2**prefix_bits, -1))
        later = by_prefix.argmin(2)
        codes = later + torch.arange(2**prefix_bits) * by_prefix.shape[2]
        return cls(codes.to(torch.uint8), error.gather(1, codes))

    def limits(self, tolerance: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """First and last prefix of each code that no prefix with an error above ``tolerance`` separates from its own.

        Returns:
            int32 [2^master_bits] each, on ``device``.
        """
        count, prefixes = self.codes.shape
        prefix, own = torch.arange(prefixes), torch.arange(count)[:, None] // (count // prefixes)
        refused = self.errors > tolerance
        first = torch.where(refused & (prefix < own), prefix, -1).amax(1) + 1
        last = torch.where(refused & (prefix > own), prefix, prefixes).amin(1) - 1
        return first.int().to(device), last.int().to(device)


def slopes(levels: Tensor, limits: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Mean slope of the value of a slice between the first and the last prefix of each code: float32 [2^master_bits].

    Args:
        levels: value of each code at the bit-width of the slice, on any device.
        limits: first and last prefix of each code.
        width: codes of a prefix.
    """
    first, last = (one.long() * width for one in limits)
    levels = levels.to(first.device)
    return (levels[last] - levels[first]) / (last - first).clamp(min=1)


class TrainedCodes:
    """Latent positions of the codes of one layer, with their momentum and the codes of the best state so far.

    Args:
        weight: at the start, on the device of the training.
        table: moves of its format.

    Attributes:
        present: the weight with the codes that the positions choose; its codes are overwritten by each step.
        momentum: bfloat16 [out_features, in_features], decaying mean of the gradients of the positions.
        rows, columns: float32 [out_features] and [in_features], decaying sums of the mean squares of the momentum.
        offset: float16 [out_features, in_features], position less that of the code at the start, in steps of a code.
        best: uint8 codes on the CPU.
    """

    def __init__(self, weight: NestedWeight, table: MoveTable) -> None:
        self._start, self._table = weight.codes, table.codes.flatten().to(weight.codes.device)
        self._prefixes = table.codes.shape[1]
        self._width = float(len(table.codes) // self._prefixes)  # codes of a prefix
        self.present = dataclasses.replace(weight, codes=weight.codes.clone())
        self.offset = torch.zeros_like(weight.codes, dtype=torch.float16)
        self.momentum = torch.zeros_like(weight.codes, dtype=torch.bfloat16)
        self.rows, self.columns = (torch.zeros(n, device=self._start.device) for n in weight.codes.shape)
        self.keep()

    def accumulate(self, grad_weight: Tensor, scales: Tensor, slopes: Tensor) -> None:
        """Add a gradient of the positions to the momentum.

        Args:
            grad_weight: gradient of the dense weight; stays as it is.
            scales: float32 [out_features, groups] that the weight was made with.
            slopes: float32 [2^master_bits], derivative of the weight in units of its scale, by the code at the start.
        """
        gradient = slopes[self._start.int()].mul_(grad_weight)
        scale_groups(gradient, scales, 0.0, self.present.format.group_size)
        self.momentum += gradient

    def moved(self, rate: float, power: float) -> Tensor:
        """Offsets moved by ``rate`` steps of a code, the root mean square over the layer: float32.

        Args:
            power: of the mean squares that the momentum is divided by, see ``RefineConfig.code_curvature_power``.
        """
        momentum = self.momentum.float()
        for kept, dim in ((self.rows, 1), (self.columns, 0)):
            kept.mul_(_SQUARES_DECAY).add_(momentum.square().mean(dim))
        if power:
            momentum /= torch.outer(*(_relative(mean) ** power for mean in (self.rows, self.columns)))
        size = momentum.square().mean().sqrt().clamp(min=_TINY)
        return self.offset - momentum * (rate / size)

    def place(self, offset: Tensor, limits: tuple[Tensor, Tensor]) -> None:
        """Set the offsets, clamped to the prefixes of ``limits``, and the present codes."""
        start = self._start.int()
        first, last = (one[start] for one in limits)
        centre = start + 0.5
        self.offset.copy_(torch.clamp(offset.float(), first * self._width - centre, (last + 1) * self._width - centre))
        prefix = ((centre + self.offset) / self._width).floor().int().clamp(first, last)
        self.present.codes.copy_(self._table[start * self._prefixes + prefix])

    def keep(self) -> None:
        """Keep the present codes as the best."""
        self.best = self.present.codes.to("cpu", copy=True)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the tensors of a state; ``place`` makes the present codes of them."""
        self.best = tensors["best"]
        for part in _TENSORS[:-1]:
            getattr(self, part).copy_(tensors[part])


class CodeRefinement(ScaleRefinement):
    """Refinement of the codes of all layers and of the scales of each trained bit-width; all other scales stay."""

    def start(self, model: SliceModel) -> None:
        super().start(model)
        config, weights = self.config, model.reader.weights
        formats = {weight.format for weight in weights.values()}
        self._tables = {fmt: MoveTable.of(fmt, max(config.bits), config.held_bits) for fmt in formats}
        self._codes = {name: TrainedCodes(weight, self._tables[weight.format]) for name, weight in weights.items()}
        self._held = {
            bits: {name: weight.scales_at(bits).float() for name, weight in weights.items()}
            for bits in config.held_bits
        }
        # Slopes of each bit-width times its share of the momentum; on the device, since captured passes read them.
        self._slopes = {
            bits: {fmt: torch.zeros(2**fmt.master_bits, device=self.context.device) for fmt in formats}
            for bits in config.bits
        }
        self._first: dict[int, float] = {}
        self._set_tolerance(config.code_tolerance)

    def _set_tolerance(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._limits = {fmt: table.limits(tolerance, self.context.device) for fmt, table in self._tables.items()}

    def _place(self, codes: TrainedCodes, offset: Tensor) -> None:
        codes.place(offset, self._limits[codes.present.format])

    @property
    def validated_bits(self) -> tuple[int, ...]:
        return (*self.config.bits, *self.config.held_bits)

    def linear(self, name: str, x: Tensor, scales: Tensor, bits: int, bias: Tensor | None) -> Tensor:
        """Output of a layer of the slice of ``bits`` bits of the present codes; its backward pass adds to the momentum."""
        codes = self._codes[name]
        own = self._slopes.get(bits, {}).get(codes.present.format)
        observe = None if own is None else lambda gradient: codes.accumulate(gradient, scales, own)
        return scaled_linear(x, scales, codes.present, bits, bias, observe)

    def take_step(self, model: SliceModel, batch: int) -> None:
        rate = self.config.code_learning_rate * rate_at(self.step, self.config)
        for codes in self._codes.values():
            codes.momentum *= _MOMENTUM_DECAY
        super().take_step(model, batch)
        for codes in self._codes.values():
            self._average(codes.momentum)
            self._place(codes, codes.moved(rate, self.config.code_curvature_power))

    def descend(self, model: SliceModel, one: TrainedScales, batch: int, full: Tensor) -> None:
        self.prepare(one.bits)
        super().descend(model, one, batch, full)

    def prepare(self, bits: int) -> None:
        """Let the next backward pass add the gradients of ``bits`` bits to the momentum, divided by the mean of its losses."""
        share = (1 - _MOMENTUM_DECAY) / (self._trained[bits].mean_loss or self._first[bits])
        for fmt, own in self._slopes[bits].items():
            changing = [self._slopes_of(fmt, one) for one in self.config.code_bits or self.config.bits]
            own.copy_(share * self._slopes_of(fmt, bits) * torch.stack(changing).any(0))

    def _slopes_of(self, fmt: WeightFormat, bits: int) -> Tensor:
        return slopes(fmt.levels(bits), self._limits[fmt], 2 ** (fmt.master_bits - max(self.config.bits)))

    def _average(self, momentum: Tensor) -> None:
        """Average the momentum over the processes, in place: it is linear in their gradients."""
        group = self.context.process_group
        if group.world_size > 1:
            total = momentum.float()
            group.all_reduce(total)
            momentum.copy_(total / group.world_size)

    def trained(self, bits: int) -> Trained:
        return self._held[bits] if bits in self._held else super().trained(bits)

    def validated(self, losses: Mapping[int, float]) -> bool:
        """Keep the present state if it is the best.

        A held bit-width that is too much worse than at the start halves the tolerance, down to that of a rounding, which moves
        the codes with the largest errors back; then the state is validated again.
        """
        self._first = self._first or dict(losses)
        held = all(losses[bits] <= (1 + self.config.held_increase) * self._first[bits] for bits in self._held)
        if not held and self._tolerance > LEAST_CODE_TOLERANCE:
            self._set_tolerance(max(self._tolerance / 2, LEAST_CODE_TOLERANCE))
            for codes in self._codes.values():
                self._place(codes, codes.offset)
            return True
        score = _mean_log_ratio(losses, self._first, self.config.bits) if held else math.inf
        kept = [one.keep_if_best(score) for one in self._trained.values()]
        if all(kept):  # or none
            for codes in self._codes.values():
                codes.keep()
        return False

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, scales = super().state()
        for name, codes in self._codes.items():
            tensors |= {f"{part}.{name}": getattr(codes, part).cpu() for part in _TENSORS}
        first = {str(bits): loss for bits, loss in self._first.items()}
        return tensors, {"scales": scales, "tolerance": self._tolerance, "first": first}

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        super().load_state(tensors, numbers["scales"])
        self._first = {int(bits): loss for bits, loss in numbers["first"].items()}
        self._set_tolerance(numbers["tolerance"])
        for name, codes in self._codes.items():
            codes.load({part: tensors[f"{part}.{name}"] for part in _TENSORS})
            self._place(codes, codes.offset)

    def refined(self, weights: Mapping[str, NestedWeight]) -> dict[str, NestedWeight]:
        return super().refined({n: dataclasses.replace(w, codes=self._codes[n].best) for n, w in weights.items()})


def _relative(mean_squares: Tensor) -> Tensor:
    """Mean squares of rows or columns over their mean; those near zero are raised."""
    return (mean_squares / mean_squares.mean().clamp(min=_TINY)).clamp(min=_LEAST_SQUARE)


def _mean_log_ratio(losses: Mapping[int, float], first: Mapping[int, float], bits: tuple[int, ...]) -> float:
    """Mean over ``bits`` of the logarithm of a loss over the first one."""
    return sum(math.log(max(losses[b], _TINY) / max(first[b], _TINY)) for b in bits) / len(bits)

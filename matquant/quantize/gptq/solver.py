"""One-shot nested quantization of one weight matrix: a function from tensors to tensors.

GPTQ (arXiv 2210.17323) keeps one error-compensated copy of the weights. Its exact extension to

    min  sum_b lambda_b tr( (W - W_b) H (W - W_b)^T )       H = 2 X^T X / n + damping

over the codes of all widths b at once keeps one compensated target per width: the code of a column is the one of least
sum_b lambda_b (t_b - w_b(q))^2, and each width's own error is fed back into its own target. MatGPTQ v1 (arXiv 2602.03537)
keeps a single target and feeds back the unweighted mean of the widths' errors (``feedback="mean"``).
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from matquant.formats.nested import NestedWeight, Slicing, WeightFormat, levels
from matquant.quantize.gptq import column_solver
from matquant.quantize.gptq.cholesky import damped, inverse_factor
from matquant.quantize.gptq.code_grid import FROM_RANGE, Grid, Trials

# Clips of a group's range that the scale search tries. Two bits want a grid well inside the range, eight bits nearly all.
_CLIPS = torch.linspace(1.0, 0.4, 25)

# Weights that are solved at once; a larger matrix is taken in parts of its rows. While one is solved there are up to three
# float32 arrays of its size for each width: compensated targets, their start, gradients.
MOST_WEIGHTS = 2**26

# Zero points about the middle of 8-bit codes that the search tries besides the one that fits the range.
_ZERO_STEPS = (0, 8, -8, 16, -16, 24, -24)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SolverOptions:
    """What a solve depends on besides its tensors; fields as in ``matquant.config.MethodConfig``.

    Attributes:
        weights: width in bits to lambda; widths of weight zero are left out.
        offset: of the zero point of symmetric weights from the middle of the codes, in units of a code. With another than
            0 each group takes the better of the grid and its mirror image, which a negative scale stands for.
        sweeps: passes of coordinate descent after the solve.
        scale_dtype: dtype in which scales are stored; codes are chosen with the stored values.
    """

    weights: Mapping[int, float]
    master_bits: int = 8
    slicing: Slicing = "msb"
    feedback: Literal["per_width", "mean"] = "per_width"
    group_size: int = 128
    symmetric: bool = True
    offset: float = 0.0
    scale: Literal["minmax", "search"] = "search"
    act_order: bool = False
    sweeps: int = 0
    damp: float = 0.01
    block_size: int = 128
    scale_dtype: torch.dtype = torch.float16

    def weight_format(self, in_features: int) -> WeightFormat:
        """Format of a weight with so many input features."""
        return WeightFormat(
            group_size=in_features if self.group_size == -1 else self.group_size,
            master_bits=self.master_bits,
            slicing=self.slicing,
            zero_point_offset=self.offset if self.symmetric else 0.0,
            has_zero_points=not self.symmetric,
            scale_dtype=self.scale_dtype,
        )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(sorted(b for b, weight in self.weights.items() if weight > 0))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What calibration knows of a layer's inputs at one width (or, when there is only one, at all).

    Attributes:
        hessian: float32 [in_features, in_features], 2 X_b^T X_b / n of the inputs X_b that the quantized model gives.
        cross: float32 [in_features, in_features], 2 (X - X_b)^T X_b / n with the full-precision model's inputs X, for
            asymmetric calibration; None takes the weights themselves as target.
    """

    hessian: Tensor
    cross: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Inputs made ready for solving; layers that share their input share it. One for all widths, or one for each of them, in
    which case widths that share their inputs hold the same tensors.

    Attributes:
        hessians: float32 [columns, columns] each, damped.
        factors: float32 [columns, columns] each, upper Cholesky factors of the inverse Hessians.
        shifts: float32 [columns, columns] each, C H^-1: the target of a weight W is W + W C H^-1, whose output on X_b comes
            nearest to that of W on X (GPTAQ, arXiv 2504.02692, for one width). None for symmetric calibration.
        order: the order in which columns are solved, in which all of these are; None for their own.
        notes: sentences that the user should read.
    """

    hessians: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...] | None
    order: Tensor | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Factored:
    """One entry of ``Calibration``: what its fields hold, for one set of inputs."""

    hessian: Tensor
    factor: Tensor
    shift: Tensor | None
    note: str | None


def factored(given: Inputs, order: Tensor | None, damp: float, layer: str) -> Factored:
    """Factor the Hessian of some inputs, in the order in which columns are solved.

    Raises:
        UserError: it is not finite, or no damping makes it positive definite.
    """
    hessian = _ordered(given.hessian, order)
    factor = inverse_factor(hessian, damp, layer)
    shift = None if given.cross is None else _ordered(given.cross, order) @ factor.upper.T @ factor.upper
    return Factored(hessian=damped(hessian, factor.damp), factor=factor.upper, shift=shift, note=factor.note)


def calibrate(
    inputs: Sequence[Inputs],
    options: SolverOptions,
    layer: str = "this layer",
    share: Callable[[int, Callable[[int], Factored]], list[Factored]] = lambda count, work: [*map(work, range(count))],
) -> Calibration:
    """Factor the Hessians of a layer's inputs.

    Args:
        inputs: one for all widths, or one per width of ``options.widths``; the same object where widths share it.
        layer: its name, for sentences.
        share: gives what the work makes of 0 .. count - 1; for those who have more than one process for it.

    Raises:
        UserError: a Hessian is not finite, or no damping makes it positive definite.
    """
    if len(inputs) not in (1, len(options.widths)):
        raise ValueError(f"{len(inputs)} inputs for {len(options.widths)} widths")
    order = None
    if options.act_order:
        columns = len(inputs[0].hessian)
        group_size = columns if options.group_size == -1 else options.group_size
        order = _column_order(torch.stack([i.hessian.diagonal() for i in inputs]).mean(0), group_size)
    different = {id(given): given for given in inputs}
    distinct = list(different.values())
    made = share(len(distinct), lambda index: factored(distinct[index], order, options.damp, layer))
    done = dict(zip(different, made, strict=True))
    each = [done[id(given)] for given in inputs]
    shifts = tuple(one.shift for one in each if one.shift is not None)
    return Calibration(
        hessians=tuple(one.hessian for one in each),
        factors=tuple(one.factor for one in each),
        shifts=shifts or None,
        order=order,
        notes=tuple(dict.fromkeys(one.note for one in made if one.note)),
    )


def solve(weight: Tensor, calibration: Calibration | None, options: SolverOptions) -> NestedWeight:
    """Quantize one weight matrix.

    Args:
        weight: [out_features, in_features], any float dtype.
        calibration: of its inputs; None rounds to nearest.
        options: how.

    Raises:
        ValueError: the group size does not divide in_features or does not align with the block size, or round slices, which
            have no mirror image, are asked for with an offset.
    """
    columns = weight.shape[1]
    group_size = columns if options.group_size == -1 else options.group_size
    _check_shapes(columns, group_size, options)
    rows_at_once = max(1, MOST_WEIGHTS // columns)
    return _joined(
        [_solve_rows(part, calibration, group_size, options) for part in weight.detach().split(rows_at_once)]
    )


def _solve_rows(
    weight: Tensor, calibration: Calibration | None, group_size: int, options: SolverOptions
) -> NestedWeight:
    """``solve`` for some of a matrix's rows, which do not depend on the others."""
    targets = weight.float()[None]
    if calibration is None:
        state = _State.start(targets, group_size, options)
        state.solve((), options)
        return state.finish(None, options)
    if calibration.order is not None:
        targets = targets[:, :, calibration.order]
    if calibration.shifts is not None:
        targets = torch.stack([targets[0] + targets[0] @ shift for shift in calibration.shifts])
    state = _State.start(targets, group_size, options)
    state.solve(calibration.factors, options)
    for _ in range(options.sweeps):
        state.sweep(targets, calibration.hessians)
    return state.finish(calibration.order, options)


def _joined(parts: Sequence[NestedWeight]) -> NestedWeight:
    """One matrix of the rows of all parts."""
    codes, scales = torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return dataclasses.replace(parts[0], codes=codes, scales=scales, zeros=torch.cat(zeros) if zeros else None)


def compile_row_solver() -> None:
    """Compile what runs on the CPU, unless that was done on this machine before: it takes some hundred MB for a while."""
    options = SolverOptions(weights={2: 1.0}, group_size=32, sweeps=1)
    solve(torch.ones(1, 32), calibrate([Inputs(hessian=torch.eye(32))], options), options)


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """tr((W - W_b) H (W - W_b)^T) / tr(W H W^T): the share of a layer's output energy that is lost.

    Args:
        weight, quantized: [out_features, in_features].
        hessian: float32 [in_features, in_features].
    """
    lost, whole = (output_energy(w, hessian).sum() for w in (weight.float() - quantized, weight.float()))
    return float(lost / whole) if whole > 0 else 0.0


def output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """w H w^T of each row w of a float32 weight [out_features, in_features]: float64 [out_features]."""
    return (weight @ hessian).mul_(weight).sum(1).double()


def _trials(options: SolverOptions, device: torch.device) -> Trials:
    """The clips and the zero points that are tried for each group."""
    middle = 2 ** (options.master_bits - 1)
    searching = options.scale == "search"
    if options.symmetric:
        zero_points = [middle + options.offset, middle - options.offset] if options.offset else [middle]
    else:
        near = [middle + step * 2.0 ** (options.master_bits - 8) for step in _ZERO_STEPS if searching]
        zero_points = [FROM_RANGE, *(z for z in near if z.is_integer())]
    clips = _CLIPS if searching else _CLIPS[:1]
    return Trials(clips.to(device), torch.tensor(zero_points, device=device).float(), options.scale_dtype)


def _check_shapes(columns: int, group_size: int, options: SolverOptions) -> None:
    if columns % group_size:
        raise ValueError(f"group size {group_size} does not divide {columns} input features")
    if group_size % options.block_size and options.block_size % group_size:
        raise ValueError(f"block size {options.block_size} and group size {group_size} do not align")
    if options.offset and options.symmetric and options.slicing != "msb":
        raise ValueError("the grid of round slices has no mirror image: they need an offset of 0")


def _divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is not above ``most``: a part of a group holds whole parts of it."""
    return next(number // n for n in range(1, number + 1) if number % n == 0 and number // n <= most)


def _column_order(diagonal: Tensor, group_size: int) -> Tensor:
    """Columns by falling diagonal of the Hessian within their group, groups by their largest.

    Groups stay whole, so that the stored matrix keeps its order and no runtime has to permute its input.
    """
    diagonal = diagonal.view(-1, group_size)
    within = diagonal.argsort(dim=1, descending=True, stable=True)
    groups = diagonal.amax(1).argsort(descending=True, stable=True)
    first = torch.arange(len(groups), device=diagonal.device)[:, None] * group_size
    return (first + within)[groups].flatten()


def _ordered(matrix: Tensor, order: Tensor | None) -> Tensor:
    return matrix if order is None else matrix[order][:, order]


@dataclasses.dataclass(slots=True)
class _State:
    """The arrays that the compiled row solver works on; names and shapes as in ``rows``."""

    targets: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    lam: Tensor
    units: Tensor
    grid: Grid
    group_size: int
    block_size: int

    @classmethod
    def start(cls, targets: Tensor, group_size: int, options: SolverOptions) -> "_State":
        _, out_features, columns = targets.shape
        widths = options.widths
        count = 1 if options.feedback == "mean" else len(widths)
        groups, device = columns // group_size, targets.device
        return cls(
            targets=targets.expand(count, -1, -1).clone(),
            codes=torch.zeros(out_features, columns, dtype=torch.uint8, device=device),
            scales=torch.zeros(out_features, groups, device=device),
            zeros=torch.zeros(out_features, groups, device=device),
            lam=torch.tensor([options.weights[b] for b in widths], device=device),
            units=torch.stack([levels(b, options.master_bits, options.slicing) for b in widths]).float().to(device),
            grid=Grid.of(widths, options.master_bits, options.slicing, device),
            group_size=group_size,
            block_size=_divisor(min(options.block_size, group_size), column_solver.largest_block(device, len(widths))),
        )

    def solve(self, factors: Sequence[Tensor], options: SolverOptions) -> None:
        """Choose all codes, column by column in blocks; without factors nothing is fed back."""
        columns, trials = self.codes.shape[1], _trials(options, self.codes.device)
        # An error e in a column adds (e / U_jj)^2 to a width's objective.
        curvature = torch.stack([f.diagonal() ** -2 for f in factors]) if factors else self.scales.new_ones(1, columns)
        lam, importance = self._weights(curvature), curvature[-1] / curvature[-1].mean()
        for first, last, group in self._blocks():
            if first % self.group_size == 0:
                self.scales[:, group], self.zeros[:, group] = column_solver.choose_scales(
                    self.targets, first, first + self.group_size, importance, lam, self.grid, trials
                )
            scales, zeros = self.scales[:, group].contiguous(), self.zeros[:, group].contiguous()
            block = (
                self._block_of(factors, first, last) if factors else self.scales.new_ones(1, last - first).diag_embed()
            )
            errors = column_solver.solve_columns(
                self.targets, first, last, block, lam, self.grid, scales, zeros, self.codes
            )
            if factors and last < columns:
                for k, target in enumerate(self.targets):
                    target[:, last:].addmm_(errors[k], factors[k % len(factors)][first:last, last:], alpha=-1)

    def sweep(self, targets: Tensor, hessians: Sequence[Tensor]) -> None:
        """One pass of coordinate descent over all columns against the damped Hessians."""
        lam = self._weights(torch.stack([h.diagonal() for h in hessians]))
        gradient = targets.new_empty(len(self.lam), *self.codes.shape)
        for k in range(len(self.lam)):
            torch.mm(self._values(k) - targets[k % len(targets)], hessians[k % len(hessians)], out=gradient[k])
        for first, last, group in self._blocks():
            block, scales = self._block_of(hessians, first, last), self.scales[:, group].contiguous()
            moves = column_solver.sweep_columns(gradient, first, last, block, lam, self.grid, scales, self.codes)
            for k in range(len(self.lam)):
                gradient[k, :, last:].addmm_(moves[k], hessians[k % len(hessians)][first:last, last:])

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """First and last column of each block, and the group in which it lies."""
        columns = self.codes.shape[1]
        for first in range(0, columns, self.block_size):
            yield first, min(first + self.block_size, columns), first // self.group_size

    def _block_of(self, matrices: Sequence[Tensor], first: int, last: int) -> Tensor:
        return torch.stack([m[first:last, first:last] for m in matrices])

    def _values(self, k: int) -> Tensor:
        """The decoded weight [rows, columns] at the k-th width."""
        grouped = self.units[k][self.codes.int()].view(*self.scales.shape, -1)
        return ((grouped - self.zeros[:, :, None]) * self.scales[:, :, None]).view(self.codes.shape)

    def _weights(self, curvature: Tensor) -> Tensor:
        """lambda of each width and column, [K, columns], when an error's cost also has a curvature [1 or K, columns].

        Only ratios matter within a column, so with one Hessian these are the lambdas themselves.
        """
        return (self.lam[:, None] * (curvature / curvature[-1])).expand(len(self.lam), -1).contiguous()

    def finish(self, order: Tensor | None, options: SolverOptions) -> NestedWeight:
        """The result in the columns' stored order."""
        codes, scales, zeros = self.codes, self.scales, self.zeros
        if options.symmetric and options.offset:
            codes, scales = self._unmirrored(options.master_bits)
        if order is not None:
            codes = codes[:, order.argsort()].contiguous()
            stored = (order.view(-1, self.group_size)[:, 0] // self.group_size).argsort()
            scales, zeros = scales[:, stored].contiguous(), zeros[:, stored].contiguous()
        return NestedWeight(
            codes=codes,
            scales=scales.to(options.scale_dtype),
            zeros=None if options.symmetric else zeros.to(torch.uint8),
            format=options.weight_format(codes.shape[1]),
        )

    def _unmirrored(self, master_bits: int) -> tuple[Tensor, Tensor]:
        """Codes and scales about the one zero point: the mirror image of a code about the middle is its complement."""
        mirrored = self.zeros < 2 ** (master_bits - 1)
        flipped = mirrored.repeat_interleave(self.group_size, 1)
        codes = torch.where(flipped, 2**master_bits - 1 - self.codes.int(), self.codes.int()).to(torch.uint8)
        return codes, torch.where(mirrored, -self.scales, self.scales)

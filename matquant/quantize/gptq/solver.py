"""One-shot nested quantization of one weight matrix: a function from tensors to tensors.

GPTQ (arXiv 2210.17323) keeps one error-compensated copy of the weights. Its exact extension to

    min  sum_b lambda_b tr( (W - W_b) H (W - W_b)^T )       H = 2 X^T X / n + damping

over the codes of all bit-widths b at once keeps one compensated target per bit-width: the code of a column is the one of least
sum_b lambda_b (t_b - w_b(q))^2, and the error of each bit-width is fed back into its own target. MatGPTQ v1 (arXiv 2602.03537)
keeps a single target and feeds back the unweighted mean of the errors (``error_feedback="mean"``).

Low bit-widths may have scales of their own. They follow from the codes in closed form (``scale_refit``), and the codes are then
chosen again with them in the next pass of coordinate descent.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from matquant.formats.groups import expand_groups, fit_group_size, group_count, scale_groups, subtract_zero_points
from matquant.formats.nested import NestedWeight
from matquant.quantize.gptq import column_solver, scale_refit
from matquant.quantize.gptq.code_grid import FROM_RANGE, CodeGrid, ScaleSearchSpace
from matquant.quantize.gptq.hessians import HessianStats, PreparedHessians, prepare_hessians
from matquant.quantize.gptq.options import SolverOptions

# Clip ratios of a group's range that the scale search tries. Two bits need a grid well inside the range, eight bits nearly all
# of it.
_CLIP_RATIOS = torch.linspace(1.0, 0.4, 25)

# Weights that are solved at once; a larger matrix is solved in parts of its rows. Up to three float32 arrays of a part's size
# are alive for each bit-width: compensated targets, uncompensated targets, gradients.
MAX_WEIGHTS_AT_ONCE = 2**26

# Zero points around the middle of 8-bit codes that the search tries besides the one that fits the range.
_ZERO_POINT_STEPS = (0, 8, -8, 16, -16, 24, -24)


def solve(weight: Tensor, prepared: PreparedHessians | None, options: SolverOptions) -> NestedWeight:
    """Quantize one weight matrix.

    Args:
        weight: [out_features, in_features], any float dtype.
        prepared: factorized Hessians of its inputs; None rounds to nearest.
        options: techniques and format.

    Raises:
        ValueError: round slices, which have no mirror image, are combined with a zero-point offset.
    """
    if options.zero_point_offset and options.symmetric and options.slicing != "msb":
        raise ValueError("the grid of round slices has no mirror image: it needs a zero-point offset of 0")
    columns = weight.shape[1]
    group_size = fit_group_size(options.group_size, columns)
    rows_at_once = max(1, MAX_WEIGHTS_AT_ONCE // columns)
    return _concat_rows(
        [_solve_rows(part, prepared, group_size, options) for part in weight.detach().split(rows_at_once)]
    )


def _solve_rows(
    weight: Tensor, prepared: PreparedHessians | None, group_size: int, options: SolverOptions
) -> NestedWeight:
    """Solve some rows of a matrix; rows do not depend on each other."""
    targets = weight.float()[None]
    if prepared is None:
        state = _ColumnSolve.start(targets, group_size, options)
        state.solve((), options)
        state.refit_scales(targets, (None,), options)
        return state.finish(None, options)
    if prepared.order is not None:
        targets = targets[:, :, prepared.order]
    if prepared.corrections is not None:
        targets = torch.stack([targets[0] + targets[0] @ correction for correction in prepared.corrections])
    state = _ColumnSolve.start(targets, group_size, options)
    state.solve(prepared.factors, options)
    for _ in range(options.cd_passes):
        state.refit_scales(targets, prepared.hessians, options)
        state.coordinate_descent(targets, prepared.hessians)
    state.refit_scales(targets, prepared.hessians, options)
    return state.finish(prepared.order, options)


def _concat_rows(parts: Sequence[NestedWeight]) -> NestedWeight:
    """Concatenate the rows of all parts."""
    first = parts[0]
    zeros = [p.zeros for p in parts if p.zeros is not None]
    return dataclasses.replace(
        first,
        codes=torch.cat([p.codes for p in parts]),
        scales=torch.cat([p.scales for p in parts]),
        zeros=torch.cat(zeros) if zeros else None,
        own_scales={bits: torch.cat([p.own_scales[bits] for p in parts]) for bits in first.own_scales},
    )


def compile_column_solver() -> None:
    """Compile the CPU solver, unless this machine's cache holds it already; compiling takes a few hundred MB."""
    options = SolverOptions(lambdas={2: 1.0}, group_size=32, cd_passes=1)
    solve(torch.ones(1, 32), prepare_hessians([HessianStats(hessian=torch.eye(32))], options), options)


def _scale_search_space(options: SolverOptions, device: torch.device) -> ScaleSearchSpace:
    """Clip ratios and zero points that are tried for each group."""
    middle, offset = 2 ** (options.master_bits - 1), options.zero_point_offset
    searching = options.scale == "search"
    if options.symmetric:
        zero_points = [middle + offset, middle - offset] if offset else [middle]
    else:
        near = [middle + step * 2.0 ** (options.master_bits - 8) for step in _ZERO_POINT_STEPS if searching]
        zero_points = [FROM_RANGE, *(z for z in near if z.is_integer())]
    clip_ratios = _CLIP_RATIOS if searching else _CLIP_RATIOS[:1]
    return ScaleSearchSpace(
        clip_ratios.to(device), torch.tensor(zero_points, device=device).float(), options.scale_dtype
    )


@dataclasses.dataclass(slots=True)
class _ColumnSolve:
    """Arrays of the column solver; shapes as in ``column_solver``, with K bit-widths and T targets.

    Attributes:
        targets: float32 [T, rows, columns], error-compensated.
        codes: uint8 [rows, columns].
        scales: float32 [S, rows, groups]; of each bit-width in ``bits``, equal for all that share the base set.
        zeros: float32 [rows, groups].
        bits: the K bit-widths of the objective, and those that only have scales of their own.
        lambdas: float32 [K].
        levels: float32 [S, 2^M], value of each code in units of its scale.
    """

    targets: Tensor
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: tuple[int, ...]
    lambdas: Tensor
    levels: Tensor
    grid: CodeGrid
    group_size: int
    block_size: int

    @classmethod
    def start(cls, targets: Tensor, group_size: int, options: SolverOptions) -> "_ColumnSolve":
        _, out_features, columns = targets.shape
        bits = options.bits
        count = 1 if options.error_feedback == "mean" else len(bits)
        groups, device = group_count(columns, group_size), targets.device
        valued = bits + tuple(b for b in options.own_scale_bits if b not in bits)
        return cls(
            targets=targets.expand(count, -1, -1).clone(memory_format=torch.contiguous_format),
            codes=torch.zeros(out_features, columns, dtype=torch.uint8, device=device),
            scales=torch.zeros(len(valued), out_features, groups, device=device),
            zeros=torch.zeros(out_features, groups, device=device),
            bits=valued,
            lambdas=torch.tensor([options.lambdas[b] for b in bits], device=device),
            levels=torch.stack([options.levels(b) for b in valued]).float().to(device),
            grid=CodeGrid.of(bits, options.master_bits, options.slicing, options.stretch, device),
            group_size=group_size,
            block_size=min(options.block_size, column_solver.max_block_size(device, len(bits))),
        )

    def solve(self, factors: Sequence[Tensor], options: SolverOptions) -> None:
        """Choose all codes, column by column in blocks; without factors no error is fed back."""
        columns, search_space = self.codes.shape[1], _scale_search_space(options, self.codes.device)
        # An error e in a column adds (e / U_jj)^2 to the objective of a bit-width.
        curvature = torch.stack([f.diagonal() ** -2 for f in factors]) if factors else self.zeros.new_ones(1, columns)
        lambdas, hessian_diag = self._column_lambdas(curvature), curvature[-1] / curvature[-1].mean()
        for first, last, group in self._blocks():
            if first % self.group_size == 0:
                end = min(first + self.group_size, columns)
                self.scales[:, :, group], self.zeros[:, group] = column_solver.choose_scales(
                    self.targets, first, end, hessian_diag, lambdas, self.grid, search_space
                )
            scales, zeros = self._scales_of(group), self.zeros[:, group].contiguous()
            block = (
                self._block_of(factors, first, last) if factors else self.zeros.new_ones(1, last - first).diag_embed()
            )
            errors = column_solver.solve_columns(
                self.targets, first, last, block, lambdas, self.grid, scales, zeros, self.codes
            )
            if factors and last < columns:
                for k, target in enumerate(self.targets):
                    target[:, last:].addmm_(errors[k], factors[k % len(factors)][first:last, last:], alpha=-1)

    def refit_scales(self, targets: Tensor, hessians: Sequence[Tensor | None], options: SolverOptions) -> None:
        """Refit the scales of the bit-widths that have their own, for the present codes.

        Args:
            targets: float32 [T, rows, columns], uncompensated.
            hessians: of each bit-width of the objective, or one for all; None weighs all inputs equally.
        """
        for bits in options.own_scale_bits:
            k = self.bits.index(bits)
            nearest = min(range(len(self.lambdas)), key=lambda i: (abs(self.bits[i] - bits), -i))
            values = subtract_zero_points(self.levels[k][self.codes.int()], self.zeros, self.group_size)
            fitted = scale_refit.refit_scales(
                values,
                targets[nearest % len(targets)],
                hessians[nearest % len(hessians)],
                self.scales[k],
                self.group_size,
            )
            self.scales[k] = fitted.to(options.scale_dtype)

    def coordinate_descent(self, targets: Tensor, hessians: Sequence[Tensor]) -> None:
        """Run one pass of coordinate descent over all columns on the exact objective of the damped Hessians.

        Args:
            targets: float32 [T, rows, columns], uncompensated.
        """
        lambdas = self._column_lambdas(torch.stack([h.diagonal() for h in hessians]))
        gradient = targets.new_empty(len(self.lambdas), *self.codes.shape)
        for k in range(len(self.lambdas)):
            torch.mm(self._dequantize(k) - targets[k % len(targets)], hessians[k % len(hessians)], out=gradient[k])
        for first, last, group in self._blocks():
            block, scales = self._block_of(hessians, first, last), self._scales_of(group)
            moves = column_solver.descend_columns(gradient, first, last, block, lambdas, self.grid, scales, self.codes)
            for k in range(len(self.lambdas)):
                gradient[k, :, last:].addmm_(moves[k], hessians[k % len(hessians)][first:last, last:])

    def _blocks(self) -> Iterator[tuple[int, int, int]]:
        """First column of each block, the column after its last one, and its group; no block crosses the end of a group."""
        columns = self.codes.shape[1]
        for group, start in enumerate(range(0, columns, self.group_size)):
            end = min(start + self.group_size, columns)
            for first in range(start, end, self.block_size):
                yield first, min(first + self.block_size, end), group

    def _scales_of(self, group: int) -> Tensor:
        """Scales of a group at each bit-width of the objective: float32 [K, rows]."""
        return self.scales[: len(self.lambdas), :, group].contiguous()

    def _block_of(self, matrices: Sequence[Tensor], first: int, last: int) -> Tensor:
        return torch.stack([m[first:last, first:last] for m in matrices])

    def _dequantize(self, k: int) -> Tensor:
        """Dense weight [rows, columns] at the k-th bit-width."""
        return scale_groups(self.levels[k][self.codes.int()], self.scales[k], self.zeros, self.group_size)

    def _column_lambdas(self, curvature: Tensor) -> Tensor:
        """Weight of each bit-width and column [K, columns], for errors whose cost has a curvature [1 or K, columns].

        Only ratios matter within a column, so with one Hessian these are the lambdas themselves.
        """
        return (self.lambdas[:, None] * (curvature / curvature[-1])).expand(len(self.lambdas), -1).contiguous()

    def finish(self, order: Tensor | None, options: SolverOptions) -> NestedWeight:
        """Return the result in the stored order of the columns."""
        codes, scales, zeros = self.codes, self.scales.to(options.scale_dtype), self.zeros
        if options.symmetric and options.zero_point_offset:
            codes, scales = self._flip_mirrored(scales, options.master_bits)
        if order is not None:
            codes = codes[:, order.argsort()].contiguous()
            stored = (order[:: self.group_size] // self.group_size).argsort()
            scales, zeros = scales[:, :, stored], zeros[:, stored].contiguous()
        base = len(self.lambdas) - 1  # the highest bit-width of the objective
        return NestedWeight(
            codes=codes,
            scales=scales[base].contiguous(),
            zeros=None if options.symmetric else zeros.to(torch.uint8),
            format=options.weight_format(codes.shape[1]),
            own_scales={bits: scales[self.bits.index(bits)].contiguous() for bits in options.own_scale_bits},
        )

    def _flip_mirrored(self, scales: Tensor, master_bits: int) -> tuple[Tensor, Tensor]:
        """Codes and scales with one zero point: a mirrored group gets a negative scale and complemented codes."""
        mirrored = self.zeros < 2 ** (master_bits - 1)
        flipped = expand_groups(mirrored, self.codes.shape[1], self.group_size)
        codes = torch.where(flipped, 2**master_bits - 1 - self.codes.int(), self.codes.int()).to(torch.uint8)
        return codes, torch.where(mirrored, -scales, scales)

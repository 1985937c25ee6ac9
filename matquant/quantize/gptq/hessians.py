"""Statistics of a layer's inputs, and their preparation for the solver: damping, Cholesky factors, target corrections."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from matquant.formats.groups import fit_group_size
from matquant.quantize.gptq.cholesky import damped, inverse_factor
from matquant.quantize.gptq.options import SolverOptions

MapFn = Callable[[int, Callable[[int], "CholeskyFactor"]], list["CholeskyFactor"]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class HessianStats:
    """Second moments of a layer's inputs at one bit-width (or at all of them, where there is only one).

    Attributes:
        hessian: float32 [in_features, in_features], 2 X_b^T X_b / n of the quantized model's inputs X_b.
        cross_hessian: float32 [in_features, in_features], 2 (X - X_b)^T X_b / n with the full-precision model's inputs X, for
            asymmetric calibration; None takes the weights themselves as targets.
    """

    hessian: Tensor
    cross_hessian: Tensor | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CholeskyFactor:
    """Factorization of one input's Hessian, columns in the order of the solve.

    Attributes:
        hessian: float32 [columns, columns], damped.
        factor: float32 [columns, columns], upper Cholesky factor of the inverse.
        correction: float32 [columns, columns], share * C H^-1; None for symmetric calibration.
        note: sentence for the user, or None.
    """

    hessian: Tensor
    factor: Tensor
    correction: Tensor | None
    note: str | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PreparedHessians:
    """Factorized Hessians of a layer's inputs; layers that share their input share the object.

    One entry for all bit-widths, or one per bit-width; bit-widths that share their statistics hold the same tensors.

    Attributes:
        hessians: float32 [columns, columns] each, damped.
        factors: float32 [columns, columns] each, upper Cholesky factors of the inverse Hessians.
        corrections: float32 [columns, columns] each, a share of C H^-1. The target W + W C H^-1 of a weight W has the output
            on X_b that is nearest to that of W on X (GPTAQ, arXiv 2504.02692, for one bit-width). A part of the way there
            disturbs high bit-widths less, whose codes the targets of low bit-widths share. None for symmetric calibration.
        order: order in which columns are solved, and of all matrices here; None for the stored order.
        notes: sentences that the user should read.
    """

    hessians: tuple[Tensor, ...]
    factors: tuple[Tensor, ...]
    corrections: tuple[Tensor, ...] | None
    order: Tensor | None
    notes: tuple[str, ...]


def factorize(stats: HessianStats, order: Tensor | None, damp: float, layer: str, share: float = 1.0) -> CholeskyFactor:
    """Factorize the damped Hessian of some inputs, in the order in which columns are solved.

    Args:
        share: of the correction that targets get.

    Raises:
        UserError: it is not finite, or no damping makes it positive definite.
    """
    hessian = _permute(stats.hessian, order)
    factor = inverse_factor(hessian, damp, layer)
    correction = None
    if stats.cross_hessian is not None:
        correction = share * (_permute(stats.cross_hessian, order) @ factor.upper.T @ factor.upper)
    return CholeskyFactor(
        hessian=damped(hessian, factor.damp), factor=factor.upper, correction=correction, note=factor.note
    )


def prepare_hessians(
    stats: Sequence[HessianStats],
    options: SolverOptions,
    layer: str = "this layer",
    map_fn: MapFn = lambda count, work: [*map(work, range(count))],
) -> PreparedHessians:
    """Factorize the Hessians of a layer's inputs.

    Args:
        stats: one for all bit-widths, or one per bit-width of ``options.bits``; the same object where bit-widths share it.
        layer: name of the layer, for messages.
        map_fn: maps ``work`` over ``range(count)``; override it to distribute the work over processes.

    Raises:
        UserError: a Hessian is not finite, or no damping makes it positive definite.
    """
    if len(stats) not in (1, len(options.bits)):
        raise ValueError(f"{len(stats)} input statistics for {len(options.bits)} bit-widths")
    order = None
    if options.act_order:
        diagonal = torch.stack([one.hessian.diagonal() for one in stats]).mean(0)
        order = _column_order(diagonal, fit_group_size(options.group_size, len(diagonal)))
    distinct = list({id(one): one for one in stats}.values())
    made = map_fn(
        len(distinct), lambda index: factorize(distinct[index], order, options.damp, layer, options.correction)
    )
    by_id = {id(one): factor for one, factor in zip(distinct, made, strict=True)}
    factors = [by_id[id(one)] for one in stats]
    corrections = tuple(one.correction for one in factors if one.correction is not None)
    return PreparedHessians(
        hessians=tuple(one.hessian for one in factors),
        factors=tuple(one.factor for one in factors),
        corrections=corrections or None,
        order=order,
        notes=tuple(dict.fromkeys(one.note for one in made if one.note)),
    )


def hessian_quadratic_form(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return w H w^T for each row w of a float32 weight [out_features, in_features]: float64 [out_features]."""
    return (weight @ hessian).mul_(weight).sum(1).double()


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Return tr((W - W_b) H (W - W_b)^T) / tr(W H W^T), the relative output error of a quantized layer.

    Args:
        weight, quantized: [out_features, in_features].
        hessian: float32 [in_features, in_features].
    """
    error, energy = (hessian_quadratic_form(w, hessian).sum() for w in (weight.float() - quantized, weight.float()))
    return float(error / energy) if energy > 0 else 0.0


def _column_order(diagonal: Tensor, group_size: int) -> Tensor:
    """Columns by falling diagonal of the Hessian within their group, groups by their largest; a short last group stays last.

    Groups stay whole, so that the stored matrix keeps its order and no runtime has to permute its input.
    """
    whole = len(diagonal) // group_size * group_size
    grouped = diagonal[:whole].view(-1, group_size)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    groups = grouped.amax(1).argsort(descending=True, stable=True)
    first = torch.arange(len(groups), device=diagonal.device)[:, None] * group_size
    short = whole + diagonal[whole:].argsort(descending=True, stable=True)
    return torch.cat([(first + within)[groups].flatten(), short])


def _permute(matrix: Tensor, order: Tensor | None) -> Tensor:
    return matrix if order is None else matrix[order][:, order]

"""The solver's options as a config means them, for all layers and for those that have some of their own."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from matquant.config import MethodConfig
from matquant.formats.nested import NestedWeight
from matquant.quantize.gptq.solver import SolverOptions


def solver_options(
    method: MethodConfig, weights: Mapping[int, float], master_bits: int, dtype: torch.dtype
) -> SolverOptions:
    """Solver options; only the ratios of the weights matter, so the largest is made 1."""
    largest = max(weights.values())
    return SolverOptions(
        weights={bits: weight / largest for bits, weight in sorted(weights.items()) if weight > 0},
        master_bits=master_bits,
        slicing=method.slicing,
        feedback=method.feedback,
        group_size=method.group_size,
        symmetric=method.symmetric,
        offset=method.offset * 2.0 ** (master_bits - 8) if method.symmetric else 0.0,
        scale=method.scale,
        act_order=method.act_order,
        sweeps=method.sweeps,
        damp=method.damp,
        block_size=method.block_size,
        scale_dtype=torch.float16 if dtype == torch.float32 else dtype,
    )


def own_options(method: MethodConfig, names: Iterable[str], options: SolverOptions) -> dict[str, SolverOptions]:
    """The options of the layers that have some of their own; layers of one pattern share the object."""
    made: dict[int, SolverOptions] = {}
    found = {}
    for name in names:
        layer = method.of_layer(name)
        if (layer.group_size, layer.weights) == (None, None):
            continue
        if id(layer) not in made:
            weights = dict(options.weights)
            if layer.weights is not None and not method.dedicated:
                largest = max(layer.weights.values())
                weights = {bits: weight / largest for bits, weight in sorted(layer.weights.items()) if weight > 0}
            group_size = layer.group_size or options.group_size
            made[id(layer)] = dataclasses.replace(options, weights=weights, group_size=group_size)
        found[name] = made[id(layer)]
    return found


def planned_weight(shape: torch.Size, options: SolverOptions) -> NestedWeight:
    """What a layer of this shape [out, in] will be, without values (on the meta device): for its size in bytes."""
    rows, columns = shape
    groups = 1 if options.group_size == -1 else columns // options.group_size
    return NestedWeight(
        codes=torch.empty(rows, columns, dtype=torch.uint8, device="meta"),
        scales=torch.empty(rows, groups, dtype=options.scale_dtype, device="meta"),
        zeros=None if options.symmetric else torch.empty(rows, groups, dtype=torch.uint8, device="meta"),
        format=options.weight_format(columns),
    )


def as_json(options: SolverOptions) -> dict[str, Any]:
    """The options as JSON can hold them."""
    plain = dataclasses.asdict(options)
    return plain | {"weights": {str(b): w for b, w in options.weights.items()}, "scale_dtype": str(options.scale_dtype)}

"""Writes one slice of a parent in a format that stock runtimes load without this project.

What holds for every such format is here: which grid each layer gets, refusing what is not exact, and the files. The formats
themselves are ``gptq.py`` and ``compressed_tensors.py``.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec
from matquant.formats.shard_index import INDEX
from matquant.pack.compressed_tensors import CompressedTensors
from matquant.pack.export_format import FUSED, Format
from matquant.pack.gptq_format import Gptq
from matquant.pack.integer_grid import Grid, IntegerWeight, exact_grid, nearest, on_grid, zero_points
from matquant.pack.pack_input import PackInput
from matquant.pack.shards import ShardWriter, aligned

_SHOWN = 2  # names in a sentence


FORMATS: dict[str, Format] = {form.name: form for form in (Gptq(), CompressedTensors())}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Storage of a slice: grid of each layer, and the layers that are stored with the nearest codes."""

    widths: Mapping[str, int]
    grids: Mapping[str, Grid]
    fitted: frozenset[str]


def write(request: Any, form: Format) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the weight files and their index.

    Args:
        request: of the stage (``stage.PackRequest``).

    Returns:
        ``quantization_config``, and what is recorded: widths, bits of the codes, and how far the codes are from the slice.

    Raises:
        UserError: the format does not hold the slice exactly, and the nearest codes were not asked for. Before anything is
            written.
    """
    source: PackInput = request.source
    _check_experts(source, form)
    widths = dict.fromkeys(source.layers, request.bits) if isinstance(request.bits, int) else dict(request.bits)
    zeros = _zero_points(source)
    choice = choose(source.layers, zeros, widths, form, request.stored_bits, fit=request.fit)
    layers = {name: form.tensors(source.layers[name], grid) for name, grid in choice.grids.items()}
    dense = aligned(source.dense)
    section = {f"{name}.{kind}": spec for name, tensors in layers.items() for kind, spec in tensors.items()} | dict(
        dense
    )
    errors: dict[str, float] = {}
    with ShardWriter(request.folder, [section], request.limit) as files:
        for name, weight in source.weights():
            stored = encode(weight, widths[name], choice.grids[name], form, fit=name in choice.fitted)
            if name in choice.fitted:
                errors[name] = _relative_error(weight, widths[name], stored)
            for kind, tensor in form.encode(stored).items():
                files.write(f"{name}.{kind}", tensor)
            request.progress(1)
        for name in dense:
            files.write(name, source.read(name))
        files.write_index(INDEX)
    return form.config(source, choice.grids), _record(request.bits, choice, errors)


def choose(
    layers: Mapping[str, LayerSpec],
    zeros: Mapping[str, Sequence[float]],
    widths: Mapping[str, int],
    form: Format,
    stored_bits: int | None,
    *,
    fit: bool,
) -> Choice:
    """A grid for each layer; layers that a runtime fuses have codes of one kind.

    Args:
        zeros: the zero points of each layer, in steps of a master code.
        stored_bits: of the codes; None for as few as are exact, or with ``fit`` as many as the slice has.
        fit: take the nearest codes where none are exact.

    Raises:
        UserError: there are no such codes; names what would be exact, and its bytes.
    """
    kinds = [kind for kind in form.supported if stored_bits in (None, kind[0])]
    if not kinds:
        known = sorted({bits for bits, _ in form.supported})
        raise UserError(f"pack={form.name} has codes of {_list(known)} bits; found pack.stored_bits={stored_bits}.")
    grids: dict[str, Grid] = {}
    fitted: set[str] = set()
    refused: list[str] = []
    for unit in _units(layers):
        if fit:
            wanted = stored_bits or max(widths[name] for name in unit)
            bits = min(b for b, symmetric in form.supported if symmetric and b >= wanted)
            found = _unit_grids(unit, layers, zeros, widths, form, [(bits, True)])
            grids |= {name: found.get(name, Grid(bits=bits, symmetric=True, factor=1)) for name in unit}
            fitted |= {name for name in unit if name not in found}
            continue
        for kind in kinds:
            found = _unit_grids(unit, layers, zeros, widths, form, [kind])
            if len(found) == len(unit):
                grids |= found
                break
        else:
            refused += unit
    if refused:
        raise UserError(_refusal(refused, layers, zeros, widths, form, stored_bits))
    return Choice(widths=widths, grids={name: grids[name] for name in layers}, fitted=frozenset(fitted))


def encode(weight: NestedWeight, width: int, grid: Grid, form: Format, *, fit: bool) -> IntegerWeight:
    """A slice of a layer on its grid, or with ``fit`` the codes nearest to it."""
    return nearest(weight, width, grid.bits) if fit else on_grid(weight, width, grid, form.least_zero)


def _unit_grids(
    unit: Iterable[str],
    layers: Mapping[str, LayerSpec],
    zeros: Mapping[str, Sequence[float]],
    widths: Mapping[str, int],
    form: Format,
    kinds: Sequence[tuple[int, bool]],
) -> dict[str, Grid]:
    """The grids of those layers that have one of these kinds."""
    found = {}
    for name in unit:
        spec = layers[name]
        grid = exact_grid(
            widths[name], spec.format.master_bits, spec.format.slicing, zeros[name], kinds, form.least_zero
        )
        if grid is not None:
            found[name] = grid
    return found


def _units(layers: Iterable[str]) -> list[list[str]]:
    """Layers that a runtime fuses together, all others alone."""
    units: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        owner, _, last = name.rpartition(".")
        units.setdefault((owner, FUSED.get(last, last)), []).append(name)
    return list(units.values())


def _zero_points(source: PackInput) -> dict[str, list[float]]:
    """The different zero points of each layer. Weights are read only where groups have some of their own."""
    if any(spec.format.has_zero_points for spec in source.layers.values()):
        return {name: zero_points(weight).unique().tolist() for name, weight in source.weights()}
    return {name: [s.format.zero_point] for name, s in source.layers.items()}


def _check_experts(source: PackInput, form: Format) -> None:
    if any(origin.expert is not None for origin in source.origins.values()):
        raise UserError(
            f"pack={form.name} does not hold mixtures of experts yet, whose matrices Transformers keeps in one tensor. "
            "Use pack=nested, which Transformers and vLLM load with this project installed."
        )


def _relative_error(weight: NestedWeight, width: int, stored: IntegerWeight) -> float:
    """The norm of what the stored codes are off, over that of the slice."""
    slice_ = weight.dequantize(width)
    norm = slice_.norm().item()
    return (stored.dequantize() - slice_).norm().item() / norm if norm else 0.0


def _record(bits: int | Mapping[str, int], choice: Choice, errors: Mapping[str, float]) -> dict[str, Any]:
    kinds = {(g.bits, g.symmetric) for g in choice.grids.values()}
    return {
        "bits": bits if isinstance(bits, int) else "allocation",
        "stored": [{"bits": b, "symmetric": symmetric} for b, symmetric in sorted(kinds)],
        "exact": not choice.fitted,
        "error": {"mean": sum(errors.values()) / len(errors), "largest": max(errors.values())} if errors else None,
    }


def _refusal(
    refused: Sequence[str],
    layers: Mapping[str, LayerSpec],
    zeros: Mapping[str, Sequence[float]],
    widths: Mapping[str, int],
    form: Format,
    stored_bits: int | None,
) -> str:
    more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
    asked = sorted({widths[name] for name in refused})
    codes = "of any size that the format has" if stored_bits is None else f"of {stored_bits} bits"
    sentence = (
        f"pack={form.name}: the {_list(asked)}-bit slice of {', '.join(refused[:_SHOWN])}{more} is not exact in codes "
        f"{codes}. "
    )
    offers = [(other.name, _alternatives(layers, zeros, other)) for other in FORMATS.values()]
    exact = "; ".join(f"pack={name} pack.bits={found}" for name, found in offers if found)
    if exact:
        sentence += f"Exact are {exact}. "
    return sentence + "pack=nested holds every width. The nearest codes, with a recorded error: pack.rounding=nearest."


def _alternatives(layers: Mapping[str, LayerSpec], zeros: Mapping[str, Sequence[float]], form: Format) -> str:
    """The widths that a format holds exactly, by the codes and bytes that they take; empty when there are none."""
    found: dict[str, list[int]] = {}
    for width in range(2, 1 + min(spec.format.master_bits for spec in layers.values())):
        grids = _unit_grids(layers, layers, zeros, dict.fromkeys(layers, width), form, form.supported)
        if len(grids) == len(layers):
            size = sum(t.nbytes for n, grid in grids.items() for t in form.tensors(layers[n], grid).values())
            bits = _list(sorted({grid.bits for grid in grids.values()}))
            found.setdefault(f"in {bits}-bit codes ({size / 1e6:.3g} MB)", []).append(width)
    return ", ".join(f"{_list(widths)} {codes}" for codes, widths in found.items())


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))

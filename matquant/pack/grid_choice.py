"""Integer codes of a slice: the grid of each layer, and the error if no grid is exact."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from matquant.errors import UserError, shorten
from matquant.formats.packed import LayerSpec
from matquant.pack.integer_grid import IntegerGrid, exact_grid

if TYPE_CHECKING:
    from matquant.pack.formats.integer_format import IntegerFormat

# Layers that vLLM stores as one matrix, with codes of one kind, by their name and the name of the matrix.
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}

_SHOWN = 2  # names in a sentence


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SliceLayers:
    """Layers of one slice, by name.

    Attributes:
        zero_points: different zero points of each layer, in steps of a master code.
    """

    specs: Mapping[str, LayerSpec]
    zero_points: Mapping[str, Sequence[float]]
    bits: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GridChoice:
    """Grid of each layer, and the layers that are stored with the nearest codes."""

    grids: Mapping[str, IntegerGrid]
    inexact: frozenset[str]


def choose_grids(
    layers: SliceLayers,
    target: "IntegerFormat",
    stored_bits: int | None,
    *,
    allow_nearest: bool,
    alternatives: Sequence["IntegerFormat"],
) -> GridChoice:
    """Choose a grid for each layer; layers that a runtime fuses have codes of one kind.

    Args:
        stored_bits: bits of the codes; None for as few as are exact, or with ``allow_nearest`` as many as the slice has.
        allow_nearest: use the nearest codes where none are exact.
        alternatives: formats to name in the error if they are exact.

    Raises:
        UserError: no exact codes; names the exact alternatives and their bytes.
    """
    kinds = [kind for kind in target.supported if stored_bits in (None, kind[0])]
    if not kinds:
        known = sorted({bits for bits, _ in target.supported})
        raise UserError(f"pack={target.name} has codes of {_list(known)} bits; found pack.stored_bits={stored_bits}.")
    if allow_nearest:
        return _nearest_grids(layers, target, stored_bits)
    grids: dict[str, IntegerGrid] = {}
    refused: list[str] = []
    for unit in _fused_units(layers.specs):
        exact = (found for kind in kinds if len(found := _exact_grids(unit, layers, target, [kind])) == len(unit))
        grids |= (chosen := next(exact, {}))
        refused += [] if chosen else unit
    if refused:
        raise UserError(_refusal(refused, layers, target, stored_bits, alternatives))
    return GridChoice(grids={name: grids[name] for name in layers.specs}, inexact=frozenset())


def _nearest_grids(layers: SliceLayers, target: "IntegerFormat", stored_bits: int | None) -> GridChoice:
    """Symmetric grids, exact where there is an exact one of the same bits."""
    grids: dict[str, IntegerGrid] = {}
    inexact: set[str] = set()
    for unit in _fused_units(layers.specs):
        wanted = stored_bits or max(layers.bits[name] for name in unit)
        bits = min(b for b, symmetric in target.supported if symmetric and b >= wanted)
        exact = _exact_grids(unit, layers, target, [(bits, True)])
        grids |= {name: exact.get(name, IntegerGrid(bits=bits, symmetric=True, factor=1)) for name in unit}
        inexact |= {name for name in unit if name not in exact}
    return GridChoice(grids={name: grids[name] for name in layers.specs}, inexact=frozenset(inexact))


def _exact_grids(
    names: Iterable[str], layers: SliceLayers, target: "IntegerFormat", kinds: Sequence[tuple[int, bool]]
) -> dict[str, IntegerGrid]:
    """Exact grids of those layers that have one of these kinds (bits, symmetric)."""
    found = {}
    for name in names:
        fmt = layers.specs[name].format
        if fmt.stretch_at(layers.bits[name]) != 1:
            continue  # its levels are not equally far apart
        grid = exact_grid(
            layers.bits[name], fmt.master_bits, fmt.slicing, layers.zero_points[name], kinds, target.min_zero_point
        )
        if grid is not None:
            found[name] = grid
    return found


def _fused_units(names: Iterable[str]) -> list[list[str]]:
    """Layers that a runtime fuses, together; all others alone."""
    units: dict[tuple[str, str], list[str]] = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        units.setdefault((owner, FUSED.get(last, last)), []).append(name)
    return list(units.values())


def _refusal(
    refused: Sequence[str],
    layers: SliceLayers,
    target: "IntegerFormat",
    stored_bits: int | None,
    alternatives: Sequence["IntegerFormat"],
) -> str:
    sliced = sorted({layers.bits[name] for name in refused})
    codes = "of any size that the format has" if stored_bits is None else f"of {stored_bits} bits"
    sentence = (
        f"pack={target.name}: the {_list(sliced)}-bit slice of {shorten(refused, _SHOWN)} is not exact in codes "
        f"{codes}. "
    )
    offers = [(other.name, _exact_bits(layers, other)) for other in alternatives]
    exact = "; ".join(f"pack={name} pack.bits={found}" for name, found in offers if found)
    if exact:
        sentence += f"Exact are {exact}. "
    return (
        sentence + "pack=nested holds every bit-width. The nearest codes, with a recorded error: pack.rounding=nearest."
    )


def _exact_bits(layers: SliceLayers, target: "IntegerFormat") -> str:
    """Bit-widths that a format stores exactly, with the size of their codes; empty if there are none."""
    found: dict[str, list[int]] = {}
    for bits in range(2, 1 + min(spec.format.master_bits for spec in layers.specs.values())):
        uniform = dataclasses.replace(layers, bits=dict.fromkeys(layers.specs, bits))
        grids = _exact_grids(layers.specs, uniform, target, target.supported)
        if len(grids) == len(layers.specs):
            size = sum(t.nbytes for n, grid in grids.items() for t in target.tensors(layers.specs[n], grid).values())
            codes = _list(sorted({grid.bits for grid in grids.values()}))
            found.setdefault(f"in {codes}-bit codes ({size / 1e6:.3g} MB)", []).append(bits)
    return ", ".join(f"{_list(bits)} {codes}" for codes, bits in found.items())


def _list(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))

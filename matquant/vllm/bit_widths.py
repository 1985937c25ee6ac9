"""The widths that an engine begins with, and whether its CUDA graphs can tell prompts from decoding."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from matquant.errors import UserError
from matquant.formats import allocation
from matquant.formats.packed import NestedSpec, check_bits


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """At which widths a checkpoint is read.

    Attributes:
        bits: the width of layers that ``decode`` does not name.
        decode: a width for each layer of the checkpoint, for steps in which every sequence has one new token.
        prefill: the width of all other steps; None for the same.
        max_bits: planes that wider slices would need are not kept.
    """

    KEYS: ClassVar = ("bits", "layer_bits", "prefill_bits", "max_bits")

    bits: int
    decode: Mapping[str, int]
    prefill: int | None
    max_bits: int

    def of(self, layer: str) -> tuple[int, int]:
        """The widths of a layer for decoding and for all else."""
        decode = self.decode.get(layer, self.bits)
        return decode, decode if self.prefill is None else self.prefill

    @property
    def differ(self) -> bool:
        """Whether some layer has another width for decoding than for all else."""
        return any(bits != self.prefill for bits in (self.bits, *self.decode.values())) and self.prefill is not None


def chosen(spec: NestedSpec, overrides: Mapping[str, Any]) -> Widths:
    """The widths of a checkpoint's config, with what ``overrides`` says instead.

    Args:
        overrides: ``bits`` (a width, or the path of an allocation's file), ``layer_bits`` (a width by layer),
            ``prefill_bits`` and ``max_bits``; None and absent ones leave it to the config.

    Raises:
        UserError: a width that the checkpoint has not, or a layer that it has not.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    most = check_bits(given.get("max_bits", spec.max_bits), "max_bits", spec.max_bits)
    bits, decode = spec.bits, {name: spec.width(name) for name in spec.layers}
    if "bits" in given:
        bits = given["bits"] if isinstance(given["bits"], int) else bits
        decode |= by_layer(given["bits"], decode, most)
    elif "max_bits" in given:
        bits, decode = min(bits, most), {name: min(width, most) for name, width in decode.items()}
    decode |= by_layer(given.get("layer_bits", {}), decode, most)
    for name, width in {"": bits, **decode}.items():
        check_bits(width, f"bits of {name}" if name else "bits", most)
    prefill = given.get("prefill_bits", spec.prefill_bits if "bits" not in given else None)
    prefill = None if prefill is None else check_bits(prefill, "prefill_bits", most)
    return Widths(bits=bits, decode=decode, prefill=prefill, max_bits=most)


def by_layer(bits: Any, layers: Mapping[str, Any], most: int) -> dict[str, int]:
    """A width for each layer that gets one.

    Args:
        bits: a width for all, one by layer, or the path of an allocation's file.
        layers: the names that there are; empty when they are not known yet.
        most: the largest width.

    Raises:
        UserError: a name or width that is not there.
    """
    if allocation.is_file_name(bits):
        found: Mapping[str, Any] = allocation.read(Path(bits)).widths
    elif isinstance(bits, Mapping):
        found = bits
    else:
        return dict.fromkeys(layers, check_bits(bits, "bits", most))
    if unknown := [name for name in found if layers and name not in layers]:
        raise UserError(f"bits names {unknown[0]}, which is no nested layer of this checkpoint.")
    return {name: check_bits(width, f"bits of {name}", most) for name, width in found.items()}


def check_graphs(mode: Any, widths: Widths) -> None:
    """Raises UserError when prompts and decoding have different widths, but share vLLM's CUDA graphs."""
    if widths.differ and mode is not None and mode.name != "NONE" and not mode.separate_routine():
        raise UserError(
            f"prefill_bits is another width than bits, but with cudagraph_mode={mode.name} vLLM has the same CUDA graphs "
            'for prompts and for decoding. Start it with --compilation-config \'{"cudagraph_mode": "FULL_AND_PIECEWISE"}\' '
            "or FULL_DECODE_ONLY, or with --enforce-eager."
        )

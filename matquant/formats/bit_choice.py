"""Bit-widths at which a reader uses a nested checkpoint: the defaults of its config, or the caller's request."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from matquant.errors import UserError, shorten
from matquant.formats import allocation
from matquant.formats.bits import MAX_BITS, check_bits
from matquant.formats.packed import NestedSpec

Bits = int | Mapping[str, int] | str | Path  # one bit-width, one for each of some layers, or the file of an allocation


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestedBits:
    """Unchecked request of the caller of a loader; None keeps the default of the checkpoint.

    Attributes:
        bits: bit-width, mapping by layer, or path of an allocation file.
        layer_bits: mapping by layer, on top of ``bits``.
        prefill_bits: bit-width of forward passes that read prompts.
        max_bits: largest bit-width to load the planes of.
    """

    bits: Any = None
    layer_bits: Any = None
    prefill_bits: Any = None
    max_bits: Any = None

    @classmethod
    def from_config(cls, config: Any) -> "RequestedBits":
        """Request in the attributes of a model's config, where loaders put the caller's arguments."""
        return cls(**{field.name: getattr(config, field.name, None) for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BitChoice:
    """Bit-widths at which the layers of a checkpoint are read.

    Attributes:
        bits: bit-width of the layers that ``layer_bits`` does not name.
        layer_bits: bit-width by layer.
        prefill_bits: bit-width of all layers in forward passes that read prompts; None for that of decoding.
        max_bits: largest bit-width to load the planes of.
    """

    bits: int
    layer_bits: Mapping[str, int]
    prefill_bits: int | None
    max_bits: int

    def of(self, layer: str) -> tuple[int, int]:
        """Bit-widths of one layer for decoding and for prefill."""
        decode = self.layer_bits.get(layer, self.bits)
        return decode, decode if self.prefill_bits is None else self.prefill_bits

    @property
    def prefill_differs(self) -> bool:
        """True if some layer has another bit-width for prefill than for decoding."""
        decode = {self.bits, *self.layer_bits.values()}
        return self.prefill_bits is not None and decode != {self.prefill_bits}


def choose_bits(spec: NestedSpec, requested: RequestedBits) -> BitChoice:
    """Combine the defaults of a checkpoint with a request.

    A request for ``bits`` replaces the checkpoint's allocation (one bit-width) or amends it (a mapping or file), and drops its
    ``prefill_bits``. ``max_bits`` lowers the checkpoint's single bit-width, but never an allocation: that would be another
    model.

    Raises:
        UserError: a bit-width that the planes do not hold, or a layer that the checkpoint does not have.
    """
    max_bits = spec.max_bits
    if requested.max_bits is not None:
        max_bits = check_bits(requested.max_bits, "max_bits", spec.max_bits)
    bits, layer_bits = min(spec.bits, max_bits), dict(spec.layer_bits)
    if isinstance(requested.bits, int):
        bits, layer_bits = check_bits(requested.bits, "bits", max_bits), {}
    elif requested.bits is not None:
        layer_bits |= bits_by_layer(requested.bits, spec.layers, max_bits)
    if requested.layer_bits is not None:
        layer_bits |= bits_by_layer(requested.layer_bits, spec.layers, max_bits)
    for name, value in layer_bits.items():
        check_bits(value, f"bits of {name}", max_bits)
    prefill = requested.prefill_bits
    if prefill is None and requested.bits is None:
        prefill = spec.prefill_bits
    if prefill is not None:
        check_bits(prefill, "prefill_bits", max_bits)
    return BitChoice(bits=bits, layer_bits=layer_bits, prefill_bits=prefill, max_bits=max_bits)


def bits_by_layer(bits: Any, layers: Collection[str], max_bits: int = MAX_BITS) -> dict[str, int]:
    """Bit-width of each layer that a value of the argument ``bits`` names.

    Args:
        bits: see ``Bits``. One bit-width stands for all ``layers``.
        layers: names of the nested layers; empty if they are not known yet.
        max_bits: largest bit-width allowed.

    Raises:
        UserError: a layer or bit-width that is not available, or an allocation file that cannot be read.
    """
    if isinstance(bits, Path) or allocation.is_file_name(bits):
        found: Mapping[str, Any] = allocation.read(Path(bits)).bits
    elif isinstance(bits, Mapping):
        found = bits
    elif isinstance(bits, str):
        raise UserError(
            f"bits must be a bit-width, a bit-width by layer, or the name of an allocation file; found {bits!r}."
        )
    else:
        return dict.fromkeys(layers, check_bits(bits, "bits", max_bits))
    if layers and (unknown := [name for name in found if name not in layers]):
        close = difflib.get_close_matches(str(unknown[0]), layers, n=1, cutoff=0.0)
        raise UserError(
            f"bits names {len(unknown)} of {len(found)} layers that are no nested layers of this model: "
            f"{shorten(list(map(str, unknown)))}. The name closest to {unknown[0]} is {close[0]}."
        )
    return {name: check_bits(value, f"bits of {name}", max_bits) for name, value in found.items()}

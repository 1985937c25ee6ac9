"""Choice of a GGUF type for each tensor: exact where there is one, else refused, or the nearest."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matquant.errors import UserError, shorten
from matquant.formats.groups import expand_groups, group_count
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.packed import LayerSpec
from matquant.pack.gguf.block_types import QUANT_BLOCK, WHOLE_NUMBERS, BlockType, nearest_candidates, pack_numbers
from matquant.pack.gguf.integer_steps import StepRange, row_strips, slice_steps, step_numbers, step_scales

DENSE_TYPES = ("Q8_0", "F16", "BF16", "F32")  # of matrices that are not quantized, the smallest first

_SHOWN = 2  # names in a sentence
_PROBED_ROWS = 64  # of a large matrix, before all of it is tried


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SliceLayer:
    """One nested layer as a slice of the model.

    Attributes:
        name: full name.
        bits: of the slice.
        steps: of its values; None if they are no multiples of the scales.
        exact: types that hold it exactly, the smallest first.
    """

    name: str
    bits: int
    steps: StepRange | None
    exact: tuple[BlockType, ...]

    @classmethod
    def measure(cls, name: str, weight: NestedWeight, bits: int) -> "SliceLayer":
        """Find the exact types of a layer by its values."""
        steps = slice_steps(weight, bits) if _blocks_share_scales(weight) else None
        exact = [
            kind
            for kind in WHOLE_NUMBERS
            if steps is not None and _signed_scales(weight, bits, steps, kind) is not None
        ]
        return cls(name=name, bits=bits, steps=steps, exact=tuple(exact))


def encode(layer: SliceLayer, weight: NestedWeight, kind: BlockType) -> Tensor:
    """Bytes of rows of a layer, exact if the type is: uint8 [rows, row bytes]."""
    parts = []
    for part in row_strips(weight):
        if kind in layer.exact:
            blocks = _encode_exact(layer, part, kind)
        else:
            blocks = kind.nearest(part.dequantize(layer.bits).view(-1, kind.block_size))
        parts.append(blocks.view(len(part.codes), -1))
    return torch.cat(parts)


def dequantize(data: Tensor, name: str) -> Tensor:
    """Values of rows in a GGUF type, by the package gguf: uint8 [rows, row bytes] to float32 [rows, columns]."""
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name]))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of ``exact``; 0 for zeros."""
    norm = exact.norm().item()
    return (found - exact).norm().item() / norm if norm else 0.0


def exact_type(layers: Sequence[SliceLayer], stored_bits: int | None) -> BlockType | None:
    """Smallest type that holds all these layers exactly; None if there is none (of codes of ``stored_bits``)."""
    return next(
        (
            kind
            for kind in WHOLE_NUMBERS
            if stored_bits in (None, kind.bits) and all(kind in layer.exact for layer in layers)
        ),
        None,
    )


def nearest_type(
    layers: Sequence[SliceLayer], weights: Callable[[str], NestedWeight], columns: int, stored_bits: int | None
) -> BlockType:
    """Type of the slice's bit-width with the least squared error; an exact one has none.

    Args:
        layers: of one tensor of the file.
        weights: gives a layer by name.
        columns: of the layers.
        stored_bits: bits of the codes instead of the slice's.
    """
    candidates = nearest_candidates(stored_bits or max(layer.bits for layer in layers), columns)
    exact = [kind for kind in candidates if all(kind in layer.exact for layer in layers)]
    if exact or len(candidates) == 1:
        return (exact or candidates)[0]

    def squared_error(kind: BlockType) -> float:
        total = 0.0
        for layer in layers:
            weight = weights(layer.name)
            found = dequantize(encode(layer, weight, kind), kind.name)
            total += (found - weight.dequantize(layer.bits)).square().sum(dtype=torch.float64).item()
        return total

    return min(candidates, key=squared_error)


def dense_type(tensor: Tensor, setting: str) -> str:
    """Type of a matrix that is not quantized: the setting, or for ``auto`` the smallest that holds it exactly."""
    fitting = [one for one in DENSE_TYPES if one != "Q8_0" or tensor.shape[-1] % QUANT_BLOCK == 0]
    if setting != "auto":
        return setting if setting in fitting else "F16"
    few = tensor.reshape(-1, tensor.shape[-1])[:_PROBED_ROWS]
    return next(name for name in fitting if _holds(few, name) and _holds(tensor, name))


def encode_dense(tensor: Tensor, name: str) -> np.ndarray:
    """Bytes of an unquantized tensor in a type, by the package gguf; F32 and F16 as numbers."""
    import gguf

    return gguf.quants.quantize(tensor.float().contiguous().numpy(), gguf.GGMLQuantizationType[name])


def dequantize_dense(data: np.ndarray, name: str) -> Tensor:
    """Values of ``encode_dense``: float32."""
    import gguf

    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]))


def representative(spec: LayerSpec, bits: int) -> SliceLayer | None:
    """Layer of the format of ``spec`` that has every code; None if its groups have zero points of their own.

    Its exact types are those of every layer of that format whose scales fit float16.
    """
    fmt = spec.format
    if fmt.has_zero_points or bits > fmt.master_bits:
        return None
    count = 2**fmt.master_bits
    columns = max(count, QUANT_BLOCK)
    own = WeightFormat(**{f.name: getattr(fmt, f.name) for f in dataclasses.fields(fmt)} | {"group_size": columns})
    scales = torch.ones(1, group_count(columns, columns), dtype=fmt.scale_dtype)
    weight = NestedWeight(
        codes=(torch.arange(columns) % count).to(torch.uint8)[None],
        scales=scales,
        zeros=None,
        format=own,
        own_scales=dict.fromkeys(fmt.scale_bits, scales),
    )
    return SliceLayer.measure("", weight, bits)


def refusal(
    refused: Mapping[str, int], specs: Mapping[str, LayerSpec], stored_bits: int | None, reason: str = ""
) -> UserError:
    """Error that names layers without an exact type, the exact bit-widths and their bytes, and the nearest types.

    Args:
        refused: bit-width by layer.
        specs: all layers.
        reason: sentence on the layers, if their bit-width has an exact type as such.
    """
    names = list(refused)
    sliced = sorted(set(refused.values()))
    codes = "" if stored_bits is None else f" with codes of {stored_bits} bits"
    exact = "; ".join(_exact_bits(specs, stored_bits))
    nearest = _nearest_bytes(specs, max(sliced), stored_bits)
    return UserError(
        f"pack=gguf: the {', '.join(map(str, sliced))}-bit slice of {shorten(names, _SHOWN)} is not exact in any "
        f"type of GGUF{codes}. {reason}{f'Exact are {exact}. ' if exact else ''}pack.rounding=nearest stores the nearest "
        f"values, with a recorded error: {nearest}. pack=nested holds every bit-width."
    )


def _exact_bits(specs: Mapping[str, LayerSpec], stored_bits: int | None) -> Iterable[str]:
    """Bit-widths that all layers hold exactly, with their types and bytes."""
    found: dict[str, list[int]] = {}
    for bits in range(2, 1 + min(spec.format.master_bits for spec in specs.values())):
        kinds = {name: _kind(representative(spec, bits), stored_bits) for name, spec in specs.items()}
        if all(kinds.values()):
            names = sorted({kind.name for kind in kinds.values() if kind})
            found.setdefault(f"in {', '.join(names)} ({_bytes(kinds, specs)})", []).append(bits)
    return [f"pack.bits={', '.join(map(str, bits))} {types}" for types, bits in found.items()]


def _kind(layer: SliceLayer | None, stored_bits: int | None) -> BlockType | None:
    return None if layer is None else exact_type([layer], stored_bits)


def _nearest_bytes(specs: Mapping[str, LayerSpec], bits: int, stored_bits: int | None) -> str:
    """Types and bytes of the nearest values of a bit-width."""
    kinds = {name: nearest_candidates(stored_bits or bits, spec.in_features)[0] for name, spec in specs.items()}
    return f"{bits} bits in {', '.join(sorted({kind.name for kind in kinds.values()}))} ({_bytes(kinds, specs)})"


def _bytes(kinds: Mapping[str, Any], specs: Mapping[str, LayerSpec]) -> str:
    total = sum(kinds[name].row_bytes(spec.in_features) * spec.out_features for name, spec in specs.items())
    return f"{total / 1e6:.3g} MB"


def _holds(tensor: Tensor, name: str) -> bool:
    """True if a type holds all values of a tensor exactly."""
    values = tensor.float()
    return torch.equal(dequantize_dense(encode_dense(values, name), name), values)


def _blocks_share_scales(weight: NestedWeight) -> bool:
    """True if every 32 columns of a row have one scale."""
    columns, size = weight.codes.shape[1], weight.format.group_size
    return columns % QUANT_BLOCK == 0 and (size % QUANT_BLOCK == 0 or size == columns)


def _signed_scales(weight: NestedWeight, bits: int, steps: StepRange, kind: BlockType) -> Tensor | None:
    """Scales d of the groups in a type of whole numbers, float16 [rows, groups]; None if it does not hold the slice."""
    sign = steps.sign_for(2 ** (kind.bits - 1))
    return step_scales(weight, bits, sign * steps.step) if sign else None


def _encode_exact(layer: SliceLayer, weight: NestedWeight, kind: BlockType) -> Tensor:
    """Blocks of rows of a layer in a type of ``layer.exact``: uint8 [blocks, block bytes]."""
    steps = layer.steps
    assert steps is not None
    scales = _signed_scales(weight, layer.bits, steps, kind)
    assert scales is not None
    numbers = step_numbers(weight, layer.bits, steps.step) * steps.sign_for(2 ** (kind.bits - 1))
    d = expand_groups(scales, weight.codes.shape[1], weight.format.group_size)[:, ::QUANT_BLOCK]
    return pack_numbers(numbers.view(-1, QUANT_BLOCK), d.reshape(-1), kind.bits)

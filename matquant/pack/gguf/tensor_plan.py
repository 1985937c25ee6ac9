"""Tensors of a GGUF file: their names, and the tensors of the model that each is made of."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError, shorten
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import TensorSpec
from matquant.pack.gguf.architectures import Architecture, rotary_order

# A matrix of one expert, or of all experts in one tensor [experts, out, in].
_EXPERT = re.compile(r"(?P<owner>.+\.experts)(\.(?P<index>\d+))?\.(?P<kind>gate_up_proj|down_proj)(\.weight)?")
_GATED = ("gate_proj", "up_proj")  # halves of gate_up_proj


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Rows of one tensor of the model.

    Attributes:
        source: full name of the tensor, or of the weight of a nested layer.
        expert: index in the first dimension of a tensor of all experts.
        position: number of the expert in the file; 0 for tensors without experts.
        rows: rows in their order in the file; None for all, as they are.
    """

    source: str
    expert: int | None = None
    position: int = 0
    rows: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Rows of an unquantized tensor."""
        matrix = tensor if self.expert is None else tensor[self.expert]
        return matrix if self.rows is None else matrix[self.rows]

    def of_weight(self, weight: NestedWeight) -> NestedWeight:
        """Rows of a nested layer."""
        rows = self.rows
        return weight if rows is None else weight.map_tensors(lambda tensor: tensor[rows])


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTensor:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: [..., rows, columns] as in Transformers; the first of three dimensions counts experts.
        pieces: one, or one for each expert in the order of their numbers.
        shift: number that is added to all values.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    shift: float = 0.0


def plan_tensors(specs: Mapping[str, TensorSpec], config: Any, architecture: Architecture) -> tuple[PlannedTensor, ...]:
    """Tensors of the file in the order of the model.

    Args:
        specs: all tensors of the model by full name; weights of nested layers too.
        config: of the model.

    Raises:
        UserError: a tensor has no name in GGUF.
    """
    names = _Names(architecture, config.num_hidden_layers)
    planned: dict[str, PlannedTensor] = {}
    for source, spec in specs.items():
        for name, shape, pieces in _parts(source, spec, config, architecture, names):
            known = planned.get(name)
            if known is not None:  # a further expert
                shape = (len(known.pieces) + 1, *shape[-2:])
                pieces = tuple(sorted((*known.pieces, *pieces), key=lambda piece: piece.position))
            shift = architecture.norm_shift if name.endswith("norm.weight") else 0.0
            planned[name] = PlannedTensor(name=name, shape=shape, pieces=pieces, shift=shift)
    names.check()
    return tuple(planned.values())


class _Names:
    """Map of names to GGUF that collects the names without an entry."""

    def __init__(self, architecture: Architecture, blocks: int) -> None:
        import gguf

        kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        self._map = gguf.get_tensor_name_map(kind, blocks)
        self._architecture = architecture
        self._unknown: list[str] = []

    def find(self, name: str) -> str | None:
        """Name in GGUF; None if there is none."""
        found = self._map.get_name(name, (".weight", ".bias"))
        if found is None:
            self._unknown.append(name)
        return found

    def check(self) -> None:
        """Raise UserError if a name was not known."""
        if self._unknown:
            raise UserError(
                f"pack=gguf: the architecture {self._architecture.name} of llama.cpp has no tensor for "
                f"{shorten(self._unknown)}. A head that is quantized or untied may be the reason "
                "(method.quantize_lm_head, transform); pack=nested holds every model."
            )


def _parts(
    source: str, spec: TensorSpec, config: Any, architecture: Architecture, names: _Names
) -> Iterable[tuple[str, tuple[int, ...], tuple[Piece, ...]]]:
    """Name, shape and pieces of the tensors of the file that one tensor of the model is part of."""
    expert = _EXPERT.fullmatch(source)
    if expert is not None:
        yield from _expert_parts(source, spec, expert, names)
        return
    name = names.find(source)
    if name is None:
        return
    shape = spec.shape
    if name.endswith("ffn_gate_inp_shexp.weight"):
        shape = shape[-1:]  # a vector in llama.cpp
    yield name, shape, (Piece(source=source, rows=_row_order(name, spec, config, architecture)),)


def _expert_parts(
    source: str, spec: TensorSpec, found: re.Match[str], names: _Names
) -> Iterable[tuple[str, tuple[int, ...], tuple[Piece, ...]]]:
    rows, columns = spec.shape[-2:]
    if found["kind"] == "gate_up_proj":
        halves: dict[str, Tensor | None] = {
            kind: torch.arange(i * rows // 2, (i + 1) * rows // 2) for i, kind in enumerate(_GATED)
        }
        rows //= 2
    else:
        halves = {found["kind"]: None}
    for kind, order in halves.items():
        name = names.find(f"{found['owner']}.{kind}.weight")
        if len(spec.shape) == 3:
            pieces = tuple(Piece(source=source, expert=i, position=i, rows=order) for i in range(spec.shape[0]))
        else:
            pieces = (Piece(source=source, position=int(found["index"]), rows=order),)
        if name is not None:
            yield name, (len(pieces), rows, columns), pieces


def _row_order(name: str, spec: TensorSpec, config: Any, architecture: Architecture) -> Tensor | None:
    """Order of the rows in the file; None for that of the model."""
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    if architecture.interleaved_rotary:
        for part, count in heads.items():
            if part in name:
                return rotary_order(spec.shape[0], count)
    return None

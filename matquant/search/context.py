"""Inputs of a search."""

import dataclasses

import torch
from torch import Tensor

from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.formats.parent import Parent
from matquant.models.blocks import BlockModel


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SearchContext:
    """Model, parent, text and device of a search.

    Attributes:
        sequences: int64 [sequences, length], the search's text.
        process_group: processes that share the candidates.
    """

    blocks: BlockModel
    parent: Parent
    sequences: Tensor
    device: torch.device
    dtype: torch.dtype
    process_group: ProcessGroup = SINGLE_PROCESS

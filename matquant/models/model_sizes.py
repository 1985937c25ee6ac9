"""The sizes of a model's parts, from which follows what it takes to quantize and to measure it."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from matquant.models.blocks import BlockModel
from matquant.models.tensor_swap import named_tensors
from matquant.models.tracing import shared_input_groups


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """A linear layer: its shape, the number of the input that it shares with others, and that of its stage of solving."""

    rows: int
    columns: int
    input: int
    stage: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """What the need of memory and time depends on.

    Attributes:
        layers: the quantized layers of the largest block, in order of execution.
        blocks: how many blocks there are.
        parameters: of the whole model; tied ones count once.
        block: parameters of the largest block.
        quantized: parameters of all quantized layers.
        embeddings, head: parameters of what comes before the blocks and after them; tied ones count in both.
        hidden, vocabulary: width of the hidden states, and number of tokens.
        stored, computing: bytes of a number as stored, and as computed with.
    """

    layers: Sequence[LayerSize]
    blocks: int
    parameters: int
    block: int
    quantized: int
    embeddings: int
    head: int
    hidden: int
    vocabulary: int
    stored: int
    computing: int

    def load_bytes(self, parameters: int) -> int:
        """Bytes of loading so many parameters: mapped from the file, and copied if they are computed with in another dtype."""
        return parameters * (self.computing + (self.stored if self.stored != self.computing else 0))

    def activation_bytes(self, tokens: int) -> int:
        """Bytes of the widest intermediate results of a block for one batch, a few of which are alive together."""
        widest = max((max(layer.rows, layer.columns) for layer in self.layers), default=self.hidden)
        return 4 * tokens * widest * self.computing


def measure(
    blocks: BlockModel, layers: Sequence[Mapping[str, nn.Linear]], stored: torch.dtype, computing: torch.dtype
) -> ModelSizes:
    """The sizes of a model of which ``layers`` are quantized, block by block. Reads and runs the largest block once."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks.blocks]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    config = blocks.model.config.get_text_config()
    embeddings = blocks.model.get_input_embeddings().weight.numel()
    head = getattr(blocks.model.get_output_embeddings(), "weight", torch.empty(0)).numel()
    unique = {id(tensor): tensor.numel() for _, tensor in named_tensors(blocks.model)}
    return ModelSizes(
        layers=_layers(blocks, largest, layers[largest]),
        blocks=len(blocks),
        parameters=sum(unique.values()),
        block=sizes[largest],
        quantized=sum(m.weight.numel() for block in layers for m in block.values()),
        embeddings=embeddings,
        head=head,
        hidden=config.hidden_size,
        vocabulary=blocks.vocabulary,
        stored=stored.itemsize,
        computing=computing.itemsize,
    )


def _layers(blocks: BlockModel, index: int, layers: Mapping[str, nn.Linear]) -> list[LayerSize]:
    inputs, pools = shared_input_groups(blocks, index), blocks.expert_groups(index)
    stages: dict[str, int] = {}
    found = []
    for number, group in enumerate([*inputs.groups, *([name] for name in inputs.uncalled)]):
        stage = stages.setdefault(pools.get(group[0], group[0]), len(stages))
        for name in group:
            if name in layers:
                rows, columns = layers[name].weight.shape
                found.append(LayerSize(rows=rows, columns=columns, input=number, stage=stage))
    return found

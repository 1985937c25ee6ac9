"""Sizes of a model's parts, for estimates of memory and time."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from matquant.models.blocks import BlockModel
from matquant.models.tensor_swap import named_tensors
from matquant.models.tracing import shared_input_groups


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """Size of a linear layer.

    Attributes:
        rows, columns: output and input features.
        input: number of its input group: layers with equal numbers share their input.
        stage: number of its stage: layers of one stage are quantized together.
    """

    rows: int
    columns: int
    input: int
    stage: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """Sizes of a model.

    Attributes:
        layers: quantized layers of the largest block, in order of execution.
        blocks: number of blocks.
        parameters: number of parameters of the model; tied ones count once.
        block: number of parameters of the largest block.
        quantized: number of parameters of all quantized layers.
        embeddings, head: number of parameters of embeddings and head; tied ones count in both.
        hidden: elements of one token's hidden state.
        vocabulary: vocabulary size.
        stored, computing: bytes of an element in the checkpoint and in the computation.
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
        """Bytes to load so many parameters: the mapped file, and a copy if the computation has another dtype."""
        return parameters * (self.computing + (self.stored if self.stored != self.computing else 0))

    def activation_bytes(self, tokens: int) -> int:
        """Bytes of the four widest intermediate tensors of a block for one batch."""
        widest = max((max(layer.rows, layer.columns) for layer in self.layers), default=self.hidden)
        return 4 * tokens * widest * self.computing


def measure_model(
    blocks: BlockModel, layers: Sequence[Mapping[str, nn.Linear]], stored: torch.dtype, computing: torch.dtype
) -> ModelSizes:
    """Measure a model. Reads and runs the largest block once.

    Args:
        layers: quantized layers of each block, by full name.
        stored, computing: dtype of the weights in the checkpoint and in the computation.
    """
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks.blocks]
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    embeddings = blocks.model.get_input_embeddings().weight.numel()
    head = getattr(blocks.model.get_output_embeddings(), "weight", torch.empty(0)).numel()
    hidden, _ = blocks.probe(torch.device("cpu"), torch.float32)  # (1, length, ...)
    unique = {id(tensor): tensor.numel() for _, tensor in named_tensors(blocks.model)}
    return ModelSizes(
        layers=_layer_sizes(blocks, largest, layers[largest]),
        blocks=len(blocks),
        parameters=sum(unique.values()),
        block=sizes[largest],
        quantized=sum(m.weight.numel() for block in layers for m in block.values()),
        embeddings=embeddings,
        head=head,
        hidden=hidden.shape[2:].numel(),
        vocabulary=blocks.vocab_size,
        stored=stored.itemsize,
        computing=computing.itemsize,
    )


def _layer_sizes(blocks: BlockModel, index: int, layers: Mapping[str, nn.Linear]) -> list[LayerSize]:
    """Sizes of the quantized layers of a block; layers of one expert group share a stage."""
    inputs, experts = shared_input_groups(blocks, index), blocks.expert_groups(index)
    stages: dict[str, int] = {}
    found = []
    for number, group in enumerate([*inputs.groups, *([name] for name in inputs.uncalled)]):
        stage = stages.setdefault(experts.get(group[0], group[0]), len(stages))
        for name in group:
            if name in layers:
                rows, columns = layers[name].weight.shape
                found.append(LayerSize(rows=rows, columns=columns, input=number, stage=stage))
    return found

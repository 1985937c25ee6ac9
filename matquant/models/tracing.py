"""Checks on a few tokens: layers that share an input, and equality of the block-by-block and the whole forward pass."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.models.finite import check_weights, has_valid_logits, is_finite, non_finite_activations
from matquant.models.patched_forward import ForwardStopped, block_order_error, hidden_of
from matquant.models.tensor_swap import patched_forwards


@dataclass(frozen=True, slots=True)
class InputGroups:
    """Linear layers of a block grouped by their input tensor.

    Attributes:
        groups: full names of the layers that receive the same tensor, in order of execution.
        uncalled: full names of the layers that the probe did not call, such as experts that no token was routed to.
    """

    groups: list[list[str]]
    uncalled: list[str]


@torch.no_grad()
def shared_input_groups(blocks: BlockModel, index: int) -> InputGroups:
    """Find the linear layers of a block that receive the same tensor, by one forward pass of a few tokens."""
    seen: dict[str, list[tuple]] = {}
    alive: list[Tensor] = []  # a new tensor may get the address of a freed one

    def record_input(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            alive.append(value)
            seen.setdefault(name, []).append(tensor_identity(value))

        return hook

    names = blocks.linears(index)
    weight = next(iter(names.values())).weight
    device, dtype = torch.device("cpu") if weight.is_meta else weight.device, weight.dtype
    # Tensors count in-place writes only outside of inference mode.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        hidden, kwargs = blocks.probe(device, dtype)
        stack.enter_context(blocks.on_device(index, device, dtype))
        for name, layer in names.items():
            handle = layer.register_forward_pre_hook(record_input(name), with_kwargs=True)
            stack.callback(handle.remove)
        blocks.run_block(index, hidden, kwargs[index])
    groups: dict[tuple, list[str]] = {}
    for name, inputs in seen.items():  # in order of their first call
        groups.setdefault(tuple(inputs), []).append(name)
    return InputGroups(list(groups.values()), [name for name in names if name not in seen])


def tensor_identity(tensor: Tensor) -> tuple:
    """Key that is equal for two tensors with the same storage, layout and number of in-place writes."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version


@torch.no_grad()
def check_blockwise_forward(
    blocks: BlockModel, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Check on a few tokens that the blocks, run one at a time, give the output of the whole model.

    Every block is read twice.

    Args:
        device: of the blocks.
        dtype: of the blocks; the stored dtype if None.

    Returns:
        Largest absolute value of each stored tensor, by full name.

    Raises:
        UserError: the outputs differ, because blocks exchange more than hidden states; or a weight of the model, the
            output of a block or the logits are not finite.
    """
    device, dtype = torch.device(device), dtype or blocks.dtype
    expected = _whole_forward(blocks, device, dtype)
    hidden, kwargs = blocks.probe(device, dtype)
    largest: dict[str, float] = {}
    for index, own in enumerate(kwargs):
        with blocks.on_device(index, device, dtype):
            largest |= check_weights(blocks.blocks[index], blocks.block_names[index])
            hidden = blocks.run_block(index, hidden, own)
            if not is_finite(hidden):
                raise UserError(non_finite_activations(f"The outputs of {blocks.block_names[index]}", hidden.dtype))
    if not torch.allclose(hidden, expected, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(blocks.model).__name__} cannot be run block by block: its blocks exchange more than hidden "
            "states. This architecture is not supported."
        )
    return largest | _check_head(blocks, hidden, device, dtype)


def _check_head(blocks: BlockModel, hidden: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Check that the weights after the last block and the logits of the probe are finite.

    Returns:
        Largest absolute value of each of these weights, by full name.

    Raises:
        UserError: names what is not finite.
    """
    with blocks.head_on_device(device, dtype):
        largest = check_weights(blocks.model, exclude=[f"{blocks.name}."])
        if not has_valid_logits(logits := blocks.head(blocks.probe_ids(device), hidden)):
            raise UserError(non_finite_activations(f"The logits of {type(blocks.model).__name__}", logits.dtype))
    return largest


def _whole_forward(blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Output of the last block in the model's own forward pass on the probe, with one block on the device at a time.

    Raises UserError for weights in front of the blocks that are not finite.
    """
    originals = [block.forward for block in blocks.blocks]
    outputs: list[Tensor] = []

    def placed(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with blocks.on_device(index, device, dtype):
                output = originals[index](*args, **kwargs)
            if index + 1 < len(originals):
                return output
            outputs.append(hidden_of(output))
            raise ForwardStopped

        return forward

    with (
        blocks.embeddings_on_device(device, dtype),
        patched_forwards(blocks.blocks, [placed(i) for i in range(len(originals))]),
    ):
        check_weights(blocks.model, exclude=[f"{blocks.name}."])
        try:
            blocks.model(input_ids=blocks.probe_ids(device), use_cache=False)
        except ForwardStopped:
            return outputs[0]
    raise block_order_error(blocks.model, blocks.name, "the last one was not called")

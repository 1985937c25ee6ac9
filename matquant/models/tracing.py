"""Checks on a few tokens: layers that share an input, and equality of the block-by-block and the whole forward pass."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.finite import check_weights, has_valid_logits, is_finite, non_finite_activations
from matquant.models.patched_forward import block_order_error, unsupported_errors
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
    seen: dict[str, list[tuple[Any, ...]]] = {}
    alive: list[Tensor] = []  # a new tensor may get the address of a freed one

    def record_input(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            alive.append(value)
            seen.setdefault(name, []).append(tensor_identity(value))

        return hook

    names = blocks.linears(index)
    weight = next(iter(names.values())).weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    dtype = compute_dtype(blocks.dtype, device)
    # Tensors count in-place writes only outside of inference mode.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        hidden, kwargs = blocks.probe(device, dtype)
        stack.enter_context(blocks.on_device(index, device, dtype))
        for name, layer in names.items():
            handle = layer.register_forward_pre_hook(record_input(name), with_kwargs=True)
            stack.callback(handle.remove)
        blocks.run_block(index, hidden, kwargs[index])
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, inputs in seen.items():  # in order of their first call
        groups.setdefault(tuple(inputs), []).append(name)
    return InputGroups(list(groups.values()), [name for name in names if name not in seen])


def block_kind(block: nn.Module) -> tuple[Any, ...]:
    """Key that is equal for blocks with the same modules and shapes."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(tensor.shape)) for name, tensor in block.named_parameters())


def tensor_identity(tensor: Tensor) -> tuple[Any, ...]:
    """Key that is equal for two tensors with the same storage, layout and number of in-place writes."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version


@torch.no_grad()
def check_blockwise_forward(
    blocks: BlockModel, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Check on a few tokens that the blocks, run one at a time, give the logits of the whole model.

    Several models are run side by side, block by block, so a block must keep nothing from one call to another. Every
    block is read twice.

    Args:
        device: of the blocks.
        dtype: of the blocks; the stored dtype if None.

    Returns:
        Largest absolute value of each stored tensor, by full name.

    Raises:
        UserError: the logits differ, because blocks exchange more than hidden states; the model does not run; or a
            weight of the model, the output of a block or the logits are not finite.
    """
    device, dtype = torch.device(device), dtype or blocks.dtype
    with unsupported_errors(blocks.model):
        hidden, largest = _run_blocks(blocks, device, dtype)
        with blocks.head_on_device(device, dtype):
            largest |= check_weights(blocks.model, exclude=[f"{blocks.name}."])
            found = blocks.head(blocks.probe_ids(device), hidden)
        if not has_valid_logits(found):
            raise UserError(non_finite_activations(f"The logits of {type(blocks.model).__name__}", found.dtype))
        expected = _whole_forward(blocks, device, dtype)
    if not is_close(found, expected):
        raise UserError(
            f"{type(blocks.model).__name__} cannot be run block by block: its blocks exchange more than hidden "
            "states. This architecture is not supported."
        )
    return largest


@torch.no_grad()
def blockwise_logits(blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits [1, length, vocabulary] for ``blocks.probe_ids``, the blocks run one at a time."""
    hidden, _ = _run_blocks(blocks, device, dtype)
    with blocks.head_on_device(device, dtype):
        return blocks.head(blocks.probe_ids(device), hidden)


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Return True if two results of the same computation differ by rounding only, relative to the largest value."""
    if found.shape != expected.shape:
        return False
    finite = expected[torch.isfinite(expected)].float()
    largest = finite.abs().max().item() if finite.numel() else 0.0
    tolerance = (1e-4 if expected.dtype == torch.float32 else 1e-2) * largest
    return torch.allclose(found.float(), expected.float(), rtol=0, atol=tolerance, equal_nan=True)


def _run_blocks(blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
    """Run the blocks one at a time on the probe; each also on other hidden states, as it does for several slices.

    Returns:
        Hidden states after the last block, and the largest absolute value of each stored tensor of the blocks.
    """
    largest = _check_embeddings(blocks, device, dtype)
    hidden, kwargs = blocks.probe(device, dtype)
    for index, own in enumerate(kwargs):
        with blocks.on_device(index, device, dtype):
            largest |= check_weights(blocks.blocks[index], blocks.block_names[index])
            output = blocks.run_block(index, hidden, own)
            _check_output(blocks, index, hidden, output)
            blocks.run_block(index, hidden.flip(1), own)
            hidden = output.to(hidden.dtype)
    return hidden, largest


def _check_embeddings(blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Largest absolute value of each weight in front of the blocks. Raises UserError if one is not finite."""
    with blocks.embeddings_on_device(device, dtype):
        return check_weights(blocks.model, exclude=[f"{blocks.name}."])


def _check_output(blocks: BlockModel, index: int, hidden: Tensor, output: Tensor) -> None:
    """Raise UserError if the output of block ``index`` is not finite or has another shape than its input."""
    name = blocks.block_names[index]
    if output.shape != hidden.shape:
        raise UserError(
            f"{name} of {type(blocks.model).__name__} maps hidden states {list(hidden.shape)} to {list(output.shape)}. "
            "This architecture is not supported."
        )
    if not is_finite(output):
        raise UserError(non_finite_activations(f"The outputs of {name}", output.dtype))


def _whole_forward(blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Logits of the model's own forward pass on the probe, with one block on the device at a time."""
    originals = [block.forward for block in blocks.blocks]
    calls: list[int] = []

    with ExitStack() as outside:

        def placed(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                calls.append(index)
                with blocks.on_device(index, device, dtype):
                    output = originals[index](*args, **kwargs)
                if len(calls) == len(originals):
                    outside.close()  # the head replaces the embeddings, so that both need not fit
                    outside.enter_context(blocks.head_on_device(device, dtype))
                return output

            return forward

        outside.enter_context(blocks.embeddings_on_device(device, dtype))
        with patched_forwards(blocks.blocks, [placed(i) for i in range(len(originals))]):
            logits: Tensor = blocks.model(input_ids=blocks.probe_ids(device), use_cache=False).logits
    if calls != list(range(len(originals))):
        raise block_order_error(blocks.model, blocks.name, f"{len(calls)} calls of {len(originals)} blocks")
    return logits

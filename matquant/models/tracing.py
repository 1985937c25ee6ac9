"""What a few tokens tell about a model: which layers share an input, and whether it can be run block by block at all."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.models.blocks import BlockModel, Stop, first
from matquant.models.tensor_swap import patched_forwards


@dataclass(frozen=True, slots=True)
class InputGroups:
    """Linear layers of a block by their input.

    Attributes:
        groups: full names; layers of one group receive the very same tensor. In order of execution.
        uncalled: full names of the layers that the probe never called, such as experts that no token chose.
    """

    groups: list[list[str]]
    uncalled: list[str]


@torch.no_grad()
def shared_input_groups(blocks: BlockModel, index: int) -> InputGroups:
    """Which linear layers of a block receive the very same input, found by watching one small forward pass."""
    seen: dict[str, list[tuple]] = {}
    alive: list[Tensor] = []  # a freed tensor's address would be given to another

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            alive.append(value)
            seen.setdefault(name, []).append(_identity(value))

        return hook

    names = blocks.linears(index)
    weight = next(iter(names.values())).weight
    device, dtype = torch.device("cpu") if weight.is_meta else weight.device, weight.dtype
    # Only outside of inference mode do tensors count the writes to them.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        hidden, calls = blocks.probe(device, dtype)
        stack.enter_context(blocks.on_device(index, device, dtype))
        for name, layer in names.items():
            handle = layer.register_forward_pre_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        blocks.run_block(index, hidden, calls[index])
    groups: dict[tuple, list[str]] = {}
    for name, inputs in seen.items():  # in order of their first call
        groups.setdefault(tuple(inputs), []).append(name)
    return InputGroups(list(groups.values()), [name for name in names if name not in seen])


@torch.no_grad()
def check(blocks: BlockModel, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
    """Make sure that block by block gives what the model gives, on a few tokens. Reads every block twice.

    Args:
        device: where blocks run.
        dtype: in which they run; the stored one when None.

    Raises:
        UserError: the results differ, so that an architecture passes more between its blocks than hidden states; or a
            block puts out what is not finite.
    """
    device, dtype = torch.device(device), dtype or blocks.dtype
    expected = _whole(blocks, device, dtype)
    hidden, calls = blocks.probe(device, dtype)
    for index, call in enumerate(calls):
        with blocks.on_device(index, device, dtype):
            hidden = blocks.run_block(index, hidden, call)
            _check_finite(blocks, index, hidden)
    if not torch.allclose(hidden, expected, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"{type(blocks.model).__name__} cannot be run block by block: its blocks exchange more than hidden "
            "states. This architecture is not supported."
        )


def _check_finite(blocks: BlockModel, index: int, hidden: Tensor) -> None:
    """Refuse what block ``index``, which is on the device, puts out if it is not finite, and say what is to blame."""
    if torch.isfinite(hidden).all():
        return
    for name, layer in blocks.linears(index).items():
        if not torch.isfinite(layer.weight).all():
            raise UserError(f"The weights of {name} hold NaN or Inf. Copy or download the checkpoint again.")
    raise UserError(
        f"{blocks.block_names[index]} puts out NaN or Inf in {str(hidden.dtype).removeprefix('torch.')}: other weights of it "
        "are damaged, or its activations are too large for that dtype, in which case model.dtype=bfloat16 may help."
    )


def _whole(blocks: BlockModel, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What leaves the last block when the model itself runs them all on the probe, each on the device for its turn."""
    own = [block.forward for block in blocks.blocks]
    left: list[Tensor] = []

    def lending(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with blocks.on_device(index, device, dtype):
                output = own[index](*args, **kwargs)
            if index + 1 < len(own):
                return output
            left.append(first(output))
            raise Stop

        return forward

    with blocks.entry_on_device(device, dtype), patched_forwards(blocks.blocks, [lending(i) for i in range(len(own))]):
        try:
            blocks.model(input_ids=blocks.probe_ids(device), use_cache=False)
        except Stop:
            return left[0]
    raise UserError(blocks.out_of_order("the last one was never called"))


def _identity(tensor: Tensor) -> tuple:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version

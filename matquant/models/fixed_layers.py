"""Linear layers that stay in full precision because nothing else can stand for them.

- Another module reads their weight, as in ``self.dt_proj.weight @ x`` (Mamba), instead of calling them. Calibration sees no
  inputs of such a layer. Reading the weight's device, dtype or shape does no harm.
- Several layers share one weight, mostly in several blocks (Zamba), which are calibrated on different inputs.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from matquant.errors import shorten
from matquant.models.blocks import BlockModel
from matquant.models.patched_forward import unsupported_errors
from matquant.models.tensor_swap import swapped_tensors
from matquant.models.tracing import block_kind
from matquant.models.unquantized import without_numbers

READ_ELSEWHERE = "the module around it reads its weight instead of calling it"
SHARED = "it shares its weight with another layer"
_LARGE_SHARE = 0.1  # of the parameters in the blocks

_PROPERTIES = (
    "device",
    "dtype",
    "layout",
    "shape",
    "ndim",
    "requires_grad",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "itemsize",
)
_METHODS = ("size", "dim", "numel", "stride", "is_floating_point", "element_size", "__len__", "__repr__")
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}


class _WatchedWeight(nn.Parameter):
    """Weight that reports each operator that reads its values outside of its layer's forward.

    Attributes:
        layer: full name of the layer.
        in_forward: True while the layer's own forward runs.
        read: names of the layers whose weight was read, to be extended.
    """

    layer: str
    in_forward: bool
    read: set[str]

    @classmethod
    def of(cls, weight: Tensor, layer: str, read: set[str]) -> "_WatchedWeight":
        """Watched weight on the same storage."""
        watched = torch.Tensor._make_subclass(cls, weight.detach())
        watched.layer, watched.in_forward, watched.read = layer, False, read
        return watched

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _METADATA:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, cls) and not value.in_forward:
                    value.read.add(value.layer)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def fixed_layers(
    blocks: BlockModel, device: torch.device, dtype: torch.dtype, *, lm_head: bool = False
) -> dict[str, str]:
    """Find the linear layers that stay in full precision.

    One block of each kind runs on a few tokens.

    Args:
        device, dtype: of the blocks.
        lm_head: look at the head too.

    Returns:
        Reason by full name.

    Raises:
        UserError: the architecture is not supported.
    """
    read = _layers_read_elsewhere(blocks, device, dtype, lm_head)
    return dict.fromkeys(_layers_that_share(blocks), SHARED) | dict.fromkeys(read, READ_ELSEWHERE)


def unsplit_notes(blocks: BlockModel) -> list[str]:
    """Sentence on matrices of the blocks that are no linear layers, if they are a large part of the blocks.

    Such are experts in a form that is not known here (Llama 4, DBRX), unlike small routers and convolutions.
    """
    linear = {f"{name}.weight" for index in range(len(blocks)) for name in blocks.linears(index)}
    matrices: dict[str, int] = {}
    for block, path in zip(blocks.blocks, blocks.block_names, strict=True):
        matrices |= {f"{path}.{name}": tensor.numel() for name, tensor in block.named_parameters() if tensor.ndim > 1}
    rest = {name: count for name, count in matrices.items() if name not in linear}
    share = sum(rest.values()) / max(1, sum(matrices.values()))
    if share < _LARGE_SHARE:
        return []
    largest = sorted(rest, key=lambda name: -rest[name])
    return [
        f"{share:.0%} of the parameters in the blocks of {type(blocks.model).__name__} are no linear layers and stay in full "
        f"precision: {shorten(list(dict.fromkeys(map(without_numbers, largest))))}."
    ]


def fixed_notes(fixed: Mapping[str, str]) -> list[str]:
    """Sentence for each reason in the result of ``fixed_layers``."""
    notes = []
    for reason in dict.fromkeys(fixed.values()):
        names = [name for name, own in fixed.items() if own == reason]
        kinds = list(dict.fromkeys(map(without_numbers, names)))
        notes.append(f"{len(names)} linear layers stay in full precision, each since {reason}: {shorten(kinds)}.")
    return notes


def _layers_that_share(blocks: BlockModel) -> list[str]:
    """Layers of blocks whose weight is that of another layer of a block."""
    weights = {name: id(layer.weight) for index in range(len(blocks)) for name, layer in blocks.linears(index).items()}
    uses = Counter(weights.values())
    return [name for name, weight in weights.items() if uses[weight] > 1]


@torch.no_grad()
def _layers_read_elsewhere(blocks: BlockModel, device: torch.device, dtype: torch.dtype, lm_head: bool) -> list[str]:
    """Layers whose weight is read outside of their forward, in the order of the model."""
    by_kind: dict[tuple[Any, ...], set[str]] = {}  # names below the block
    found = []
    for index, path in enumerate(blocks.block_names):
        kind = block_kind(blocks.blocks[index])
        if kind not in by_kind:
            by_kind[kind] = {name.removeprefix(path) for name in _read_in(blocks, index, device, dtype)}
        found += [name for name in blocks.linears(index) if name.removeprefix(path) in by_kind[kind]]
    return found + (list(_read_in(blocks, len(blocks), device, dtype)) if lm_head else [])


def _read_in(blocks: BlockModel, index: int, device: torch.device, dtype: torch.dtype) -> set[str]:
    """Layers of one block, or of the head, whose weight is read outside of their forward."""
    read: set[str] = set()
    hidden, kwargs = blocks.probe(device, dtype)
    with unsupported_errors(blocks.model), blocks.on_device(index, device, dtype), ExitStack() as stack:
        layers = blocks.linears(index)
        watched = {name: _WatchedWeight.of(layer.weight, name, read) for name, layer in layers.items()}
        stack.enter_context(swapped_tensors(blocks.model, {f"{name}.weight": w for name, w in watched.items()}))
        _mark_forwards(layers, watched, stack)
        if index < len(blocks):
            blocks.run_block(index, hidden, kwargs[index])
        else:
            blocks.head(blocks.probe_ids(device), hidden)
    return read


def _mark_forwards(layers: Mapping[str, nn.Linear], watched: Mapping[str, _WatchedWeight], stack: ExitStack) -> None:
    """Set ``in_forward`` of each weight while its layer's forward runs, until the stack closes."""

    def marker(weight: _WatchedWeight, value: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            weight.in_forward = value

        return hook

    for name, layer in layers.items():
        stack.callback(layer.register_forward_pre_hook(marker(watched[name], True)).remove)
        stack.callback(layer.register_forward_hook(marker(watched[name], False)).remove)

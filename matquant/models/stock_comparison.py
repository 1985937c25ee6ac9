"""Comparison of a model as it is read here, block by block, with the one that ``from_pretrained`` of Transformers loads."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant import machine
from matquant.errors import UserError, shorten
from matquant.models.blocks import BlockModel
from matquant.models.computed_tensors import bytes_of
from matquant.models.loading import LoadedModel, quiet_transformers
from matquant.models.tensor_swap import named_tensors
from matquant.models.tracing import blockwise_logits, is_close

# The comparison takes a second or two for the largest model that it is made for.
_MAX_BYTES = 2**30
_MAX_FREE_SHARE = 0.25


@torch.no_grad()
def check_against_stock(
    loaded: LoadedModel, blocks: BlockModel, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> bool:
    """Compare every tensor, and the logits of a few tokens, with a stock load, if the whole model is small.

    Args:
        blocks: of ``loaded``. Logits of transformed weights are not compared.
        device, dtype: of the blocks.

    Returns:
        False if the model is too large for the comparison.

    Raises:
        UserError: a tensor or the logits differ.
    """
    device = torch.device(device)
    elements = sum({id(tensor): tensor.numel() for _, tensor in named_tensors(loaded.model)}.values())
    free = min(machine.device_free(place) for place in (device, torch.device("cpu")))
    if elements * (dtype.itemsize + loaded.dtype.itemsize) > min(_MAX_BYTES, _MAX_FREE_SHARE * free):
        return False
    stock = _load_stock(loaded)
    if wrong := _different_tensors(loaded, dict(named_tensors(stock))):
        raise _difference(loaded, f"the values of {shorten(wrong)}")
    if blocks.transform is None:
        stock = stock.to(device).float() if dtype == torch.float32 else stock.to(device)
        expected = stock(input_ids=blocks.probe_ids(device), use_cache=False).logits
        if not is_close(blockwise_logits(blocks, device, dtype), expected):
            raise _difference(loaded, "the logits")
    return True


def _load_stock(loaded: LoadedModel) -> Any:
    """Model as Transformers loads it, on the CPU in the dtype of ``loaded``."""
    folder = loaded.model.config.name_or_path
    trusted = type(loaded.model).__module__.startswith("transformers_modules.")  # its code ran already
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=loaded.dtype, key_mapping=dict(loaded.renaming), trust_remote_code=trusted
        )
    return model.eval()


def _different_tensors(loaded: LoadedModel, stock: dict[str, Tensor]) -> list[str]:
    """Names of the stored and computed tensors that differ from the stock model's."""
    stored = loaded.checkpoint.read(name for name in stock if name in loaded.checkpoint)
    wrong = [name for name, tensor in stored if not _equal(tensor, stock[name])]
    computed = {name: tensor for name, tensor in named_tensors(loaded.model) if not tensor.is_meta}
    return wrong + [name for name, tensor in computed.items() if name in stock and not _equal(tensor, stock[name])]


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and torch.equal(bytes_of(one), bytes_of(other))


def _difference(loaded: LoadedModel, what: str) -> UserError:
    return UserError(
        f"{loaded.label} as it is read here differs from what Transformers loads in {what}, so its results would be wrong. "
        f"{type(loaded.model).__name__} is not supported with the installed transformers; please report it."
    )

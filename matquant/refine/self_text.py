"""Text that the full-precision model writes itself, to refine scales without a data set."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from matquant.data.config import TextConfig
from matquant.errors import UserError
from matquant.models.blocks import BlockModel
from matquant.models.token_ids import embedded_tokens

BATCH = 64  # sequences that are sampled at a time
SELF_TEXT_VERSION = 2  # part of the key of sampled sequences: raised when the same settings give others than before


def sample_windows(
    blocks: BlockModel,
    tokenizer: Any,
    text: TextConfig,
    top_k: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Sample sequences at temperature 1, with the whole model on the device.

    A sequence begins with the beginning-of-text token where the tokenizer adds one by itself, then a random token that is not
    special; so all of them differ from the start (as in LLM-QAT, arXiv 2305.17888). An end-of-text token does not end it: the
    model goes on with another document.

    Args:
        text: ``sequences``, ``sequence_length`` and ``seed``.
        top_k: number of the most likely tokens to draw from.
        progress: called with the number of finished sequences.

    Returns:
        int64 [sequences, sequence_length], on the CPU.
    """
    devices = [device] if device.type == "cuda" else []
    found = []
    with torch.random.fork_rng(devices), torch.no_grad(), blocks.whole_on_device(device, dtype):
        torch.manual_seed(text.seed or 0)
        for first in range(0, text.sequences, BATCH):
            prompts = _first_tokens(blocks, tokenizer, min(BATCH, text.sequences - first)).to(device)
            found.append(_continue(blocks.model, prompts, text.sequence_length, top_k).cpu())
            progress(len(prompts))
    return torch.cat(found)


def check_generates(model: Any) -> None:
    """Raise UserError for a model without generation."""
    if not model.can_generate():
        raise UserError(
            "refine.text asks for text that the model writes itself (self), which needs a model that generates text, and "
            f"{type(model).__name__} does not. Choose another text, such as refine.text.dataset=stdlib."
        )


def _first_tokens(blocks: BlockModel, tokenizer: Any, count: int) -> Tensor:
    """Tokens that ``count`` sequences begin with: int64 [count, 1 or 2]."""
    known = min(embedded_tokens(blocks.model), blocks.vocab_size, len(tokenizer))
    special = torch.tensor([token for token in tokenizer.all_special_ids if token < known], dtype=torch.int64)
    plain = torch.ones(known, dtype=torch.bool).index_fill(0, special, False).nonzero()[:, 0]
    drawn = plain[torch.randint(len(plain), (count, 1))]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return torch.cat([torch.full((count, 1), bos), drawn], 1) if adds_bos else drawn


def _continue(model: Any, prompts: Tensor, length: int, top_k: int) -> Tensor:
    """Sequences of ``length`` tokens that begin with the prompts, int64 [count, length]."""
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": top_k, "top_p": 1.0, "use_cache": True}
    settings |= {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": length - prompts.shape[1]}
    with _plain_generation(model):
        found: Tensor = model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    return found[:, :length]


@contextlib.contextmanager
def _plain_generation(model: Any) -> Any:
    """Sampling without the settings that a checkpoint brings along, such as a repetition penalty, inside the context."""
    kept = model.generation_config
    model.generation_config = type(kept)()
    try:
        yield
    finally:
        model.generation_config = kept

"""Plausibility of the full-precision model and of its slices: sentences on figures that a sound model does not give."""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from matquant import number_format
from matquant.errors import UserError, shorten
from matquant.evaluate.metrics import likelihood
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.finite import is_finite, non_finite_activations

PROBE_TOKENS = 256

_MAX_PERPLEXITY = 100.0  # of the full-precision model
_BOS_FACTOR = 3.0  # between the perplexities without and with a beginning-of-text token
_MAX_KL_AT_8_BITS = 0.01  # nats per token
_LOST_OUTPUT = 0.99  # relative error of a layer, which is 1 for a layer of zeros
# Largest KL, in nats per token, that the rounding of a computation in this dtype makes by itself.
_KL_FLOOR = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 5e-3}


@torch.no_grad()
def probe_perplexities(blocks: BlockModel, windows: Tensor, device: torch.device) -> list[float]:
    """Perplexity of the full-precision model on each of a few windows, from their third token on.

    Every block is read once.

    Args:
        windows: int64 [windows, length], length at least 3.

    Raises:
        UserError: the output of a block is not finite.
    """
    dtype = compute_dtype(blocks.dtype, device)
    start = blocks.capture_block_inputs(windows, len(windows), device, dtype)
    hidden, (kwargs,) = start.hidden[:], start.kwargs
    for index in range(len(blocks)):
        with blocks.on_device(index, device, dtype):
            hidden = blocks.run_block(index, hidden, kwargs[index])
        if not is_finite(hidden):
            raise UserError(non_finite_activations(f"The outputs of {blocks.block_names[index]}", dtype))
    ids = windows.to(device)
    with blocks.head_on_device(device, dtype):
        logits = (blocks.head(ids[row : row + 1], hidden[row : row + 1])[:, 1:] for row in range(len(ids)))
        return [likelihood(one, ids[row : row + 1, 1:]).metrics().perplexity for row, one in enumerate(logits)]


def full_precision_warnings(
    blocks: BlockModel, windows: Mapping[str, Tensor], bos: int | None, device: torch.device
) -> list[str]:
    """Sentences on texts that the full-precision model predicts implausibly badly.

    Args:
        windows: int64 [length], one window of each text by the text's name in the config; at most ``PROBE_TOKENS`` tokens
            of each are read.
        bos: beginning-of-text token, which is tried in front of a window that lacks it; None for no such token.

    Raises:
        UserError: the output of a block is not finite.
    """
    length = min((len(window) for window in windows.values()), default=0)
    if length < 3:
        return []
    tried: dict[tuple[str, bool], Tensor] = {}
    for name, window in windows.items():
        tried[name, False] = part = window[: min(length, PROBE_TOKENS)]
        if bos is not None and part[0] != bos:
            tried[name, True] = torch.cat([part.new_tensor([bos]), part[:-1]])
    found = dict(zip(tried, probe_perplexities(blocks, torch.stack([*tried.values()]), device), strict=True))
    sentences = (_perplexity_warning(name, found[name, False], found.get((name, True))) for name in windows)
    return [sentence for sentence in sentences if sentence is not None]


def _perplexity_warning(name: str, plain: float, with_bos: float | None) -> str | None:
    """Sentence on one text; None if its perplexity is plausible."""
    if with_bos is not None and with_bos * _BOS_FACTOR < plain:
        return (
            f"The full-precision model has a perplexity of {number_format.perplexity(plain)} on a window of {name}, and of "
            f"{number_format.perplexity(with_bos)} with a beginning-of-text token in front. It was trained with that "
            f"token: set {name}.bos=true."
        )
    if plain > _MAX_PERPLEXITY:
        return (
            f"The full-precision model has a perplexity of {number_format.perplexity(plain)} on a window of {name}: it does "
            "not predict this text. Check that model, tokenizer and text belong together; figures of slices say little "
            "otherwise."
        )
    return None


def dtype_warnings(dtype: torch.dtype) -> list[str]:
    """Sentence on the KL that the rounding of a computation in ``dtype`` makes by itself; none for float32."""
    if dtype == torch.float32:
        return []
    return [
        f"KL and perplexity are computed in {str(dtype).removeprefix('torch.')} (eval.dtype=model), whose rounding alone makes "
        f"a KL of up to {_KL_FLOOR[dtype]:g}: figures of 6 and 8 bits say little. eval.dtype=float32 measures them."
    ]


def kl_warnings(dataset: str, kl: Mapping[int, float], dtype: torch.dtype) -> list[str]:
    """Sentences on implausible KL divergences of uniform slices.

    Args:
        dataset: name of the text.
        kl: KL(full precision || slice) in nats per token by bit-width.
        dtype: of the computation, whose rounding bounds what can be compared.
    """
    sentences = []
    if kl.get(8, 0.0) > _MAX_KL_AT_8_BITS:
        sentences.append(
            f"The slice of 8 bits has a KL of {number_format.significant(kl[8])} on {dataset}, and a sound one less than "
            f"{_MAX_KL_AT_8_BITS:g}: do not use this parent before you know the cause. Look for layers with large errors."
        )
    for (few, worse), (many, better) in itertools.pairwise(sorted(kl.items())):
        if better >= worse and better > _KL_FLOOR.get(dtype, 0.0):
            sentences.append(
                f"The KL on {dataset} does not fall with the bits: {number_format.significant(worse)} at {few} bits and "
                f"{number_format.significant(better)} at {many} bits. Raise the weight of {many} bits in the objective, or "
                "calibrate and evaluate on more text."
            )
    return sentences


def layer_warnings(errors: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Sentence on layers whose quantized outputs have nothing in common with the original ones; empty without any.

    Args:
        errors: relative output errors of each layer by bit-width.
    """
    lost = {
        name: at
        for name, of_layer in errors.items()
        if (at := [bits for bits, error in of_layer.items() if error >= _LOST_OUTPUT])
    }
    if not lost:
        return []
    named = shorten([f"{name} at {', '.join(bits)} bits" for name, bits in lost.items()])
    return [
        f"{len(lost)} layers lose their output, with a relative error of {_LOST_OUTPUT} or more: {named}. Skip them with "
        "method.skip, or give them a smaller group size or other weights with method.overrides."
    ]

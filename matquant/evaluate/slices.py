"""Measurement of the full-precision model and any number of its slices in one pass over the blocks.

Only one block at a time is converted and on the device. The hidden states of all models are stored between two blocks, so each
block is loaded once for all of them.

Lifecycle:
  1. ``capture_block_inputs`` makes the inputs of block 0, once for all models;
  2. block by block, each model's weights replace those of the block, which maps the model's hidden states;
  3. batch by batch, the head gives each model's logits, which are added to its sums and freed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from matquant.distributed import SINGLE_PROCESS, ProcessGroup
from matquant.errors import UserError
from matquant.evaluate.metrics import Metrics, Totals, compare, likelihood
from matquant.models.activation_cache import ActivationCache, OffloadTarget
from matquant.models.blocks import BlockInputs, BlockModel
from matquant.models.finite import is_finite, non_finite_activations

FULL = "full"

# Logits of one model at a time: with those of the full model beside them and in float32, 1 GB.
LOGITS_AT_ONCE = 2**27

WeightsOf = Callable[[int, str], Mapping[str, Tensor]]
Hidden = dict[str, ActivationCache]  # of each model


def model_name(name: str) -> str:
    """Name of the full-precision model or of a slice in a sentence."""
    if name == FULL:
        return "the full-precision model"
    return f"the slice of {name} bits" if name.isdecimal() else f"the slice {name}"


def steps(blocks: BlockModel, windows: Tensor, slices: Sequence[str]) -> int:
    """Number of ``progress`` steps of ``evaluate_slices``."""
    return (len(blocks) + 1) * (len(slices) + 1) * len(windows)


def evaluate_slices(
    blocks: BlockModel,
    windows: Tensor,
    weights_of: WeightsOf,
    slices: Sequence[str],
    batch_size: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
    place: OffloadTarget | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Metrics]:
    """Perplexity, KL to the full-precision model and top-1 agreement of every slice.

    Args:
        blocks: the full-precision model; its weights are restored at the end.
        windows: int64 [sequences, length].
        weights_of: returns for a block's index and a slice the weights that differ, [out, in] by full layer name. It is
            called once for each block and slice, block by block, and for the head as the block after the last.
        slices: their names, none of them ``"full"``.
        batch_size: windows at a time. The figures depend on it by rounding only.
        device, dtype: of blocks and head while they are computed. The rounding of 16-bit activations alone makes a KL of
            about 1e-3 (bfloat16) or 2e-5 (float16) nats per token.
        progress: called with the number of windows that went through a block or the head; ``steps`` of them in all.
        place: storage of hidden states between two blocks; ``device`` if None.
        process_group: the processes that share the windows; each calls this with the same arguments and gets the same figures.

    Returns:
        Figures of ``"full"`` and of each slice. Every window predicts its tokens but the first.

    Raises:
        ValueError: a name occurs twice or is ``"full"``, ``weights_of`` returned weights that do not fit the block, or
            there is nothing to predict.
        UserError: hidden states or logits of a model are not finite.
    """
    if FULL in slices or len(set(slices)) != len(slices):
        raise ValueError(f"slices need different names, and none may be {FULL!r}: {list(slices)}")
    advance = progress or (lambda _: None)
    device = torch.device(device)
    windows = windows[process_group.shard(len(windows))]
    # Not inference mode: the caller may keep the tensors of weights_of, which must stay ordinary ones.
    with torch.no_grad():
        start = blocks.capture_block_inputs(windows, batch_size, device, dtype, place)
        hidden: Hidden = {FULL: start.hidden, **{name: start.hidden.clone() for name in slices}}
        for index in range(len(blocks)):
            with blocks.on_device(index, device, dtype):
                for name, states in hidden.items():
                    # Not kept in a variable: the weights of one slice would stay allocated while the next one's are made.
                    with blocks.with_weights(index, {} if name == FULL else weights_of(index, name)):
                        _through_block(blocks, index, name, states, start, advance)
        heads = {name: weights_of(len(blocks), name) for name in slices}
        with blocks.head_on_device(device, dtype):
            totals = _score(blocks, windows, hidden, heads, batch_size, device, advance)
    return {name: _added_up(total, process_group).metrics() for name, total in totals.items()}


def _added_up(totals: Totals, process_group: ProcessGroup) -> Totals:
    """The sums of all processes."""
    sums = torch.tensor([totals.nll, totals.kl, totals.agreeing, totals.tokens], dtype=torch.float64)
    process_group.all_reduce(sums)
    nll, kl, agreeing, tokens = sums.tolist()
    return Totals(nll, kl, int(agreeing), int(tokens))


def _through_block(
    blocks: BlockModel,
    index: int,
    name: str,
    states: ActivationCache,
    start: BlockInputs,
    advance: Callable[[int], None],
) -> None:
    """Replace hidden states [sequences, length, hidden] by the block's output. Raises UserError if it is not finite."""
    finite = []
    for rows, calls in zip(start.rows, start.kwargs, strict=True):
        states[rows] = output = blocks.run_block(index, states[rows], calls[index])
        finite.append(torch.stack(output.aminmax()))
        advance(len(output))
    if not is_finite(*finite):
        what = f"The outputs of {blocks.block_names[index]} in {model_name(name)}"
        raise UserError(non_finite_activations(what, output.dtype))


def _score(
    blocks: BlockModel,
    windows: Tensor,
    hidden: Hidden,
    heads: Mapping[str, Mapping[str, Tensor]],
    batch_size: int,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, Totals]:
    totals = dict.fromkeys(hidden, Totals())
    for rows in _head_rows(windows, blocks.vocab_size, batch_size):
        ids = windows[rows].to(device)
        full = blocks.head(ids, hidden[FULL][rows])
        for name, states in hidden.items():
            if name == FULL:
                totals[name] += likelihood(full, ids)
            else:
                with blocks.with_weights(len(blocks), heads[name]):
                    totals[name] += compare(full, blocks.head(ids, states[rows]), ids)
            _check_metrics(name, totals[name].metrics())
            advance(len(ids))
    return totals


def _check_metrics(name: str, metrics: Metrics) -> None:
    """Raise UserError if a figure of a model is NaN or infinite."""
    if not metrics.is_finite:
        raise UserError(
            f"The perplexity of {model_name(name)} is {metrics.perplexity:.4g} and its KL {metrics.kl:.4g}: the logits hold "
            "NaN or Inf, or give a token of the text no probability. Check the checkpoint and the text; a model in "
            "float16 may need model.dtype=bfloat16."
        )


def _head_rows(windows: Tensor, vocabulary: int, batch_size: int) -> Iterator[slice]:
    """Batches for the head: smaller ones where the vocabulary makes their logits large."""
    sequences, length = windows.shape
    size = max(1, min(batch_size, LOGITS_AT_ONCE // (length * vocabulary)))
    for start in range(0, sequences, size):
        yield slice(start, min(start + size, sequences))

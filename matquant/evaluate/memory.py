"""Memory estimate of evaluating slices, block by block."""

from matquant.evaluate.metrics import PIECE
from matquant.evaluate.slices import LOGITS_AT_ONCE
from matquant.memory import FLOAT32_BYTES, MemoryEstimate, Offload, estimate
from matquant.models.model_sizes import ModelSizes

_LOGIT_ARRAYS = 9  # arrays of a piece of logits that are alive while two models are compared


def evaluate_memory(
    sizes: ModelSizes, tokens: int, length: int, batch: int, slices: int, *, on_gpu: bool, offload: Offload
) -> MemoryEstimate:
    """Peak memory of evaluating ``slices`` slices in one pass over the blocks.

    Args:
        tokens: on this process.
        length: tokens of one sequence.
        batch: sequences of one forward pass.
    """
    cached = (1 + slices) * tokens * sizes.hidden * sizes.computing
    weights = [layer.rows * layer.columns for layer in sizes.layers]
    # Dequantized layers of one slice, temporaries of one layer, and its codes, which stay mapped from the parent.
    dequantized = sum(weights) * FLOAT32_BYTES + 3 * max(weights, default=0) * FLOAT32_BYTES + sum(weights)
    swapped, codes = sum(weights) * sizes.computing, 0 if on_gpu else sum(weights)
    forward = swapped + codes + sizes.activation_bytes(batch * length)
    block = sizes.block * sizes.computing + max(0 if on_gpu else dequantized, forward)
    rows = max(1, min(batch, LOGITS_AT_ONCE // (length * sizes.vocabulary)))
    logits = rows * length * sizes.vocabulary
    comparing = _LOGIT_ARRAYS * min(PIECE["other" if on_gpu else "cpu"], logits) * FLOAT32_BYTES
    head = sizes.head * sizes.computing + 2 * logits * sizes.computing + comparing + codes
    loading = max(sizes.load_bytes(part) for part in (sizes.embeddings, sizes.block, sizes.head))
    running = max(loading, block, head)
    return estimate("evaluate", running=running, cached=cached, on_host=dequantized, on_gpu=on_gpu, offload=offload)


def evaluate_operations(sizes: ModelSizes, tokens: int, slices: int) -> float:
    """Floating-point operations of the forward passes of the full-precision model and of all slices."""
    return 2.0 * (sizes.block * sizes.blocks + sizes.head) * tokens * (1 + slices)

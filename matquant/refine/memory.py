"""Memory estimate of a refinement: the whole model is on the device."""

from collections.abc import Sequence

from matquant.memory import FLOAT32_BYTES, MemoryEstimate, Offload, estimate
from matquant.models.model_sizes import ModelSizes
from matquant.refine.slice_model import sequences_at_a_time

_SETS = 5  # of scales per bit-width: start, ratio, two moments, best
_LOGIT_ARRAYS = 6  # of the sequences at a time: two logits, two log-probabilities, two gradients
_GRADIENTS = 3  # activations of a block with their gradients, over the activations alone


def refine_memory(
    sizes: ModelSizes,
    bits: Sequence[int],
    *,
    groups: int,
    parent: int,
    windows: int,
    length: int,
    batch: int,
    on_gpu: bool,
    offload: Offload,
) -> MemoryEstimate:
    """Peak memory of training the scales of some bit-widths.

    Args:
        groups: of all quantized layers.
        parent: bytes of the parent.
        windows: of training and validation on this process.
        length: tokens of a window.
        batch: windows of one step on this process.
    """
    cached = windows * length * sizes.hidden * sizes.computing
    scales = len(bits) * _SETS * groups * FLOAT32_BYTES
    boundaries = sizes.blocks * batch * length * sizes.hidden * sizes.computing
    inside = _GRADIENTS * sizes.activation_bytes(batch * length)
    sequences = min(batch, sequences_at_a_time(length, sizes.vocabulary))
    logits = _LOGIT_ARRAYS * sequences * length * sizes.vocabulary * FLOAT32_BYTES
    dense = 3 * max((layer.rows * layer.columns for layer in sizes.layers), default=0) * FLOAT32_BYTES
    running = sizes.parameters * sizes.computing + parent + scales + boundaries + max(inside + dense, logits)
    return estimate(
        "refine",
        running=running,
        cached=cached,
        on_host=2 * parent,
        disk=2 * parent + scales,
        on_gpu=on_gpu,
        offload=offload,
    )


def refine_operations(sizes: ModelSizes, steps: int, bits: int, tokens: int) -> float:
    """Floating-point operations of ``steps`` steps of ``tokens`` tokens: forward, recomputed forward and backward passes."""
    forward = 2.0 * (sizes.block * sizes.blocks + sizes.head) * tokens
    return steps * forward * (1 + 4 * bits)

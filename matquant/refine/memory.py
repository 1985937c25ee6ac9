"""Memory and operations of a refinement: the whole model is on the device."""

import dataclasses

from matquant.memory import FLOAT32_BYTES, MemoryEstimate, Offload, estimate
from matquant.models.model_sizes import ModelSizes
from matquant.refine.config import RefineConfig
from matquant.refine.slice_model import sequences_at_a_time

_SETS = 5  # of scales per bit-width: start, ratio, two moments, best
_STEP_SETS = 4  # in a step of one of them: present scales, their gradients by layer and as one tensor, a temporary one
_LOGIT_ARRAYS = 6  # of the sequences at a time: two logits, two log-probabilities, two gradients
_LATENTS = 4  # of a trained weight: latent weight, gradient, two moments
_SLICE_ARRAYS = 6  # float32 arrays of a block's weights while a slice of trained weights is made, with its gradient
_GRADIENTS = 3  # activations of a block with their gradients, over the activations alone


# Least seconds of a block on a GPU in an optimizer step of one bit-width, for its kernels forward, forward again and backward:
# in SmolLM2-135M (30 blocks, 4096 tokens, bfloat16) on an H200, 4500 steps of 1.75 bit-widths took 486 s.
_BLOCK_SECONDS = 2e-3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBytes:
    """Bytes that depend on the trained tensors.

    Attributes:
        state: trained tensors, their gradients, moments and copies, on the device.
        saved: of the state in the store.
        reading: peak while the layers of a block read a slice.
    """

    state: int
    saved: int
    reading: int


def trained_scales_bytes(sizes: ModelSizes, bits: int, groups: int) -> TrainedBytes:
    """Bytes of training scales of so many bit-widths; ``groups``: of all quantized layers."""
    scales = bits * _SETS * groups * FLOAT32_BYTES
    step = _STEP_SETS * groups * FLOAT32_BYTES
    dense = 3 * max((layer.rows * layer.columns for layer in sizes.layers), default=0) * FLOAT32_BYTES
    return TrainedBytes(state=scales + step, saved=scales, reading=dense)


def trained_weights_bytes(sizes: ModelSizes) -> TrainedBytes:
    """Bytes of training the weights of all quantized layers."""
    block = sum(layer.rows * layer.columns for layer in sizes.layers)
    return TrainedBytes(
        state=_LATENTS * sizes.quantized * FLOAT32_BYTES,
        saved=(_LATENTS - 1) * sizes.quantized * FLOAT32_BYTES,
        reading=_SLICE_ARRAYS * block * FLOAT32_BYTES,
    )


def refine_memory(
    sizes: ModelSizes,
    trained: TrainedBytes,
    *,
    parent: int,
    windows: int,
    length: int,
    batch: int,
    captured: int,
    states: int = 1,
    on_gpu: bool,
    offload: Offload,
) -> MemoryEstimate:
    """Peak memory of a refinement.

    CUDA graphs keep their memory between replays: the hidden states between blocks for each bit-width, and what a block needs
    beside what the logits need.

    Args:
        parent: bytes of the parent.
        windows: of training and validation on this process.
        length: tokens of a window.
        batch: windows of one step on this process.
        captured: number of bit-widths whose passes are captured as CUDA graphs.
        states: largest number of saved states on the disk: two while a new one is written beside the last.
    """
    cached = windows * length * sizes.hidden * sizes.computing
    boundaries = sizes.blocks * batch * length * sizes.hidden * sizes.computing
    inside = _GRADIENTS * sizes.activation_bytes(batch * length)
    sequences = min(batch, sequences_at_a_time(length, sizes.vocabulary))
    logits = _LOGIT_ARRAYS * sequences * length * sizes.vocabulary * FLOAT32_BYTES
    running = sizes.parameters * sizes.computing + parent + trained.state + max(captured, 1) * boundaries
    running += inside + trained.reading + logits if captured else max(inside + trained.reading, logits)
    return estimate(
        "refine",
        running=running,
        cached=cached,
        on_host=2 * parent + trained.saved,
        disk=parent + max(parent + trained.saved, states * trained.saved),
        on_gpu=on_gpu,
        offload=offload,
    )


def refine_launch_seconds(sizes: ModelSizes, config: RefineConfig) -> float:
    """Seconds of a refinement on a GPU that do not depend on the sizes of the layers."""
    return _BLOCK_SECONDS * sizes.blocks * sum(config.steps_of(bits) for bits in config.bits)


def refine_operations(sizes: ModelSizes, config: RefineConfig, tokens: int) -> float:
    """Floating-point operations of a refinement with ``tokens`` tokens a step.

    A step runs the full-precision model, and each bit-width that learns in it forward, forward again, and backward.
    """
    forward = 2.0 * (sizes.block * sizes.blocks + sizes.head) * tokens
    return forward * (config.steps + 4 * sum(config.steps_of(bits) for bits in config.bits))

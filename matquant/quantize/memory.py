"""Memory estimate of making one parent, block by block."""

from matquant.memory import MemoryEstimate, Offload, estimate
from matquant.models.model_sizes import ModelSizes
from matquant.quantize.base import BlockQuantizer, CalibrationTokens


def quantize_memory(
    sizes: ModelSizes,
    quantizer: BlockQuantizer,
    tokens: CalibrationTokens,
    parent: int,
    *,
    on_gpu: bool,
    solver_on_gpu: bool,
    offload: Offload,
) -> MemoryEstimate:
    """Peak memory of quantizing a model; it does not grow with the number of blocks, except on the disk.

    Args:
        tokens: calibration tokens on this process; 0 without calibration.
        parent: bytes of the parent.
        offload: storage of the hidden states between two blocks.
    """
    needs = quantizer.calibration
    streams = len(needs.streams) if needs is not None and tokens.total else 0
    cached = streams * tokens.total * sizes.hidden * sizes.computing
    method = quantizer.memory(sizes, tokens)
    writing = parent // max(1, sizes.blocks)
    copy = sizes.block * sizes.computing
    loading = max(sizes.load_bytes(sizes.embeddings), sizes.load_bytes(sizes.block))
    if not on_gpu:
        running, on_host = max(loading, copy + max(method.calibrate, method.solve, writing)), 0
    else:
        running = max(loading, copy + max(method.calibrate, method.solve if solver_on_gpu else 0))
        on_host = max(writing, 0 if solver_on_gpu else method.solve)
    return estimate(
        "quantize", running=running, cached=cached, on_host=on_host, disk=parent, on_gpu=on_gpu, offload=offload
    )

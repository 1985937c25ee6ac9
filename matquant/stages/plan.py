"""Memory plan of a job from the estimates of its stages."""

import collections
import dataclasses
from collections.abc import Mapping

import torch

from matquant import machine
from matquant.evaluate.memory import evaluate_memory, evaluate_operations
from matquant.formats.groups import group_count
from matquant.formats.nested import planes_read
from matquant.memory import MemoryEstimate, MemoryPlan, Offload, make_plan
from matquant.quantize.base import BlockQuantizer, CalibrationTokens
from matquant.quantize.memory import quantize_memory
from matquant.refine.memory import (
    refine_launch_seconds,
    refine_memory,
    refine_operations,
    trained_scales_bytes,
    trained_weights_bytes,
)
from matquant.stages.generate import generate_memory
from matquant.stages.load import LoadedJob, own_tokens
from matquant.stages.runtime import Runtime


def plan_with_quantize(job: LoadedJob, runtime: Runtime, quantizer: BlockQuantizer) -> MemoryPlan:
    """Plan of a job that makes a parent."""
    quantizer.prepare()  # before free memory is measured
    sequences = job.calibration
    batch = job.config.calibration.batch_size * (1 if sequences is None else sequences.shape[1])
    tokens = CalibrationTokens(total=own_tokens(runtime, sequences), batch=batch)
    offload = quantize_offload(job, runtime, quantizer)
    solver_on_gpu = machine.solver_device(runtime.device, []).type == "cuda"
    estimate = quantize_memory(
        job.sizes,
        quantizer,
        tokens,
        job.parent_bytes,
        on_gpu=runtime.on_gpu,
        solver_on_gpu=solver_on_gpu,
        offload=offload,
    )
    later, operations = _later_stages(job, runtime)
    operations[torch.float32] += quantizer.operations(job.sizes, tokens)
    return _plan(job, runtime, [estimate, *later], operations, offload)


def plan_without_quantize(job: LoadedJob, runtime: Runtime) -> MemoryPlan | None:
    """Plan of a job that finds its parent in the store; None if no further stage needs memory."""
    estimates, operations = _later_stages(job, runtime)
    offload = runtime.device if job.evaluation else None
    return _plan(job, runtime, estimates, operations, offload) if estimates else None


def quantize_offload(job: LoadedJob, runtime: Runtime, quantizer: BlockQuantizer) -> Offload:
    """Storage of the hidden states while a parent is made."""
    streams = 1 if quantizer.calibration is None else 1 + len(quantizer.calibration.bits)
    return job.offload_target(runtime, job.calibration, streams, job.dtype)


def _later_stages(job: LoadedJob, runtime: Runtime) -> tuple[list[MemoryEstimate], dict[torch.dtype, float]]:
    """Estimates of the stages after quantizing, and operations by dtype."""
    config, estimates = job.config, []
    operations: dict[torch.dtype, float] = collections.defaultdict(float)
    slices = len(config.slice_bits) + len(job.allocations)
    if job.refinement is not None:
        estimates.append(_refine_estimate(job, runtime))
        tokens = job.refinement.batch_size * job.refinement.length // runtime.process_group.world_size
        operations[job.refine_dtype] += refine_operations(job.sizes, config.refine, tokens)
    for name, sequences in job.evaluation.items():
        tokens, batch = own_tokens(runtime, sequences), config.eval.datasets[name].batch_size
        offload = job.offload_target(runtime, sequences, 1 + slices, job.evaluation_dtype)
        sizes = dataclasses.replace(job.sizes, computing=job.evaluation_dtype.itemsize)
        estimates.append(
            evaluate_memory(sizes, tokens, sequences.shape[1], batch, slices, on_gpu=runtime.on_gpu, offload=offload)
        )
        operations[job.evaluation_dtype] += evaluate_operations(job.sizes, tokens, slices)
    if "generate" in config.stages:
        prompt, new = job.prompt_tokens(), config.max_new_tokens
        packed = sum(layer.packed_bytes(_planes(job)) for layer in job.layer_specs.values())
        estimates.append(generate_memory(job.sizes, packed, job.parent_bytes, prompt, new, on_gpu=runtime.on_gpu))
        operations[job.dtype] += evaluate_operations(job.sizes, prompt + new, slices)
    return estimates, operations


def _refine_estimate(job: LoadedJob, runtime: Runtime) -> MemoryEstimate:
    config, text, processes = job.config.refine, job.refinement, runtime.process_group.world_size
    assert text is not None
    captured = 0
    if config.trains_weights:
        trained = trained_weights_bytes(job.sizes)
    else:
        groups = sum(
            layer.out_features * group_count(layer.in_features, layer.format.group_size)
            for layer in job.layer_specs.values()
        )
        trained = trained_scales_bytes(job.sizes, len(config.bits), groups)
        captured = len(config.bits) if runtime.on_gpu else 0
    return refine_memory(
        dataclasses.replace(job.sizes, computing=job.refine_dtype.itemsize),
        trained,
        parent=job.parent_bytes,
        windows=text.sequences // processes,
        length=text.length,
        batch=text.batch_size // processes,
        captured=captured,
        states=2 if config.steps > config.validate_every else 1,
        on_gpu=runtime.on_gpu,
        offload=runtime.device,
    )


def _planes(job: LoadedJob) -> int:
    """Largest number of bit planes that text is generated with."""
    config, method = job.config, job.config.method
    bits = [*config.slice_bits, *(b for found in job.allocations.values() for b in found.bits.values())]
    most = method.master_bits if config.search.wanted else max(bits)
    return planes_read(most, most if method.per_bit_models else method.master_bits, method.slicing)


def _plan(
    job: LoadedJob,
    runtime: Runtime,
    estimates: list[MemoryEstimate],
    operations: Mapping[torch.dtype, float],
    offload: Offload | None,
) -> MemoryPlan:
    sizes, refines_on_gpu = job.sizes, runtime.on_gpu and job.refinement is not None
    return make_plan(
        estimates,
        operations,
        parameters=sizes.parameters,
        checkpoint=sizes.parameters * sizes.stored,
        parent=job.parent_bytes,
        device=runtime.device,
        offload=offload,
        store=runtime.store.path,
        launch_seconds=refine_launch_seconds(sizes, job.config.refine) if refines_on_gpu else 0.0,
    )

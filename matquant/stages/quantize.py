"""Stage quantize: the parent of a job, from the store or made now, and the slices of it."""

import dataclasses
import logging
from typing import Any

from matquant import machine
from matquant.data import texts
from matquant.errors import UserError
from matquant.formats.parent import Parent
from matquant.formats.slice_spec import SliceSpec
from matquant.quantize.base import BlockQuantizer
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.stages.load import LoadedJob
from matquant.stages.plan import plan_with_quantize, quantize_offload
from matquant.stages.runtime import Runtime
from matquant.store.distributed_store import DraftLike, open_or_build

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedJob:
    """Quantized models of a job.

    Attributes:
        slices: slices to evaluate: one parent's, or of a method with ``per_bit_models`` one model per bit-width.
        parent: of all slices; None with ``per_bit_models``.
    """

    slices: list[SliceSpec]
    parent: Parent | None


def quantize(job: LoadedJob, runtime: Runtime) -> QuantizedJob:
    """Quantize the model, or find its parent in the store.

    Raises:
        UserError: the model cannot be quantized, or the store holds no parent and the stage quantize is left out.
    """
    config = job.config
    if config.method.per_bit_models:
        slices = []
        for bits in config.slice_bits:
            parent = _open_parent(job, runtime, job.quantizer({bits: 1.0}, bits), f" at {bits} bits")
            slices.append(SliceSpec(name=str(bits), parent=parent, bits=bits))
        return QuantizedJob(slices=slices, parent=None)
    parent = _open_parent(job, runtime, job.quantizer(), "")
    slices = [SliceSpec(name=str(bits), parent=parent, bits=bits) for bits in config.slice_bits]
    for path, found in job.allocations.items():
        slices.append(SliceSpec(name=path, parent=parent, bits=found.bits, allocation=found))
        runtime.log.warnings.extend(allocation_notes(slices[-1]))
    return QuantizedJob(slices=slices, parent=parent)


def allocation_notes(one: SliceSpec) -> list[str]:
    """Sentences on facts in an allocation file that do not hold: it was edited, or found for another parent."""
    recorded, notes = one.allocation, []
    if recorded is None:
        return []
    average, parent = one.average_bits(), recorded.about.get("parent")
    if recorded.average_bits is not None and abs(recorded.average_bits - average) > 1e-4:
        notes.append(
            f"{one.name} records {recorded.average_bits:g} bits on average, but its bit-widths make {average:g}: it was "
            "edited, and the losses that it records are those before the edit."
        )
    if parent is not None and parent != one.parent.artifact.sha256:
        notes.append(f"{one.name} was found for another parent ({str(parent)[:12]}); it is evaluated on this one.")
    return notes


def _open_parent(job: LoadedJob, runtime: Runtime, quantizer: BlockQuantizer, suffix: str) -> Parent:
    """Parent that a quantizer makes, from the store or made now."""

    def build(draft: DraftLike) -> dict[str, Any]:
        return _make_parent(job, runtime, quantizer, draft, suffix)

    artifact = open_or_build(runtime.store, runtime.process_group, "parent", _inputs(job, quantizer), build)
    parent = Parent(artifact)
    runtime.log.warnings.extend([*artifact.notes, *parent.notes()])
    return parent


def _inputs(job: LoadedJob, quantizer: BlockQuantizer) -> dict[str, Any]:
    """JSON-able inputs that determine a parent, for its key in the store."""
    return {
        "model": job.model.fingerprint,
        "dtype": str(job.model.dtype),
        "calibration": None if job.calibration is None else texts.fingerprint(job.calibration),
        "layers": list(job.layer_names),
        **quantizer.cache_key(),
        **({"batch_size": job.config.calibration.batch_size} if quantizer.depends_on_batch_size else {}),
        **transform_entry(job),
    }


def transform_entry(job: LoadedJob) -> dict[str, Any]:
    """Entry ``transform`` of a parent's key and manifest; empty without a transform."""
    description = job.blocks.transform_description
    return {} if description is None else {"transform": description}


def _make_parent(
    job: LoadedJob, runtime: Runtime, quantizer: BlockQuantizer, draft: DraftLike, suffix: str
) -> dict[str, Any]:
    """Quantize all blocks into the draft; return the facts for the parent's manifest."""
    config, log = job.config, runtime.log
    if "quantize" not in config.stages:
        raise UserError(f"The store has no such parent{suffix} yet; add quantize to stages, or check the settings.")
    offload = quantize_offload(job, runtime, quantizer)
    solver_device = machine.solver_device(runtime.device, log.warnings)
    if log.plan is None:
        runtime.announce(plan_with_quantize(job, runtime, quantizer))
    if draft.resumed:
        logger.info("resuming an unfinished parent%s from its last finished block", suffix)
    with runtime.bars.bar(f"quantize{suffix}", len(job.layer_names)) as progress:
        driver = BlockwiseQuantizer(
            job.blocks,
            job.layers,
            quantizer,
            device=runtime.device,
            dtype=job.dtype,
            batch_size=config.calibration.batch_size,
            solver_device=solver_device,
            offload=offload,
            process_group=runtime.process_group,
            progress=progress,
        )
        blocks = driver.run(draft, job.calibration)
    for phase, seconds in driver.timer.seconds.items():
        log.quantize_seconds[phase] = log.quantize_seconds.get(phase, 0.0) + seconds
    label = f"{job.model.label} {config.method.name}{suffix}"
    return {"label": label, "blocks": blocks} | transform_entry(job)

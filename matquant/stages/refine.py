"""Stage refine: a trained parent from the parent of a job, from the store or made now."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matquant import number_format
from matquant.data import texts
from matquant.errors import UserError
from matquant.formats.parent import Parent
from matquant.quantize.base import normalized
from matquant.refine.config import RefineConfig
from matquant.refine.quantization_aware import QuantizationAwareTraining
from matquant.refine.refinement import RefineContext, Refinement
from matquant.refine.scale_refinement import ScaleRefinement
from matquant.refine.self_text import SELF_TEXT_VERSION, sample_windows
from matquant.stages.load import LoadedJob, RefinementText
from matquant.stages.quantize import QuantizedJob, transform_entry
from matquant.stages.runtime import Runtime
from matquant.store import Draft
from matquant.store.distributed_store import DraftLike, open_or_build

_REFINEMENTS: dict[str, type[Refinement]] = {"scales": ScaleRefinement, "qat": QuantizationAwareTraining}
# Settings that keys of the other kind of refinement lack.
_OF_SCALES = ("step_every",)
_OF_WEIGHTS = ("distilled_bits", "distill_only")

logger = logging.getLogger(__name__)


def refine(job: LoadedJob, quantized: QuantizedJob, runtime: Runtime) -> tuple[QuantizedJob, dict[str, Any] | None]:
    """Refine the parent, or find its refinement in the store.

    Returns:
        The same slices of the refined parent, and the record for the results; the arguments and None without a refinement.

    Raises:
        UserError: the store holds no such refinement and the stage quantize is left out.
    """
    config = job.config.refine
    if job.refinement is None or quantized.parent is None:
        return quantized, None
    parent = quantized.parent
    training, validation = job.refinement.split(_windows(job, job.refinement, runtime))

    def build(draft: DraftLike) -> dict[str, Any]:
        if "quantize" not in job.config.stages:
            raise UserError("The store has no such refinement yet; add quantize to stages, or check the settings.")
        return _train(job, parent, training, validation, runtime, draft)

    inputs = {
        "parent": parent.artifact.sha256,
        "refine": _key_of(config),
        "text": texts.fingerprint(training),
        "validation": texts.fingerprint(validation),
        "batch_size": job.refinement.batch_size,
        "dtype": str(job.refine_dtype),
        "version": _REFINEMENTS[config.method].version,
    }
    if config.trains_weights:
        inputs |= {"model": job.model.fingerprint, "lambdas": {str(bits): _lambdas(job)[bits] for bits in config.bits}}
    artifact = open_or_build(runtime.store, runtime.process_group, "refined", inputs, build)
    runtime.log.warnings.extend(artifact.notes)
    refined = Parent(artifact)
    runtime.log.warnings.extend(note for note in refined.notes() if note not in parent.notes())
    slices = [dataclasses.replace(one, parent=refined) for one in quantized.slices]
    runtime.log.warnings.extend(artifact.about["refine"].get("warnings", []))  # parents of older versions have none
    record = artifact.about["refine"] | {"sha256": artifact.sha256, "reused": artifact.reused}
    return QuantizedJob(slices=slices, parent=refined), record


def _key_of(config: RefineConfig) -> dict[str, Any]:
    """Settings that determine a refinement beside its text, for its key in the store."""
    dropped = ("name", "text", "dtype", "top_k", *(_OF_SCALES if config.trains_weights else _OF_WEIGHTS))
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in dropped}


def _lambdas(job: LoadedJob) -> dict[int, float]:
    """Weight of each bit-width in the objective; the largest is 1."""
    return normalized(job.config.objective.lambdas)


def _windows(job: LoadedJob, text: RefinementText, runtime: Runtime) -> Tensor:
    """Sequences of the text, int64 [sequences, length]; those that the model writes are kept in the store."""
    if not text.written:
        return text.read
    config = job.config.refine.text
    assert config is not None
    wanted = dataclasses.replace(config, sequences=text.written)

    def build(draft: Draft) -> dict[str, Any]:
        if "quantize" not in job.config.stages:
            raise UserError("The store has no such refinement yet; add quantize to stages, or check the settings.")
        with runtime.bars.bar("text of the model", text.sequences) as progress:
            windows = sample_windows(
                job.blocks, job.model.tokenizer, wanted, job.config.refine.top_k, runtime.device, job.dtype, progress
            )
        draft.write_tensors("windows.safetensors", {"windows": windows})
        return {"label": f"{job.model.label} text of the model itself"}

    inputs = {
        "model": job.model.fingerprint,
        "text": {"sequences": text.written, "sequence_length": text.length, "seed": config.seed},
        "top_k": job.config.refine.top_k,
        "dtype": str(job.dtype),
        "version": SELF_TEXT_VERSION,
        **transform_entry(job),
    }
    artifact = runtime.process_group.rank0_first(lambda: runtime.store.open_or_build("windows", inputs, build))
    return torch.cat([text.read, artifact.read_tensors("windows.safetensors")[0]["windows"]])


def _train(
    job: LoadedJob, parent: Parent, training: Tensor, validation: Tensor, runtime: Runtime, draft: DraftLike
) -> dict[str, Any]:
    """Train into the draft; return the facts for the manifest."""
    config, text = job.config.refine, job.refinement
    assert text is not None
    if draft.resumed:
        logger.info("resuming an unfinished refinement from its last validation")

    def validated(step: int, kl: Mapping[int, float]) -> None:
        if runtime.process_group.is_main:
            figures = ", ".join(f"{bits} bits {number_format.significant(loss)}" for bits, loss in kl.items())
            logger.info("refine step %d of %d: held-out KL %s", step, config.steps, figures)

    with runtime.bars.bar(f"refine {config.name}", config.steps) as progress:
        context = RefineContext(
            blocks=job.blocks,
            parent=parent,
            windows=training,
            validation=validation,
            batch_size=text.batch_size,
            device=runtime.device,
            dtype=job.refine_dtype,
            lambdas=_lambdas(job),
            process_group=runtime.process_group,
            progress=progress,
            validated=validated,
        )
        refinement = _REFINEMENTS[config.method](config, context)
        blocks = refinement.run(draft)
    label = f"{parent.artifact.about.get('label', 'parent')} refine={config.name}"
    facts: dict[str, Any] = {
        "method": config.method,
        "bits": list(config.bits),
        "steps": config.steps,
        "step_every": list(config.step_every),
        "dtype": str(job.refine_dtype).removeprefix("torch."),
        "history": refinement.history,
    }
    facts["warnings"] = refinement.warnings
    return {k: v for k, v in parent.artifact.about.items() if k != "blocks"} | {
        "label": label,
        "blocks": blocks,
        "parent": parent.artifact.sha256,
        "refine": facts,
    }

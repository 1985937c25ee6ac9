"""Checks of a job's config that are made before any work starts.

Checks that need the model (a group size that does not divide a layer, a folder without safetensors) are made when it is
loaded.
"""

from matquant.config import STAGES, Config
from matquant.data.texts import check_refinement_text, check_text
from matquant.errors import UserError
from matquant.evaluate.check import check_evaluation
from matquant.models import config as loading
from matquant.optional_packages import check_installed
from matquant.pack.check import check_pack
from matquant.quantize.config import check_bits, check_method, check_objective
from matquant.search.config import check_search

_QAT = "matquant_qat"  # preset of a method that refine=qat completes


def check_config(config: Config) -> None:
    """Raise UserError if a value is out of range, or values contradict each other."""
    method, master_bits = config.method, config.method.master_bits
    loading.check(config.model)
    check_objective(config.objective, master_bits)
    check_method(method)
    check_text(config.calibration, "calibration")
    _check_packages(config)
    check_search(config.search, master_bits, per_bit_models=method.per_bit_models)
    config.refine.check(master_bits)
    _check_refine(config)
    check_evaluation(config.eval)
    _check_slices(config)
    for stage in config.stages:
        if stage not in STAGES:
            raise UserError(f"stages: there is no stage {stage!r}; there are {', '.join(STAGES)}.")
    models = len(config.slice_bits) if method.per_bit_models else 1
    if "generate" in config.stages and (not config.prompt or config.max_new_tokens < 1 or models > 1):
        raise UserError(
            "stages=[generate] needs a prompt, such as prompt='def ', max_new_tokens of at least 1, and a method that "
            f"makes one parent; found prompt={config.prompt!r}, max_new_tokens={config.max_new_tokens} and {models} models."
        )
    check_pack(config.pack, config.stages, models)


def _check_packages(config: Config) -> None:
    """Refuse settings whose packages are not installed, before any work."""
    if config.eval.tasks and "evaluate" in config.stages:
        check_installed("lm_eval", f"eval.tasks={list(config.eval.tasks)}")
    if config.tracking.wandb:
        check_installed("wandb", "tracking=wandb (tracking=none goes without)")
    if config.search.wanted:
        check_installed("scipy", f"search={config.search.name}")


def _check_refine(config: Config) -> None:
    """Refuse a refinement without a parent or with too little text."""
    text = config.refine.text
    if config.method.name == _QAT and not config.refine.trains_weights:
        raise UserError(
            f"method={_QAT} is round to nearest until refine=qat trains it; found refine={config.refine.name}. Leave out what "
            "sets refine (refine=, quality=), or use method=rtn."
        )
    if not config.refine.wanted or text is None:
        return
    if config.refine.trains_weights:
        _check_qat(config)
    if config.method.per_bit_models:
        raise UserError(
            f"refine={config.refine.name} trains one parent, but method={config.method.name} makes one model per "
            "bit-width. Use method=matgptq, or refine=none."
        )
    check_refinement_text(text, "refine.text")
    if text.sequences < text.batch_size:
        raise UserError(
            f"refine.text.sequences={text.sequences} do not fill one batch of refine.text.batch_size={text.batch_size}."
        )


def _check_qat(config: Config) -> None:
    """Refuse training of the weights whose parent would be made by another method, or whose objective lacks a bit-width."""
    method, weighted = config.method, {bits for bits, weight in config.objective.lambdas.items() if weight > 0}
    if method.uses_calibration or method.slicing != "round" or method.symmetric:
        raise UserError(
            f"refine={config.refine.name} trains weights with min-max codes, zero points and round slices from the "
            f"full-precision model, so nothing of method={method.name} would be left. Use method={_QAT}."
        )
    if missing := set(config.refine.bits) - weighted:
        raise UserError(
            f"refine.bits names {min(missing)}, which has no weight in the objective; it weighs {sorted(weighted)}."
        )


def _check_slices(config: Config) -> None:
    for bits in config.bits:
        check_bits(bits, "bits", config.method.master_bits)
    if len(set(config.bits)) != len(config.bits):
        raise UserError(f"bits names a bit-width twice: {list(config.bits)}.")
    if config.allocations and config.method.per_bit_models:
        raise UserError(
            f"bits={config.allocations[0]} mixes bit-widths of one parent, but method={config.method.name} makes one model per "
            "bit-width. Use method=matgptq, or method.per_bit_models=false."
        )

"""The plan of one job: the needs of its stages, from its config and what it works on."""

import torch
from torch import Tensor

from matquant import plan
from matquant.formats.nested import planes_read
from matquant.models.activation_cache import OffloadTarget
from matquant.opening import Opened
from matquant.plan import Calibrating, Need, Plan
from matquant.quantize.driver import CalibrationOptions
from matquant.quantize.gptq.solver import SolverOptions, compile_row_solver


def plan_quantizing(
    opened: Opened,
    calibration: CalibrationOptions,
    options: SolverOptions,
    windows: Tensor | None,
    solver_device: torch.device,
) -> Plan:
    """The plan of a job that makes a parent, and measures it or generates text if it is to."""
    compile_row_solver()  # before memory is measured
    place = opened.place(windows, 1 + len(calibration.streams))
    job = Calibrating(
        tokens=opened.own_tokens(windows),
        batch=calibration.batch_size * (1 if windows is None else windows.shape[1]),
        streams=0 if windows is None else len(calibration.streams),
        widths=len(options.widths),
        asymmetric=calibration.asymmetric,
        staged=calibration.staged,
        group_size=options.group_size,
    )
    need = plan.quantizing(
        opened.shapes, job, on_gpu=opened.device.type == "cuda", solver_on_gpu=solver_device.type == "cuda", place=place
    )
    needs, work = _after_quantizing(opened)
    return _plan(opened, [need, *needs], plan.operations(opened.shapes, job, 0, 0) + work, place)


def plan_the_rest(opened: Opened) -> Plan | None:
    """The plan of a job that has its parent; None where that is all that it is asked for."""
    needs, work = _after_quantizing(opened)
    return _plan(opened, needs, work, opened.device if opened.evaluation else None) if needs else None


def _after_quantizing(opened: Opened) -> tuple[list[Need], float]:
    """The needs of measuring and generating, and the operations of both."""
    config, shapes, on_gpu = opened.config, opened.shapes, opened.device.type == "cuda"
    needs, work = [], 0.0
    variants = len(config.widths) + len(opened.allocations)
    for name, text in opened.evaluation.items():
        tokens, batch = opened.own_tokens(text), config.eval.datasets[name].batch_size
        place = opened.place(text, 1 + variants)
        needs.append(plan.measuring(shapes, tokens, text.shape[1], batch, variants, on_gpu=on_gpu, place=place))
        work += plan.operations(shapes, None, tokens, variants)
    if "generate" in config.stages:
        prompt, new = opened.prompt_tokens, config.max_new_tokens
        group_size = config.method.group_size
        needs.append(plan.generating(shapes, _planes(opened), group_size, prompt, new, on_gpu=on_gpu))
        work += plan.operations(shapes, None, prompt + new, variants)
    return needs, work


def _planes(opened: Opened) -> int:
    """How many planes text is generated with at most."""
    config, method = opened.config, opened.config.method
    widths = [*config.widths, *(bits for found in opened.allocations.values() for bits in found.widths.values())]
    most = method.master_bits if config.search.wanted else max(widths)
    return planes_read(most, most if method.dedicated else method.master_bits, method.slicing)


def _plan(opened: Opened, needs: list[Need], work: float, place: OffloadTarget | None) -> Plan:
    return plan.make_plan(
        opened.shapes,
        needs,
        work,
        device=opened.device,
        place=place,
        store=opened.store.path,
        group_size=opened.config.method.group_size,
    )

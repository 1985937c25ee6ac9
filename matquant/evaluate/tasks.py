"""Tasks of lm-eval on every slice of a model, one after the other in one process, with one model in memory.

Lifecycle:
  1. ``Tasks`` finds and loads the tasks, before any long work: unknown names and missing data are refused at once;
  2. ``evaluate_tasks`` puts the model on the device once, and scores it with the weights of each slice.
"""

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from matquant.errors import UserError
from matquant.evaluate import docstrings
from matquant.evaluate.slices import FULL, WeightsOf, model_name
from matquant.models.blocks import BlockModel, compute_dtype
from matquant.models.finite import checked_logits

Scores = dict[str, dict[str, float]]  # by task and metric; standard errors under `METRIC_stderr`

_SEED = 1234  # of few-shot examples


class Tasks:
    """Loaded tasks.

    Args:
        names: of lm-eval's own tasks and groups, of tasks in ``folder``, or of ``docstrings.NAMES``.
        folder: of task files (YAML), with data of their own; None for none.
        fewshot: examples before each question; None for the task's own number.

    Raises:
        UserError: there is no such task or folder, or a task's data cannot be loaded.
    """

    def __init__(self, names: Sequence[str], folder: str | None, fewshot: int | None) -> None:
        from lm_eval.tasks import TaskManager

        self._temporary = tempfile.TemporaryDirectory(prefix="matquant-tasks-")
        made = Path(self._temporary.name)
        if set(names) & set(docstrings.NAMES):
            docstrings.write_tasks(made)
        folders = [str(made), *([_folder(folder)] if folder is not None else [])]
        manager = TaskManager(include_path=folders, include_defaults=False)
        if missing := [name for name in names if name not in manager.all_tasks]:
            manager = TaskManager(include_path=folders)  # takes seconds: it reads some ten thousand files
            missing = [name for name in missing if name not in manager.all_tasks]
        if missing:
            raise UserError(
                f"eval.tasks: there is no task {', '.join(missing)}. There are lm-eval's own, {', '.join(docstrings.NAMES)}, "
                "and those in eval.task_folder."
            )
        try:
            self.loaded = manager.load(list(names))
        except Exception as error:  # any error of a data set's loader
            reason = " ".join(": ".join(str(e) for e in (error, error.__cause__) if e is not None).split())
            raise UserError(
                f"The data of eval.tasks={list(names)} cannot be loaded: {reason}. Without a network, give local task files "
                "with eval.task_folder, or prepare HF_DATASETS_CACHE on another machine and set HF_HUB_OFFLINE=1."
            ) from error
        for task in self.loaded["tasks"].values():
            if fewshot is not None:
                task.set_config(key="num_fewshot", value=fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)

    def texts(self, limit: int | None) -> Iterator[tuple[str, str]]:
        """Yield the name of the task and the text of everything that a model reads: contexts and continuations.

        Args:
            limit: questions of each task; None for all.
        """
        for name, task in self.loaded["tasks"].items():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
            for request in task.instances:
                yield from ((name, part) for part in request.args if isinstance(part, str))
            task.set_fewshot_seed(seed=_SEED)  # the evaluation draws the same examples


def evaluate_tasks(
    tasks: Tasks,
    blocks: BlockModel,
    tokenizer: Any,
    weights_of: WeightsOf,
    slices: Sequence[str],
    *,
    limit: int | None,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[tuple[str, Scores]]:
    """Yield the scores of the full-precision model (``"full"``), and of every slice.

    Args:
        tasks: tasks to score.
        blocks: the full-precision model; its weights are restored at the end.
        weights_of: as of ``evaluate_slices``.
        slices: their names, none of them ``"full"``.
        limit: questions of each task; None for all.
        batch_size: requests at a time.
        device: device of the whole model, computed in float32 on a CPU and in the stored dtype elsewhere.
        progress: called with 1 after each model.

    Yields:
        Name of the model, and for each task its metrics, with their standard errors where lm-eval gives one.

    Raises:
        UserError: logits or a metric are not finite.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    dtype = compute_dtype(blocks.dtype, device)
    with contextlib.ExitStack() as placed:
        placed.enter_context(blocks.head_on_device(device, dtype))
        for index in range(len(blocks)):
            placed.enter_context(blocks.on_device(index, device, dtype))
        with _quiet():
            model = HFLM(pretrained=blocks.model, tokenizer=tokenizer, batch_size=batch_size)
        for name in (FULL, *slices):
            with contextlib.ExitStack() as replaced:
                for index in range(len(blocks) + 1) if name != FULL else ():
                    replaced.enter_context(blocks.with_weights(index, weights_of(index, name)))
                with checked_logits(blocks.model, model_name(name)), _quiet():
                    results = evaluate(model, tasks.loaded, limit=limit, log_samples=False, verbosity="ERROR")
            progress(1)
            yield name, _scores(results["results"] if results else {}, model_name(name))


def recovery(scores: Scores, full: Scores) -> dict[str, float]:
    """For each ``TASK/METRIC`` the share of the full-precision model's score that is kept, in percent.

    Perplexities and bits per byte count the other way round: 100 is as good, less is worse.
    """
    kept = {}
    for task, metrics in scores.items():
        for metric, value in metrics.items():
            reference = full.get(task, {}).get(metric)
            if metric.endswith("_stderr") or not reference or not value:
                continue
            lower_is_better = "perplexity" in metric or metric == "bits_per_byte"
            kept[f"{task}/{metric}"] = 100 * (reference / value if lower_is_better else value / reference)
    return kept


def _scores(results: Mapping[str, Mapping[str, Any]], model: str) -> Scores:
    """Scores by task and metric.

    lm-eval's ``acc,none`` is ``acc`` here; another filter's name stays: ``exact_match/strict``. A standard error that is
    not finite (of a single question) is left out.

    Raises:
        UserError: a metric of ``model`` is not finite.
    """
    scores: Scores = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, source = key.partition(",")
            is_error = metric.endswith("_stderr")
            if comma and isinstance(value, int | float) and not math.isfinite(value) and not is_error:
                raise UserError(
                    f"eval.tasks: {metric} of {task} is {value} for {model}. Leave the task out, or check its data and the "
                    "model."
                )
            if comma and isinstance(value, int | float) and math.isfinite(value):
                name = metric if source == "none" else f"{metric}/{source}"
                if is_error and source != "none":
                    name = f"{metric.removesuffix('_stderr')}/{source}_stderr"
                scores.setdefault(task, {})[name] = float(value)
    return scores


def _folder(folder: str) -> str:
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"eval.task_folder={folder} is not a folder. Give a folder of lm-eval's task files (YAML).")
    return str(Path(folder).expanduser().absolute())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress log messages of lm-eval below errors, and its progress bars, inside the context."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

"""Settings of the evaluation: texts for perplexity and KL divergence, and tasks of lm-eval."""

import dataclasses
from collections.abc import Mapping

from matquant.data.config import TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Texts and tasks that every slice is evaluated on.

    Attributes:
        datasets: texts by their name in the results.
        tasks: of lm-eval: its own names, ``stdlib_choice`` and ``stdlib_docstrings``, or those in ``task_folder``.
        task_folder: of task files with data of their own.
        fewshot: examples before each question; None leaves it to the task.
        limit: questions of each task; None for all.
    """

    datasets: Mapping[str, TextConfig]
    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    fewshot: int | None = None
    limit: int | None = None
    task_batch_size: int = 8

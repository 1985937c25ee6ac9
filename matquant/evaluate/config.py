"""Settings of the evaluation: texts for perplexity and KL divergence, and tasks of lm-eval."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from matquant.data.config import TextConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Texts and tasks that every slice is evaluated on.

    Attributes:
        datasets: texts by their name in the results.
        dtype: of the forward passes for perplexity and KL. In 16 bits the rounding of the activations hides what 6 and 8
            bits of weights change. ``model`` is the dtype of the model, on a CPU float32.
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
    dtype: Literal["float32", "model"] = "float32"

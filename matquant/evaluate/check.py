"""Checks of an evaluation's settings that need no model."""

from matquant.data.texts import check_text
from matquant.errors import UserError
from matquant.evaluate.config import EvalConfig


def check_evaluation(config: EvalConfig) -> None:
    """Raise UserError if there is no text, or a value is out of range."""
    if not config.datasets:
        raise UserError("eval.datasets names no text; give at least one, for example eval=default.")
    for name, text in config.datasets.items():
        check_text(text, f"eval.datasets.{name}")
    for name, least in {"task_batch_size": 1, "limit": 1, "fewshot": 0}.items():
        if (value := getattr(config, name)) is not None and value < least:
            raise UserError(f"eval.{name} must be at least {least}; found {value}.")

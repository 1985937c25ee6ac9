"""Packages that extras install: their names, and sentences for those that are missing."""

import importlib.util

from matquant.errors import UserError

EXTRA_OF = {  # extra that installs a package, by the name that it is imported by
    "hydra": "quantize",
    "omegaconf": "quantize",
    "numba": "quantize",
    "datasets": "quantize",
    "matplotlib": "quantize",
    "rich": "quantize",
    "scipy": "search",
    "lm_eval": "eval",
    "wandb": "track",
    "wandb_workspaces": "dashboard",
    "gguf": "gguf",
    "vllm": "vllm",
}


def missing_sentence(package: str, purpose: str) -> str:
    """Sentence on a package that is not installed, with the command that installs it."""
    return (
        f"{purpose} needs the package {package}, which is not installed: pip install 'matquant[{EXTRA_OF[package]}]'."
    )


def check_installed(package: str, purpose: str) -> None:
    """Raise UserError unless a package of ``EXTRA_OF`` is installed; ``purpose`` begins the sentence."""
    if importlib.util.find_spec(package) is None:
        raise UserError(missing_sentence(package, purpose))

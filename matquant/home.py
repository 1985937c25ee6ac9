"""Where the folders conf, kernels and experiments are: beside the package in a checkout, inside it in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """The folder that holds ``conf/``, ``kernels/`` and ``experiments/``."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent

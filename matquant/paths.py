"""Location of the resource folders: beside the package in a checkout, inside the package in an installed wheel."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def resource_root() -> Path:
    """Folder that holds ``conf/``, ``kernels/`` and ``experiments/models/``."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent

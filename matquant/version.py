"""Version of the package, from the git tag. The build reads it here too, so this module imports nothing of the package."""

import contextlib
import functools
import importlib.metadata
import re
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_DESCRIBE = ("git", "describe", "--tags", "--long", "--dirty", "--always", "--abbrev=9", "--match", "v[0-9]*")

# git fills this in when it makes an archive of a commit (see .gitattributes); without a tag the first part is empty.
_ARCHIVED = "$Format:%(describe:tags=true,abbrev=9,match=v[0-9]*)|%h$"

UNKNOWN = "0+unknown"


def _installed() -> str | None:
    """Version of the installed wheel that this package is part of; None in a checkout, installed as editable or not."""
    if (_PACKAGE / "conf").is_dir():  # in a checkout it is beside the package
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version("matquant")
    return None


def _described() -> str | None:
    """Description of the commit by git, of the checkout or of the archive; None without either."""
    if not _ARCHIVED.startswith("$"):
        described, commit = _ARCHIVED.split("|")
        return described or commit
    if (_PACKAGE.parent / ".git").exists():  # the repository of another project above it says nothing
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            run = subprocess.run(_DESCRIBE, cwd=_PACKAGE, capture_output=True, text=True, check=True, timeout=30)
            return run.stdout.strip()
    return None


def from_description(description: str) -> str:
    """Version (PEP 440) of a description by ``git describe``.

    The tag's, and for a later commit ``+N.gHASH`` with the number of commits since, and ``.dirty`` for changed files. Without a
    tag it is ``0+gHASH``.
    """
    match = re.fullmatch(r"(?:v(.+?)(?:-(\d+)-g([0-9a-f]+))?|([0-9a-f]+))(-dirty)?", description)
    if match is None:
        return UNKNOWN
    tag, commits, later, untagged, dirty = match.groups()
    local = [f"g{untagged}"] if untagged else [] if commits in (None, "0") else [commits, f"g{later}"]
    local += ["dirty"] if dirty else []
    return (tag or "0") + ("+" + ".".join(local) if local else "")


@functools.cache
def version() -> str:
    """Version of this package: of the installed wheel, or of the commit of a checkout; ``0+unknown`` without either."""
    return _installed() or from_description(_described() or "")

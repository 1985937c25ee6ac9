"""The source code of Python's standard library as a text corpus, read from an interpreter at run time.

Every machine that runs this project has this text, so it needs no network and no licence question: nothing of it is stored
in the repository. Files are assigned to a split by a hash of their path, so the splits never overlap, whatever the
Python version.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matquant.data.config import TextConfig
from matquant.data.sources.base import TextSource
from matquant.errors import UserError

SPLITS = ("train", "calibration", "evaluation")

# Percentiles of the path hash at which the calibration and the evaluation split begin.
_CALIBRATION_FROM, _EVALUATION_FROM = 80, 92

_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})
# Packaged apart by some distributions, so only good enough for training.
_TESTS = frozenset({"test", "tests", "idle_test"})
# Tables rather than text, or written by the build of one interpreter.
_TABLES = frozenset({"encodings", "pydoc_data"})


class StdlibSource(TextSource):
    """Source code of the running interpreter's standard library. Its windows depend on the machine, so none are stored."""

    name = "stdlib"
    has_cached_windows = False

    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        return documents(split)

    def describe(self, text: TextConfig, split: str) -> str:
        return f"the {split} split of the standard library's source"


def split_of(path: str) -> str:
    """The split of a file, from its path relative to the library's root, with forward slashes."""
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100
    if bucket < _CALIBRATION_FROM:
        return "train"
    return "calibration" if bucket < _EVALUATION_FROM else "evaluation"


def documents(split: str, root: Path | None = None) -> Iterator[str]:
    """The texts of one split, in order of their paths.

    Test suites belong to ``train`` alone, whatever their hash: not every distribution ships them.

    Args:
        split: one of ``SPLITS``.
        root: folder of a standard library; that of the running interpreter when None.

    Raises:
        UserError: the folder holds no Python source (an interpreter without its library's source).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = False
    for path in _files(root):
        relative = path.relative_to(root)
        tested = not _TESTS.isdisjoint(relative.parts[:-1])
        if ("train" if tested else split_of(relative.as_posix())) != split:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few test files are invalid on purpose
            continue
        found = True
        yield text
    if not found:
        raise UserError(
            f"No Python source of split '{split}' was found under {root}. "
            "Use an interpreter that ships its standard library's source, or another text with calibration=local."
        )


def _files(root: Path) -> list[Path]:
    """The source files of the library itself, in order. Folders of other packages may be large, and are not entered."""
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in _FOREIGN | _TABLES]
        found += [
            Path(folder, name) for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return sorted(found)

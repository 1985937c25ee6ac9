"""Paths, overrides and a loader of scripts that several test modules use."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "experiments" / "models" / "tiny"

# Overrides of a small job: few short sequences. Without a seed they are the first of the text, so only these are tokenized.
SMALL = (
    "calibration.seed=null",
    "eval.datasets.stdlib.seed=null",
    "calibration.sequences=4",
    "calibration.sequence_length=64",
    "eval.datasets.stdlib.sequences=4",
    "eval.datasets.stdlib.sequence_length=64",
    "tracking=none",
)


def load_script(path: Path, name: str | None = None) -> ModuleType:
    """Module of a file that is in no package, under its stem or another name; run anew at each call."""
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look it up
    spec.loader.exec_module(module)
    return module

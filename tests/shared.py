"""Paths and overrides that several test modules use."""

from pathlib import Path

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

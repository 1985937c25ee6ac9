"""What several test modules use."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "experiments" / "models" / "tiny"

# The smallest job: few windows, short ones, and the first of their text, for whose sake not all of it is tokenized.
SMALL = (
    "calibration.seed=null",
    "eval.datasets.stdlib.seed=null",
    "calibration.sequences=4",
    "calibration.sequence_length=64",
    "eval.datasets.stdlib.sequences=4",
    "eval.datasets.stdlib.sequence_length=64",
    "tracking=none",
)

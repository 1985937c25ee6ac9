"""Texts from the hub, at pinned revisions, cut into the windows that published results use.

WikiText-2 and C4 are cut as in GPTQ (arXiv 2210.17323) and what compares with it. WikiText-2: all lines of a split joined by
empty lines; measured on windows from its start, calibrated on windows from random places. C4: measured on the first 1100
documents of the validation split; each calibration window is from a random place of a random document that is longer than
it. FineWeb-Edu has one split only, which a hash of each document parts into calibration and evaluation; it is streamed.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from matquant.errors import UserError

REVISIONS = {
    "wikitext2": ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3"),
    "c4": ("allenai/c4", "607bd4c8450a42878aa9ddc051a65a055450ef87"),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"),
}

_C4_FILES = {
    "calibration": ("train", "en/c4-train.00000-of-01024.json.gz"),
    "evaluation": ("validation", "en/c4-validation.00000-of-00008.json.gz"),
}
_C4_EVALUATED = 1100  # documents

# Percent of FineWeb-Edu's documents that calibration sees.
_CALIBRATED = 90


def wikitext2(split: str) -> str:
    """The whole text of a split."""
    rows = _load("wikitext2", name="wikitext-2-raw-v1", split="test" if split == "evaluation" else "train")
    return "\n\n".join(rows["text"])


def c4_evaluated() -> str:
    """The text that models are measured on."""
    return " ".join(_c4("evaluation")[:_C4_EVALUATED]["text"])


def c4_windows(tokenizer: Any, sequences: int, length: int, seed: int) -> list[list[int]]:
    """Calibration windows of ``length`` tokens, each from another place."""
    documents, drawn = _c4("calibration"), random.Random(seed)
    windows: list[list[int]] = []
    for _ in range(1000 * sequences):
        ids = tokenizer(documents[drawn.randint(0, len(documents) - 1)]["text"], verbose=False)["input_ids"]
        if len(ids) > length:
            start = drawn.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
        if len(windows) == sequences:
            return windows
    raise UserError(f"C4 holds too few documents of more than {length} tokens. Lower sequence_length.")


def random_windows(ids: Sequence[int], sequences: int, length: int, seed: int) -> list[list[int]]:
    """Windows from random places of one text. There must be more than ``length`` tokens."""
    drawn = random.Random(seed)
    starts = [drawn.randint(0, len(ids) - length - 1) for _ in range(sequences)]
    return [list(ids[start : start + length]) for start in starts]


def fineweb_edu(split: str) -> Iterator[str]:
    """The documents of a split, as they stream in."""
    for row in _load("fineweb_edu", name="sample-10BT", split="train", streaming=True):
        text = row["text"]
        bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 100
        if (bucket < _CALIBRATED) == (split != "evaluation"):
            yield text


def _c4(split: str) -> Any:
    part, file = _C4_FILES[split if split == "evaluation" else "calibration"]
    return _load("c4", data_files={part: file}, split=part)


def _load(dataset: str, **settings: Any) -> Any:
    import datasets  # slow to import, and not needed for local texts

    repository, revision = REVISIONS[dataset]
    try:
        return datasets.load_dataset(repository, revision=revision, **settings)
    except Exception as error:  # not cached, no network, a proxy: the client raises its HTTP library's errors too
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"The text {dataset} ({repository} on the hub) is not in the cache and could not be fetched: {reason}. "
            "Try again with a network, or give a text of your own: dataset=local and path=FILE."
        ) from error

"""FineWeb-Edu (sample-10BT), streamed. A hash of each document assigns it to calibration or evaluation."""

import hashlib
from collections.abc import Iterator
from typing import Any

from matquant.data.config import TextConfig
from matquant.data.sources.hub import HubSource

_CALIBRATION_PERCENT = 90


class FineWebEduSource(HubSource):
    """Documents in the order of the stream; the dataset itself has one split."""

    name = "fineweb_edu"
    revision = ("HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9")
    is_streamed = True

    def documents(self, text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
        for row in self.load(name="sample-10BT", split="train", streaming=True):
            document = row["text"]
            bucket = int.from_bytes(hashlib.sha256(document.encode()).digest()[:8], "big") % 100
            if (bucket < _CALIBRATION_PERCENT) == (split != "evaluation"):
                yield document

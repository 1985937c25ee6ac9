"""Small builds for the tests of the store, and ways to damage them."""

import hashlib
from pathlib import Path

import torch

from matquant.store import Draft

BLOCKS = 4
INPUTS = {"model": "toy", "bits": [2, 4, 8]}


def block(index: int) -> dict[str, torch.Tensor]:
    codes = torch.arange(24, dtype=torch.uint8).reshape(4, 6) + index
    return {"codes": codes, "scales": torch.full((4, 1), 0.5 + index, dtype=torch.bfloat16)}


class Builder:
    """Build of ``BLOCKS`` blocks; ``made`` lists the indices of the blocks that it wrote."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.resumed = False
        self.draft: Draft | None = None

    def __call__(self, draft: Draft) -> dict[str, object]:
        self.draft, self.resumed = draft, draft.resumed
        for index in range(BLOCKS):
            name = f"block_{index}.safetensors"
            if not draft.has(name):
                self.made.append(index)
                draft.write_tensors(name, block(index), {"index": str(index), "slicing": "msb", "about": "ü"})
        draft.write_json("layers.json", {"layers": BLOCKS})
        return {"label": "toy parent", "blocks": BLOCKS}


class Interrupted(Exception):
    """Raised by a build that stops before its end."""


def interrupted_after(blocks: int, then=lambda draft: None):
    """Build that raises ``Interrupted`` after some blocks, and after ``then`` was called with its draft."""

    def build(draft: Draft) -> dict[str, object]:
        for index in range(blocks):
            draft.write_tensors(
                f"block_{index}.safetensors", block(index), {"index": str(index), "slicing": "msb", "about": "ü"}
            )
        then(draft)
        raise Interrupted

    return build


def flip_byte(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def digest_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}

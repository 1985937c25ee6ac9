"""Token windows: a text becomes one row of token ids, and the row is cut into windows of one length."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matquant.config import TextConfig
from matquant.data import stdlib
from matquant.errors import UserError

SUFFIXES = (".txt", ".md", ".py")

# Documents that are tokenized in one call: enough for a fast tokenizer's threads, and little memory for their ids.
_AT_ONCE = 64


def windows(text: TextConfig, split: str, tokenizer: Any) -> Tensor:
    """Fixed, non-overlapping windows of a text.

    All documents are tokenized without special tokens, each is followed by the end-of-text token if the tokenizer has
    one, and the row that they make together is cut. With a seed, windows are drawn from the whole row without
    replacement and kept in the order of the text; without one, they are the first.

    Args:
        text: which text, how many windows, and how long.
        split: one of ``stdlib.SPLITS``. A user's own text (``dataset: text``) has no splits: all of it is used.
        tokenizer: of Transformers, slow or fast.

    Returns:
        int64 [sequences, sequence_length], on the CPU.

    Raises:
        UserError: a path that does not exist, a file that is empty or not UTF-8, or too little text.
    """
    wanted = text.sequences * text.sequence_length
    row = _row(_documents(text, split), tokenizer, wanted if text.seed is None else None)
    available = len(row) // text.sequence_length
    if available < text.sequences:
        raise UserError(_too_little(text, split, len(row), available))
    cut = row[: available * text.sequence_length].view(available, text.sequence_length)
    if text.seed is None:
        return cut[: text.sequences].clone()
    generator = torch.Generator().manual_seed(text.seed)
    chosen = torch.randperm(available, generator=generator)[: text.sequences].sort().values
    return cut[chosen]


def fingerprint(windows: Tensor) -> str:
    """SHA-256, in hex, of the shape and the ids of int64 windows [sequences, length]."""
    digest = hashlib.sha256(f"{tuple(windows.shape)}".encode())
    # Little-endian whatever the machine, so that a store can be shared.
    digest.update(windows.contiguous().cpu().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _row(documents: Iterable[str], tokenizer: Any, enough: int | None) -> Tensor:
    """int64 [tokens]: all documents, or only as many as make ``enough`` tokens."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces: list[Tensor] = []
    tokens = 0
    iterator = iter(documents)
    while (enough is None or tokens < enough) and (some := list(islice(iterator, _AT_ONCE))):
        # Not verbose: the whole text is longer than any model's context, which needs no warning.
        encoded = tokenizer(
            some, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        pieces += [torch.tensor([*ids, *end], dtype=torch.int64) for ids in encoded]
        tokens += sum(len(ids) + len(end) for ids in encoded)
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _too_little(text: TextConfig, split: str, tokens: int, available: int) -> str:
    source = f"the {split} split of the standard library's source" if text.dataset == "stdlib" else text.path
    return (
        f"Too little text: {text.sequences} windows of {text.sequence_length} tokens were asked for "
        f"({text.sequences * text.sequence_length} tokens), but {source} gives {tokens} tokens, "
        f"which make {available}. "
        "Lower sequences or sequence_length, or give a longer text."
    )


# Documents


def _documents(text: TextConfig, split: str) -> Iterator[str]:
    return stdlib.documents(split) if text.dataset == "stdlib" else _own_documents(Path(text.path or "").expanduser())


def _own_documents(path: Path) -> Iterator[str]:
    """One file, or every text file below a folder in order of their paths; hidden files and folders are left out."""
    if not path.exists():
        raise UserError(f"There is no text at {path}. Give a text file, or a folder of {', '.join(SUFFIXES)} files.")
    if path.is_file():
        content = _read(path)
        if not content.strip():
            raise UserError(f"The text file {path} is empty. Give a file with text in it.")
        yield content
        return
    found = False
    for file in _text_files(path):
        # An empty file among others is nothing unusual (__init__.py).
        if (content := _read(file)).strip():
            found = True
            yield content
    if not found:
        raise UserError(
            f"The folder {path} holds no text: no {', '.join(SUFFIXES)} file that is not empty was found in it."
        )


def _text_files(folder: Path) -> list[Path]:
    files = []
    for file in folder.rglob("*"):
        relative = file.relative_to(folder)
        if (
            file.suffix.lower() in SUFFIXES
            and not any(part.startswith(".") for part in relative.parts)
            and file.is_file()
        ):
            files.append((relative.as_posix(), file))
    return [file for _, file in sorted(files)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The text file {file} is not UTF-8: byte {error.start} cannot be decoded. "
            "Convert it to UTF-8, or remove it."
        ) from error
    except OSError as error:
        raise UserError(f"The text file {file} cannot be read: {error.strerror or error}.") from error

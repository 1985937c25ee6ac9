"""Token windows: a text becomes one row of token ids, and the row is cut into windows of one length."""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from matquant.data import hub, local, stdlib
from matquant.data.config import TextConfig
from matquant.errors import UserError
from matquant.store import Store, fingerprint_files

# Documents that are tokenized in one call: enough for a fast tokenizer's threads, and little memory for their ids.
_AT_ONCE = 64

# Part of the key of stored windows: raised when the same settings would give other windows than before.
_VERSION = 1


def windows(text: TextConfig, split: str, tokenizer: Any, store: Store | None = None) -> Tensor:
    """Windows of a text, of one length.

    A text of one's own and the standard library: all documents are tokenized without special tokens, each is followed by
    the end-of-text token if the tokenizer has one, and the row that they make together is cut. With a seed, windows are
    drawn from the whole row without replacement and kept in the order of the text; without one, they are the first. Texts
    from the hub are cut as in published results, see ``matquant.data.hub``.

    Args:
        text: which text, how many windows, and how long. With ``bos`` every window begins with the tokenizer's
            beginning-of-text token; null does so for texts that have no published windows, where the tokenizer begins a
            text with it by itself.
        split: one of ``stdlib.SPLITS``. A user's own text has no splits: all of it is used.
        tokenizer: of Transformers, slow or fast.
        store: keeps the windows, so that a text is tokenized once; not those of the standard library.

    Returns:
        int64 [sequences, sequence_length], on the CPU.

    Raises:
        UserError: a text that is not there or cannot be read, or too little of it.
    """
    if store is None or text.dataset == "stdlib" or "stdlib" in text.mix:
        return _cut(text, split, tokenizer)
    inputs = {
        "text": {k: v for k, v in dataclasses.asdict(text).items() if k not in ("path", "batch_size")},
        "split": split,
        "tokenizer": _tokenizer_hash(tokenizer),
        "revisions": [hub.REVISIONS[name] for name in (text.dataset, *text.mix) if name in hub.REVISIONS],
        "files": _file_hashes(text),
        "version": _VERSION,
    }

    def build(draft: Any) -> dict[str, Any]:
        draft.write_tensors("windows.safetensors", {"windows": _cut(text, split, tokenizer)})
        return {"label": f"{text.dataset} {split}"}

    return store.open_or_build("windows", inputs, build).read_tensors("windows.safetensors")[0]["windows"].clone()


def _cut(text: TextConfig, split: str, tokenizer: Any) -> Tensor:
    if text.dataset == "mix":
        return torch.cat([_cut(part, split, tokenizer) for part in shares(text)])
    bos = _first_token(text, tokenizer)
    if text.dataset in ("wikitext2", "c4"):
        found = _published(text, split, tokenizer)
        if bos is not None:
            found[:, 0] = bos
        return found
    length = text.sequence_length - (bos is not None)
    found = _from_row(text, split, tokenizer, length)
    return found if bos is None else torch.cat([torch.full((len(found), 1), bos), found], 1)


def shares(text: TextConfig) -> list[TextConfig]:
    """The parts of a mix, with their share of the sequences (the largest remainders are rounded up)."""
    whole = sum(text.mix.values())
    exact = {name: text.sequences * weight / whole for name, weight in text.mix.items()}
    counts = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: text.sequences - sum(counts.values())]:
        counts[name] += 1
    parts = {name: count for name, count in counts.items() if count}
    return [dataclasses.replace(text, dataset=cast(Any, n), mix={}, sequences=count) for n, count in parts.items()]


def check_apart(calibration: TextConfig, evaluated: dict[str, TextConfig]) -> None:
    """Refuse to measure on a text of one's own that was calibrated on. Other texts have splits that do not overlap.

    Raises:
        UserError: the same file or folder, or one inside the other.
    """
    for name, text in evaluated.items():
        if _is_local(calibration) and _is_local(text):
            one, other = (Path(t.path or "").expanduser().resolve() for t in (calibration, text))
            if one == other or one in other.parents or other in one.parents:
                raise UserError(
                    f"calibration.path={calibration.path} and eval.datasets.{name}.path={text.path} are the same text, so that "
                    "figures would flatter. Part it into two files, or measure on another one."
                )


def _is_local(text: TextConfig) -> bool:
    return text.dataset == "local" or "local" in text.mix


def _first_token(text: TextConfig, tokenizer: Any) -> int | None:
    """The token that every window shall begin with."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if text.bos is None:
        by_itself = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
        return bos if by_itself and text.dataset not in ("wikitext2", "c4") else None
    if text.bos and bos is None:
        raise UserError("bos=true, but the model's tokenizer has no beginning-of-text token. Set it to null or false.")
    return bos if text.bos else None


def _published(text: TextConfig, split: str, tokenizer: Any) -> Tensor:
    count, length = text.sequences, text.sequence_length
    if text.dataset == "c4" and split != "evaluation":
        return torch.tensor(hub.c4_windows(tokenizer, count, length, text.seed or 0))
    whole = hub.c4_evaluated() if text.dataset == "c4" else hub.wikitext2(split)
    ids = tokenizer(whole, verbose=False)["input_ids"]
    if len(ids) < count * length or len(ids) <= length:
        raise UserError(_too_little(text, split, len(ids), len(ids) // length))
    if split != "evaluation":
        return torch.tensor(hub.random_windows(ids, count, length, text.seed or 0))
    return torch.tensor(ids[: count * length]).view(count, length)


def _from_row(text: TextConfig, split: str, tokenizer: Any, length: int) -> Tensor:
    # What streams in without end is taken from its start.
    drawn = text.seed is not None and text.dataset != "fineweb_edu"
    row = _row(_documents(text, split, tokenizer), tokenizer, None if drawn else text.sequences * length)
    available = len(row) // length
    if available < text.sequences:
        raise UserError(_too_little(text, split, len(row), available))
    cut = row[: available * length].view(available, length)
    if not drawn:
        return cut[: text.sequences].clone()
    generator = torch.Generator().manual_seed(text.seed or 0)
    chosen = torch.randperm(available, generator=generator)[: text.sequences].sort().values
    return cut[chosen]


def _documents(text: TextConfig, split: str, tokenizer: Any) -> Iterator[str]:
    if text.dataset == "stdlib":
        return stdlib.documents(split)
    if text.dataset == "fineweb_edu":
        return hub.fineweb_edu(split)
    return local.documents(Path(text.path or "").expanduser(), text.field, tokenizer)


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(f"{content}{special}".encode()).hexdigest()


def _file_hashes(text: TextConfig) -> list[str]:
    if not _is_local(text):
        return []
    path = Path(text.path or "").expanduser()
    return list(fingerprint_files(Path(), [str(file) for file in local.files(path)]).values()) if path.exists() else []


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
    named = {"stdlib": f"the {split} split of the standard library's source", "local": text.path}
    return (
        f"Too little text: {text.sequences} windows of {text.sequence_length} tokens were asked for "
        f"({text.sequences * text.sequence_length} tokens), but {named.get(text.dataset, text.dataset)} gives {tokens} tokens, "
        f"which make {available}. "
        "Lower sequences or sequence_length, or give a longer text."
    )

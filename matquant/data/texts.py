"""Token windows of the configured texts: cut from their source, stored, checked and fingerprinted."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matquant.data.config import TextConfig
from matquant.data.sources import SOURCES
from matquant.errors import UserError
from matquant.store import Store

MIX = "mix"  # value of ``dataset`` that combines several sources
SELF = "self"  # dataset of a refinement, alone or in a mix: the model writes the text

# Part of the key of stored windows: raised when the same settings give other windows than before.
_VERSION = 2


def check_text(text: TextConfig, where: str) -> None:
    """Check the settings of a text.

    Args:
        where: place of the text in the config, such as ``calibration``.

    Raises:
        UserError: a value is out of range, or settings contradict each other.
    """
    check_sizes(text, where)
    if text.dataset == SELF:
        raise UserError(f"{where}.dataset=self: only a refinement can be trained on text that the model writes itself.")
    _check_dataset(text, where, tuple(SOURCES))
    sources = [SOURCES[name] for name in _source_names(text)]
    for setting in ("path", "field"):
        value = getattr(text, setting)
        if value is not None and not any(source.reads_files for source in sources):
            raise UserError(
                f"{where}.{setting}={value} is for a text of your own, but {where}.dataset={text.dataset} reads another one. "
                f"Set {where}.dataset=local, or leave {where}.{setting} out."
            )
    for source in sources:
        source.check(text, where)


def check_refinement_text(text: TextConfig, where: str) -> None:
    """Check the settings of a text that the model may write itself, in part or as a whole; ``where`` is its place.

    Raises:
        UserError: see ``check_text``.
    """
    check_sizes(text, where)
    _check_dataset(text, where, (*SOURCES, SELF))
    if (read := split_self(text)[0]) is not None:
        check_text(read, where)


def split_self(text: TextConfig) -> tuple[TextConfig | None, int]:
    """Part of a text that is read (None for nothing), and the number of sequences that the model writes itself."""
    if text.dataset == SELF:
        return None, text.sequences
    if text.dataset != MIX or SELF not in text.mix:
        return text, 0
    written = sum(part.sequences for part in shares(text) if part.dataset == SELF)
    if written == text.sequences:
        return None, written
    others = {name: weight for name, weight in text.mix.items() if name != SELF}
    return dataclasses.replace(text, mix=others, sequences=text.sequences - written), written


def check_sizes(text: TextConfig, where: str) -> None:
    """Check the number and length of the windows of a text; ``where`` is its place. Raises UserError."""
    for name, least in {"sequences": 1, "sequence_length": 2, "batch_size": 1}.items():
        if getattr(text, name) < least:
            raise UserError(f"{where}.{name} must be at least {least}; found {getattr(text, name)}.")


def notes(text: TextConfig) -> list[str]:
    """Sentences for the user on omitted parts of a text."""
    return [note for name in _source_names(text) for note in SOURCES[name].notes(text)]


def windows(text: TextConfig, split: str, tokenizer: Any, store: Store | None = None) -> Tensor:
    """Windows of a text, all of one length. ``TextSource`` describes how they are cut.

    Args:
        split: one of ``stdlib.SPLITS``. A user's own text has no splits: all of it is used.
        tokenizer: of Transformers, slow or fast.
        store: store of the windows, so that a text is tokenized once; None cuts them anew.

    Returns:
        int64 [sequences, sequence_length], on the CPU.

    Raises:
        UserError: the text is missing, unreadable or too short.
    """
    sources = [SOURCES[name] for name in _source_names(text)]
    if store is None or not all(source.has_cached_windows for source in sources):
        return _cut(text, split, tokenizer)
    inputs = {
        "text": {k: v for k, v in dataclasses.asdict(text).items() if k not in ("path", "batch_size")},
        "split": split,
        "tokenizer": _tokenizer_hash(tokenizer),
        "revisions": [source.revision for source in sources if source.revision is not None],
        "files": [digest for source in sources for digest in source.file_hashes(text)],
        "version": _VERSION,
    }

    def build(draft: Any) -> dict[str, Any]:
        draft.write_tensors("windows.safetensors", {"windows": _cut(text, split, tokenizer)})
        return {"label": f"{text.dataset} {split}"}

    return store.open_or_build("windows", inputs, build).read_tensors("windows.safetensors")[0]["windows"].clone()


def check_apart(calibration: TextConfig, evaluated: Mapping[str, TextConfig], where: str = "calibration") -> None:
    """Refuse to evaluate on a text without splits that the model is calibrated on, or trained; ``where`` is its place.

    Raises:
        UserError: the same file or folder, or one inside the other.
    """
    for name, text in evaluated.items():
        if _lacks_splits(calibration) and _lacks_splits(text):
            one, other = (Path(t.path or "").expanduser().resolve() for t in (calibration, text))
            if one == other or one in other.parents or other in one.parents:
                raise UserError(
                    f"{where}.path={calibration.path} and eval.datasets.{name}.path={text.path} are the same text, so that "
                    "figures would flatter. Split it into two files, or evaluate on another one."
                )


def shares(text: TextConfig) -> list[TextConfig]:
    """Parts of a mix with their share of the sequences (the largest remainders are rounded up)."""
    whole = sum(text.mix.values())
    exact = {name: text.sequences * weight / whole for name, weight in text.mix.items()}
    counts = {name: int(share) for name, share in exact.items()}
    for name in sorted(exact, key=lambda n: counts[n] - exact[n])[: text.sequences - sum(counts.values())]:
        counts[name] += 1
    parts = {name: count for name, count in counts.items() if count}
    return [dataclasses.replace(text, dataset=n, mix={}, sequences=count) for n, count in parts.items()]


def fingerprint(windows: Tensor) -> str:
    """SHA-256, in hexadecimal digits, of the shape and the ids of int64 windows [sequences, length]."""
    digest = hashlib.sha256(f"{tuple(windows.shape)}".encode())
    # Little-endian on every machine, so that a store can be shared.
    digest.update(windows.contiguous().cpu().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def _cut(text: TextConfig, split: str, tokenizer: Any) -> Tensor:
    if text.dataset == MIX:
        return torch.cat([_cut(part, split, tokenizer) for part in shares(text)])
    return SOURCES[text.dataset].windows(text, split, tokenizer)


def _check_dataset(text: TextConfig, where: str, names: Sequence[str]) -> None:
    """Check that a text is one of these datasets or a mix of them, and the weights of a mix. Raises UserError."""
    if text.dataset not in (*names, MIX):
        raise UserError(f"{where}.dataset must be one of {', '.join((*names, MIX))}; found {text.dataset!r}.")
    if (text.dataset == MIX) != bool(text.mix):
        raise UserError(
            f"{where}.mix gives each dataset a weight, and goes with {where}.dataset=mix; found {dict(text.mix)}."
        )
    for name, weight in text.mix.items():
        if name not in names or not 0 < weight < math.inf:
            raise UserError(f"{where}.mix.{name}={weight}: a mix is of {', '.join(names)}, with weights above 0.")


def _source_names(text: TextConfig) -> tuple[str, ...]:
    return tuple(text.mix) or (text.dataset,)


def _lacks_splits(text: TextConfig) -> bool:
    return not all(SOURCES[name].has_splits for name in _source_names(text))


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(f"{content}{special}".encode()).hexdigest()

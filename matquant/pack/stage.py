"""The stage ``pack``: a folder that other programs load, made under another name and renamed when it is whole.

A format is a function from an ``Order`` to what it ``Written``, in ``WRITERS``; the rest (config, tokenizer, model card, the
record for the results) is the same for all.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from matquant.errors import UserError
from matquant.evaluate.variants import Variant
from matquant.models.blocks import BlockModel
from matquant.models.load import LoadedModel
from matquant.pack import card, companions, nested, stock
from matquant.pack.formats import Format
from matquant.pack.settings import PackConfig
from matquant.pack.source import Source
from matquant.quantize.parent import Parent
from matquant.search import allocation
from matquant.store.files import delete, explained, size_of

_GIGABYTE = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a writer is asked for.

    Attributes:
        source: the model.
        folder: an empty one, for weight files and their index.
        bits: the widths that a reader begins with, or that are written: one, or one for each layer.
        prefill_bits: the width for many tokens; None for the same.
        max_bits: the planes that widths up to this one need are written.
        limit: bytes of a file.
        progress: called with 1 after each layer.
        stored_bits, fit: of formats that hold one slice: the bits of their codes (None for as few as are exact), and
            whether the nearest codes will do.
    """

    source: Source
    folder: Path
    bits: int | Mapping[str, int]
    prefill_bits: int | None
    max_bits: int
    limit: int
    progress: Callable[[int], None]
    stored_bits: int | None = None
    fit: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a writer did.

    Attributes:
        quantization_config: for ``config.json``.
        config: other entries of ``config.json``, in place of the original's.
        record: for the results, beside folder and bytes.
    """

    quantization_config: dict[str, Any]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


class Writer(Protocol):
    """A format."""

    def __call__(self, order: Order) -> Written: ...


def _write_nested(order: Order) -> Written:
    spec = nested.write(
        order.source, order.folder, bits=order.bits, prefill_bits=order.prefill_bits, max_bits=order.max_bits,
        limit=order.limit, progress=order.progress,
    )  # fmt: skip
    # Null here, so that from_pretrained(folder, bits=3) finds a setting of that name.
    return Written(
        quantization_config=spec.to_json(),
        config={"bits": None, "prefill_bits": None, "max_bits": None},
        record={"max_bits": spec.max_bits, "bits": order.bits if isinstance(order.bits, int) else "allocation"},
    )


def _stock(form: Format) -> Writer:
    """The writer of a format that holds one slice."""

    def write(order: Order) -> Written:
        quantization_config, record = stock.write(order, form)
        return Written(quantization_config=quantization_config, record=record)

    return write


WRITERS: dict[str, Writer] = {"nested": _write_nested} | {name: _stock(form) for name, form in stock.FORMATS.items()}


class Packing:
    """The stage of one job. The constructor refuses, before any long work, what cannot be packed.

    Args:
        config: of a format, not ``none``.
        layers: names of the layers that the parent has, or will have.
        master_bits: of its codes.
        job_folder: where the run writes.

    Raises:
        UserError: the target is there already, or ``pack.bits`` does not fit the layers.
    """

    def __init__(self, config: PackConfig, layers: Sequence[str], master_bits: int, job_folder: Path) -> None:
        self.config = config
        self.folder = _target(config, job_folder)
        self.allocated: Mapping[str, int] | None = None
        if config.allocation_file is not None:
            found = allocation.read(Path(config.allocation_file))
            allocation.check(found, layers, master_bits, config.allocation_file)
            self.allocated = found.widths

    def run(
        self,
        loaded: LoadedModel,
        blocks: BlockModel,
        variants: Sequence[Variant],
        results: Mapping[str, Any],
        progress: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Write the folder.

        Args:
            variants: what the job measures.
            results: for the model card.
            progress: called with 1 after each layer.

        Returns:
            For the results: ``format``, ``folder``, ``bytes`` and what the writer records.

        Raises:
            UserError: the format cannot hold the parent or the widths, or the disk is full.
        """
        config = self.config
        source = Source(loaded, blocks, _parent(variants))
        master = max(layer.master_bits for layer in source.layers.values())
        max_bits = min(config.max_bits or master, master)
        bits = self.allocated or _chosen_widths(config, variants, max_bits)
        _check_widths(bits, config.prefill_bits, max_bits)
        limit = source.original_shard() if config.shard_gigabytes is None else int(config.shard_gigabytes * _GIGABYTE)
        with _replacing(self.folder) as folder:
            order = Order(
                source=source, folder=folder, bits=bits, prefill_bits=config.prefill_bits, max_bits=max_bits,
                limit=limit, progress=progress, stored_bits=config.stored_bits, fit=config.fit == "nearest",
            )  # fmt: skip
            written = WRITERS[config.name](order)
            companions.copy(source.folder, folder)
            companions.write_config(source, folder, written.quantization_config, written.config)
            record = {"format": config.name, "folder": str(self.folder), "bytes": size_of(folder), **written.record}
            with explained(folder):
                (folder / "README.md").write_text(card.render(results, record), encoding="utf-8")
        return record


def _target(config: PackConfig, job_folder: Path) -> Path:
    """The folder that is made."""
    folder = job_folder / "packed" if config.path is None else Path(config.path).expanduser().absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())) and not config.overwrite:
        raise UserError(
            f"pack.path: {folder} is there already. Give another, or set pack.overwrite=true to replace it."
        )
    return folder


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder, that takes the place of ``folder`` when everything went well."""
    temporary = folder.with_name(f".{folder.name}.partial")
    delete(temporary)
    try:
        with explained(temporary):
            temporary.mkdir(parents=True)
        yield temporary
        with explained(folder):
            delete(folder)
            os.replace(temporary, folder)
    finally:
        delete(temporary)


def _parent(variants: Sequence[Variant]) -> Parent:
    """The one parent of what the job measures."""
    parents = list(dict.fromkeys(variant.parent for variant in variants))
    if len(parents) != 1:
        raise UserError(
            f"The method makes a model for each width, and one folder holds one of them: give one width with bits=, not "
            f"{len(parents)}; or a nested method, such as method=matgptq."
        )
    return parents[0]


def _chosen_widths(config: PackConfig, variants: Sequence[Variant], max_bits: int) -> int | Mapping[str, int]:
    """What a reader begins with: ``pack.bits``, else the job's only width or allocation, else ``max_bits``."""
    allocated = [v for v in variants if v.allocation is not None]
    if config.width is not None:
        return config.width
    for only in (allocated, list(variants)):
        if len(only) == 1:
            return only[0].widths
    return max_bits


def _check_widths(bits: int | Mapping[str, int], prefill_bits: int | None, max_bits: int) -> None:
    widest = max([bits] if isinstance(bits, int) else bits.values())
    for where, width in (("pack.bits", widest), ("pack.prefill_bits", prefill_bits or 0)):
        if width > max_bits:
            raise UserError(
                f"{where}: {width} bits need more planes than are written, for {max_bits} bits. Raise pack.max_bits."
            )

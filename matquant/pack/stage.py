"""The stage ``pack``: a folder that other programs load, made under another name and renamed when it is whole.

A format is a function from a ``PackRequest`` to a ``PackResult``, in ``WRITERS``; the rest (config, tokenizer, model card, the
record for the results) is the same for all.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from matquant.errors import UserError
from matquant.formats import allocation
from matquant.formats.packed import STOCK_INDEX
from matquant.formats.slice_spec import SliceSpec
from matquant.models.blocks import BlockModel
from matquant.models.loading import LoadedModel
from matquant.pack import aux_files, export, matgptq_writer, model_card, nested_writer
from matquant.pack.config import PackConfig, check_widths
from matquant.pack.export_format import Format
from matquant.pack.pack_input import PackInput
from matquant.quantize.config import MethodConfig
from matquant.store.files import delete, total_bytes, translate_os_errors

_GIGABYTE = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackRequest:
    """Request to a writer.

    Attributes:
        source: the model.
        folder: an empty one, for weight files and their index.
        bits: default bit-width of a reader, or the bit-width to write: one, or one for each layer.
        prefill_bits: bit-width for many tokens; None for the same.
        max_bits: largest bit-width whose planes are written.
        limit: bytes of a file.
        progress: called with 1 after each layer.
        stored_bits: bits of the codes of a stock format; None for as few as are exact.
        fit: store the nearest codes where none are exact.
    """

    source: PackInput
    folder: Path
    bits: int | Mapping[str, int]
    prefill_bits: int | None
    max_bits: int
    limit: int
    progress: Callable[[int], None]
    stored_bits: int | None = None
    fit: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PackResult:
    """Result of a writer.

    Attributes:
        quantization_config: for ``config.json``.
        config: other entries of ``config.json``, in place of the original's.
        record: for the results, beside folder and bytes.
    """

    quantization_config: dict[str, Any]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


class Writer(Protocol):
    """Writer of a format."""

    def __call__(self, request: PackRequest) -> PackResult: ...


def _write_nested(request: PackRequest) -> PackResult:
    spec = nested_writer.write(
        request.source,
        request.folder,
        bits=request.bits,
        prefill_bits=request.prefill_bits,
        max_bits=request.max_bits,
        limit=request.limit,
        progress=request.progress,
    )
    # Null here, so that from_pretrained(folder, bits=3) finds a setting of that name.
    return PackResult(
        quantization_config=spec.to_json(),
        config={"bits": None, "prefill_bits": None, "max_bits": None, "transformers_weights": STOCK_INDEX},
        record={"max_bits": spec.max_bits, "bits": request.bits if isinstance(request.bits, int) else "allocation"},
    )


def _write_published(request: PackRequest) -> PackResult:
    spec = matgptq_writer.write(
        request.source,
        request.folder,
        bits=request.bits,
        prefill_bits=request.prefill_bits,
        limit=request.limit,
        progress=request.progress,
    )
    return PackResult(quantization_config=spec.to_json(), record={"bits": spec.bits})


def _stock(form: Format) -> Writer:
    """The writer of a format that holds one slice."""

    def write(request: PackRequest) -> PackResult:
        quantization_config, record = export.write(request, form)
        return PackResult(quantization_config=quantization_config, record=record)

    return write


WRITERS: dict[str, Writer] = {"nested": _write_nested, "matgptq_v1": _write_published}
WRITERS |= {name: _stock(form) for name, form in export.FORMATS.items()}

# What a format cannot hold whatever the model, refused before any long work.
CHECKS: dict[str, Callable[[PackConfig, MethodConfig], None]] = {"matgptq_v1": matgptq_writer.check}


class Packing:
    """The stage of one job. The constructor refuses, before any long work, what cannot be packed.

    Args:
        config: of a format, not ``none``.
        layers: names of the layers that the parent has, or will have.
        method: that makes it.
        job_folder: where the run writes.

    Raises:
        UserError: the target is there already, or ``pack.bits`` does not fit the layers.
    """

    def __init__(self, config: PackConfig, layers: Sequence[str], method: MethodConfig, job_folder: Path) -> None:
        self.config = config
        self.folder = _target(config, job_folder)
        if config.name in CHECKS:
            CHECKS[config.name](config, method)
        self.allocated: Mapping[str, int] | None = None
        if config.allocation_file is not None:
            found = allocation.read(Path(config.allocation_file))
            allocation.check_layers(found, layers, method.master_bits, config.allocation_file)
            self.allocated = found.bits
            _check_allocation(found.bits, min(config.max_bits or method.master_bits, method.master_bits))

    def run(
        self,
        loaded: LoadedModel,
        blocks: BlockModel,
        variants: Sequence[SliceSpec],
        results: Mapping[str, Any],
        progress: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Write the folder.

        Args:
            variants: what the job measures, all of one parent.
            results: for the model card.
            progress: called with 1 after each layer.

        Returns:
            For the results: ``format``, ``folder``, ``bytes`` and what the writer records.

        Raises:
            UserError: the format cannot hold the parent or the widths, or the disk is full.
        """
        config = self.config
        source = PackInput(loaded, blocks, variants[0].parent)
        master = max(layer.format.master_bits for layer in source.layers.values())
        max_bits = min(config.max_bits or master, master)
        bits = self.allocated or _default_bits(config, variants, max_bits)
        _check_allocation(bits, max_bits)
        limit = source.original_shard() if config.shard_gb is None else int(config.shard_gb * _GIGABYTE)
        with _replacing(self.folder) as folder:
            request = PackRequest(
                source=source,
                folder=folder,
                bits=bits,
                prefill_bits=config.prefill_bits,
                max_bits=max_bits,
                limit=limit,
                progress=progress,
                stored_bits=config.stored_bits,
                fit=config.rounding == "nearest",
            )
            written = WRITERS[config.name](request)
            aux_files.copy(source.folder, folder)
            aux_files.write_config(source, folder, written.quantization_config, written.config)
            record = {"format": config.name, "folder": str(self.folder), "bytes": total_bytes(folder), **written.record}
            with translate_os_errors(folder, setting="pack.path"):
                (folder / "README.md").write_text(model_card.render(results, record), encoding="utf-8")
        return record


def _target(config: PackConfig, job_folder: Path) -> Path:
    """Output folder. Raises UserError if it is in the way."""
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
        with translate_os_errors(temporary, setting="pack.path"):
            temporary.mkdir(parents=True)
        yield temporary
        with translate_os_errors(folder, setting="pack.path"):
            delete(folder)
            os.replace(temporary, folder)
    finally:
        delete(temporary)


def _check_allocation(bits: int | Mapping[str, int], max_bits: int) -> None:
    widest = {"pack.bits": bits} if isinstance(bits, int) else {f"pack.bits, {name}": b for name, b in bits.items()}
    check_widths(max_bits, widest)


def _default_bits(config: PackConfig, variants: Sequence[SliceSpec], max_bits: int) -> int | Mapping[str, int]:
    """Default bits of a reader: ``pack.bits``, else the job's only bit-width or allocation, else ``max_bits``."""
    allocated = [v for v in variants if v.allocation is not None]
    if config.width is not None:
        return config.width
    for only in (allocated, list(variants)):
        if len(only) == 1:
            return only[0].bits
    return max_bits

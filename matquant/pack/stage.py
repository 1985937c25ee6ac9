"""Stage ``pack``: a folder that other programs load, written under a temporary name and renamed when it is complete.

The weights depend on the format (``matquant.pack.formats``). Config, tokenizer, model card and the record for the
results are the same for all formats.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from matquant.errors import UserError
from matquant.formats import allocation
from matquant.formats.packed import LayerSpec
from matquant.formats.slice_spec import SliceSpec
from matquant.models.blocks import BlockModel
from matquant.models.loading import LoadedModel
from matquant.pack import aux_files, model_card
from matquant.pack.check import check_planes
from matquant.pack.config import PackConfig
from matquant.pack.formats import FORMATS, PackRequest
from matquant.pack.pack_input import PackInput
from matquant.quantize.config import MethodConfig
from matquant.store.files import delete, total_bytes, translate_os_errors, try_writing

_GIGABYTE = 10**9


class Packing:
    """Packing of one job. The constructor refuses, before any long work, settings that cannot be packed.

    Args:
        config: settings with a format, not ``none``.
        layers: size, and format in the parent, of each layer by full name.
        method: settings of the method that makes the parent.
        job_folder: output folder of the job.
        loaded: the model.
        uniform: bit-widths of the job's slices if all are uniform; the format checks the one that it will write.

    Attributes:
        stored_weights: after ``run``, the weights that the folder holds, by layer, from a block's number; None if they are
            those of the slice.

    Raises:
        UserError: the target is there already, the format cannot store the model, or ``pack.bits`` does not fit them.
    """

    def __init__(
        self,
        config: PackConfig,
        layers: Mapping[str, LayerSpec],
        method: MethodConfig,
        job_folder: Path,
        loaded: LoadedModel,
        uniform: Sequence[int] = (),
    ) -> None:
        self.config = config
        self.folder = _target(config, job_folder)
        self.format = FORMATS[config.name]
        self.format.check(_planned(config, uniform, method.master_bits), method, layers)
        self.format.check_model(config, loaded)
        self.stored_weights: Callable[[int], Mapping[str, Tensor]] | None = None
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
        slices: Sequence[SliceSpec],
        results: Mapping[str, Any],
        progress: Callable[[int], None] = lambda _: None,
    ) -> dict[str, Any]:
        """Write the folder.

        Args:
            slices: those of the job, all of one parent.
            results: for the model card.
            progress: called with 1 after each layer.

        Returns:
            For the results: ``format``, ``folder``, ``bytes`` and what the writer records.

        Raises:
            UserError: the format cannot store the parent or the bit-widths, or the disk is full.
        """
        config = self.config
        source = PackInput(loaded, blocks, slices[0].parent)
        master = max(layer.format.master_bits for layer in source.layers.values())
        max_bits = min(config.max_bits or master, master)
        bits = self.allocated or _default_bits(config, slices, max_bits)
        _check_allocation(bits, max_bits)
        file_bytes = source.original_shard() if config.shard_gb is None else int(config.shard_gb * _GIGABYTE)
        with _replacing(self.folder) as folder:
            request = PackRequest(
                source=source,
                folder=folder,
                bits=bits,
                prefill_bits=config.prefill_bits,
                max_bits=max_bits,
                file_bytes=file_bytes,
                progress=progress,
                stored_bits=config.stored_bits,
                allow_nearest=config.rounding == "nearest",
                dense_type=config.dense_type,
            )
            written = self.format.write(request)
            if written.quantization_config is not None:
                aux_files.copy(source.folder, folder)
                aux_files.write_config(source, folder, written.quantization_config, written.config)
            record = {"format": config.name, "folder": str(self.folder), "bytes": total_bytes(folder), **written.record}
            with translate_os_errors(folder, setting="pack.path"):
                (folder / "README.md").write_text(model_card.render(results, record), encoding="utf-8")
        if written.stored_weights is not None:
            self.stored_weights = functools.partial(written.stored_weights, self.folder)
        return record


def _planned(config: PackConfig, uniform: Sequence[int], master_bits: int) -> PackConfig:
    """Settings with the bit-width that ``_default_bits`` will find, if it is known before the job."""
    if config.bits is not None or not uniform:
        return config
    bits = uniform[0] if len(uniform) == 1 else min(config.max_bits or master_bits, master_bits)
    return dataclasses.replace(config, bits=str(bits))


def try_target(config: PackConfig, job_folder: Path) -> None:
    """Write beside and in the output folder and delete it again, before any work.

    Raises:
        UserError: the folder is in the way, cannot be written, or cannot be replaced.
    """
    folder = _target(config, job_folder)
    if folder.is_mount():
        raise UserError(
            f"pack.path: {folder} is a mount point, which a finished folder cannot replace. Give a folder inside it, such as "
            f"{folder / 'model'}."
        )
    try_writing(_temporary(folder), "pack.path")
    if folder.is_dir():
        try_writing(folder, "pack.path")


def _target(config: PackConfig, job_folder: Path) -> Path:
    """Output folder. Raises UserError if it is in the way."""
    folder = job_folder / "packed" if config.path is None else Path(config.path).expanduser().absolute()
    with translate_os_errors(folder, setting="pack.path"):
        in_the_way = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if in_the_way and not config.overwrite:
        raise UserError(
            f"pack.path: {folder} is there already. Give another, or set pack.overwrite=true to replace it."
        )
    return folder


def _temporary(folder: Path) -> Path:
    """Name of the unfinished folder."""
    return folder.with_name(f".{folder.name}.partial")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Temporary folder that replaces ``folder`` if no error is raised."""
    temporary = _temporary(folder)
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
    wanted = {"pack.bits": bits} if isinstance(bits, int) else {f"pack.bits, {name}": b for name, b in bits.items()}
    check_planes(max_bits, wanted)


def _default_bits(config: PackConfig, slices: Sequence[SliceSpec], max_bits: int) -> int | Mapping[str, int]:
    """Default bits of a reader: ``pack.bits``, else the job's only bit-width or allocation, else ``max_bits``."""
    allocated = [one for one in slices if one.allocation is not None]
    if config.uniform_bits is not None:
        return config.uniform_bits
    for only in (allocated, list(slices)):
        if len(only) == 1:
            return only[0].bits
    return max_bits

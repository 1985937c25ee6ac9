"""Checks that every reader of a nested checkpoint makes before it uses a weight."""

import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matquant.errors import UserError, shorten
from matquant.formats.packed import TensorSpec
from matquant.formats.safetensors_headers import DTYPES, StoredTensor
from matquant.store.files import DamageError, FileRecord, check_content

_HASH_THREADS = 8


def check_files(files: Sequence[Path], records: Mapping[str, FileRecord]) -> None:
    """Check that the files are in one folder and have the size and SHA-256 that the checkpoint's config records.

    Args:
        files: weight files to be read.
        records: by file name, as in ``NestedSpec.files``; if empty, only the folder is checked.

    Raises:
        UserError: names the first file that is missing, damaged or outside of the folder.
    """
    folders = {os.path.normpath(os.path.dirname(os.path.abspath(file))) for file in files}
    if len(folders) > 1 or any(".." in Path(file).name for file in files):
        raise UserError(
            f"The checkpoint's index names files outside of its folder: {shorten(sorted(map(str, files)))}. It is not safe "
            "to load. Get the checkpoint from a source that you trust."
        )
    if not records:
        return
    for file in files:
        if Path(file).name not in records:
            raise UserError(f"{file} is no weight file of this checkpoint: its config.json does not list it.")
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        for _ in pool.map(lambda file: _check_file(Path(file), records[Path(file).name]), files):
            pass  # raises the error of the first damaged file


def check_tensors(
    stored: Mapping[str, StoredTensor],
    nested: Mapping[str, TensorSpec],
    dense: Mapping[str, TensorSpec],
    optional: Collection[str] = (),
) -> None:
    """Check that the files hold exactly the tensors that the model needs, in the right shapes and dtypes.

    Args:
        stored: tensors in the headers of the files.
        nested: required tensors of nested layers, by name.
        dense: all other required tensors, by name; a float tensor may have another float dtype.
        optional: names that may be missing, for example one of two tied tensors.

    Raises:
        UserError: names the first tensors that are missing, unknown or wrong.
    """
    expected = {**dense, **nested}
    if missing := sorted(expected.keys() - stored.keys() - set(optional)):
        raise UserError(
            f"The checkpoint lacks {len(missing)} tensors that the model needs: {shorten(missing)}. They would be random "
            "numbers. Copy or download it again."
        )
    if unknown := sorted(stored.keys() - expected.keys()):
        raise UserError(
            f"The checkpoint holds {len(unknown)} tensors that the model does not have: {shorten(unknown)}. Use the model "
            "that it was packed for."
        )
    for name, found in stored.items():
        spec, dtype = expected[name], DTYPES.get(found.dtype)
        floats = dtype is not None and dtype.is_floating_point and spec.dtype.is_floating_point
        if found.shape != spec.shape or (dtype != spec.dtype and (name in nested or not floats)):
            wanted = f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"
            raise UserError(
                f"{name} is {found.dtype} {list(found.shape)} in {found.file.name}; the model needs {wanted}."
            )


def _check_file(file: Path, record: FileRecord) -> None:
    try:
        check_content(file, record)
    except DamageError as error:
        raise UserError(f"{file.parent}: {error}. Copy or download the checkpoint again.") from error
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror or error}. Copy or download the checkpoint again."
        ) from error

"""What every reader of a nested checkpoint makes sure of before a weight is used."""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matquant.errors import UserError
from matquant.formats.packed import TensorSpec
from matquant.formats.safetensors_headers import DTYPES, StoredTensor
from matquant.store.files import FileRecord

_NAMED = 3  # names in one sentence
_THREADS = 8  # that hash files side by side


def check_files(files: Sequence[Path], records: Mapping[str, FileRecord]) -> None:
    """Make sure that the files lie in one folder and have the bytes that the checkpoint's config records.

    Args:
        files: weight files, those that are to be read.
        records: by file name, as in ``NestedSpec.files``; without any only the folder is checked.

    Raises:
        UserError: names the first file that is missing, outside of the folder, or damaged.
    """
    folders = {os.path.normpath(os.path.dirname(os.path.abspath(file))) for file in files}
    if len(folders) > 1 or any(".." in Path(file).name for file in files):
        raise UserError(
            f"The checkpoint's index names files outside of its folder: {', '.join(sorted(map(str, files))[:_NAMED])}. It is "
            "not safe to load: get the checkpoint from where you trust it."
        )
    if not records:
        return
    for file in files:
        if Path(file).name not in records:
            raise UserError(f"{file} is no weight file of this checkpoint: its config.json does not name it.")
    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(lambda file: _damage(Path(file), records[Path(file).name]), files):
            if found is not None:
                raise UserError(f"{found}. Copy or download the checkpoint again.")


def check_tensors(
    stored: Mapping[str, StoredTensor],
    nested: Mapping[str, TensorSpec],
    dense: Mapping[str, TensorSpec],
    optional: Collection[str] = (),
) -> None:
    """Make sure that the files hold exactly what the model needs, in the right shapes and dtypes.

    Args:
        stored: from the files' headers.
        nested: of nested layers, by name.
        dense: of all else, by name; a float may be of another float dtype.
        optional: names that may be missing, such as one of two tied ones.

    Raises:
        UserError: names the first tensors that are missing, foreign or wrong.
    """
    expected = {**dense, **nested}
    if missing := sorted(expected.keys() - stored.keys() - set(optional)):
        raise UserError(
            f"The checkpoint lacks {len(missing)} tensors that the model needs: {_some(missing)}. They would be random "
            "numbers. Copy or download it again."
        )
    if foreign := sorted(stored.keys() - expected.keys()):
        raise UserError(
            f"The checkpoint holds {len(foreign)} tensors that the model has no place for: {_some(foreign)}. Was it "
            "packed for another model?"
        )
    for name, found in stored.items():
        spec, dtype = expected[name], DTYPES.get(found.dtype)
        floats = dtype is not None and dtype.is_floating_point and spec.dtype.is_floating_point
        if found.shape != spec.shape or (dtype != spec.dtype and (name in nested or not floats)):
            wanted = f"{str(spec.dtype).removeprefix('torch.')} {list(spec.shape)}"
            raise UserError(
                f"{name} is {found.dtype} {list(found.shape)} in {found.file.name}; the model needs {wanted}."
            )


def _damage(file: Path, record: FileRecord) -> str | None:
    try:
        with file.open("rb") as stream:
            if (size := os.fstat(stream.fileno()).st_size) != record.size:
                return f"{file} has {size:,} bytes instead of {record.size:,}"
            if hashlib.file_digest(stream, "sha256").hexdigest() != record.sha256:
                return f"The bytes of {file} do not match their SHA-256 in config.json"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    return None


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")

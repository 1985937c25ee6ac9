"""Atomic text files: a file under its final name is complete."""

import os
import secrets
from pathlib import Path


def write_atomic(path: Path, text: str) -> Path:
    """Write ``text`` as UTF-8 under a temporary name beside ``path``, sync it, rename it; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            # A path from the command line may hold bytes that are not UTF-8 (lone surrogates): escape them.
            file.write(text.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path

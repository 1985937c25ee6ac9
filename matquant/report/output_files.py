"""Text files of a report: a file under its final name is complete."""

from pathlib import Path

from matquant.store.files import write_atomically


def write_atomic(path: Path, text: str) -> Path:
    """Write ``text`` atomically as UTF-8. Returns ``path``. Raises OSError."""
    # A path from the command line may hold bytes that are not UTF-8 (lone surrogates): escape them.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))
    return path

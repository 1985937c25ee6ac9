"""JSON of the store: canonical form, hash, and files with deterministic bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from matquant.errors import UserError


def normalize_json(value: Any) -> Any:
    """Return ``value`` as a JSON file gives it back: tuples as lists, keys as strings. Both forms have the same hash.

    Raises:
        ValueError, TypeError: ``value`` has no JSON form. NaN and infinity have none.
    """
    return json.loads(json.dumps(value, allow_nan=False))


def hash_json(value: Any) -> str:
    """SHA-256, as hexadecimal digits, of the canonical JSON of ``value``: sorted keys, no spaces, ASCII."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def pretty_json(value: Any) -> bytes:
    """Bytes of an indented JSON file with sorted keys. Equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file of an artifact.

    Raises:
        UserError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise UserError(
            f"The file {path} cannot be read: {error}. Run the same command again to rebuild it."
        ) from error

"""Compilation of a source in ``kernels/`` to a cubin for one architecture, with a cache on disk.

NVRTC gets the source and its includes as text and searches no folders. The cache key is a hash of all its inputs: texts,
options, architecture and NVRTC version.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matquant.errors import UserError
from matquant.paths import resource_root
from matquant.store.files import write_atomically

CACHE_VARIABLE = "MATQUANT_CUDA_CACHE"
STANDARD = "--std=c++17"

# Compiler: (name of the source, its text, included texts by name, options) -> cubin.
Compiler = Callable[[str, str, Mapping[str, str], Sequence[str]], bytes]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
_DIGEST = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Translation unit.

    Attributes:
        name, text: of the file in ``kernels/``.
        headers: texts of all files in ``kernels/`` that it includes, directly or indirectly, by name.
    """

    name: str
    text: str
    headers: Mapping[str, str]


def read_source(name: str, folder: Path | None = None) -> Source:
    """Read the file ``name`` of ``kernels/`` (or of ``folder``) and its includes.

    Includes in skipped preprocessor branches are read too. A missing include is left to the compiler.

    Raises:
        UserError: there is no such file.
    """
    folder = resource_root() / "kernels" if folder is None else folder
    path = folder / name
    if not path.is_file():
        raise UserError(f"There is no CUDA source {name} in {folder}. Is the installation complete?")
    text = path.read_text(encoding="utf-8")
    headers: dict[str, str] = {}
    unread = [text]
    while unread:
        for included in _INCLUDE.findall(unread.pop()):
            file = folder / included
            if included not in headers and file.is_file():
                headers[included] = file.read_text(encoding="utf-8")
                unread.append(headers[included])
    return Source(name, text, headers)


def compile_options(
    architecture: str, defines: Mapping[str, int | str] | None = None, extra: Sequence[str] = ()
) -> tuple[str, ...]:
    """Options of NVRTC: the architecture (``sm_90a``), C++17, ``-DNAME=VALUE`` per macro sorted by name, ``extra``."""
    macros = tuple(f"-D{name}={value}" for name, value in sorted((defines or {}).items()))
    return (f"-arch={architecture}", STANDARD, *macros, *extra)


def cubin(source: Source, options: Sequence[str], version: str, compiler: Compiler, cache: Path | None = None) -> bytes:
    """Compile a source, or read it from the cache.

    Args:
        version: of NVRTC.
        compiler: called on a cache miss.
        cache: folder; that of ``cache_folder`` if None. A folder that cannot be written gives a warning, and each process
            compiles.
    """
    path = (
        cache_folder() if cache is None else cache
    ) / f"{Path(source.name).stem}-{_key(source, options, version)}.cubin"
    found = _read(path)
    if found is not None:
        return found
    compiled = compiler(source.name, source.text, source.headers, options)
    try:
        write_atomically(path, hashlib.sha256(compiled).digest(), compiled)
    except OSError as error:
        logger.warning(
            f"Compiled kernels cannot be written to {path.parent}: {error}. Every process will compile them again; set "
            f"{CACHE_VARIABLE} to another folder."
        )
    return compiled


def cache_folder() -> Path:
    """Folder of the cubin cache: ``MATQUANT_CUDA_CACHE``, else ``matquant/cuda`` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path("~/.cache").expanduser()) / "matquant" / "cuda"


def _key(source: Source, options: Sequence[str], version: str) -> str:
    content = [source.name, source.text, sorted(source.headers.items()), list(options), version]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """Compiled kernel of a cache file, which begins with its SHA-256; None if the file is missing or truncated."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:_DIGEST], content[_DIGEST:]
    return body if hashlib.sha256(body).digest() == digest else None

"""From a source in ``kernels/`` to a cubin for one architecture, through a cache on disk.

NVRTC gets the source and the files it includes as text, so it searches no folders, and what it was given is what the
cache's key is made of: texts, options, architecture and NVRTC's version.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matquant.errors import UserError
from matquant.paths import resource_root

CACHE_VARIABLE = "MATQUANT_CUDA_CACHE"
STANDARD = "--std=c++17"

# NVRTC itself: name of the source, its text, the included texts by name, options -> cubin.
Compiler = Callable[[str, str, Mapping[str, str], Sequence[str]], bytes]

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)
_DIGEST = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A translation unit.

    Attributes:
        name: of the file in ``kernels/``.
        text: of that file.
        headers: text of every file in ``kernels/`` that it includes, directly or not, by name.
    """

    name: str
    text: str
    headers: Mapping[str, str]


def read_source(name: str, folder: Path | None = None) -> Source:
    """The file ``name`` of ``kernels/`` (or of ``folder``) and what it includes.

    An include in a branch that the preprocessor will skip is read as well, if it is there; one that is not there is left
    to the compiler to complain about.

    Raises:
        UserError: there is no such file.
    """
    folder = resource_root() / "kernels" if folder is None else folder
    path = folder / name
    if not path.is_file():
        raise UserError(f"There is no CUDA source {name} in {folder}. Is the installation complete?")
    text = path.read_text(encoding="utf-8")
    headers: dict[str, str] = {}
    waiting = [text]
    while waiting:
        for included in _INCLUDE.findall(waiting.pop()):
            file = folder / included
            if included not in headers and file.is_file():
                headers[included] = file.read_text(encoding="utf-8")
                waiting.append(headers[included])
    return Source(name, text, headers)


def compile_options(
    architecture: str, defines: Mapping[str, int | str] | None = None, extra: Sequence[str] = ()
) -> tuple[str, ...]:
    """NVRTC's options: the architecture (``sm_90a``), C++17, ``-DNAME=VALUE`` for each definition by name, ``extra``."""
    macros = tuple(f"-D{name}={value}" for name, value in sorted((defines or {}).items()))
    return (f"-arch={architecture}", STANDARD, *macros, *extra)


def cubin(source: Source, options: Sequence[str], version: str, compiler: Compiler, cache: Path | None = None) -> bytes:
    """The compiled source, out of the cache where it is there.

    Args:
        version: of NVRTC.
        compiler: is called when the cache has nothing.
        cache: folder; None for the user's, see ``cache_folder``. One that cannot be written costs a compilation per
            process, and a warning.
    """
    path = (
        cache_folder() if cache is None else cache
    ) / f"{Path(source.name).stem}-{_key(source, options, version)}.cubin"
    found = _read(path)
    if found is not None:
        return found
    compiled = compiler(source.name, source.text, source.headers, options)
    try:
        _write(path, compiled)
    except OSError as error:
        logger.warning(
            f"The compiled kernels cannot be kept in {path.parent}: {error}. They will be compiled again by every process; "
            f"{CACHE_VARIABLE} names another folder."
        )
    return compiled


def cache_folder() -> Path:
    """Where cubins are kept: ``MATQUANT_CUDA_CACHE``, else ``matquant/cuda`` in the user's cache folder."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path("~/.cache").expanduser()) / "matquant" / "cuda"


def _key(source: Source, options: Sequence[str], version: str) -> str:
    content = [source.name, source.text, sorted(source.headers.items()), list(options), version]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """What ``_write`` wrote, or None: a file that was cut short must not reach the driver."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:_DIGEST], content[_DIGEST:]
    return body if hashlib.sha256(body).digest() == digest else None


def _write(path: Path, body: bytes) -> None:
    """Digest and body, under a temporary name until all is written: other processes may be reading or writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

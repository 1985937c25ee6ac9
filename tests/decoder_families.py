"""Outcome of every decoder family of Transformers, and the table of them in ``docs/architectures.md``.

``outcome_of`` runs one family from end to end: a random small model is saved, quantized, evaluated, packed, loaded by
``from_pretrained``, and compared with a stock model that has the dequantized weights. ``python tests/decoder_families.py``
runs all families and writes the table.
"""

import dataclasses
import datetime
import heapq
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import random_model, save
from hydra import compose, initialize_config_dir
from shared import ROOT, SMALL
from small_configs import KINDS, small_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant.cli import register
from matquant.config import Config, from_hydra
from matquant.data import texts
from matquant.errors import UserError
from matquant.formats.parent import Parent
from matquant.inference import nested_layers
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig
from matquant.models.loading import open_model
from matquant.models.summary import OUTSIDE
from matquant.report.results import JobResults
from matquant.stages.job import JobInfo, compute
from matquant.store import Store
from matquant.store.artifact import read_artifact

DOCS = ROOT / "docs" / "architectures.md"
BITS = (2, 8)
_OVERRIDES = (
    *SMALL,
    "method.group_size=32",
    f"bits={list(BITS)}",
    "stages=[quantize,evaluate,pack]",
    "pack=nested",
    "runtime.device=cpu",
    "runtime.progress=false",
    "runtime.threads=1",
    "calibration.dataset=local",
    "eval.datasets.stdlib.dataset=local",
)
SUPPORTED, REFUSED, NOT_TRIED = "supported", "refused", "not tried"
_PROBE = torch.arange(8)[None]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of one family.

    Attributes:
        family: model type of its config.
        model: class of the model; empty if there is none.
        kind: one of SUPPORTED, REFUSED, NOT_TRIED.
        layers: number of quantized layers; 0 unless supported.
        sentence: of the refusal, or the error of Transformers.
        dense: matrices in full precision beside embeddings and head, by name, with the reason.
    """

    family: str
    model: str
    kind: str
    layers: int = 0
    sentence: str = ""
    dense: Mapping[str, str] = dataclasses.field(default_factory=dict)


@cache
def _config(folder: Path) -> Config:
    """Composed config of all jobs, without model. Texts are two modules of the standard library, copied to ``folder``."""
    overrides = [*_OVERRIDES, f"store.path={folder / 'store'}"]
    for name, module in (("calibration", textwrap), ("eval.datasets.stdlib", heapq)):
        file = shutil.copy(str(module.__file__), folder / f"{name}.txt")
        overrides.append(f"{name}.path={file}")
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(compose("config", overrides=overrides))


def outcome_of(family: str, folder: Path, shared: Path) -> Outcome:
    """Run one family from end to end.

    Args:
        folder: empty or missing; checkpoint and packed model are written there.
        shared: folder of the texts and the store; may be that of other families.

    Raises:
        AssertionError: the family is neither supported with right results nor refused before work.
    """
    try:
        model = random_model(small_config(family))
        model(input_ids=_PROBE, use_cache=False)
    except Exception as error:  # code of any architecture raises anything
        return Outcome(family, "", NOT_TRIED, sentence=_first_line(error))
    name = type(model).__name__
    config = dataclasses.replace(_config(shared), model=ModelConfig(path=str(save(model, folder / "model"))))
    store = Path(config.store.path)
    parents = set((store / "parent").glob("*"))
    job = folder / "job"
    job.mkdir(parents=True)
    refusal, results = None, None
    try:
        results = compute(config, JobInfo(folder=job, command="", name=family, group=None, resolved={}))
    except UserError as error:
        refusal = str(error).replace(str(folder / "model"), "FOLDER")
    if refusal is not None:
        assert set((store / "parent").glob("*")) == parents, f"{family} was refused after work: {refusal}"
        return Outcome(family, name, REFUSED, sentence=refusal)
    assert results is not None
    _check_results(results)
    _check_packed(config, job, results)
    return Outcome(family, name, SUPPORTED, layers=len(results.layers), dense=_dense(results))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2]) or 'without a message'}"


def _dense(results: JobResults) -> dict[str, str]:
    rows = {row["name"]: row["reason"] for row in results.unquantized}
    return {name: why for name, why in rows.items() if not why.startswith(("embeddings", "the head", "norm"))}


def _check_results(results: JobResults) -> None:
    low, high = (entry.kl["stdlib"] for entry in results.slices)
    assert low is not None
    assert high is not None
    assert 0 < high < low
    assert high < 0.01
    assert not any("not finite" in warning or "KL" in warning for warning in results.warnings), results.warnings


@torch.no_grad()
def _check_packed(config: Config, job: Path, results: JobResults) -> None:
    """Compare the packed model with a stock model that has the dequantized weights, and the KL with its logits."""
    original, packed = Path(str(config.model.path)), job / "packed"
    full, dense = _stock(original), _stock(original)
    nested = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval()
    assert len(nested_layers(nested)) == len(results.layers)
    parent = Parent(read_artifact(Path(str(results.parent.path))))
    loaded = open_model(config.model)
    windows = texts.windows(
        config.eval.datasets["stdlib"], "evaluation", loaded.tokenizer, Store(Path(str(config.store.path)))
    )
    views = BlockModel(loaded.model).source_views
    expected = full(input_ids=windows, use_cache=False).logits
    for bits, entry in zip(BITS, results.slices, strict=True):
        _set_weights(dense, parent, views, bits)
        nested.set_bits(bits)
        wanted, found = (model(input_ids=windows, use_cache=False).logits for model in (dense, nested))
        scale = wanted[torch.isfinite(wanted)].abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)
        kl = _divergence(expected, found)
        assert abs(kl - entry.kl["stdlib"]) <= 1e-3 * kl + 1e-7, (bits, kl, entry.kl)
        assert _generated(nested, windows) == _generated(dense, windows)


def _stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _set_weights(model: Any, parent: Parent, views: Mapping[str, Any], bits: int) -> None:
    """Set the weights of a stock model to those of one slice, in the places where the architecture stores them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for index in range(len(parent.blocks)):
        for name, weight in parent.block(index).items():
            view = views.get(f"{name}.weight")
            place = parameters[f"{name}.weight"] if view is None else view.view(parameters[view.name])
            place.copy_(weight.dequantize(bits))


def _divergence(full: Tensor, found: Tensor) -> float:
    """Mean KL of the next-token distributions over all tokens but the last of each window."""
    p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (full, found))
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return terms.sum(-1).mean().item()


def _generated(model: Any, windows: Tensor) -> Any:
    """Greedy tokens after a prompt, with the cache of the architecture; the kind of error if it cannot generate."""
    torch.manual_seed(0)
    prompt = windows[:1, :8]
    try:
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
    except Exception as error:  # code of any architecture raises anything
        return _first_line(error)
    return ids.tolist()


# Table

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
  the job reported.
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
        "command": "python tests/decoder_families.py",
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

"""KL and perplexity of every method on a real model, over calibration seeds and kinds of text, computed in float32.

    python experiments/benchmarks/real/prepare.py
    python experiments/benchmarks/real/benchmark.py outputs/real/smollm2-135m-instruct.gguf --out experiments/results/real
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods matgptq gptq --seeds 0 --overrides runtime.device=cuda
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --refine scales_mix --overrides refine=scales ...

Each job is ``python run.py`` with groups of 64, 128 calibration windows of 512 tokens of the standard library's source, and 64
windows each of held-out source (text ``source``), held-out English manuals (``prose``) and, for a model with a chat template,
held-out requests and answers (``chat``). The rows ``bf16`` and ``fp16`` are the unquantized model in that dtype against
float32: figures below them say nothing about a 16-bit runtime. They are measured when the output lacks them. ``peers.py`` adds
rows of other packages.

The output MODEL.json is a list of records with the keys model, method, refine, seed, text, group_size, bits, kl (null if a
logit is not finite), perplexity, evaluation_dtype, seconds (of quantizing and refining), and the provenance: commit, dirty,
command, versions, machine and date. Records of other methods, seeds or settings in the file stay; equal ones are replaced.
training/MODEL.json has the held-out KL of each refinement at its validations, with the steps, tokens and seconds so far.
``summary.py`` makes tables and plots of both.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from matquant.data.config import TextConfig
from matquant.data.texts import windows
from matquant.models.config import ModelConfig
from matquant.models.gguf import convert_gguf
from matquant.report.provenance import provenance
from matquant.store import Store

METHODS = ("rtn", "gptq", "matgptq_v1", "matgptq")
TEXTS = {
    "source": TextConfig(dataset="stdlib", sequences=64, sequence_length=512),
    "prose": TextConfig(dataset="local", path="outputs/real/prose/evaluation", sequences=64, sequence_length=512),
    "chat": TextConfig(dataset="local", path="outputs/real/chat/evaluation.jsonl", sequences=64, sequence_length=512),
}
FLOORS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_IDENTITY = ("model", "method", "refine", "seed", "text", "group_size", "bits")
TRAINING_IDENTITY = ("model", "method", "refine", "seed", "group_size", "step")


def texts_of(tokenizer: Any) -> dict[str, TextConfig]:
    """Texts that a model with this tokenizer is measured on."""
    return {name: text for name, text in TEXTS.items() if name != "chat" or tokenizer.chat_template}


def run_job(
    model: Path, method: str, seed: int, group_size: int, texts: Sequence[str], overrides: Sequence[str]
) -> dict[str, Any]:
    """Results of one job."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "run.py",
            f"model.path={model}",
            "model.dtype=float32",
            f"method={method}",
            f"method.group_size={group_size}",
            "calibration.sequences=128",
            f"calibration.seed={seed}",
            *(
                f"+eval.datasets.{name}={{dataset:local,path:{TEXTS[name].path},sequences:{TEXTS[name].sequences},"
                "sequence_length:512,batch_size:8}"
                for name in texts
                if name != "source"
            ),
            "tracking=none",
            f"hydra.run.dir={folder}",
            *overrides,
        ]
        subprocess.run(command, check=True)
        results: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
        return results


def job_records(results: dict[str, Any], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each bit-width and text of a job."""
    seconds = {key: results["seconds"][key] for key in ("quantize", "refine") if key in results["seconds"]}
    return [
        about
        | {"text": "source" if text == "stdlib" else text, "bits": one["bits"]}
        | {"kl": kl, "perplexity": one["perplexity"][text], "seconds": round(sum(seconds.values()), 1)}
        for one in results["slices"]
        for text, kl in one["kl"].items()
    ]


def training_records(results: dict[str, Any], about: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each validation of a refinement; none without one.

    Seconds are those of the whole refinement by the share of the steps; ``kl`` is by bit-width, on held-out windows.
    """
    refine = results.get("refine")
    if refine is None:
        return []
    text = results["config"]["refine"]["text"]
    tokens, seconds = text["batch_size"] * text["sequence_length"], results["seconds"]["refine"] / refine["steps"]
    return [
        about
        | {"step": row["step"], "tokens": row["step"] * tokens}
        | {"seconds": round(row["step"] * seconds, 1), "kl": row["kl"]}
        for row in refine["history"]
    ]


def open_reference(model: Path, device: str) -> tuple[Any, Any, Store]:
    """Unquantized model in float32, its tokenizer, and the store that holds it."""
    store = Store(Path("outputs/store"))
    folder = convert_gguf(ModelConfig(path=str(model), dtype="float32"), store)[0].path
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return exact, AutoTokenizer.from_pretrained(folder), store


@torch.inference_mode()
def records_against(
    exact: Any, other: Any, tokenizer: Any, store: Store, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """One record for each text of a model against the float32 model, both on one device."""
    records = []
    for text, config in texts_of(tokenizer).items():
        kl, loss = compare(exact, other, windows(config, "evaluation", tokenizer, store).to(exact.device))
        found = {"kl": kl, "perplexity": math.exp(loss)}
        records.append(about | {"text": text} | {k: v if math.isfinite(v) else None for k, v in found.items()})
    return records


def floor_records(model: Path, about: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Records of the unquantized model in float32 and in 16-bit dtypes."""
    exact, tokenizer, store = open_reference(model, device)
    records = []
    for name, dtype in {"fp32": torch.float32, **FLOORS}.items():
        other = exact if dtype == torch.float32 else copy.deepcopy(exact).to(dtype)
        row = {"method": name, "seed": None, "group_size": None, "bits": torch.finfo(dtype).bits, "seconds": 0.0}
        records += records_against(exact, other, tokenizer, store, about | row)
    return records


def compare(exact: Any, other: Any, ids: Tensor) -> tuple[float, float]:
    """Mean KL(exact || other) over all tokens and mean cross-entropy of ``other``, in nats, for ids [windows, tokens]."""
    divergence = loss = 0.0
    for batch in ids.split(4):
        reference, found = (model(batch, use_cache=False).logits.float().log_softmax(-1) for model in (exact, other))
        divergence += (reference.exp() * (reference - found)).sum().item()
        loss -= found[:, :-1].gather(2, batch[:, 1:, None]).sum().item()
    return divergence / ids.numel(), loss / ids[:, 1:].numel()


def merge(
    file: Path, records: list[dict[str, Any]], further: Sequence[str] = (), identity: Sequence[str] = _IDENTITY
) -> None:
    """Write the records to the file, in place of equal ones.

    Args:
        further: keys that tell records apart beside ``identity``.
    """
    kept = json.loads(file.read_text()) if file.exists() else []
    new = {tuple(record[key] for key in (*identity, *further)): record for record in [*kept, *records]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(list(new.values()), indent=1, allow_nan=False) + "\n")


def origin() -> dict[str, Any]:
    """Provenance of records that are made now, with one name for the machine."""
    found = provenance()
    machine = found["machine"].get("gpus") or [found["machine"]["cpu"]]
    return found | {"machine": machine[0]}


def main() -> None:
    """Measure what the command line names, and record it after every job."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the rows bf16 and fp16"
    )
    parser.add_argument("--floors", action="store_true", help="measure the rows of the unquantized model again")
    parser.add_argument("--refine", default="none", help="name of the refinement in the records; --overrides choose it")
    parser.add_argument("--overrides", nargs="*", default=[], help="further settings of run.py")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/real"))
    given = parser.parse_args()
    file = given.out / f"{given.model.stem}.json"
    about = {"model": given.model.stem, "evaluation_dtype": "float32", **origin()}
    measured = {record["method"] for record in json.loads(file.read_text())} if file.exists() else set()
    if given.floors or not {"fp32", *FLOORS} <= measured:
        merge(file, floor_records(given.model, about | {"refine": "none"}, given.device))
    texts = list(texts_of(open_reference(given.model, "cpu")[1]))
    for seed in given.seeds:
        for method in given.methods:
            results = run_job(given.model, method, seed, given.group_size, texts, given.overrides)
            row = {"method": method, "refine": given.refine, "seed": seed, "group_size": given.group_size}
            merge(file, job_records(results, about | row))
            if trained := training_records(results, about | row):
                merge(given.out / "training" / file.name, trained, identity=TRAINING_IDENTITY)


if __name__ == "__main__":
    main()

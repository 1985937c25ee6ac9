"""Time a model in vLLM: the dense one, engines that start at a bit-width, one that switches, and one that drafts.

    python experiments/benchmarks/bench_vllm.py --out experiments/results/serving/vllm.json      # the shape of Llama 3.1 8B
    python experiments/benchmarks/bench_vllm.py --start 4 --switch 2 8 --batch 1,16
    python experiments/benchmarks/bench_vllm.py --start 8 --draft 2 --acceptance-length 2.5
    python experiments/benchmarks/bench_vllm.py --model FOLDER --dense SOURCE --start 8 --draft 3 --speculation always adaptive

Needs a CUDA device, and vLLM beside this project. Weights of a shape are dummies, since speed does not depend on them.
FOLDER is a packed folder (``pack=nested``), SOURCE its full-precision model, and prompts are then real text. Engines run one
after another, each in a process of its own, with the CUDA graphs that vLLM captures by default.

Decoding is timed from the second token on: the difference between ``--tokens`` tokens and one, as the median of ``REPEATS``
calls. Prefill is the time of the first token after ``--prompt`` tokens. The engine that starts first at a bit-width is
measured twice, then switches to each of ``--switch``, and back. An engine with ``--draft`` speculates: vLLM's own rejection
sampling accepts drafts, or with ``--acceptance-length`` so many tokens a round on average, whatever the weights say (vLLM's
synthetic acceptance). With ``--speculation adaptive`` this project's scheduler leaves drafts out where plain decoding is
measured to be faster; by default an engine always drafts. Keep the host idle: a step of one sequence waits for it.

Writes a JSON file whose rows have the keys engine, bits, switched, batch, decode_tokens_per_second, prompt_tokens_per_second,
speedup (of decoding, over the dense engine of the run), repeated (in the second measurement), draft_bits, speculation,
tokens_per_round (null without drafts), decisions (of the scheduler so far) and, once for each switch, switch_seconds.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed
sys.path.append(str(Path(__file__).resolve().parent / "real"))

from matquant.report.provenance import provenance

REPEATS = 3
SPECULATION = ("always", "adaptive")
SCHEDULER = "matquant.vllm.scheduler.WidthScheduler"
SHAPE_VOCABULARY = 128256


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b", help="packed folder, or the shape llama-8b with dummy weights")
    parser.add_argument("--dense", help="full-precision folder of --model")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense engine out")
    parser.add_argument("--start", type=int, nargs="*", default=[4, 2, 8], help="bit-widths that engines start at")
    parser.add_argument(
        "--switch", type=int, nargs="*", default=[2, 3, 8], help="bit-widths that the first one switches to"
    )
    parser.add_argument("--batch", type=_numbers, default=[1, 16, 64], help="numbers of sequences, such as 1,16,64")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompts that time prefill")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens")
    parser.add_argument(
        "--draft", type=int, nargs="*", default=[], help="bit-widths that draft, each for the first of --start"
    )
    parser.add_argument("--draft-tokens", type=int, default=3, help="drafts a round")
    parser.add_argument("--acceptance-length", type=float, help="tokens a round, instead of vLLM's own acceptance")
    parser.add_argument(
        "--speculation", nargs="+", choices=SPECULATION, default=["always"], help="kinds of engines that draft"
    )
    parser.add_argument("--engine", type=json.loads, default={}, help="further arguments of vllm.LLM as JSON")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/serving/vllm.json"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # of one engine's process
    given = parser.parse_args()
    if given.job:
        for row in run_engine(given.job):
            print("ROW " + json.dumps(row), flush=True)
        return
    if importlib.util.find_spec("vllm") is None:
        parser.error("vLLM is not installed in this environment")
    if given.draft and not given.start:
        parser.error("--draft needs a bit-width of the target in --start")
    with tempfile.TemporaryDirectory() as scratch:
        rows: list[dict[str, Any]] = []
        for job in jobs(given, Path(scratch)):
            rows += engine_rows(job)
            add_speedups(rows)
            content = {
                "provenance": provenance(),
                "model": Path(given.model).name,
                "tokens": given.tokens,
                "rows": rows,
            }
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(content, indent=1) + "\n")
    print_table(rows)


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def jobs(given: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    """Jobs of all engines: name, bit-width (None for the dense model), arguments of ``LLM``, switches and measurements."""
    nested, dense = Path(given.model), given.dense
    engine = {"dtype": "float16", "enable_prefix_caching": False, "gpu_memory_utilization": 0.8} | given.engine
    if given.model == "llama-8b":
        from make_shape import write_shape

        nested, dense = write_shape(scratch / "nested", True), write_shape(scratch / "dense", False)
        engine |= {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 2048}
    measured = {name: getattr(given, name) for name in ("prompt", "tokens", "batch")}
    if dense and not given.no_dense:
        yield measured | {"name": "fp16", "bits": None, "engine": engine | {"model": str(dense)}, "switch": []}
    for place, bits in enumerate(given.start):
        arguments = engine | {"model": str(nested), "hf_overrides": {"bits": bits}}
        switch = [other for other in given.switch if other != bits] if place == 0 else []
        yield measured | {"name": f"starts at {bits}", "bits": bits, "engine": arguments, "switch": switch}
    for draft, speculation in itertools.product(given.draft, given.speculation):
        speculative = {"method": "draft_model", "model": str(nested), "num_speculative_tokens": given.draft_tokens}
        if given.acceptance_length:
            speculative |= {"rejection_sample_method": "synthetic"}
            speculative |= {"synthetic_acceptance_length": given.acceptance_length}
        arguments = engine | {"model": str(nested), "hf_overrides": {"bits": given.start[0]}}
        arguments |= {"speculative_config": speculative, "disable_log_stats": False}
        arguments |= {"additional_config": {"matquant": {"draft_bits": draft, "speculation": speculation}}}
        if speculation == "adaptive":
            arguments |= {"scheduler_cls": SCHEDULER}
        row = {"name": f"drafts at {draft}", "bits": given.start[0], "draft_bits": draft, "speculation": speculation}
        yield measured | row | {"engine": arguments, "switch": []}


def engine_rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of one engine, from a process of its own, whose log goes to this one's."""
    print(f"{job['name']}: the engine starts", flush=True)
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    rows = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                rows.append(json.loads(line.removeprefix("ROW ")))
                print(rows[-1], flush=True)
            elif line.startswith("READY "):
                print(f"{job['name']}: {line.removeprefix('READY ')}", end="", flush=True)
    if process.returncode:
        sys.exit(f"The engine {job['name']!r} ended with status {process.returncode}; its log is above.")
    print(f"{job['name']}: the engine has ended", flush=True)
    return rows


def run_engine(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of one engine in this process."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    start = time.perf_counter()
    from vllm import LLM

    from matquant.vllm import set_bits

    llm = LLM(**job["engine"], worker_extension_cls="matquant.vllm.worker.WidthExtension")
    print(f"READY after {time.perf_counter() - start:.0f} s", flush=True)
    yield from measure(llm, job, job["bits"], False)
    if job["switch"]:  # what an engine loses by having run is not the switch's
        yield from ({**row, "repeated": True} for row in measure(llm, job, job["bits"], False))
    for bits in [*job["switch"], job["bits"]] if job["switch"] else []:
        start = time.perf_counter()
        set_bits(llm, bits)
        yield {"engine": job["name"], "bits": bits, "switch_seconds": round(time.perf_counter() - start, 3)}
        yield from measure(llm, job, bits, True)


def measure(llm: Any, job: dict[str, Any], bits: int | None, switched: bool) -> Iterator[dict[str, Any]]:
    """One row for each batch size."""
    for batch in job["batch"]:
        short, long = prompts_of(job, batch)
        generate(llm, short, job["tokens"])  # warms up
        before = rounds(llm) if "draft_bits" in job else None
        seconds = statistics.median(
            [generate(llm, short, job["tokens"]) - generate(llm, short, 1) for _ in range(REPEATS)]
        )
        row = {"engine": job["name"], "bits": bits or "float16", "switched": switched, "batch": batch}
        row["decode_tokens_per_second"] = round(batch * (job["tokens"] - 1) / seconds, 1)
        if before is not None:
            drafted, accepted = (after - was for after, was in zip(rounds(llm), before, strict=True))
            row |= {name: job[name] for name in ("draft_bits", "speculation")}
            row["tokens_per_round"] = round(1 + accepted / drafted, 3) if drafted else None
            if job["speculation"] == "adaptive":
                row["decisions"] = llm.collective_rpc("get_step_state")[0]["speculation"]
        generate(llm, long, 1)
        seconds = statistics.median([generate(llm, long, 1) for _ in range(REPEATS)])
        row["prompt_tokens_per_second"] = round(sum(len(p["prompt_token_ids"]) for p in long) / seconds)
        yield row


def prompts_of(job: dict[str, Any], batch: int) -> tuple[list[Any], list[Any]]:
    """Prompts that decoding goes on from, and those of prefill."""
    folder = job["engine"]["model"]
    if job["engine"].get("load_format") == "dummy":
        short, long = (
            [
                [(7919 * (number + 1) * (place + 1)) % SHAPE_VOCABULARY for place in range(length)]
                for number in range(batch)
            ]
            for length in (16, job["prompt"])
        )
    else:
        from acceptance import PROMPTS, encode
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = [encode(tokenizer, text, kind)[0].tolist() for kind, texts in PROMPTS.items() for text in texts]
        short = [texts[number % len(texts)] for number in range(batch)]
        long = [(text * -(-job["prompt"] // len(text)))[: job["prompt"]] for text in short]
    return [{"prompt_token_ids": ids} for ids in short], [{"prompt_token_ids": ids} for ids in long]


def generate(llm: Any, prompts: Sequence[Any], tokens: int) -> float:
    """Continue the prompts greedily by so many tokens, and return the seconds."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, parameters, use_tqdm=False)
    return time.perf_counter() - start


def rounds(llm: Any) -> tuple[float, float]:
    """Rounds of speculation, and accepted drafts, since the engine started."""
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return counters["vllm:spec_decode_num_drafts"], counters["vllm:spec_decode_num_accepted_tokens"]


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """Add the ratio to the dense engine's decoding at the same batch size."""
    timed = [row for row in rows if "batch" in row]
    dense = {row["batch"]: row["decode_tokens_per_second"] for row in timed if row["bits"] == "float16"}
    for row in timed:
        if row["batch"] in dense:
            row["speedup"] = round(row["decode_tokens_per_second"] / dense[row["batch"]], 3)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print decoded tokens a second, and the speedup, by engine and batch size."""
    print(f"{'engine':>16} {'bits':>8} {'switched':>9} {'batch':>6} {'decode tok/s':>13} {'x':>6} {'prompt tok/s':>13}")
    for row in rows:
        if "batch" in row:
            print(
                f"{row['engine']:>16} {row['bits']:>8} {row['switched']!s:>9} {row['batch']:>6} "
                f"{row['decode_tokens_per_second']:>13.0f} {row.get('speedup', float('nan')):>6.2f} "
                f"{row['prompt_tokens_per_second']:>13}"
            )


if __name__ == "__main__":
    main()

"""Tables and plots of the records of real models.

python experiments/benchmarks/real/summary.py      # writes README.md and a plot of each model into experiments/results/real
"""

import argparse
import json
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

BITS = (2, 3, 4, 6, 8)
FLOORS = {"bf16": "bfloat16", "fp16": "float16"}
NAMES = {
    "rtn": "`rtn`, a model per bit-width",
    "gptq": "`gptq`, a model per bit-width",
    "matgptq_v1": "`matgptq_v1`, one parent",
    "matgptq": "**`matgptq`, one parent**",
}
SETTINGS = {
    "none": "",
    "self_300": ", `refine=scales` of 300 steps on 256 windows that the model wrote",
    "scales_300": ", `refine=scales` of 300 steps on 256 windows",
    "codes": ", `refine=codes` of 600 steps (removed since)",
    "mix_600": ", `refine=scales` on source and prose",
    "mix_2500": ", `refine=scales` of 2500 steps on source and prose",
    "mix_4500": ", **`refine=scales` of 4500 steps on source and prose**",
    "scales": ", **`refine=scales`**",
}
DRAWN = ("none", "mix_4500", "scales")  # settings in the plots
INTRODUCTION = """# Real models

KL(full precision ‖ slice) in nats a token, over 64 windows of 512 tokens that nothing was calibrated or trained on, computed in
float32: Python source, English manuals (prose), and requests with answers in the model's chat template (chat). Groups of 64,
calibrated on 128 windows of 512 tokens of source. With several calibration seeds a figure is their mean, and ± half of their
range.

`matgptq` and `matgptq_v1` are one parent, of which each column is a slice; all other rows are a model for each bit-width. With
`refine=scales` (600 steps on 1024 windows of source, the default) only the scales of 2, 3 and 4 bits change. The row of source
and prose has the same number of steps, on 1024 windows of each; those of 2500 and 4500 steps have 2048 windows of each, and 3
and 4 bits learn at every second and fourth step. Rows of other packages are AutoRound (200 iterations, zero
points at 2 bits) and the GPTQ of llm-compressor, quantized by these packages on the same windows, each with its default
settings. The KL of the unquantized model in bfloat16 and float16 is a floor: what is below it cannot be seen in that dtype.

    python experiments/benchmarks/real/prepare.py
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods rtn gptq matgptq_v1 matgptq --seeds 0
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods matgptq --seeds 1 2
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods matgptq --seeds 0 --refine scales \\
        --overrides refine=scales
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods matgptq --seeds 0 --refine scales_300 \\
        --overrides refine=scales refine.steps=300 refine.text.sequences=256
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods matgptq --seeds 0 --refine self_300 \\
        --overrides refine=scales refine.steps=300 refine.text.dataset=self refine.text.sequences=256
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods matgptq --seeds 0 --refine mix_600 \\
        --overrides refine=scales refine.text.dataset=mix '++refine.text.mix={stdlib:1,local:1}' \\
        refine.text.path=outputs/real/prose/calibration refine.text.sequences=2048
    python experiments/benchmarks/real/benchmark.py MODEL.gguf --methods matgptq --seeds 0 --refine mix_4500 \\
        --overrides refine=scales refine.text.dataset=mix '++refine.text.mix={stdlib:1,local:1}' \\
        refine.text.path=outputs/real/prose/calibration refine.text.sequences=4096 refine.steps=4500 \\
        'refine.step_every=[1,2,4]' refine.validate_every=250       # and 2500 steps
    python experiments/benchmarks/real/peers.py MODEL.gguf --peers auto_round llmcompressor
    python experiments/benchmarks/real/summary.py

Each record of the JSON files has its commit, machine and date. Seconds are of quantizing and refining, on a GPU that several
jobs shared, so that they compare only roughly.

On two cores of an AMD EPYC, with 16 calibration windows and beside other work, SmolLM2 takes 13 minutes from the GGUF file to
a packed folder (commit 5a4be93, 2026-11-29). Its slices have 2.05, 0.329, 0.0710, 0.00678 and 0.00146 nats on the first 8
windows of source:

    python run.py model.path=MODEL.gguf model.dtype=float32 method.group_size=64 calibration.sequences=16 \\
        eval.datasets.stdlib.sequences=8 pack=nested tracking=none
"""

TRAINING = """KL on windows held out of the text that each refinement trains on, against the tokens so far, and the time of
the whole refinement; the names are those of the commands above. Records: `training/MODEL.json`."""
ALONE = "a model per bit-width"
ABLATION_INTRODUCTION = """## Changes of the one-shot solver

One setting of `method=matgptq` at a time, without refinement, on the same windows; the first row is the default. Where a model
per bit-width, made by the same solver for that bit-width alone (strict planes), is among the records, the last column is the
geometric mean over the bit-widths of the ratio to it.

    python experiments/benchmarks/real/ablation.py MODEL.gguf --jobs 3 --overrides runtime.device=cuda
    python experiments/benchmarks/real/ablation.py MODEL.gguf --lists       # the settings of each row

Records with commit, machine and date: `ablation/MODEL.json`.
"""


def rows_of(records: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Method and refinement of each row, in the order of the tables."""
    found = dict.fromkeys((record["method"], record["refine"]) for record in records if record["bits"] in BITS)
    order = ["rtn", "gptq", "matgptq_v1", None, "matgptq"]  # None: other packages
    settings = list(SETTINGS)
    return sorted(
        found, key=lambda row: (order.index(row[0] if row[0] in NAMES else None), settings.index(row[1]), row)
    )


def label(method: str, refine: str) -> str:
    """Name of a row."""
    return NAMES.get(method, f"{method}, a model per bit-width") + SETTINGS[refine]


def figure(values: Sequence[float | None]) -> str:
    """Mean of the seeds, with half of their range."""
    finite = [value for value in values if value is not None]
    if not finite:
        return "not finite" if values else ""
    text = f"{statistics.mean(finite):.3g}"
    return text if len(finite) == 1 else f"{text} ± {(max(finite) - min(finite)) / 2:.1g}"


def floors(records: Sequence[dict[str, Any]]) -> str:
    """Sentence on the full-precision model, for one model and text."""
    (full,) = (r for r in records if r["method"] == "fp32")
    of_dtypes = {name: [r["kl"] for r in records if r["method"] == method] for method, name in FLOORS.items()}
    listed = ", ".join(f"{figure(values)} in {name}" for name, values in of_dtypes.items())
    return f"Full precision: perplexity {full['perplexity']:.4g}; its own KL {listed}."


def table(records: Sequence[dict[str, Any]]) -> str:
    """KL of every row and bit-width, the perplexity at 2 to 4 bits, and seconds, for one model and text."""
    lines = [
        "| KL | " + " | ".join(f"{bits} bits" for bits in BITS) + " | perplexity at 2, 3, 4 bits | seconds |",
        "|---" * (len(BITS) + 3) + "|",
    ]
    for method, refine in rows_of(records):
        mine = [r for r in records if (r["method"], r["refine"]) == (method, refine)]
        first = {r["bits"]: r for r in mine if r["seed"] == 0}
        cells = [figure([r["kl"] for r in mine if r["bits"] == bits]) for bits in BITS]
        perplexities = ", ".join(f"{first[bits]['perplexity']:.4g}" for bits in (2, 3, 4) if bits in first)
        seconds = f"{sum({r['seconds'] for r in first.values()}):.0f}"
        lines.append(f"| {label(method, refine)} | " + " | ".join([*cells, perplexities, seconds]) + " |")
    return "\n".join(lines)


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """KL against bits for each text, a line for each row of the settings in ``DRAWN``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    texts = list(dict.fromkeys(record["text"] for record in records))
    records = [record for record in records if record["refine"] in DRAWN]
    panels, axes = plt.subplots(1, len(texts), figsize=(3.4 * len(texts) + 1, 4), sharey=True, squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for method, refine in rows_of(records):
            mine = [r for r in records if (r["text"], r["method"], r["refine"], r["seed"]) == (text, method, refine, 0)]
            points = sorted((r["bits"], r["kl"]) for r in mine if r["kl"] is not None)
            style = "-" if method == "matgptq" else "--"
            name = label(method, refine).replace("`", "").replace("*", "")
            axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name) if points else None
        floor = [r["kl"] for r in records if (r["text"], r["method"]) == (text, "bf16")]
        axis.axhline(floor[0], color="gray", linewidth=0.8, linestyle=":", label="full precision in bfloat16")
        axis.set(title=text, xlabel="bits", yscale="log")
    axes[0][0].set_ylabel("KL, nats a token")
    handles, names = axes[0][0].get_legend_handles_labels()
    panels.tight_layout(rect=(0, 0.18, 1, 1))
    panels.legend(handles, names, loc="lower center", ncols=len(texts), fontsize=8, frameon=False)
    panels.savefig(path, dpi=130)


def draw_training(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out KL against the tokens of each refinement, one panel for each bit-width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_bits = sorted({bits for record in records for bits in record["kl"]}, key=int)
    panels, axes = plt.subplots(1, len(all_bits), figsize=(3.4 * len(all_bits) + 1, 3.6), squeeze=False)
    lines = {}
    for refine, seed, size in dict.fromkeys((r["refine"], r["seed"], r["group_size"]) for r in records):
        mine = [r for r in records if (r["refine"], r["seed"], r["group_size"]) == (refine, seed, size)]
        mine.sort(key=lambda record: record["step"])
        name = (
            f"{refine}, seed {seed}, groups of {size}: {mine[-1]['step']} steps, {mine[-1]['seconds'] / 60:.1f} minutes"
        )
        color = f"C{len(lines)}"
        for axis, bits in zip(axes[0], all_bits, strict=True):
            points = [(r["tokens"] / 1e6, r["kl"][bits]) for r in mine if bits in r["kl"]]
            if points:
                (lines[name],) = axis.plot(*zip(*points, strict=True), marker="o", markersize=2, color=color)
    for axis, bits in zip(axes[0], all_bits, strict=True):
        axis.set(title=f"{bits} bits", xlabel="million tokens", yscale="log")
    axes[0][0].set_ylabel("held-out KL, nats a token")
    panels.tight_layout(rect=(0, 0.12, 1, 1))
    panels.legend(lines.values(), lines, loc="lower center", ncols=2, fontsize=8, frameon=False)
    panels.savefig(path, dpi=130)
    plt.close(panels)


def ablation_table(records: Sequence[dict[str, Any]], text: str) -> str:
    """KL of every change of the one-shot solver on one text, and the geometric mean of its ratio to a model per bit-width."""
    mine = [record for record in records if record["text"] == text]
    alone = {r["bits"]: r["kl"] for r in mine if r["change"] == ALONE and r["seed"] == 0}
    heads = ["change", *(f"{bits} bits" for bits in BITS), *(["times a model per bit-width"] if alone else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for change in dict.fromkeys(record["change"] for record in mine):
        found = {bits: [r["kl"] for r in mine if (r["change"], r["bits"]) == (change, bits)] for bits in BITS}
        ratios = [statistics.mean(found[bits]) / alone[bits] for bits in BITS if bits in alone]
        ratio = [f"{statistics.geometric_mean(ratios):.2f}"] if ratios else []
        name = "**none**" if change == "none" else change
        lines.append("| " + " | ".join([name, *(figure(found[bits]) for bits in BITS), *ratio]) + " |")
    return "\n".join(lines)


def ablation_parts(ablations: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown of the changes of the one-shot solver."""
    if not ablations:
        return []
    parts = [ABLATION_INTRODUCTION]
    for name, records in ablations.items():
        for text in dict.fromkeys(record["text"] for record in records):
            parts.append(f"### {name}, {text}\n\n{ablation_table(records, text)}\n")
    return parts


def page(
    models: dict[str, list[dict[str, Any]]],
    ablations: dict[str, list[dict[str, Any]]] | None = None,
    trained: Collection[str] = (),
) -> str:
    """Markdown of the records of each model, and of the changes of the solver; ``trained``: models with a plot of training."""
    parts = [INTRODUCTION]
    for name, records in models.items():
        parts.append(f"## {name}\n\n![KL against bits]({name}.png)\n")
        if name in trained:
            parts.append(f"{TRAINING}\n\n![Held-out KL against tokens]({name}_training.png)\n")
        for text in dict.fromkeys(record["text"] for record in records):
            mine = [r for r in records if r["text"] == text]
            parts.append(f"### {text}\n\n{table(mine)}\n\n{floors(mine)}\n")
    return "\n".join(parts + ablation_parts(ablations or {}))


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Records of each model in a folder."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"), reverse=True)}


def main() -> None:
    """Write the page and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("experiments/results/real"))
    folder = parser.parse_args().folder
    models = read(folder)
    for name, records in models.items():
        draw(records, folder / f"{name}.png")
    for name, records in read(folder / "training").items():
        draw_training(records, folder / f"{name}_training.png")
    (folder / "README.md").write_text(page(models, read(folder / "ablation"), read(folder / "training")))


if __name__ == "__main__":
    main()

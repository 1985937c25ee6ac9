"""Model card: contents of the folder, commands that load it, and measurements."""

from collections.abc import Mapping
from typing import Any

from matquant import number_format

_LOADING = """\
```python
import matquant  # makes the format known to Transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER, bits=3)
model.set_bits(2)  # at any time; nothing is loaded again
```
"""


def render(results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        results: of the job.
        record: of the packed folder: ``format``, ``bytes`` and what its writer recorded.
    """
    library = "gguf" if record["format"] == "gguf" else "transformers"
    lines = ["---", f"library_name: {library}", "tags: [matquant, quantized]", "---", ""]
    lines += [f"# {results['model']}, quantized by matquant ({results['method']})", ""]
    lines += [_about(results, record), "", *_table(results), *_warnings(results)]
    return "\n".join(lines)


def _about(results: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    size = number_format.size(record["bytes"])
    if record["format"] == "gguf":
        kind = "exactly" if record["exact"] else "with the nearest values of its types"
        return (
            f"One slice ({record['bits']} bits, {size}) as the GGUF file `{record['file']}`, which llama.cpp and programs "
            f"built on it load; it holds the slice {kind}. Made by `{results['command']}`."
        )
    if record["format"] != "nested":
        return f"Format `{record['format']}`, {size}. Made by `{results['command']}`."
    most = record["max_bits"]
    loading = _LOADING
    return (
        f"One checkpoint ({size}) whose top 2 to {most} bits of every weight are each a model. Loaded without an argument "
        f"it has {record['bits']} bits; `bits=` gives another bit-width, `max_bits=` fetches no more planes than it "
        f"needs.\n\n{loading}\nMade by `{results['command']}`."
    )


def _table(results: Mapping[str, Any]) -> list[str]:
    """A row per measured slice; a sentence when nothing was measured."""
    datasets = list((results.get("baseline") or {}).get("perplexity") or {})
    if not datasets:
        return ["Nothing was measured when this folder was written.", ""]
    head = ["bits", "average bits", "MB read per token"]
    head += [f"{kind} ({name})" for name in datasets for kind in ("perplexity", "KL")]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    baseline = results["baseline"]
    full = ["full precision", "", number_format.megabytes(baseline.get("bytes"))]
    for name in datasets:
        full += [number_format.significant(baseline["perplexity"][name]), "0"]
    lines.append("| " + " | ".join(full) + " |")
    for entry in results["slices"]:
        row = [str(entry.get("name", entry["bits"])), number_format.average_bits(entry["average_bits"])]
        row.append(number_format.megabytes(entry["bytes"]))
        for name in datasets:
            row += [number_format.significant(entry[kind][name]) for kind in ("perplexity", "kl")]
        lines.append("| " + " | ".join(row) + " |")
    return [*lines, "", "KL is the mean over tokens of KL(full precision ‖ slice) in nats.", ""]


def _warnings(results: Mapping[str, Any]) -> list[str]:
    """Warnings of the job as a list; nothing without any."""
    warnings = results.get("warnings") or []
    return ["## Warnings", "", *(f"- {warning}" for warning in warnings), ""] if warnings else []

"""The stage ``generate``: what a model goes on with at each width, how fast, and how much it reads for it."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from matquant.formats.slice_spec import SliceSpec
from matquant.inference import replace_linears, set_bits
from matquant.models.blocks import BlockModel
from matquant.models.loading import LoadedModel
from matquant.report import formatting


class Clock(BaseStreamer):
    """Notes when a prompt and each token after it were there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        value.cpu()  # waits for the device
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: the prompt, and the token that its pass gives, are not counted. None for fewer than two tokens."""
        first, last = self.times[1], self.times[-1]
        return (len(self.times) - 2) / (last - first) if len(self.times) > 2 else None

    @property
    def prompt_seconds(self) -> float:
        return self.times[1] - self.times[0]


def generate(
    loaded: LoadedModel,
    blocks: BlockModel,
    variants: Sequence[SliceSpec],
    prompt: str,
    max_new_tokens: int,
    device: torch.device,
) -> dict[str, Any]:
    """Greedy text at the width or allocation of every variant, all from one resident copy of their parent.

    Args:
        loaded: whose model gets its values for good: nothing can be read block by block afterwards.
        variants: of one parent, of which only the planes that they need are kept.

    Returns:
        For the results: ``prompt``, and for each variant ``name``, ``text``, ``tokens_per_second`` (decoding), ``seconds`` of
        the prompt, and ``bytes`` that a token reads of the quantized layers.
    """
    parent = variants[0].parent
    dtype = loaded.compute_dtype(device)
    names = [name for block in parent.blocks for name in block["layers"]]
    blocks.fill({f"{name}.weight" for name in names}, device, dtype)
    replace_linears(blocks.model, parent, max(variant.bits_of(name) for variant in variants for name in names))
    model = blocks.model.to(device)
    inputs = loaded.tokenizer(prompt, return_tensors="pt").to(device)
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": loaded.tokenizer.pad_token_id or 0}
    rows = []
    model.generate(
        **inputs, **settings, max_new_tokens=2
    )  # kernels are compiled and memory is found before a clock runs
    for variant in variants:
        set_bits(model, {name: variant.bits_of(name) for name in names})
        clock = Clock()
        found = model.generate(**inputs, **settings, max_new_tokens=max_new_tokens, streamer=clock)
        text = loaded.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append(
            {
                "name": variant.name,
                "text": text,
                "tokens_per_second": clock.tokens_per_second,
                "prompt_seconds": clock.prompt_seconds,
                "bytes": variant.bytes_read(),
            }
        )
    return {"prompt": prompt, "variants": rows}


def show(results: Mapping[str, Any], console: Console) -> None:
    """Print what the stage found, if it ran."""
    if "generate" not in results:
        return
    table = Table(title=repr(results["generate"]["prompt"]), show_lines=True)
    for column in ("bits", "tokens/s", "MB a token", "text"):
        table.add_column(column)
    for row in results["generate"]["variants"]:
        speed = formatting.significant(row["tokens_per_second"])
        table.add_row(row["name"], speed, formatting.megabytes(row["bytes"]), repr(row["text"])[1:-1])
    console.print(table)

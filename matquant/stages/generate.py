"""Stage generate: greedy text at each slice, decoding speed, and bytes read per token."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from matquant import number_format
from matquant.evaluate.slices import model_name
from matquant.formats.slice_spec import SliceSpec
from matquant.inference import replace_linears, set_bits
from matquant.memory import MemoryEstimate
from matquant.models.finite import checked_logits
from matquant.models.model_sizes import ModelSizes
from matquant.stages.load import LoadedJob
from matquant.stages.runtime import Runtime


class TimingStreamer(BaseStreamer):
    """Streamer of Transformers that records the time of the prompt and of each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Record the time of the next tokens."""
        value.cpu()  # synchronizes with the device
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """End of the text; nothing to record."""

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, without the prompt and the token of its forward pass; None for fewer than two tokens."""
        first, last = self.times[1], self.times[-1]
        return (len(self.times) - 2) / (last - first) if len(self.times) > 2 else None

    @property
    def prompt_seconds(self) -> float:
        """Seconds of the prompt."""
        return self.times[1] - self.times[0]


def generate(job: LoadedJob, slices: Sequence[SliceSpec], runtime: Runtime) -> dict[str, Any]:
    """Generate text with every slice, all from one resident copy of their parent.

    The whole model is loaded for good: no block can be loaded by itself afterwards.

    Args:
        slices: of one parent; only the planes that they need are kept.

    Returns:
        ``prompt``, and for each slice ``name``, ``text``, ``tokens_per_second`` of decoding, ``prompt_seconds``, and ``bytes``
        of the quantized layers that a token reads.

    Raises:
        UserError: logits of a slice are not finite.
    """
    parent, prompt, device = slices[0].parent, str(job.config.prompt), runtime.device
    dtype = job.model.compute_dtype(device)
    names = [name for block in parent.blocks for name in block["layers"]]
    job.blocks.fill({f"{name}.weight" for name in names}, device, dtype)
    replace_linears(job.blocks.model, parent, max(one.bits_of(name) for one in slices for name in names))
    model, tokenizer = job.blocks.model.to(device), job.model.tokenizer
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": tokenizer.pad_token_id or 0}
    model.generate(**inputs, **settings, max_new_tokens=2)  # compile kernels and allocate memory before any timing
    rows = []
    for one in slices:
        set_bits(model, {name: one.bits_of(name) for name in names})
        streamer = TimingStreamer()
        with checked_logits(model, model_name(one.name)):
            found = model.generate(**inputs, **settings, max_new_tokens=job.config.max_new_tokens, streamer=streamer)
        text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        rows.append(
            {
                "name": one.name,
                "text": text,
                "tokens_per_second": streamer.tokens_per_second,
                "prompt_seconds": streamer.prompt_seconds,
                "bytes": one.bytes_read(),
            }
        )
    return {"prompt": prompt, "slices": rows}


def generate_memory(
    sizes: ModelSizes, packed: int, parent: int, prompt: int, new: int, *, on_gpu: bool
) -> MemoryEstimate:
    """Peak memory of generating ``new`` tokens after a prompt of ``prompt`` tokens.

    Everything that is not quantized is held in the dtype of the computation, and the planes that are read, with their scales;
    keys and values of every token (at most two hidden states per block), and the activations of the prompt in one block. While
    a block of the parent is packed, its codes are mapped.

    Args:
        packed: bytes of the planes that are read and their scales.
        parent: bytes of the parent.
    """
    dense = (sizes.parameters - sizes.quantized) * sizes.computing
    cache = 2 * sizes.blocks * (prompt + new) * sizes.hidden * sizes.computing
    held = dense + packed + cache + sizes.activation_bytes(prompt)
    mapped = parent // max(1, sizes.blocks)
    largest_dense = sizes.block - sum(one.rows * one.columns for one in sizes.layers)
    reading = sizes.load_bytes(max(sizes.embeddings, largest_dense))
    if on_gpu:
        return MemoryEstimate(stage="generate", device=held, host=max(2 * mapped, reading), disk=0)
    return MemoryEstimate(stage="generate", device=0, host=held + mapped, disk=0)


def show(generated: Mapping[str, Any] | None, console: Console) -> None:
    """Print the texts, if the stage ran."""
    if generated is None:
        return
    table = Table(title=repr(generated["prompt"]), show_lines=True)
    for column in ("bits", "tokens/s", "MB a token", "text"):
        table.add_column(column)
    for row in generated["slices"]:
        speed = number_format.significant(row["tokens_per_second"])
        table.add_row(row["name"], speed, number_format.megabytes(row["bytes"]), repr(row["text"])[1:-1])
    console.print(table)

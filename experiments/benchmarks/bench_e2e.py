"""Time prefill and decoding of a whole model in Transformers at each bit-width, against the dense model in the same run.

    make bench-e2e                                                      # the shape of the shipped model, on this machine
    .venv/bin/python experiments/benchmarks/bench_e2e.py --model llama-8b --device cuda --batch 1,4,16,64
    .venv/bin/python experiments/benchmarks/bench_e2e.py --model llama-8b --device cuda --compile
    .venv/bin/python experiments/benchmarks/bench_e2e.py --model llama-8b --device cuda --layers separate,fused

Weights are random, since speed does not depend on them. On a GPU decoding replays a CUDA graph of one step over a static
cache; with --compile it is a step of the compiled model. On a CPU it is a plain loop. With --layers separate,fused each
bit-width is measured twice: with a launch for every layer, and with one for q, k and v, and one for gate and up. The floor is
the time to read the bytes of a step (planes and scales, dense weights, key-value cache) at the bandwidth of a device-to-device
copy, measured in the same run. Writes results.json into ``--out``.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicCache, StaticCache

from matquant.formats.nested import WeightFormat
from matquant.formats.packed import LayerSpec, NestedSpec
from matquant.inference import nested_layers, set_bits
from matquant.inference.model_surgery import fuse_layers
from matquant.report.provenance import provenance
from matquant.transformers.layers import place_layers

TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
REPEATS = 5
GROUP_SIZE = 128
LAYERS = ("separate", "fused")
STRETCH = 1.25  # of the planes 5 to 8, as method=matgptq has by default
COPY_BYTES = 2**31  # of the copy that measures the bandwidth


def config_of(name: str) -> Any:
    """Config of a folder, or of the shape ``llama-8b``."""
    if name != "llama-8b":
        return AutoConfig.from_pretrained(name)
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )


def nested_spec(config: Any, dtype: torch.dtype) -> NestedSpec:
    """Description of a nested checkpoint of all linear layers but the head, in the default format."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    scale_dtype = torch.float16 if dtype == torch.float32 else dtype
    form = WeightFormat(
        group_size=GROUP_SIZE, zero_point_offset=8.0, scale_dtype=scale_dtype, has_zero_points=False, stretch=STRETCH
    )
    layers = {
        name: LayerSpec(out_features=module.out_features, in_features=module.in_features, format=form)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    return NestedSpec(layers=layers, bits=8, max_bits=8, modules_to_not_convert=["lm_head"])


def make_model(config: Any, dtype: torch.dtype, device: torch.device, nested: bool) -> Any:
    """Model with random weights; with ``nested`` all linear layers but the head have 8-bit nested weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if nested:
        place_layers(model, nested_spec(config, dtype))
    model.to_empty(device=device)
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()  # also computed buffers, such as rotary frequencies
    model.tie_weights()
    for layer in nested_layers(model).values():
        layer.planes.random_(-(2**31), 2**31 - 1)
        layer.scales.uniform_(-1e-4, 1e-4)
    return model.eval().requires_grad_(False)


def step_bytes(model: Any, cache: int) -> int:
    """Bytes that one decoding step reads: layers at their bits, dense weights without the embeddings, key-value cache."""
    embeddings = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    dense = sum(p.numel() * p.element_size() for p in model.parameters() if p is not embeddings or p is head)
    return dense + sum(layer.bytes_read() for layer in nested_layers(model).values()) + cache


def cache_bytes(model: Any, batch: int, length: int) -> int:
    """Bytes of the key-value cache."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * length * batch * model.dtype.itemsize


def median_seconds(call: Callable[[], Any], device: torch.device, repeats: int = REPEATS) -> float:
    """Median time of a call."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if ``device`` is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    size = COPY_BYTES if device.type == "cuda" else COPY_BYTES // 16
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device)


@torch.no_grad()
def measure(model: Any, batch: int, prompt: int, steps: int, compiled: bool) -> dict[str, float]:
    """Tokens per second of prefill and of decoding, over the whole batch."""
    device = model.device
    ids = torch.arange(batch * prompt, device=device).view(batch, prompt) % model.config.vocab_size
    length = prompt + steps + 8
    on_gpu = device.type == "cuda"
    cache = StaticCache(config=model.config, max_cache_len=length) if on_gpu else None

    def prefill() -> tuple[Any, Tensor]:
        if cache is not None:
            cache.reset()
        kept = cache if cache is not None else DynamicCache(config=model.config)
        logits = model(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1).logits
        return kept, logits[:, -1:].argmax(-1)

    prefill()  # compiles the kernels
    prompt_seconds = median_seconds(prefill, device, 3)
    decode = decode_graph if on_gpu else decode_loop
    torch._dynamo.reset()  # one graph per bit-width and batch size would exceed the recompile limit
    step_seconds = decode(torch.compile(model, fullgraph=True) if compiled else model, prefill, steps)
    return {
        "prompt_tokens_per_second": batch * prompt / prompt_seconds,
        "decode_tokens_per_second": batch / step_seconds,
        "step_ms": step_seconds * 1000,
        "bytes": step_bytes(model, cache_bytes(model, batch, length if on_gpu else prompt + steps // 2)),
    }


def decode_loop(model: Any, prefill: Callable[[], tuple[Any, Tensor]], steps: int) -> float:
    """Seconds of one decoding step in a plain loop."""
    kept, token = prefill()
    start = time.perf_counter()
    for _ in range(steps):
        token = model(input_ids=token, past_key_values=kept, use_cache=True).logits[:, -1:].argmax(-1)
    return (time.perf_counter() - start) / steps


def decode_graph(model: Any, prefill: Callable[[], tuple[Any, Tensor]], steps: int) -> float:
    """Seconds of one decoding step as a replayed CUDA graph."""
    kept, first = prefill()
    token = first.clone()

    def step() -> None:
        token.copy_(model(input_ids=token, past_key_values=kept, use_cache=True).logits[:, -1:].argmax(-1))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    times = []
    for _ in range(REPEATS):
        prefill()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def run(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    bit_widths: Sequence[int],
    batches: Sequence[int],
    layers: Sequence[str],
    prompt: int,
    steps: int,
    compiled: bool,
) -> list[dict[str, Any]]:
    """Rows of the dense model and of each bit-width, at each batch size, with layers separate or fused."""
    rate = copy_bandwidth(device)
    print(
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}: a copy moves {rate / 1e9:.0f} GB/s"
    )
    speeds = f"{'prompt tok/s':>13} {'decode tok/s':>13} {'ms/step':>10} {'floor share':>13} {'x':>6}"
    print(f"{'bits':>7} {'layers':>9} {'batch':>6} {speeds}")
    rows: list[dict[str, Any]] = []
    full: dict[int, float] = {}
    for nested in (False, True):
        model = make_model(config, dtype, device, nested)
        for kind in layers if nested else ["dense"]:
            if kind == "fused":
                fuse_layers(model)
            for bits, batch in itertools.product(bit_widths if nested else [None], batches):
                if bits is not None:
                    set_bits(model, bits)
                row = {"bits": bits or str(dtype).removeprefix("torch."), "layers": kind, "batch": batch}
                row |= measure(model, batch, prompt, steps, compiled)
                full.setdefault(batch, row["step_ms"])
                row |= {"floor_ms": row["bytes"] / rate * 1000, "speedup": full[batch] / row["step_ms"]}
                rows.append(row)
                print(line(row), flush=True)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def line(row: dict[str, Any]) -> str:
    """Line of the table."""
    speeds = (
        f"{row['prompt_tokens_per_second']:>13.1f} {row['decode_tokens_per_second']:>13.1f} {row['step_ms']:>10.2f}"
    )
    share = row["floor_ms"] / row["step_ms"]
    return f"{row['bits']:>7} {row['layers']:>9} {row['batch']:>6} {speeds} {share:>13.2f} {row['speedup']:>6.2f}"


def layers_of(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> list[str]:
    """Kinds of layers to measure, ``separate`` first: fusing moves weights, and is not undone. Exits for a wrong choice."""
    given = (arguments.layers or ("separate" if arguments.compile else "fused")).split(",")
    if unknown := [kind for kind in given if kind not in LAYERS]:
        parser.error(f"--layers {unknown[0]} is unknown; give {' or '.join(LAYERS)}, or both with a comma.")
    if arguments.compile and "fused" in given:
        parser.error(
            "A compiled model multiplies its layers separately: leave out --compile, or give --layers separate."
        )
    if arguments.layers and "fused" in given and torch.device(arguments.device).type != "cuda":
        parser.error(f"Layers are fused on GPUs alone, and --device is {arguments.device}: give --layers separate.")
    return [kind for kind in LAYERS if kind in given]


def main() -> None:
    """Measure the model of the command line and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="folder with a config.json, or llama-8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="default: float16 on a GPU, float32 on a CPU")
    parser.add_argument("--bits", default="2,3,4,8")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, default=64, help="decoded tokens")
    parser.add_argument("--compile", action="store_true", help="decode with the model compiled by torch.compile")
    parser.add_argument("--layers", help="separate, fused or both; default: fused, and separate with --compile")
    parser.add_argument("--out", default="outputs/bench_e2e")
    arguments = parser.parse_args()
    layers = layers_of(parser, arguments)
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "float32"))
    bit_widths, batches = ([int(n) for n in text.split(",")] for text in (arguments.bits, arguments.batch))
    rows = run(
        config_of(arguments.model),
        dtype,
        device,
        bit_widths,
        batches,
        layers,
        arguments.prompt,
        arguments.steps,
        arguments.compile,
    )
    about = {
        "provenance": provenance(),
        "model": arguments.model if arguments.model == "llama-8b" else Path(arguments.model).name,
        "dtype": str(dtype),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "prompt": arguments.prompt,
        "steps": arguments.steps,
        "compile": arguments.compile,
    }
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(f"written: {out / 'results.json'}")


if __name__ == "__main__":
    main()

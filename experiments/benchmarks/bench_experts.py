"""Time the experts of one layer in decoding: all in one launch, in a loop, and peers in 16 and 4 bits.

    python experiments/benchmarks/bench_experts.py
    python experiments/benchmarks/bench_experts.py --models qwen3_moe --bits 4 --tokens 1,16

Needs a CUDA device and CuPy; peers of vLLM are timed where it is installed. First the grouped products are compared with
float64, with experts of several bit-widths. A time is a replay of a CUDA graph over several layers and routings, divided by
their number, so that weights come from memory. Columns, in microseconds for a layer:

    grouped_us      route, two grouped products, activation, weighted sum
    loop_us         a loop over the experts that have tokens; it reads the routing on the host, so it is no graph
    graph_loop_us   every expert for all tokens in a graph
    grouped_mm_us   torch._grouped_mm in bfloat16
    vllm_fp16_us    fused_experts of vLLM in float16
    vllm_4bit_us    fused_marlin_moe of vLLM, 4 bits in groups of 128
    floor_us        planes and scales of the experts that have tokens, at the bandwidth of a copy

Missing numbers have their reason in the record. Writes a JSON file.
"""

import argparse
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from kernel_timing import copy_bandwidth, format_of, precompile, replay

from matquant.formats.nested import NestedWeight
from matquant.formats.planes import NestedPlanes
from matquant.formats.tile_layout import TILE, plane_shape
from matquant.inference import cuda_ops, ops
from matquant.inference.expert_ops import StackedExperts, route
from matquant.inference.gemm_shape import GemmShape
from matquant.inference.launch_config import make_launch_config
from matquant.inference.moe_launch import choose_block_m, make_moe_launch
from matquant.report.provenance import provenance

GROUP_SIZE = 128
STRETCH = 1.25
LAYERS = 3
MIN_BYTES = 2**28  # weights that the launches of one graph read at least, beyond the second-level cache
LOOP_CALLS = 4
VLLM_FUSED = "vllm.model_executor.layers.fused_moe"
PEER_LINE = "PEER "
MARLIN_MODULES = (f"{VLLM_FUSED}.experts.marlin_moe", f"{VLLM_FUSED}.fused_marlin_moe")


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of the experts of one layer."""

    experts: int
    top_k: int
    hidden: int
    inner: int

    def bytes_of_expert(self, bits: int) -> float:
        """Bytes of planes and scales."""
        return 3 * self.hidden * self.inner * (bits / 8 + 2 / GROUP_SIZE)


MODELS = {"mixtral": Model(8, 2, 4096, 14336), "qwen3_moe": Model(128, 8, 2048, 768)}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Experts of one layer: gate and up in one matrix, and down."""

    first: StackedExperts
    down: StackedExperts


def stacked(planes: Tensor, scales: Tensor, rows: int, columns: int) -> StackedExperts:
    return StackedExperts(
        planes=planes,
        scales=[scales],
        scale_bits=[],
        zeros=None,
        out_features=[rows],
        in_features=columns,
        format=format_of(GROUP_SIZE, STRETCH),
    )


def random_stack(experts: int, rows: int, columns: int) -> StackedExperts:
    """Matrices of random codes."""
    shape = plane_shape(experts * rows, columns)
    planes = torch.empty(8, *shape, dtype=torch.int32, device="cuda").random_(-(2**31), 2**31 - 1)
    scales = torch.rand(columns // GROUP_SIZE, shape[0], 8, 4, 2, device="cuda").half() * 1e-3
    return stacked(planes, scales, rows, columns)


def random_layer(model: Model) -> Layer:
    return Layer(
        random_stack(model.experts, 2 * model.inner, model.hidden),
        random_stack(model.experts, model.hidden, model.inner),
    )


def random_step(
    model: Model, tokens: int, seed: int, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, router weights, and different experts for each token."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, model.hidden, generator=generator, device="cuda").to(dtype)
    weights, ids = torch.rand(tokens, model.experts, generator=generator, device="cuda").topk(model.top_k)
    return x, weights.to(dtype), ids


def gated(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, -1)
    return F.silu(gate) * up


def together(layer: Layer, bits: Sequence[int], x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The experts of all tokens by grouped products."""
    routing = route(ids, range(len(bits)), len(bits))
    inner = gated(layer.first.linear(x, routing, bits))
    out = layer.down.linear(inner, routing, bits).view(*ids.shape, -1)
    return (out * weights[:, :, None]).sum(1)


def matrix(stack: StackedExperts, index: int) -> NestedPlanes:
    """Matrix of one expert."""
    (rows,) = stack.out_features
    part = slice(index * rows // TILE, (index + 1) * rows // TILE)
    return NestedPlanes(
        planes=stack.planes[:, part],
        scales=stack.scales[0][:, part],
        zeros=None,
        out_features=rows,
        in_features=stack.in_features,
        format=stack.format,
    )


def one_at_a_time(layer: Layer, bits: int, x: Tensor, weights: Tensor, ids: Tensor, *, all_tokens: bool) -> Tensor:
    """The experts in a loop.

    Args:
        all_tokens: compute every expert for all tokens, as a CUDA graph needs it.
    """
    result = torch.zeros_like(x)
    count = len(layer.down.planes[0]) * TILE // layer.down.out_features[0]
    for index in range(count):
        weight = torch.where(ids == index, weights, 0).sum(-1, keepdim=True)
        tokens = None if all_tokens else weight[:, 0].nonzero()[:, 0]
        if tokens is not None and not len(tokens):
            continue
        own = x if tokens is None else x[tokens]
        out = ops.linear(gated(ops.linear(own, matrix(layer.first, index), bits)), matrix(layer.down, index), bits)
        if tokens is None:
            result += out * weight
        else:
            result.index_add_(0, tokens, out * weight[tokens])
    return result


def by_grouped_mm(first: Tensor, down: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The experts by ``torch._grouped_mm`` with dense weights [experts, rows, columns]."""
    pairs = ids.flatten().argsort(stable=True)
    counts = (ids.flatten()[:, None] == torch.arange(len(first), device=ids.device)).sum(0)
    ends = counts.cumsum(0).int()
    inner = gated(torch._grouped_mm(x[pairs // ids.shape[1]], first.transpose(1, 2), offs=ends))
    out = torch.empty(len(pairs), x.shape[1], dtype=x.dtype, device=x.device)
    out[pairs] = torch._grouped_mm(inner, down.transpose(1, 2), offs=ends)
    return (out.view(*ids.shape, -1) * weights[:, :, None]).sum(1)


def worst_error() -> float:
    """Largest error of grouped products at several bit-widths, as a multiple of that of rounding the exact result."""
    worst = 0.0
    for experts, rows, columns, tokens in (
        (8, 384, 1024, 1),
        (8, 384, 1024, 40),
        (128, 128, 768, 16),
        (8, 256, 512, 300),
    ):
        generator = torch.Generator("cuda").manual_seed(rows)
        dense = [
            NestedWeight(
                codes=torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device="cuda", generator=generator),
                scales=(
                    torch.rand(rows, columns // GROUP_SIZE, device="cuda", generator=generator) * 0.02 + 0.001
                ).half(),
                zeros=None,
                format=format_of(GROUP_SIZE, STRETCH),
            )
            for _ in range(experts)
        ]
        packed = [NestedPlanes.pack(one) for one in dense]
        stack = stacked(
            torch.cat([one.planes for one in packed], 1), torch.cat([one.scales for one in packed], 1), rows, columns
        )
        bits = [(2, 4, 8)[index % 3] for index in range(experts)]
        x, _, ids = random_step(Model(experts, 2, columns, rows), tokens, seed=tokens)
        found = stack.linear(x, route(ids, range(experts), experts), bits)
        exact = torch.zeros(tokens * 2, rows, dtype=torch.float64, device="cuda")
        for index, weight in enumerate(dense):
            pairs = (ids.flatten() == index).nonzero()[:, 0]
            exact[pairs] = x[pairs // 2].double() @ weight.dequantize(bits[index]).double().T
        error, best = (torch.linalg.norm(one.double() - exact).item() for one in (found, exact.half()))
        worst = max(worst, error / best)
    return worst


def compile_kernels(models: Sequence[Model], widths: Sequence[int], batches: Sequence[int]) -> None:
    """Compile all kernels at once, by all cores."""
    device, plans = cuda_ops.device_limits(0), []
    for model, bits, tokens in itertools.product(models, widths, batches):
        for rows, depth in ((2 * model.inner, model.hidden), (model.hidden, model.inner)):
            shape = functools.partial(
                GemmShape, rows=rows, depth=depth, bits=bits, format=format_of(GROUP_SIZE, STRETCH), dtype=torch.float16
            )
            plans.append(make_moe_launch(shape(tokens=choose_block_m(tokens, model.top_k, model.experts)), device))
            plans += [
                make_launch_config(shape(tokens=count), device) for count in (1, 16, 32, 64) if count <= max(8, tokens)
            ]
    precompile(plans)


def host_time(call: Callable[[int], Any]) -> float:
    """Microseconds of a call that waits for the device."""
    call(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for seed in range(LOOP_CALLS):
        call(seed)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / LOOP_CALLS


def timed(call: Callable[[int], Any], count: int) -> float | str:
    """Microseconds of one of ``count`` launches in a graph; the reason if it cannot be measured."""
    try:
        return round(replay([functools.partial(call, seed) for seed in range(count)]), 1)
    except Exception as error:  # of a peer: its releases differ
        return f"{type(error).__name__}: {str(error)[:200]}"


def marlin_moe() -> Callable[..., Tensor]:
    """``fused_marlin_moe`` of vLLM, of whichever module holds it. Raises ImportError."""
    for name in MARLIN_MODULES:
        try:
            found: Callable[..., Tensor] = importlib.import_module(name).fused_marlin_moe
            return found
        except (ImportError, AttributeError):
            continue
    raise ImportError("vLLM has no fused_marlin_moe, or is not installed")


def marlin_layer(model: Model) -> dict[str, Any]:
    """Arguments of ``fused_marlin_moe``: random weights in Marlin's shapes, [experts, K / 16, 2 N]."""
    from vllm.scalar_type import scalar_types

    def packed(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        shape = (model.experts, columns // 16, 2 * rows)
        weight = torch.empty(shape, dtype=torch.int32, device="cuda").random_(-(2**31), 2**31 - 1)
        return weight, torch.rand(model.experts, columns // 128, rows, device="cuda").half() * 1e-3

    first, down = packed(2 * model.inner, model.hidden), packed(model.hidden, model.inner)
    names = ("w1", "w1_scale", "w2", "w2_scale")
    return dict(zip(names, (*first, *down), strict=True)) | {"quant_type_id": scalar_types.uint4b8.id}


def by_marlin(arguments: dict[str, Any], x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    function = marlin_moe()
    given = arguments | {
        "topk_weights": weights.float(),
        "topk_ids": ids.int(),
        "global_num_experts": arguments["w1"].shape[0],
    }
    parameters = inspect.signature(function).parameters
    empty = {name: None for name, one in parameters.items() if one.default is inspect.Parameter.empty}
    return function(
        **empty | {"hidden_states": x} | {name: value for name, value in given.items() if name in parameters}
    )


def by_vllm(first: Tensor, down: Tensor, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    fused: Callable[..., Tensor] = importlib.import_module(VLLM_FUSED).fused_experts
    return fused(x, first, down, weights.float(), ids.int())


# Columns of the peers, the dtype of the activations, and one layer.
PEERS: dict[str, tuple[torch.dtype, Callable[..., Tensor]]] = {
    "grouped_mm_us": (torch.bfloat16, by_grouped_mm),
    "vllm_fp16_us": (torch.float16, by_vllm),
    "vllm_4bit_us": (torch.float16, by_marlin),
}


def peer_times(name: str, batches: Sequence[int]) -> dict[int, dict[str, float | str]]:
    """Times of the peers by number of tokens; each peer has a process, since it may leave the device unusable.

    Args:
        name: key of ``MODELS``.
    """
    times: dict[int, dict[str, float | str]] = {tokens: {} for tokens in batches}
    for column in PEERS:
        command = [
            sys.executable,
            __file__,
            "--peer",
            column,
            "--models",
            name,
            "--tokens",
            ",".join(map(str, batches)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        found = {
            int(tokens): value
            for line in done.stdout.splitlines()
            if line.startswith(PEER_LINE)
            for tokens, value in json.loads(line.removeprefix(PEER_LINE)).items()
        }
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = f"its process ended with status {done.returncode}: {lines[-1][:200]}"
        for tokens in batches:
            times[tokens][column] = found.get(tokens, reason)
    return times


def print_peer_times(column: str, model: Model, batches: Sequence[int]) -> None:
    """Print the time of one peer for each number of tokens, as JSON."""
    dtype, function = PEERS[column]
    sizes = ((model.experts, 2 * model.inner, model.hidden), (model.experts, model.hidden, model.inner))
    try:
        if function is by_marlin:
            marlin_moe()
            made: list[Any] = [(marlin_layer(model),) for _ in range(LAYERS)]
        else:
            made = [
                tuple(torch.empty(size, dtype=dtype, device="cuda").normal_(0, 0.02) for size in sizes)
                for _ in range(LAYERS)
            ]
    except ImportError as error:
        print(PEER_LINE + json.dumps(dict.fromkeys(batches, str(error))), flush=True)
        return
    for tokens in batches:
        count = launches(model, tokens, 16)
        steps = [random_step(model, tokens, seed, dtype) for seed in range(count)]
        call = functools.partial(call_peer, function, made, steps)
        print(PEER_LINE + json.dumps({tokens: timed(call, count)}), flush=True)


def call_peer(function: Callable[..., Tensor], layers: Sequence[Any], steps: Sequence[Any], seed: int) -> Tensor:
    return function(*layers[seed % len(layers)], *steps[seed])


def active_experts(model: Model, tokens: int, count: int) -> float:
    """Mean number of experts that have tokens."""
    return sum(len(random_step(model, tokens, seed)[2].unique()) for seed in range(count)) / count


def launches(model: Model, tokens: int, bits: int) -> int:
    """Number of launches of a graph, each with a routing of its own."""
    active = min(model.experts, tokens * model.top_k)
    return int(min(24, max(LAYERS, -(-MIN_BYTES // (active * model.bytes_of_expert(bits))))))


def measure(name: str, widths: Sequence[int], batches: Sequence[int], bandwidth: float) -> Iterator[dict[str, Any]]:
    """Yield the times of each bit-width and number of tokens."""
    model, peers = MODELS[name], peer_times(name, batches)
    layers = [random_layer(model) for _ in range(LAYERS)]
    for bits, tokens in itertools.product(widths, batches):
        count = launches(model, tokens, bits)
        steps = [random_step(model, tokens, seed) for seed in range(count)]
        uniform = [bits] * model.experts

        def grouped(seed: int, steps: Any = steps, uniform: Any = uniform) -> Tensor:
            return together(layers[seed % LAYERS], uniform, *steps[seed])

        def loop(seed: int, steps: Any = steps, bits: int = bits, all_tokens: bool = False) -> Tensor:
            return one_at_a_time(layers[seed % LAYERS], bits, *steps[seed % len(steps)], all_tokens=all_tokens)

        yield {
            "bits": bits,
            "tokens": tokens,
            "grouped_us": timed(grouped, count),
            "loop_us": round(host_time(loop), 1),
            "graph_loop_us": timed(functools.partial(loop, all_tokens=True), 2),
            **peers[tokens],
            "floor_us": round(active_experts(model, tokens, count) * model.bytes_of_expert(bits) / bandwidth * 1e6, 1),
        }


def main() -> None:
    """Check, measure and record what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--bits", default="2,3,4,8")
    parser.add_argument("--tokens", default="1,4,16,64")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-experts.json"))
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)  # of one peer's process
    given = parser.parse_args()
    widths, batches = ([int(one) for one in text.split(",")] for text in (given.bits, given.tokens))
    names = given.models.split(",")
    if unknown := set(names) - MODELS.keys():
        parser.error(f"--models: {', '.join(sorted(unknown))} is unknown; choose from {', '.join(MODELS)}")
    if given.peer:
        print_peer_times(given.peer, MODELS[names[0]], batches)
        return
    start = time.perf_counter()
    error = worst_error()
    print(f"largest error: {error:.4f} times that of rounding", flush=True)
    if not error <= 1.2:
        raise SystemExit("WRONG")
    compile_kernels([MODELS[name] for name in names], widths, batches)
    print(f"checked and compiled after {time.perf_counter() - start:.0f} s", flush=True)
    bandwidth, rows = copy_bandwidth(), []
    torch.cuda.empty_cache()
    for name in names:
        for row in measure(name, widths, batches, bandwidth):
            rows.append({"model": name, **row})
            print(json.dumps(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance(), "bandwidth": bandwidth, "largest_error": error, "timings": rows}
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s in all; written to {given.out}")


if __name__ == "__main__":
    main()

"""Times the matmul of ``kernels/gemm.cu`` against ``F.linear`` in float16, after checking it against float64.

    make bench-kernels                                                     # all shapes, widths and batches
    .venv/bin/python experiments/benchmarks/bench_kernels.py --shapes 4096x4096 --bits 2,4 --tokens 1,16
    .venv/bin/python experiments/benchmarks/bench_kernels.py --candidates             # times other tile configurations too
    .venv/bin/python experiments/benchmarks/bench_kernels.py --peers humming,marlin   # other packages in the same run
    .venv/bin/python experiments/benchmarks/bench_kernels.py --overhead-only          # time of the host for one call

Needs a CUDA device, CuPy and nothing of Hydra. Every time is a replay of one CUDA graph with a launch for each of several
copies of the weights, together more than three times the second-level cache, so that weights come from memory. The floor is
the time that planes, scales, activations and outputs take at the bandwidth of a device-to-device copy, measured in the same
run. Writes results.json and results.png into ``--out``.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from kernel_candidates import tile_configs
from kernel_checks import activations, check, checks
from kernel_peers import KernelPeer, PeerTiming, open_peers
from kernel_peers import measure as measure_peer

from matquant.cuda import load
from matquant.cuda.cuda_driver import architecture, nvrtc_compile, nvrtc_version
from matquant.cuda.source import compile_options, cubin, read_source
from matquant.formats.bits import STRICT_BITS
from matquant.formats.nested import NestedWeight, WeightFormat
from matquant.formats.planes import NestedPlanes
from matquant.inference import NestedLinear, cuda_ops, ops
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families import choose_tile_config
from matquant.inference.kernel_families.base import TileConfig
from matquant.inference.kernel_families.mma import GEMM_MAX_M
from matquant.inference.launch_config import LaunchConfig, make_launch_config, max_tokens
from matquant.report.provenance import provenance

SHAPES = "4096x4096,4096x14336,14336x4096,8192x8192,16384x16384"
BATCHES = "1,2,3,4,5,8,12,16,32,64,128,512"
REPLAYS = 7
WARM_SECONDS = 0.05
OVERHEAD_TOKENS = (1, 32)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """One line: times in microseconds, ``faster`` over float16, ``floor_share`` of the floor, ``gb_per_s`` of bytes read."""

    rows: int
    depth: int
    bits: int
    stretch: float
    tokens: int
    us: float
    fp16_us: float
    faster: float
    floor_us: float
    floor_share: float
    gb_per_s: float
    tile: dict[str, int] | None
    registers: int = 0
    chosen: bool = True


def replay(launches: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of one launch: the median replay of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches[:2]:
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    warm = time.perf_counter() + WARM_SECONDS  # clocks fall while the host prepares
    while time.perf_counter() < warm:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second that a copy on the device moves, read and written. Not from a graph: there the copy engine does it."""
    source = torch.randint(0, 255, (2**32,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.nbytes / statistics.median(times)


def problem_of(tokens: int, rows: int, depth: int, bits: int, group: int, stretch: float) -> GemmShape:
    return GemmShape(
        tokens=tokens, rows=rows, depth=depth, bits=bits, dtype=torch.float16, format=format_of(group, stretch)
    )


def format_of(group: int, stretch: float) -> WeightFormat:
    return WeightFormat(
        group_size=group, zero_point_offset=8.0, scale_dtype=torch.float16, has_zero_points=False, stretch=stretch
    )


def _compile(job: tuple[str, dict[str, int], str]) -> None:
    source, defines, target = job
    cubin(read_source(source), compile_options(target, defines), nvrtc_version(), nvrtc_compile)


def precompile(plans: Sequence[LaunchConfig]) -> None:
    """Fill the cache of cubins with all cores; afterwards each is only loaded."""
    different = {(p.source, tuple(sorted(p.defines.items()))) for p in plans}
    target = architecture(torch.cuda.get_device_capability())
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        list(pool.map(_compile, [(source, dict(defines), target) for source, defines in different], chunksize=2))


class Bench:
    """Weights of one shape, width and stretch, in as many copies as exceed the cache."""

    def __init__(
        self, rows: int, depth: int, bits: int, group: int, stretch: float, device: DeviceLimits, *, pdl: bool
    ) -> None:
        self.rows, self.depth, self.bits, self.group, self.stretch = rows, depth, bits, group, stretch
        self.device, self.pdl = device, pdl
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = max(3, -(-4 * cache // (rows * depth * bits // 8)))
        shape = (copies, bits, -(-rows // 64), -(-depth // 64), 32, 4)
        self.planes = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device="cuda")
        self.scales = torch.rand(copies, depth // group, shape[2], 8, 4, 2, device="cuda").half()

    def launches(self, plan: LaunchConfig, tokens: int) -> tuple[list[Callable[[], None]], int, int]:
        """(one launch for each copy, registers, bytes of local memory)."""
        kernel = load(plan.source, plan.function, defines=plan.defines, prefer_shared=True, pdl=self.pdl)
        x, y = (
            activations(tokens, self.depth, torch.float16),
            torch.empty(tokens, self.rows, device="cuda", dtype=torch.float16),
        )
        workspace = torch.empty(plan.workspace, device="cuda")
        semaphores = torch.zeros(plan.tile_semaphores, dtype=torch.int32, device="cuda")

        def launch(planes: Tensor, scales: Tensor) -> None:
            weight = plan.weight_arguments(planes, scales, None)
            args = plan.arguments(weight, x, None, y, workspace, semaphores, tokens)
            kernel.launch(plan.grid, plan.block, args, plan.shared_bytes)

        pairs = zip(self.planes, self.scales, strict=True)
        return [lambda p=p, s=s: launch(p, s) for p, s in pairs], kernel.registers, kernel.local_bytes

    def time(self, tokens: int, tile: TileConfig) -> tuple[float, int] | None:
        """(microseconds, registers); None for a tile that spills registers, which is never chosen."""
        made = make_launch_config(self.problem(tokens), self.device, tile)
        launches, registers, local = self.launches(made, tokens)
        return None if local else (replay(launches), registers)

    def chosen(self, tokens: int) -> TileConfig | None:
        problem = self.problem(tokens)
        return choose_tile_config(problem, self.device) if tokens <= max_tokens(problem, self.device) else None

    def problem(self, tokens: int) -> GemmShape:
        return problem_of(tokens, self.rows, self.depth, self.bits, self.group, self.stretch)

    def timing(
        self, tokens: int, us: float, fp16_us: float, bandwidth: float, tile: TileConfig | None, registers: int
    ) -> Timing:
        weights = self.rows * self.depth
        moved = weights * self.bits / 8 + weights / self.group * 2 + 2 * tokens * (self.rows + self.depth)
        return Timing(
            rows=self.rows,
            depth=self.depth,
            bits=self.bits,
            stretch=self.stretch,
            tokens=tokens,
            us=us,
            fp16_us=fp16_us,
            faster=fp16_us / us,
            floor_us=moved / bandwidth * 1e6,
            floor_share=moved / bandwidth * 1e6 / us,
            gb_per_s=moved / us / 1e3,
            tile=None if tile is None else dataclasses.asdict(tile),
            registers=registers,
            chosen=tile == self.chosen(tokens),
        )

    def time_many(self, tokens: int) -> float:
        """By the public operator."""
        x = activations(tokens, self.depth, torch.float16)
        weights = [
            NestedPlanes(
                planes=p,
                scales=s,
                zeros=None,
                out_features=self.rows,
                in_features=self.depth,
                format=format_of(self.group, self.stretch),
            )
            for p, s in zip(self.planes, self.scales, strict=True)
        ]
        return replay([functools.partial(ops.linear, x, w, self.bits) for w in weights])

    def time_strips(self, tokens: int) -> float:
        """By strips for cuBLAS, whatever the rule is."""
        with mock.patch.object(cuda_ops, "max_tokens", return_value=0), mock.patch.object(cuda_ops, "launch_cache", {}):
            return self.time_many(tokens)


def call_overhead() -> dict[str, dict[str, float]]:
    """Microseconds of the host for one call outside graphs, at 4 bits of 1024x1024, by number of tokens and kind of call."""
    dense = torch.randn(1024, 1024, device="cuda").half()
    layer = NestedLinear.from_planes(
        NestedWeight(
            codes=torch.randint(0, 256, (1024, 1024), dtype=torch.uint8, device="cuda"),
            scales=torch.rand(1024, 8, device="cuda").half(),
            zeros=None,
            format=format_of(128, stretch=1.0),
        ),
        bits=4,
    )
    packed = layer.nested_planes()
    tensors, sizes = (packed.planes, packed.scales, None, None), (4, 1024, 1024, *packed.format.op_args)
    found = {}
    for tokens in OVERHEAD_TOKENS:
        x = activations(tokens, 1024, torch.float16)
        calls: dict[str, Callable[[], Tensor]] = {
            "NestedLinear": functools.partial(layer, x),
            "ops.linear": functools.partial(ops.linear, x, packed, 4),
            "nested_linear": functools.partial(torch.ops.matquant.nested_linear.default, x, *tensors, *sizes),
            "F.linear": functools.partial(torch.nn.functional.linear, x, dense),
        }
        found[str(tokens)] = {name: host_time(call) for name, call in calls.items()}
    return found


def print_overhead(overhead: dict[str, dict[str, float]]) -> None:
    for tokens, times in overhead.items():
        listed = ", ".join(f"{us:.1f} µs ({name})" for name, us in times.items())
        print(f"tokens: {tokens}. A call takes the host {listed}", flush=True)


def host_time(call: Callable[[], Any]) -> float:
    """Microseconds of the host for one call: the median of 20 rounds."""
    rounds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):  # fewer than the driver lets wait in line
            call()
        rounds.append((time.perf_counter() - start) / 200 * 1e6)
    return statistics.median(rounds)


def fp16_times(rows: int, depth: int, batches: Sequence[int]) -> dict[int, float]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(3, -(-4 * cache // (rows * depth * 2)))
    weights = [torch.randn(rows, depth, device="cuda").half() for _ in range(copies)]
    times = {}
    for tokens in batches:
        x = activations(tokens, depth, torch.float16)
        times[tokens] = replay([functools.partial(torch.nn.functional.linear, x, w) for w in weights])
    return times


def measure(
    args: argparse.Namespace, device: DeviceLimits, bandwidth: float, peers: Sequence[KernelPeer]
) -> Iterator[Timing | PeerTiming]:
    """Times of each shape: first of this project's kernels, then of the peers."""
    for rows, depth in args.shapes:
        fp16 = fp16_times(rows, depth, args.tokens)
        for bits, stretch in itertools.product(args.bits, args.stretch):
            if stretch != args.stretch[0] and bits <= STRICT_BITS:
                continue  # the same kernel
            bench = Bench(rows, depth, bits, args.group, stretch, device, pdl=not args.no_pdl)
            for tokens in args.tokens:
                for tile, us, registers in timed_tiles(bench, tokens, candidates=args.candidates):
                    yield bench.timing(tokens, us, fp16[tokens], bandwidth, tile, registers)
            del bench
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        for bits, peer in itertools.product(args.bits, peers):
            if bits in peer.bits:
                yield from measure_peer(peer, (rows, depth), bits, fp16, replay, cache)


def timed_tiles(bench: Bench, tokens: int, *, candidates: bool) -> Iterator[tuple[TileConfig | None, float, int]]:
    """(tile, microseconds, registers): first the chosen one. The tile of strips is None."""
    problem = bench.problem(tokens)
    if tokens > max_tokens(problem, bench.device):
        yield None, bench.time_many(tokens), 0
        return
    for tile in tile_configs(problem, bench.device, candidates=candidates):
        timed = bench.time(tokens, tile)
        if timed is not None:
            yield tile, *timed
    if candidates and tokens > GEMM_MAX_M:
        yield None, bench.time_strips(tokens), 0


def draw(timings: Sequence[Timing], path: Path) -> None:
    """Times faster than float16 against the batch, a panel for each shape and a line for each width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes, stretch = list(dict.fromkeys((t.rows, t.depth) for t in timings)), timings[0].stretch
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.6 * len(shapes), 3.4), squeeze=False, sharey=True)
    for axis, (rows, depth) in zip(axes[0], shapes, strict=True):
        for bits in sorted({t.bits for t in timings}):
            line = [
                t
                for t in timings
                if (t.rows, t.depth, t.bits) == (rows, depth, bits) and t.chosen and t.stretch == stretch
            ]
            axis.plot(
                [t.tokens for t in line], [t.faster for t in line], marker="o", markersize=3, label=f"{bits} bits"
            )
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(title=f"{rows} x {depth}", xlabel="tokens", xscale="log")
    axes[0][0].set_ylabel("times faster than float16")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="out x in features")
    parser.add_argument("--bits", default="2,3,4,5,6,7,8")
    parser.add_argument("--tokens", default=BATCHES)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument(
        "--stretch", default="1", help="of the steps of the fifth and later planes: 1,1.25 compares both"
    )
    parser.add_argument("--candidates", action="store_true", help="time other tile configurations too")
    parser.add_argument("--no-pdl", action="store_true", help="launch without programmatic dependent launch (PDL)")
    parser.add_argument("--peers", default="", help="kernels of other packages to time as well: humming, marlin")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument(
        "--overhead-only", action="store_true", help="print the host's time of a call, and time no kernel"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-kernels"))
    args = parser.parse_args()
    args.shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    args.bits = [int(b) for b in args.bits.split(",")]
    args.tokens = [int(t) for t in args.tokens.split(",")]
    args.stretch = [float(t) for t in args.stretch.split(",")]
    args.peers = [name for name in args.peers.split(",") if name]
    return args


def all_plans(args: argparse.Namespace, device: DeviceLimits) -> list[LaunchConfig]:
    """Launch configurations of all checks and measurements."""
    problems = [] if args.no_check else [case.problem() for case in checks(args.bits, args.stretch)]
    plans = [make_launch_config(p, device) for p in problems if p.tokens <= max_tokens(p, device)]
    if not args.check_only:
        for rows, depth in args.shapes:
            for bits, stretch in itertools.product(args.bits, args.stretch):
                problems = [problem_of(tokens, rows, depth, bits, args.group, stretch) for tokens in args.tokens]
                for problem in (p for p in problems if p.tokens <= max_tokens(p, device)):
                    plans += [
                        make_launch_config(problem, device, v)
                        for v in tile_configs(problem, device, candidates=args.candidates)
                    ]
    return plans


def command(argv: Sequence[str]) -> str:
    """Command of the run, without its output folder."""
    kept = list(argv)
    if "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return " ".join(["python", *kept])


def line(t: Timing) -> str:
    problem = f"{f'{t.rows}x{t.depth}':>12} {t.bits:5} {t.stretch:7} {t.tokens:6}"
    return f"{problem} {t.us:8.1f} {t.gb_per_s:7.0f} {t.floor_share:6.0%} {t.faster:7.2f}"


def peer_line(t: PeerTiming) -> str:
    problem = f"{f'{t.rows}x{t.depth}':>12} {t.bits:5} {t.peer:>7} {t.tokens:6}"
    return f"{problem} {t.us:8.1f} {'':7} {'':6} {t.faster:7.2f}"


def main() -> None:
    args = arguments()
    peers = open_peers(args.peers, args.bits, args.group)
    if not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device to measure on.")
    if args.overhead_only:
        print_overhead(call_overhead())
        return
    properties = torch.cuda.get_device_properties(0)
    device = cuda_ops.device_limits(0)
    precompile(all_plans(args, device))
    worst = None if args.no_check else check(args.bits, args.stretch)
    if worst is not None:
        print(f"right: the largest error is {worst:.4f} times that of rounding the exact result", flush=True)
    if args.check_only:
        return
    bandwidth = copy_bandwidth()
    overhead = call_overhead()
    print_overhead(overhead)
    print(f"{properties.name}: a copy moves {bandwidth / 1e12:.2f} TB/s\n")
    print("       shape  bits stretch tokens       us    GB/s  floor  x fp16", flush=True)
    timings: list[Timing] = []
    peer_timings: list[PeerTiming] = []
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for timing in measure(args, device, bandwidth, peers):
            if isinstance(timing, PeerTiming):
                peer_timings.append(timing)
                print(peer_line(timing), flush=True)
                continue
            timings.append(timing)
            if timing.chosen:
                print(line(timing), flush=True)
    finally:  # also of a run that is cut short
        record = {
            "provenance": provenance(),
            "command": command(sys.argv),
            "date": datetime.date.today().isoformat(),
            "device": properties.name,
            "torch": torch.__version__,
            "nvrtc": nvrtc_version(),
            "group_size": args.group,
            "copy_bytes_per_s": bandwidth,
            "pdl": not args.no_pdl,
            "call_us": overhead,
            "largest_error": worst,
            "timings": [dataclasses.asdict(t) for t in timings],
            "peers": {peer.name: f"{peer.package} {peer.version()}" for peer in peers},
            "peer_timings": [dataclasses.asdict(t) for t in peer_timings],
        }
        (args.out / "results.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    draw(timings, args.out / "results.png")


if __name__ == "__main__":
    main()

"""Time the matmul of ``kernels/gemm.cu`` against ``F.linear`` in float16, after checking it against float64.

    make bench-kernels                                                     # all shapes, bit-widths and batches
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
import dataclasses
import datetime
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from call_overhead import call_overhead, print_overhead
from kernel_candidates import tile_configs
from kernel_checks import check, checks
from kernel_peers import KernelPeer, PeerTiming, open_peers
from kernel_peers import measure as measure_peer
from kernel_timing import Bench, Timing, copy_bandwidth, fp16_times, precompile, problem_of, replay

from matquant.cuda.cuda_driver import nvrtc_version
from matquant.formats.bits import STRICT_BITS
from matquant.inference import cuda_ops
from matquant.inference.gemm_shape import DeviceLimits
from matquant.inference.kernel_families.base import TileConfig
from matquant.inference.kernel_families.mma import GEMM_MAX_M
from matquant.inference.launch_config import LaunchConfig, make_launch_config, max_tokens
from matquant.report.provenance import provenance

SHAPES = "4096x4096,4096x14336,14336x4096,8192x8192,16384x16384"
BATCHES = "1,2,3,4,5,8,12,16,32,64,128,512"


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
    """Draw the speedup over float16 against the batch, a panel for each shape and a line for each bit-width."""
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

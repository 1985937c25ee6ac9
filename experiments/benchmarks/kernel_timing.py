"""Times of matrix products on a GPU, from CUDA graphs of many launches."""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from kernel_checks import activations
from torch import Tensor

from matquant.cuda import load
from matquant.cuda.cuda_driver import architecture, nvrtc_compile, nvrtc_version
from matquant.cuda.source import compile_options, cubin, read_source
from matquant.formats.nested import WeightFormat
from matquant.formats.planes import NestedPlanes
from matquant.inference import cuda_ops, ops
from matquant.inference.gemm_shape import DeviceLimits, GemmShape
from matquant.inference.kernel_families import choose_tile_config
from matquant.inference.kernel_families.base import TileConfig
from matquant.inference.launch_config import LaunchConfig, make_launch_config, max_tokens

REPLAYS = 7
WARM_SECONDS = 0.05


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


def fp16_times(rows: int, depth: int, batches: Sequence[int]) -> dict[int, float]:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(3, -(-4 * cache // (rows * depth * 2)))
    weights = [torch.randn(rows, depth, device="cuda").half() for _ in range(copies)]
    times = {}
    for tokens in batches:
        x = activations(tokens, depth, torch.float16)
        times[tokens] = replay([functools.partial(torch.nn.functional.linear, x, w) for w in weights])
    return times


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
    """Weights of one shape, bit-width and stretch, in as many copies as exceed the cache."""

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

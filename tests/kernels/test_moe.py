"""``kernels/moe_route.cu`` and ``kernels/moe_gemm.cu`` on the emulator, against a loop over experts in float64.

Outputs, unused entries, planes that must not be read and experts without tokens are poisoned. The error may be 1.2 times that
of rounding the exact result.
"""

import ctypes
import dataclasses
import itertools
import re

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import POISON, GemmCase, GemmConfig, affine, exact_weight, make_weight, pack
from tests.kernels.emulator import EmulatorError, compile_kernel, have_compiler, read_source
from tests.kernels.test_bugs import Bug, plant

pytestmark = [pytest.mark.compiler, pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")]

HALVES = (torch.float16, torch.bfloat16)
UNWRITTEN = -7.0  # value of y before the launch
ROUTE_THREADS, CHUNK = 32, 1024
GUARD = 8192  # entries behind an output, which a kernel must not write


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeCase:
    """Layer of experts, its tokens, and their routing.

    Attributes:
        experts: of the router.
        held: those on this device; None for all.
        computed: those that the launch computes, by place in ``held``; None for all.
        share_x: True if the pairs of a token share a row of x.
        popular: share of tokens whose first expert is expert 1.
        before, between: row tiles of other matrices in front of the stack, and after each expert.
    """

    tokens: int = 5
    top_k: int = 2
    experts: int = 4
    held: tuple[int, ...] | None = None
    computed: tuple[int, ...] | None = None
    rows: int = 128
    depth: int = 256
    share_x: bool = True
    popular: float = 0.0
    before: int = 0
    between: int = 0
    master_bits: int = 8
    offset: float = 8.0
    seed: int = 0

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(range(self.experts)) if self.held is None else self.held

    def routing(self) -> Tensor:
        """Different experts for each token: int64 [tokens, top_k]."""
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.rand(self.tokens, self.experts, generator=generator)
        scores[: int(self.popular * self.tokens), 1] = 2
        return scores.topk(self.top_k).indices

    def weight_case(self, expert: int) -> GemmCase:
        return GemmCase(
            rows=self.rows,
            depth=self.depth,
            master_bits=self.master_bits,
            offset=self.offset,
            seed=10 * self.seed + expert,
        )


def expert_mask(experts) -> ctypes.Array:
    words = (ctypes.c_uint32 * 32)()
    for expert in experts:
        words[expert // 32] |= 1 << expert % 32
    return words


def max_items(pairs: int, experts: int, block_m: int) -> int:
    return pairs if pairs <= experts else experts + (pairs - experts) // block_m


def route(
    ids: Tensor, held, block_m: int, *, source: str | None = None, seed: int = 1, spare: int = 0, sanitize: bool = False
) -> tuple[Tensor, Tensor]:
    """Pairs sorted by expert, and items, of the kernel. Unwritten entries are poisoned."""
    count = max_items(ids.numel(), len(held), block_m) + spare
    pairs = torch.full((ids.numel() + GUARD,), POISON, dtype=torch.int32)
    items = torch.full((count + GUARD, 4), POISON, dtype=torch.int32)
    threads = -(-len(held) // ROUTE_THREADS) * ROUTE_THREADS
    defines = {"WIDE_IDS": int(ids.dtype == torch.int64), "BLOCK_M": block_m, "THREADS": threads}
    compile_kernel(source or read_source("moe_route.cu"), "moe_route", defines, sanitize=sanitize).launch(
        (1,), (threads,), [ids, ids.numel(), expert_mask(held), pairs, items, count], (CHUNK + 2 * threads) * 4, seed
    )
    if not ((pairs[-GUARD:] == POISON).all() and (items[-GUARD:] == POISON).all()):
        raise EmulatorError("write beyond the end of pairs or items")
    return pairs[:-GUARD], items[:-GUARD]


def expected_route(ids: Tensor, held, block_m: int) -> tuple[list[int], list[list[int]]]:
    """Pairs of experts on this device, and items with pairs."""
    pairs, items = [], []
    for place, expert in enumerate(held):
        own = [pair for pair, one in enumerate(ids.view(-1).tolist()) if one == expert]
        items += [[place, len(pairs) + i, min(block_m, len(own) - i), 0] for i in range(0, len(own), block_m)]
        pairs += own
    return pairs, items


def check_route(ids: Tensor, held, block_m: int, **options) -> bool:
    """Return True if the routing is the expected one, and unused items are 0."""
    pairs, items = route(ids, held, block_m, **options)
    own, used = expected_route(ids, held, block_m)
    return pairs[: len(own)].tolist() == own and items.tolist() == used + [[0] * 4] * (len(items) - len(used))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 2, 8), (7, 1, 3), (40, 8, 128), (300, 4, 60), (9, 3, 200)]
)
def test_routing(tokens, top_k, experts, dtype):
    for seed, held in enumerate((range(experts), range(experts // 2, experts), range(1, experts, 2))):
        ids = MoeCase(tokens=tokens, top_k=top_k, experts=experts, seed=seed).routing().to(dtype)
        for block_m in (8, 64):
            assert check_route(ids, held, block_m, seed=seed, spare=seed)


def test_routing_leaves_out_ids_of_no_expert():
    """Sentinels of expert parallelism, and padding."""
    ids = torch.tensor([[3, 4], [-1, 0], [2**20, 3], [1024, 2]])
    assert check_route(ids, range(4), 8)
    assert check_route(ids.int(), (0, 3), 8)


@pytest.mark.parametrize(("pairs", "experts", "block_m"), [(1, 4, 2), (4, 4, 2), (5, 3, 2), (9, 3, 2), (10, 2, 4)])
def test_bound_of_items_is_the_largest_number(pairs, experts, block_m):
    """Over all divisions of the pairs among the experts, and pairs of none."""
    splits = itertools.product(range(pairs + 1), repeat=experts)
    needed = [sum(-(-count // block_m) for count in split) for split in splits if sum(split) <= pairs]
    assert max(needed) == max_items(pairs, experts, block_m)


@dataclasses.dataclass
class MoeResult:
    """Output of the kernel, the exact one, and the pairs that the kernel had to write."""

    y: Tensor
    exact: Tensor
    written: Tensor

    def error_ratio(self) -> float:
        """Error norm as a multiple of that of rounding; infinite if other pairs or columns were written."""
        width = self.exact.shape[1]
        untouched = torch.cat([self.y[~self.written].flatten(), self.y[:, width:].flatten()])
        if not (untouched == UNWRITTEN).all():
            return float("inf")
        exact = self.exact[self.written]
        error, best = (
            torch.linalg.norm(v.double() - exact) for v in (self.y[self.written, :width], exact.to(self.y.dtype))
        )
        return (error / best).item()


def stack(config: GemmConfig, case: MoeCase, weights, used: set[int]) -> list[Tensor | None]:
    """Planes, scales and zero points of all experts, with poisoned tiles before and between; so are unused experts."""
    packed = [pack(config, case.weight_case(place), weight) for place, weight in enumerate(weights)]

    def join(kind: int, poison: float) -> Tensor | None:
        first = packed[0][kind]
        if first is None:
            return None
        empty = [first.new_full((len(first), count, *first.shape[2:]), poison) for count in (case.before, case.between)]
        parts = [
            (part[kind] if place in used else torch.full_like(part[kind], poison)) for place, part in enumerate(packed)
        ]
        return torch.cat([empty[0], *(one for part in parts for one in (part, empty[1]))], 1)

    return [join(0, POISON), join(1, torch.nan), join(2, 255)]


def run(
    config: GemmConfig, case: MoeCase, *, sources=(None, None), sanitize: bool = False, order: int = 1
) -> MoeResult:
    """Route, and compute the experts of one launch."""
    ids, places = case.routing(), case.places
    pairs, items = route(ids, places, config.block_m, source=sources[0], seed=order)
    computed = range(len(places)) if case.computed is None else case.computed
    weights = [make_weight(config, case.weight_case(place)) for place in range(len(places))]
    slots = torch.tensor([places.index(one) if one in places else -1 for one in ids.flatten().tolist()])
    written = torch.isin(slots, torch.tensor(list(computed)))
    generator = torch.Generator().manual_seed(case.seed + 1)
    x = torch.randn(case.tokens if case.share_x else len(slots), case.depth, generator=generator) + 0.5
    x[:, 7::97] *= 10
    x = x.to(config.dtype)
    y = torch.full((len(slots), case.rows + 24), UNWRITTEN).to(config.dtype)
    planes, scales, zeros = stack(config, case, weights, set(slots[written].tolist()))
    shared = config.shared_bytes() + 8 * config.block_m
    defines = config.defines() | {"GATHER": 1, "SHARED_BYTES": shared}
    kernel = compile_kernel(sources[1] or read_source("moe_gemm.cu"), "nested_moe_gemm", defines, sanitize=sanitize)
    kernel.launch(
        (-(-case.rows // config.block_n), len(items)),
        (config.threads,),
        [
            planes,
            ctypes.c_uint64(planes.stride(0) // 4),
            scales.view(torch.int16),
            zeros,
            x.view(torch.int16),
            y.view(torch.int16),
            pairs,
            items,
            expert_mask(computed),
            case.top_k if case.share_x else 1,
            case.rows,
            case.depth,
            y.shape[1],
            case.before,
            case.rows // 64 + case.between,
            scales.stride(0) // 64,
            *affine(config, case.weight_case(0), code_bits=8),
        ],
        shared_bytes=shared,
        seed=order,
    )
    exact = torch.zeros(len(slots), case.rows, dtype=torch.float64)
    for pair in written.nonzero()[:, 0].tolist():
        row = x[pair // case.top_k if case.share_x else pair].double()
        exact[pair] = exact_weight(weights[slots[pair]], config.bits) @ row
    return MoeResult(y, exact, written)


def check(config: GemmConfig, case: MoeCase, **options) -> None:
    assert run(config, case, **options).error_ratio() <= 1.2


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_bit_width(bits):
    """Both dtypes with the mainloop are in ``test_gemm``."""
    config = GemmConfig(
        bits=bits,
        dtype=HALVES[bits % 2],
        scale_dtype=HALVES[bits // 2 % 2],
        group_size=(32, 64, 128, -1)[bits % 4],
        warps_k=2,
        block_k=64,
    )
    check(config, MoeCase(seed=bits))
    check(config, MoeCase(seed=bits, share_x=False, held=(1, 2), before=2, between=1))


@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(bits=3, group_size=32, has_zero_points=True, warps_k=4, block_k=64),
        GemmConfig(bits=4, slicing="round", warps_k=2),
        GemmConfig(bits=8, stretch=1.25, warps_k=2, block_k=64),
        GemmConfig(bits=6, stretch=1.5, dtype=torch.bfloat16, has_zero_points=True),
        GemmConfig(bits=2, block_m=16, block_n=128, warps_k=2, x_stage_tiles=1),
        GemmConfig(bits=5, block_m=32, block_n=128, warps_k=2, x_stage_tiles=1),
        GemmConfig(bits=4, block_m=64, block_n=128, row_block_warps=2, x_stage_tiles=1),
    ],
)
def test_formats_and_tiles(config):
    """With a popular expert, whose pairs fill several items, and experts without pairs."""
    offset = 0.0 if config.slicing == "round" else 8.0
    cases = (MoeCase(tokens=11, top_k=2, experts=8, popular=1.0), MoeCase(tokens=1, top_k=3, experts=9, rows=192))
    for seed, case in enumerate(cases):
        check(
            config, dataclasses.replace(case, offset=offset, seed=seed, depth=352 if config.group_size == 32 else 256)
        )


@pytest.mark.parametrize(("depth", "group_size"), [(72, 32), (200, 64), (576, 128)])
def test_short_last_groups_and_ragged_columns(depth, group_size):
    for zeros in (False, True):
        config = GemmConfig(bits=3, group_size=group_size, has_zero_points=zeros, warps_k=2, block_k=64)
        check(config, MoeCase(depth=depth, seed=depth))


@pytest.mark.parametrize("master_bits", [5, 6])
def test_fewer_master_bits(master_bits):
    check(GemmConfig(bits=3, has_zero_points=master_bits == 6), MoeCase(master_bits=master_bits, offset=0.5))


@pytest.mark.parametrize("computed", [(0, 2), (1, 3)])
def test_a_launch_computes_the_experts_of_its_bit_width_alone(computed):
    """Other experts are poisoned, and the outputs of their pairs stay as they are."""
    check(GemmConfig(bits=4), MoeCase(tokens=9, computed=computed))


def test_a_launch_without_experts_writes_nothing():
    assert (run(GemmConfig(), MoeCase(computed=())).y == UNWRITTEN).all()


def test_result_is_independent_of_the_schedule():
    config, case = GemmConfig(warps_k=4, block_k=64), MoeCase(tokens=20, popular=0.9)
    first = run(config, case).y
    for order in range(2, 5):
        assert torch.equal(run(config, case, order=order).y, first)


def test_no_access_outside_buffers():
    config = GemmConfig(bits=3, group_size=32, has_zero_points=True, warps_k=2, block_k=64)
    check(config, MoeCase(tokens=7, depth=328, held=(1, 3), seed=1), sanitize=True)


SMALL = MoeCase(tokens=9, popular=0.9)
BUGS = {  # and whether the route or the GEMM kernel has it
    "experts of another bit-width computed": (0, Bug(marker="moe-mask", pattern=r" \|\| !.*\)\)", wrong=")")),
    "items all begin with the first pair": (0, Bug(marker="moe-item-start", pattern=r"\w+\.y \+ ", wrong="")),
    "row of x of the pair, not of its token": (0, Bug(marker="moe-x-row", pattern=r" / \w+;", wrong=";")),
    "no barrier after the lists of rows": (0, Bug(marker="moe-rows-sync")),
    "weights of the first expert": (0, Bug(marker="moe-expert", pattern=r" \+ .*;", wrong=";")),
    "place among the experts counts none of its word": (1, Bug(marker="route-rank", pattern=r"= .*;", wrong="= 0;")),
    "experts that are not here routed": (1, Bug(marker="route-absent", pattern=r" \|\| !\w+\.has.*?\)\)", wrong=")")),
    "chunk of ids overwritten while it is read": (1, Bug(marker="route-chunk-read")),
    "chunk of ids read before it is written": (1, Bug(marker="route-chunk-written")),
    "pairs numbered within their chunk": (1, Bug(marker="route-chunk-index", pattern=r"\w+ \+ ", wrong="")),
    "sum over threads without a barrier": (1, Bug(marker="route-sum", sanitize=True)),
    "items counted without the last, smaller one": (
        1,
        Bug(marker="route-items", pattern=r"\w+ \+ BLOCK_M - 1", wrong="count"),
    ),
    "items with the pairs of those after them": (1, Bug(marker="route-item-size", pattern=r"min\(.*\)", wrong="count")),
    "unused items left as they are": (1, Bug(marker="route-unused")),
}


def detection(name: str) -> str | None:
    """Evidence of a planted bug: an emulator error, or a wrong result. None if there is none."""
    of_route, bug = BUGS[name]
    source = plant(read_source("moe_route.cu" if of_route else "moe_gemm.cu"), bug)
    for order in range(4):
        try:
            if of_route:
                ids = MoeCase(tokens=300, top_k=4, experts=60, seed=order).routing()
                right = check_route(ids, range(1, 60, 2), 8, source=source, seed=order, sanitize=bug.sanitize)
            else:
                cases = (SMALL, dataclasses.replace(SMALL, computed=(0, 2)))
                right = all(
                    run(GemmConfig(), case, sources=(None, source), order=order).error_ratio() <= 1.2 for case in cases
                )
        except EmulatorError as error:
            return str(error)
        if not right:
            return "wrong result"
    return None


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_detected(name):
    assert detection(name) is not None


def test_correct_sources_pass_the_cases_of_the_bugs():
    for order in range(4):
        ids = MoeCase(tokens=300, top_k=4, experts=60, seed=order).routing()
        assert check_route(ids, range(1, 60, 2), 8, seed=order)
        for case in (SMALL, dataclasses.replace(SMALL, computed=(0, 2))):
            check(GemmConfig(), case, order=order)


def test_every_marker_has_a_bug():
    """Apart from those of the shared headers, whose bugs are in ``test_bugs``."""
    sources = "".join(read_source(name) for name in ("moe_route.cu", "moe_gemm.cu"))
    shared = read_source("gemm.cu")
    markers = set(re.findall(r"/\*bug:([\w-]+)\*/", sources)) - set(re.findall(r"/\*bug:([\w-]+)\*/", shared))
    assert markers == {bug.marker for _, bug in BUGS.values()}

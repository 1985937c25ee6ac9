"""Bugs planted in ``kernels/gemm.cu`` and ``gemm_sm90_ws.cu``, each of which the stand-in must show: the tests' own test."""

import dataclasses

import pytest
import torch
from kernel_cases import Case, Variant, error_ratio, run
from standin import StandinError, have_compiler, read_source

pytestmark = pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")

SPLIT = Case(tokens=5, rows=192, depth=1024, blocks=5)
WIDE = Variant(row_warps=2, panel=1)
SHARED_RING = Variant(row_warps=2, tile_warps=2, panel=8)
WGMMA = Variant(wgmma=True, token_tiles=4, row_warps=4, panel=2)
WGMMA_CASE = Case(tokens=29, rows=640, depth=1024, blocks=2)
MANY = Variant(many=True, wgmma=True, token_tiles=16, row_warps=4, tile_warps=2, units=1, panel=1)
MANY_CASE = Case(tokens=140, rows=300, depth=640, blocks=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bug:
    """A change of the source, and a product that it spoils. ``sanitize``: only the sanitizer shows it."""

    correct: str
    wrong: str
    variant: Variant = WIDE
    case: Case = SPLIT
    sanitize: bool = False


BUGS = {
    "no barrier before a panel of x is used": Bug(
        correct="        __syncthreads(); // all threads' copies of the panel are there,", wrong="        //"
    ),
    "no barrier after the sums of x": Bug(correct="lane, warp);\n        __syncthreads();", wrong="lane, warp);"),
    "warps that share a ring do not meet": Bug(correct="meet(at); //", wrong="//", variant=SHARED_RING),
    "waits for one group of copies too few": Bug(
        correct="copy_async_wait<STAGES - 2>();", wrong="copy_async_wait<STAGES - 1>();"
    ),
    "does not wait for copies at the end of a run": Bug(
        correct="    copy_async_wait<0>();\n}", wrong="}", variant=Variant(row_warps=2, panel=4)
    ),
    "copies into a slot that is still read": Bug(
        correct="if (++next.stage == STAGES) next.stage = 0;", wrong="if (++next.stage >= STAGES - 1) next.stage = 0;"
    ),
    "registers of a fragment in the wrong order": Bug(
        correct="fragment[part][c][p + 2 * u]", wrong="fragment[part][c][2 * p + u]"
    ),
    "planes merged with swapped masks": Bug(
        correct="p ? 0x55555555u : 0xAAAAAAAAu", wrong="p ? 0xAAAAAAAAu : 0x55555555u"
    ),
    "reads a plane too many": Bug(
        correct="const uint4* from = next.planes;", wrong="const uint4* from = next.planes + a.plane_stride;"
    ),
    "rounds a slice of all ones up": Bug(
        correct="& ~all;", wrong=";", variant=Variant(slicing="round", bits=2), case=Case(tokens=5, offset=0.0)
    ),
    "scales of the wrong group": Bug(
        correct="column / max(GROUP, 1) : 0", wrong="column / max(2 * GROUP, 1) : 0", variant=Variant(group=64)
    ),
    "keeps columns of x beyond K": Bug(
        correct="const bool inside = from < a.depth;",
        wrong="const bool inside = true;",
        variant=Variant(group=-1),
        case=Case(tokens=4, depth=328),
    ),
    "bias of bfloat16's fragments left out": Bug(
        correct="parts == 2 ? 17.0f : 1.0f", wrong="parts == 2 ? 17.0f : 0.0f", variant=Variant(dtype=torch.bfloat16)
    ),
    "sums not set to 0 between tiles": Bug(
        correct="            sums.clear();\n            chunk = 0;", wrong="            chunk = 0;"
    ),
    "writer of partial sums does not fence": Bug(
        correct="    device_fence(); // by each lane, after its stores\n", wrong=""
    ),
    "reader of partial sums does not fence": Bug(
        correct="    device_fence();\n    return true;", wrong="    return true;"
    ),
    "ticket not set back": Bug(correct="if (lane == 0) *ticket = 0;", wrong=""),
    "last block recognised too early": Bug(correct="earlier != count - 1", wrong="earlier != count - 2"),
    "sums of the warps along K taken before all are there": Bug(
        correct="    __syncthreads();\n    UNROLL\n    for (int i = 0; i < shares; i++) {\n        const int j = at.k_warp",
        wrong="    UNROLL\n    for (int i = 0; i < shares; i++) {\n        const int j = at.k_warp",
        variant=Variant(k_warps=4, panel=1),
    ),
    "sums of the warps along K overwritten while they are read": Bug(
        correct="    __syncthreads(); // nobody reads the sums",
        wrong="    // nobody reads the sums",
        variant=Variant(bits=8, wgmma=True, tile_warps=4, k_warps=2, token_tiles=2, panel=4),
        case=Case(tokens=16, rows=300, depth=640, blocks=2),
    ),
    "wgmma: sums are scaled before they are complete": Bug(
        correct="        wait();\n        UNROLL",
        wrong="        UNROLL",
        variant=dataclasses.replace(WGMMA, group=64),
        case=WGMMA_CASE,
    ),
    "wgmma: no fence after registers were written": Bug(
        correct="        wgmma_fence();\n", wrong="", variant=WGMMA, case=WGMMA_CASE
    ),
    "wgmma: a fragment is decoded anew while it is read": Bug(
        correct="wgmma_wait<1>();", wrong="wgmma_wait<2>();", variant=WGMMA, case=WGMMA_CASE
    ),
    "wgmma: a chunk ends before its products": Bug(
        correct="        wait(); // the compiler", wrong="        // the compiler", variant=WGMMA, case=WGMMA_CASE
    ),
    "wgmma: a panel is asked for while it is read": Bug(
        correct="        __syncthreads(); // nobody needs",
        wrong="        // nobody needs",
        variant=WGMMA,
        case=WGMMA_CASE,
    ),
    "wgmma: does not wait for activations": Bug(
        correct="        barrier_wait(shared_address(shared.arrived + index), phase);\n",
        wrong="",
        variant=WGMMA,
        case=WGMMA_CASE,
    ),
    "wgmma: a barrier expects the bytes of one chunk": Bug(
        correct="barrier_expect(barrier, count * x_bytes);",
        wrong="barrier_expect(barrier, x_bytes);",
        variant=WGMMA,
        case=WGMMA_CASE,
    ),
    "wgmma: a barrier's phase is not turned": Bug(correct="phase ^= 1;", wrong="", variant=WGMMA, case=WGMMA_CASE),
    "wgmma: the scale's ratio upside down": Bug(
        correct="scale[c][p] * reciprocal(next)", wrong="next * reciprocal(scale[c][p])", variant=WGMMA, case=WGMMA_CASE
    ),
    "wgmma: the low nibble's bias left in": Bug(
        correct="? 0xBF80BF80u : 0xC180C180u",
        wrong="? 0x80008000u : 0xC180C180u",
        variant=dataclasses.replace(WGMMA, bits=8, dtype=torch.bfloat16),
        case=WGMMA_CASE,
    ),
    "many: does not wait for a chunk": Bug(
        correct="            barrier_wait(shared_address(shared.arrived + stage.index), stage.phase);\n",
        wrong="",
        variant=MANY,
        case=MANY_CASE,
    ),
    "many: asks for a chunk whose place is in use": Bug(
        correct="if (!is_free) barrier_wait", wrong="if (false) barrier_wait", variant=MANY, case=MANY_CASE
    ),
    "many: a place is given back before its last products": Bug(
        correct="if (step == 0 && before && at.lane == 0)",
        wrong="if (step == 0 && at.lane == 0 && (before = shared_address(shared.free + stage)))",
        variant=MANY,
        case=MANY_CASE,
    ),
    "many: a place is free when one warp is done with it": Bug(
        correct="barrier_set_up(shared_address(shared.free + i), warps);",
        wrong="barrier_set_up(shared_address(shared.free + i), 1);",
        variant=MANY,
        case=MANY_CASE,
    ),
    "many: expects the bytes of the activations alone": Bug(
        correct="barrier_expect(arrived, bytes_of_chunk);",
        wrong="barrier_expect(arrived, UNITS * unit_bytes);",
        variant=MANY,
        case=MANY_CASE,
    ),
    "many: a fragment is decoded anew while it is read": Bug(
        correct="        wgmma_wait<1>();", wrong="        wgmma_wait<2>();", variant=MANY, case=MANY_CASE
    ),
    "many: sums leave before all products": Bug(
        correct="        sums.wait();\n", wrong="", variant=MANY, case=MANY_CASE
    ),
    "many: every tile has the tokens of the first": Bug(
        correct="piece.tile / token_tiles, piece.tile % token_tiles, piece.chunk + i",
        wrong="piece.tile / token_tiles, 0, piece.chunk + i",
        variant=MANY,
        case=MANY_CASE,
    ),
    "many: rounds take the next tile, not the next of this block": Bug(
        correct="tile += gridDim.x;", wrong="tile++;", variant=MANY, case=MANY_CASE
    ),
    "many: masks are not turned for a warp's tiles": Bug(
        correct="p - turn & 31", wrong="p & 31", variant=dataclasses.replace(MANY, bits=8), case=MANY_CASE
    ),
    "many: scales of the first group": Bug(
        correct="unit * 64 / max(GROUP, 1) : 0;", wrong="0 : 0;", variant=MANY, case=MANY_CASE
    ),
    "many: half of a float16 scale for bfloat16": Bug(
        correct="two ? fma_bfloats(f, low[c][r % 2], minus_zero) : minus_zero",
        wrong="minus_zero",
        variant=dataclasses.replace(MANY, dtype=torch.bfloat16, bits=3),
        case=dataclasses.replace(MANY_CASE, mean=4.0),
    ),
    "rows beyond N stored": Bug(
        correct="if (n >= out.rows) continue;", wrong="", case=Case(tokens=2, rows=100), sanitize=True
    ),
}


def shown_by(source: str, variant: Variant, case: Case, *, sanitize: bool = False) -> str | None:
    """How the stand-in shows that the source is wrong: its own message, a wrong result, or None."""
    for order in range(4):
        try:
            found = run(variant, case, source=source, order=order, launches=1 + order % 2, sanitize=sanitize)
        except StandinError as error:
            return f"the stand-in: {str(error).splitlines()[0]}"
        except AssertionError as error:
            return f"the tickets: {str(error).splitlines()[0]}"
        ratio = error_ratio(*found)
        if not ratio <= 1.2:
            return f"the result: {ratio:.3g} times the error of {'a dense matrix' if variant.many else 'rounding'}"
    return None


def source_of(variant: Variant) -> str:
    return "gemm_sm90_ws.cu" if variant.many else "gemm.cu"


def planted(name: str) -> str | None:
    """How one of the bugs is shown."""
    bug = BUGS[name]
    source = read_source(source_of(bug.variant))
    assert source.count(bug.correct) == 1, "the source has changed: plant the bug anew"
    return shown_by(source.replace(bug.correct, bug.wrong), bug.variant, bug.case, sanitize=bug.sanitize)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_shown(name: str) -> None:
    assert planted(name) is not None


def test_correct_source_shows_nothing() -> None:
    for variant, case in {(bug.variant, bug.case) for bug in BUGS.values()}:
        assert shown_by(read_source(source_of(variant)), variant, case) is None


if __name__ == "__main__":  # the table in experiments/results/kernels/README.md
    for name in BUGS:
        print(f"| {name} | {planted(name)} |")

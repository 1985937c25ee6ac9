"""Bugs planted in ``kernels/gemm.cu`` and ``kernels/gemm_sm90_ws.cu``; the emulator must detect every one of them.

A trailing ``/*bug:NAME*/`` in the kernel sources marks the line that a bug changes. The change itself is here: the statement is
deleted, moved, or rewritten by a regular expression that names no variable of the kernel.
"""

import dataclasses
import re

import pytest
import torch

from matquant.inference.kernel_families import FAMILIES
from tests.kernels.cases import GemmCase, GemmConfig, run
from tests.kernels.emulator import EmulatorError, have_compiler, read_source

pytestmark = [pytest.mark.compiler, pytest.mark.skipif(not have_compiler(), reason="no C++ compiler (g++, or CXX)")]

STREAM_K = GemmCase(tokens=5, rows=192, depth=1024, blocks=5)
MMA = GemmConfig(block_n=128, x_stage_tiles=1)
STRETCHED = GemmConfig(bits=8, stretch=1.25, block_n=128, x_stage_tiles=1)
CLUSTER = GemmConfig(block_n=128, warps_k=2, block_k=64, x_stage_tiles=1, cluster=4)
SHARED_RING = GemmConfig(block_n=128, row_block_warps=2, x_stage_tiles=8)
WGMMA = GemmConfig(family="wgmma", block_m=32, block_n=256, x_stage_tiles=2)
WGMMA_CASE = GemmCase(tokens=29, rows=640, depth=1024, blocks=2)
WS = GemmConfig(family="wgmma_ws", block_m=128, block_n=256, row_block_warps=2, block_k=64, x_stage_tiles=1)
WS_CASE = GemmCase(tokens=140, rows=300, depth=640, blocks=3)
WS_CLUSTER = dataclasses.replace(WS, cluster=2, stages=4)
SHORT_CASE = GemmCase(tokens=29, rows=192, depth=576, blocks=2)  # in groups of 128 the fifth one has 64 columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bug:
    """Change of one marked line, and a launch that the change must spoil.

    Attributes:
        marker: name of the marked line.
        pattern: regular expression that matches the line's code once; the default matches the whole statement.
        wrong: replacement of the match.
        before: marker of a line; the statement moves in front of it instead of being replaced.
        config: compiled kernel.
        case: GEMM problem.
        sanitize: run under the address sanitizer, which alone detects the bug.
    """

    marker: str
    pattern: str = r"\S.*"
    wrong: str = ""
    before: str | None = None
    config: GemmConfig = MMA
    case: GemmCase = STREAM_K
    sanitize: bool = False


def wgmma_bug(marker: str, pattern: str = Bug.pattern, wrong: str = "", **changes: object) -> Bug:
    """Bug in ``gemm_wgmma.cuh``; ``changes`` are fields of its configuration."""
    config = dataclasses.replace(WGMMA, **changes)
    return Bug(marker=marker, pattern=pattern, wrong=wrong, config=config, case=WGMMA_CASE)


def ws_bug(marker: str, pattern: str = Bug.pattern, wrong: str = "", **changes: object) -> Bug:
    """Bug in ``gemm_sm90_ws.cu``; ``changes`` are fields of its configuration."""
    config = dataclasses.replace(WS, **changes)
    return Bug(marker=marker, pattern=pattern, wrong=wrong, config=config, case=WS_CASE)


BUGS = {
    "no barrier before an x stage is read": Bug(marker="x-stage-full-sync"),
    "no barrier after the group sums of x": Bug(marker="x-sums-sync", config=dataclasses.replace(MMA, block_m=32)),
    "warps that share a ring are not synchronized": Bug(marker="ring-sync", config=SHARED_RING),
    "one cp.async group too few is waited for": Bug(marker="ring-wait", pattern="- 2", wrong="- 1"),
    "pending cp.async groups at the end of the kernel": Bug(
        marker="final-wait", config=GemmConfig(block_n=128, x_stage_tiles=4)
    ),
    "load into a ring stage that is still read": Bug(marker="ring-wrap", pattern=r"== (\w+)", wrong=r">= \1 - 1"),
    "fragment registers in the wrong order": Bug(
        marker="fragment-registers", pattern=r"\[(\w+) \+ 2 \* (\w+)\]", wrong=r"[2 * \1 + \2]"
    ),
    "planes merged with swapped masks": Bug(marker="plane-masks", pattern=r"(0x5+u) : (0xA+u)", wrong=r"\2 : \1"),
    "planes read from the second one on": Bug(marker="first-plane", pattern=r"if \(\w+ > 0\) ", wrong=""),
    "slice of all ones rounded up": Bug(
        marker="round-overflow",
        pattern=r" & ~\w+;",
        wrong=";",
        config=GemmConfig(slicing="round", bits=2),
        case=GemmCase(tokens=5, offset=0.0),
    ),
    "scales of the wrong group": Bug(
        marker="scale-group", pattern=r"max\(GROUP", wrong="max(2 * GROUP", config=GemmConfig(group_size=64)
    ),
    "mma: scales of a short last group taken from the group in front": Bug(
        marker="scale-group",
        pattern=r"(\w+ / max\(GROUP, 1\))",
        wrong=r"min(\1, 3)",
        config=dataclasses.replace(MMA, block_m=32),
        case=SHORT_CASE,
    ),
    "wgmma: scales of a short last group taken from the group in front": dataclasses.replace(
        wgmma_bug("scale-group", r"(\w+ / max\(GROUP, 1\))", r"min(\1, 3)"), case=SHORT_CASE
    ),
    "ws: scales of a short last group taken from the group in front": dataclasses.replace(
        ws_bug("ws-scale-group", r"(\w+ \* 64 / max\(GROUP, 1\))", r"min(\1, 3)"), case=SHORT_CASE
    ),
    "columns of x beyond K kept": Bug(
        marker="x-bounds",
        pattern="= .*;",
        wrong="= true;",
        config=GemmConfig(group_size=-1),
        case=GemmCase(tokens=4, depth=328),
    ),
    "bias of bfloat16 fragments left out": Bug(
        marker="fragment-bias", pattern=r": 1\.0f;", wrong=": 0.0f;", config=GemmConfig(dtype=torch.bfloat16)
    ),
    "mma: low bits of a float16 code not stretched": Bug(
        marker="stretch-low-bits", pattern=r"return \S+\(.*\)", wrong="return fragment", config=STRETCHED
    ),
    "mma: whole code stretched in place of its low bits": Bug(
        marker="stretch-low-bits", pattern=r" & \(.*?\)", wrong="", config=STRETCHED
    ),
    "mma: low nibble of a bfloat16 code not stretched": Bug(
        marker="stretch-nibble",
        pattern=r"factor, factor",
        wrong="0x3F803F80u, 0x3F803F80u",
        config=dataclasses.replace(STRETCHED, dtype=torch.bfloat16),
    ),
    "wgmma: bias of a stretched low nibble subtracted twice": wgmma_bug(
        "low-bias", r"0x80008000u", "0xBF80BF80u", bits=6, stretch=1.25, dtype=torch.bfloat16
    ),
    "accumulator not cleared between tiles": Bug(marker="clear-accumulator"),
    "no fence after partial sums are stored": Bug(marker="release-fence"),
    "no fence before partial sums are loaded": Bug(marker="acquire-fence"),
    "tile semaphore not reset": Bug(marker="semaphore-reset"),
    "last arrival detected one too early": Bug(marker="last-arrival", pattern="- 1", wrong="- 2"),
    "K-warp reduction before all partial sums are written": Bug(
        marker="k-warps-written", config=GemmConfig(warps_k=4, x_stage_tiles=1)
    ),
    "K-warp partial sums overwritten while they are read": Bug(
        marker="k-warps-read",
        config=GemmConfig(bits=8, family="wgmma", row_block_warps=4, warps_k=2, block_m=16, x_stage_tiles=4),
        case=GemmCase(tokens=16, rows=300, depth=640, blocks=2),
    ),
    "sums of x over the last 16 columns of a group alone": Bug(
        marker="own-sums", pattern=r", \w+\[\w+\]\);", wrong=", zero);"
    ),
    "cluster: partial sums stored before the other blocks have begun": Bug(marker="cluster-begun", config=CLUSTER),
    "cluster: partial sums read before all are written": Bug(marker="cluster-written", config=CLUSTER),
    "cluster: mbarrier expects the bytes of one block": Bug(
        marker="cluster-bytes", pattern=r"\w+ \* (?=kWarpsN)", config=CLUSTER
    ),
    "cluster: partial sums stored to the first block": Bug(
        marker="cluster-rank", pattern=r", \w+ % \w+, ", wrong=", 0, ", config=CLUSTER
    ),
    "wgmma: accumulator rescaled before WGMMA completes": wgmma_bug("rescale-wait", group_size=64),
    "wgmma: no fence after register writes": wgmma_bug("wgmma-fence"),
    "wgmma: fragment overwritten while WGMMA reads it": wgmma_bug("fragment-wait", "<1>", "<2>"),
    "wgmma: k-tile ends before WGMMA completes": wgmma_bug("k-tile-wait"),
    "wgmma: x stage loaded while WGMMA reads it": wgmma_bug("x-stage-empty-sync"),
    "wgmma: no wait for the full barrier of x": wgmma_bug("x-full-wait"),
    "wgmma: barrier of x expects the bytes of one k-tile": wgmma_bug("x-expect-bytes", r"\w+ \* "),
    "wgmma: barrier parity not flipped": wgmma_bug("x-parity"),
    "wgmma: ratio of scales inverted": wgmma_bug("scale-ratio", r"(\S+) \* (\w+)\((\w+)\)", r"\3 * \2(\1)"),
    "wgmma: bias of the low nibble left in": wgmma_bug(
        "low-bias", r": 0xBF80BF80u", ": 0x80008000u", bits=8, dtype=torch.bfloat16
    ),
    "ws: no wait for the full barrier": ws_bug("full-wait"),
    "ws: producer does not wait for the empty barrier": ws_bug("empty-wait", r"if \(.*?\)", "if (false)"),
    "ws: stage released before its last WGMMA": dataclasses.replace(ws_bug("release-stage"), before="consume"),
    "ws: stage empty after one warp's arrival": ws_bug("empty-arrivals", r", \w+\);", ", 1);"),
    "ws: barrier expects the bytes of x alone": ws_bug("expect-bytes", r" \+ .*;", ";"),
    "ws: fragment overwritten while WGMMA reads it": ws_bug("batch-wait", "<1>", "<2>"),
    "ws: epilogue before WGMMA completes": ws_bug("epilogue-wait"),
    "ws: every tile reads the first token tile": ws_bug("token-tile", r"\S+ % \S+;", "0;"),
    "ws: wave advances by one tile instead of the grid size": ws_bug("wave-stride", r"\+= gridDim\.x", "+= 1"),
    "ws: partial sums of a cluster stored before the stages have been read": dataclasses.replace(
        ws_bug("cluster-begun"), config=WS_CLUSTER
    ),
    "ws: partial sums of a cluster read before all are written": dataclasses.replace(
        ws_bug("cluster-written"), config=WS_CLUSTER
    ),
    "ws: every cluster stores the first token tile": dataclasses.replace(
        ws_bug("cluster-token-tile", r"\w+\.\w+ % \w+", "0"), config=WS_CLUSTER
    ),
    "ws: whole tiles beyond the last wave left out": ws_bug("last-wave", r" \+ \(.*?\);", ";", whole_tiles=True),
    "ws: four rows stored for every lane of a token's pair": ws_bug("store-fours", r"\w+ \? \w+ : \w+, ", "low, "),
    "ws: masks not rotated to the warp's row tiles": ws_bug("mask-rotation", r" - \w+ & 31", " & 31", bits=8),
    "ws: scales of the first group": ws_bug("ws-scale-group", r"\? .* : 0", "? 0 : 0"),
    "ws: residual of a float16 scale in bfloat16 dropped": dataclasses.replace(
        ws_bug("scale-residual", r"\w+ \? .* : ", dtype=torch.bfloat16, bits=3),
        case=dataclasses.replace(WS_CASE, mean=4.0),
    ),
    "rows beyond N stored": Bug(marker="row-bounds", case=GemmCase(tokens=2, rows=100), sanitize=True),
}


def plant(source: str, bug: Bug) -> str:
    """Source with the bug. Fails if the marker or its code is missing or not unique."""
    lines = source.splitlines()
    index, code = marked(lines, bug.marker)
    assert len(re.findall(bug.pattern, code)) == 1, (
        f"{bug.pattern!r} does not match the code of {bug.marker!r} once: {code!r}"
    )
    lines[index] = re.sub(bug.pattern, bug.wrong, code)
    if bug.before is not None:
        lines.insert(marked(lines, bug.before)[0], code)
    return "\n".join(lines)


def marked(lines: list[str], marker: str) -> tuple[int, str]:
    """Index of the marked line, and its code in front of the marker."""
    mark = f"/*bug:{marker}*/"
    found = [(i, line.split(mark)[0].rstrip()) for i, line in enumerate(lines) if mark in line]
    assert len(found) == 1, f"{mark} must be in the source once, found {len(found)} times"
    return found[0]


def detection(source: str, config: GemmConfig, case: GemmCase, *, sanitize: bool = False) -> str | None:
    """Evidence that the source is wrong: an emulator error, semaphores left set, or a wrong result. None if there is none."""
    for order in range(4):
        try:
            result = run(config, case, source=source, order=order, launches=1 + order % 2, sanitize=sanitize)
        except EmulatorError as error:
            return "address sanitizer" if sanitize else f"emulator: {str(error).splitlines()[0]}"
        except AssertionError as error:
            return f"semaphores: {str(error).splitlines()[0]}"
        ratio = result.error_ratio()
        if not ratio <= 1.2:
            reference = "a dense matrix" if config.family == "wgmma_ws" else "rounding"
            return f"result: {ratio:.3g} times the error of {reference}"
    return None


def source_of(config: GemmConfig) -> str:
    """Source of the configuration's kernel with its headers inlined."""
    return read_source(config.source_name)


def planted_detection(name: str) -> str | None:
    """Evidence for one of the planted bugs."""
    bug = BUGS[name]
    return detection(plant(source_of(bug.config), bug), bug.config, bug.case, sanitize=bug.sanitize)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * BUGS[name].sanitize) for name in BUGS])
def test_planted_bug_is_detected(name: str) -> None:
    assert planted_detection(name) is not None


@pytest.mark.parametrize(("config", "case"), dict.fromkeys((bug.config, bug.case) for bug in BUGS.values()))
def test_correct_source_passes(config: GemmConfig, case: GemmCase) -> None:
    assert detection(source_of(config), config, case) is None


def test_every_marker_has_a_bug() -> None:
    """With those of the headers that the sources of all kernel families include."""
    sources = "".join(read_source(family.source) for family in FAMILIES.values())
    markers = {name for bug in BUGS.values() for name in (bug.marker, bug.before) if name}
    assert set(re.findall(r"/\*bug:([\w-]+)\*/", sources)) == markers


if __name__ == "__main__":  # the table in experiments/results/kernels/README.md
    for name in BUGS:
        print(f"| {name} | {planted_detection(name)} |")

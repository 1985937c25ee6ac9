"""Bit-widths by load, turns of bit-widths, settings of the server, and keys of cached blocks, without vLLM."""

import hashlib
import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from matquant.errors import UserError
from matquant.vllm.block_keys import WidthKeyedHasher
from matquant.vllm.width_policy import LoadPolicy, StepCounts, Turns
from matquant.vllm.width_settings import PolicySettings, WidthSettings

LIMITS: dict[str, Any] = {
    "lower_at_waiting": 10,
    "raise_at_waiting": 3,
    "lower_at_cache": 0.9,
    "raise_at_cache": 0.5,
    "hold_seconds": 5.0,
}


class Server:
    """Load policy with a clock that the test moves."""

    def __init__(self, *bits: int, **limits: Any) -> None:
        self.now = 0.0
        self.policy = LoadPolicy(PolicySettings(bits=bits, **LIMITS | limits), lambda: self.now)

    def at(self, seconds: float, waiting: int = 0, cache: float = 0.0) -> int:
        self.now = seconds
        return self.policy.update(waiting, cache)


@pytest.mark.parametrize("load", [{"waiting": 10}, {"cache": 0.9}, {"waiting": 99, "cache": 1.0}])
def test_bits_fall_with_load_and_rise_after_it(load, caplog):
    server = Server(8, 4, 3)
    with caplog.at_level(logging.INFO):
        found = [server.at(second, **load if 6 <= second < 16 else {}) for second in range(30)]
    assert found[:6] == [8] * 6
    assert found[6:11] == [4] * 5  # one step down at once, the next after hold_seconds
    assert found[11:21] == [3] * 10
    assert found[21:26] == [4] * 5
    assert found[26:] == [8] * 4
    assert server.policy.switches == 4
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "Bit-width 8 -> 4",
        "Bit-width 4 -> 3",
        "Bit-width 3 -> 4",
        "Bit-width 4 -> 8",
    ]
    assert "requests wait, the KV cache is" in caplog.text


@pytest.mark.parametrize("load", [{"waiting": 9}, {"waiting": 4}, {"cache": 0.89}, {"cache": 0.51}])
def test_nothing_changes_between_the_limits(load):
    server = Server(8, 2)
    assert {server.at(second, **load) for second in range(100)} == {8}
    server.at(100, waiting=10)
    assert {server.at(second, **load) for second in range(101, 200)} == {2}


def test_a_load_that_oscillates_around_a_limit_changes_the_bits_once():
    server = Server(8, 4, 3, 2)
    server.at(10, waiting=10)
    assert {server.at(10.1 + i / 10, waiting=load) for i, load in enumerate([0, 12] * 20)} == {4}
    assert server.policy.switches == 1


def test_bits_rise_at_once_after_a_pause_without_steps():
    server = Server(8, 4, 3)
    assert [server.at(second, waiting=50) for second in (5, 10)] == [4, 3]
    assert server.at(15, waiting=1) == 3
    assert server.at(1000, waiting=1) == 8


def test_limits_of_the_ladder():
    server = Server(6, 5, hold_seconds=0.0)
    assert {server.at(second, waiting=50) for second in range(20)} == {5}
    server.at(20)
    assert {server.at(second) for second in range(21, 40)} == {6}


@pytest.mark.parametrize("widths", [(3, 8), (None, 2), (None, 2, 5, 8)])
def test_every_bit_width_with_work_gets_a_step_in_turn(widths):
    turns = Turns()
    found = [turns.next(widths) for _ in range(6 * len(widths))]
    for start in range(len(found) - len(widths) + 1):
        assert set(found[start : start + len(widths)]) == set(widths)
    assert turns.next({7}) == turns.next([7]) == turns.next([]) == 7


def test_counts_by_bit_width():
    counts = StepCounts()
    for width, tokens in ((3, 10), (None, 1), (3, 2), (4, 0)):
        counts.add(width, tokens)
    assert counts.to_json() == {"steps": {"3": 2, "default": 1}, "tokens": {"3": 12, "default": 1}}


def test_settings():
    section = {"model_bits": {"m-3": 3}, "policy": {"bits": [4, 2], "hold_seconds": 1}, "draft_bits": 3}
    settings = WidthSettings.from_config({"matquant": section, "other": 1}, max_bits=4)
    assert settings.draft_bits == 3
    assert settings.policy == PolicySettings(bits=(4, 2), hold_seconds=1)
    assert [settings.request_bits(*pair) for pair in ((2, "m-3"), (None, "m-3"), (None, "m"), (None, None))] == [
        2,
        3,
        None,
        None,
    ]
    assert WidthSettings.from_config({}, 8) == WidthSettings(max_bits=8)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([1], "matquant in --additional-config must be an object; found [1]"),
        ({"polizy": {}}, "has no setting polizy; there are model_bits, policy, draft_bits"),
        ({"model_bits": [3]}, "matquant.model_bits must be an object of model names"),
        ({"model_bits": {"a": 5}}, "model_bits of a: 5 bits cannot be read"),
        ({"model_bits": {"a": "3"}}, "model_bits of a: a bit-width must be a whole number in 2..8; found '3'"),
        ({"draft_bits": 5}, "matquant.draft_bits: 5 bits cannot be read"),
        ({"policy": {}}, "policy.bits must be a list of two or more bit-widths, the highest first; found None"),
        ({"policy": {"bits": [4]}}, "two or more"),
        ({"policy": {"bits": [8, 4]}}, "8 bits cannot be read"),
        ({"policy": {"bits": [2, 4]}}, "must fall from the first to the last; found [2, 4]"),
        ({"policy": {"bits": [4, 4, 2]}}, "must fall"),
        ({"policy": {"bits": [4, 2], "hold": 1}}, "has no setting hold"),
        ({"policy": {"bits": [4, 2], "hold_seconds": "1"}}, "hold_seconds must be a number from 0; found '1'"),
        ({"policy": {"bits": [4, 2], "lower_at_cache": -1}}, "lower_at_cache must be a number from 0"),
        ({"policy": {"bits": [4, 2], "lower_at_waiting": 2}}, "raise_at_waiting must be less than lower_at_waiting"),
        ({"policy": {"bits": [4, 2], "raise_at_cache": 0.9}}, "raise_at_cache must be less than lower_at_cache"),
    ],
)
def test_wrong_settings_raise(section, message):
    with pytest.raises(UserError) as caught:
        WidthSettings.from_config({"matquant": section}, max_bits=4)
    assert message in str(caught.value)


@pytest.mark.parametrize("bits", [1, 9, True, "3", 3.0, [3], {}])
def test_requests_with_wrong_bits_raise(bits):
    with pytest.raises(UserError, match="bits: a bit-width must be a whole number in 2..8; found"):
        WidthSettings(max_bits=8).request_bits(bits, None)


def test_a_request_beyond_the_planes_raises():
    with pytest.raises(UserError, match="5 bits cannot be read; the planes that this server keeps hold at most 4 bits"):
        WidthSettings(max_bits=4).request_bits(5, None)


BLOCK = 4
_names = itertools.count()


def hash_blocks(request: Any) -> list[bytes]:
    """Hashes of new full blocks, chained as vLLM's."""
    found: list[bytes] = []
    for start in range(len(request.block_hashes) * BLOCK, len(request.tokens) - BLOCK + 1, BLOCK):
        before = found[-1] if found else request.block_hashes[-1] if request.block_hashes else b""
        found.append(hashlib.sha256(before + bytes(request.tokens[start : start + BLOCK])).digest())
    return found


def make_request(tokens: list[int]) -> Any:
    request = SimpleNamespace(
        request_id=f"r{next(_names)}", tokens=list(tokens), block_hashes=[], _block_hasher=hash_blocks
    )
    request.block_hashes.extend(hash_blocks(request))
    return request


def append(request: Any, *tokens: int) -> None:
    request.tokens += tokens
    request.block_hashes.extend(request._block_hasher(request))


def run(tokens: list[int], *changes: tuple[int, str], prompt: int = 10) -> list[bytes]:
    """Hashes of a request that has computed so many tokens at each change of its bit-width; the first is at 0 tokens."""
    request = make_request(tokens[:prompt])
    hasher = WidthKeyedHasher(request, changes[0][1])
    for done, (computed, width) in enumerate(changes[1:], 1):
        while len(request.tokens) < computed:
            append(request, tokens[len(request.tokens)])
        hasher.change(request, width, computed, computed, BLOCK)
        assert done
    while len(request.tokens) < len(tokens):
        append(request, tokens[len(request.tokens)])
    return request.block_hashes


TEXT = list(range(40, 64))


def test_blocks_of_one_bit_width_are_shared_and_those_of_two_are_not():
    eight, again, three = run(TEXT, (0, "8")), run(TEXT, (0, "8"), prompt=3), run(TEXT, (0, "3"))
    assert eight == again
    assert len(set(eight) | set(three)) == 2 * len(eight) == 12
    other = run([*TEXT[:9], 1, *TEXT[10:]], (0, "8"))
    assert [a == b for a, b in zip(eight, other, strict=True)] == [True, True, False, False, False, False]


@pytest.mark.parametrize("computed", [4, 8, 12, 16])
@pytest.mark.parametrize("prompt", [3, 10, 24])
def test_complete_blocks_keep_their_keys_when_the_bits_change(computed, prompt):
    """The prompt may be read in part only, or the change may come while text is generated."""
    changed, before = run(TEXT, (0, "8"), (computed, "3"), prompt=prompt), run(TEXT, (0, "8"))
    kept = computed // BLOCK
    assert changed[:kept] == before[:kept]
    assert not set(changed[kept:]) & {*before, *run(TEXT, (0, "3"))}
    assert changed == run(TEXT, (0, "8"), (computed, "3"))  # the same blocks of another request


@pytest.mark.parametrize("computed", [1, 6, 11])
def test_a_block_of_two_bit_widths_is_not_shared(computed):
    first, second = (run(TEXT, (0, "8"), (computed, "3")) for _ in range(2))
    kept = computed // BLOCK
    assert first[:kept] == second[:kept] == run(TEXT, (0, "8"))[:kept]
    assert not set(first[kept:]) & set(second[kept:])


@pytest.mark.parametrize(("settled", "computed"), [(8, 9), (7, 8), (5, 13)])
def test_blocks_with_tokens_that_may_be_computed_again_are_not_shared(settled, computed):
    """Tokens in flight, of which drafts may be rejected."""
    request = make_request(TEXT)
    WidthKeyedHasher(request, "8").change(request, "3", settled, computed, BLOCK)
    kept = settled // BLOCK
    assert request.block_hashes[:kept] == run(TEXT, (0, "8"))[:kept]
    others = {*run(TEXT, (0, "8")), *run(TEXT, (0, "3")), *run(TEXT, (0, "8"), (kept * BLOCK, "3"))}
    assert not set(request.block_hashes[kept:]) & others


def test_a_request_that_starts_again_has_the_keys_of_its_new_bits():
    request = make_request(TEXT)
    hasher = WidthKeyedHasher(request, "8")
    hasher.change(request, "3", 6, 6, BLOCK)
    hasher.restart(request, "3")
    append(request, 1, 2, 3, 4)
    assert request.block_hashes == run([*TEXT, 1, 2, 3, 4], (0, "3"))

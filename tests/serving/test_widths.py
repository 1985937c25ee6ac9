"""Bit-widths by request and by load over HTTP, on one server that all tests share; the last one kills its engine."""

import concurrent.futures
import http.client
import importlib.util
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from engine import QUIET
from packing import Opened
from server import Server
from shared import TINY

from matquant.errors import UserError

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
os.environ.update(QUIET)

WIDTHS = (2, 3, 4)
TOKENS = 3
PROMPTS = [[5, 9, 100, 7], [1000, 3], [17] * 40, [8, 60, 61]]
POLICY = {"bits": [5, 3, 2], "lower_at_waiting": 8, "raise_at_waiting": 2, "hold_seconds": 1.0}
SECTION = {"matquant": {"model_bits": {"m-2bit": 2, "m-4bit": 4}, "policy": POLICY}}


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Opened:
    return Opened(TINY, tmp_path_factory.mktemp("store"), group_size=64)


@pytest.fixture(scope="module")
def folder(opened, tmp_path_factory) -> Path:
    return opened.pack(tmp_path_factory.mktemp("widths") / "packed")


@pytest.fixture(scope="module")
def expected(opened) -> dict[int, list[list[int]]]:
    """Greedy tokens of each prompt in Transformers with dequantized weights, by bit-width."""
    model, found = tf.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), {}
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    for bits in WIDTHS:
        for index in range(len(opened.parent.blocks)):
            for name, weight in opened.parent.block(index).items():
                model.get_submodule(name).weight.data.copy_(weight.dequantize(bits))
        found[bits] = [model.generate(torch.tensor([p]), **length)[0, len(p) :].tolist() for p in PROMPTS]
    assert len({str(tokens) for tokens in found.values()}) == len(WIDTHS)
    return found


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory) -> Iterator[Server]:
    arguments = {
        "--served-model-name": ["m", "m-2bit", "m-4bit"],
        "--scheduler-cls": ["matquant.vllm.scheduler.WidthScheduler"],
        "--hf-overrides": ['{"max_bits": 5, "bits": 3}'],
        "--additional-config": [json.dumps(SECTION)],
        "--max-num-seqs": ["32"],
        "--max-num-batched-tokens": ["128"],
    }
    words = [word for name, values in arguments.items() for word in (name, *values)]
    with Server(folder, tmp_path_factory.mktemp("log") / "log", *words) as found:
        yield found


def in_parallel(calls: list[Any]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def ask(server: Server, prompt: int, **body: Any) -> Any:
    return lambda: server.complete(PROMPTS[prompt], TOKENS, **body)


def test_requests_have_the_bit_widths_that_they_name(server, expected):
    cases = [(index, bits) for index in range(len(PROMPTS)) for bits in WIDTHS]
    wanted = [expected[bits][index] for index, bits in cases]
    assert in_parallel([ask(server, index, bits=bits) for index, bits in cases]) == wanted
    assert in_parallel([ask(server, index, vllm_xargs={"bits": bits}) for index, bits in cases[:6]]) == wanted[:6]


def test_names_of_the_model_stand_for_bit_widths(server, expected):
    found = in_parallel(
        [ask(server, 0, model=f"m-{bits}bit") for bits in (2, 4)] + [ask(server, 0, model="m-4bit", bits=2)]
    )
    assert found == [expected[2][0], expected[4][0], expected[2][0]]


def test_a_streamed_answer_has_its_bit_width(server, expected):
    body = {"model": "m", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    status, text = server.request("/v1/completions", body | {"bits": 3, "stream": True, "return_token_ids": True})
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    tokens = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"] or ()]
    assert (status, tokens) == (200, expected[3][0])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"bits": 6}, "6 bits cannot be read; the planes that this server keeps hold at most 5 bits"),
        ({"bits": 1}, "a bit-width must be a whole number in 2..8; found 1"),
        ({"bits": "3"}, "a bit-width must be a whole number in 2..8; found '3'"),
        ({"vllm_xargs": {"bits": 2.5}}, "a bit-width must be a whole number in 2..8; found 2.5"),
        ({"bits": 3, "vllm_xargs": {"bits": 4}}, "names two bit-widths: bits=3 and vllm_xargs.bits=4"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_wrong_bits_are_answered_with_400(server, path, body, message):
    status, answer = server.request(path, {"model": "m", "prompt": [1], "messages": [], "input": "a"} | body)
    assert status == 400
    assert message in json.loads(answer)["error"]["message"]


def test_a_body_that_is_no_json_is_left_to_vllm(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(
        "POST", "/v1/completions", "{bits", {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    )
    assert connection.getresponse().status in (400, 422)


def test_bits_cannot_be_set_while_the_load_decides(server):
    status, answer = server.request("/v1/matquant/bits", {"bits": 4})
    assert status == 400
    assert "The load decides the bit-width of this server" in answer


def disconnect(server: Server, bits: int | None) -> None:
    """Send a long request, and close the connection."""
    body = {"model": "m", "prompt": PROMPTS[2], "max_tokens": 80, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    content = json.dumps(body if bits is None else body | {"bits": bits})
    connection.request(
        "POST", "/v1/completions", content, {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    )
    time.sleep(1)
    connection.close()


def engine_process(server: Server) -> int:
    """Process id of the engine, the child of the server that holds most memory."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return max(map(int, children), key=resident_bytes)


def resident_bytes(process: int) -> int:
    kilobytes = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    return 1024 * int(kilobytes[1]) if kilobytes else 0


@pytest.mark.slow
def test_many_requests_of_mixed_bit_widths_while_the_load_changes_it(server, expected):
    """Two waves of 100 requests; every fourth names no bit-width, and some clients leave."""
    cases = [(index % len(PROMPTS), (*WIDTHS, None)[index // 4 % 4]) for index in range(100)]
    grown = []
    for _ in range(2):
        before = resident_bytes(engine_process(server))
        calls = [ask(server, index, **({} if bits is None else {"bits": bits})) for index, bits in cases]
        found = in_parallel(calls + [lambda bits=bits: disconnect(server, bits) for bits in (2, None, 5)])
        for (index, bits), tokens in zip(cases, found, strict=False):
            assert tokens == expected[bits][index] if bits is not None else len(tokens) == TOKENS
        grown.append(resident_bytes(engine_process(server)) - before)
    assert grown[1] < 64e6
    deadline = time.monotonic() + 120
    while (state := server.request("/v1/matquant/bits")[1]["scheduler"])["running"] and time.monotonic() < deadline:
        server.complete(PROMPTS[1], 1, bits=2)  # a step, which reports the state
    assert state["switches"] > 0
    assert in_parallel([ask(server, 0, bits=bits) for bits in WIDTHS]) == [expected[bits][0] for bits in WIDTHS]


def test_planes_leave_the_memory_and_come_back(server, expected):
    total = server.request("/v1/matquant/bits")[1]["plane_bytes"]["total"]
    status, found = server.request("/v1/matquant/planes", {"bits": 3})
    assert (status, found) == (200, {"resident": total * 3 // 5, "total": total})
    for bits, resident in ((2, 3), (3, 3), (4, 4), (2, 4)):
        assert server.complete(PROMPTS[0], TOKENS, bits=bits) == expected[bits][0]
        assert server.request("/v1/matquant/bits")[1]["plane_bytes"]["resident"] == total * resident // 5
    status, answer = server.request("/v1/matquant/planes", {"bits": 2})
    assert status == 400
    assert "planes of 2 bits are not enough: some layers are read at 3 bits" in answer
    assert server.request("/v1/matquant/planes", {"bits": 9})[0] == 400


def test_state_and_metrics(server):
    server.complete(PROMPTS[1], 2, bits=4)
    answer = server.request("/v1/matquant/bits")[1]
    state = answer["scheduler"]
    assert state["server_bits"] in ("5", "3", "2")
    assert state["policy"]["bits"] == [5, 3, 2]
    assert 0 <= state["kv_cache_usage"] <= 1
    status, text = server.request("/metrics")
    assert status == 200
    values = dict(re.findall(r"^(matquant_\S+) (\S+)$", text, re.MULTILINE))
    assert float(values["matquant_switches_total"]) == state["switches"]
    assert float(values["matquant_step_bits"]) == 4
    for bits, tokens in state["tokens"].items():
        assert float(values[f'matquant_tokens_total{{bits="{bits}"}}']) == tokens
    before = float(values['matquant_steps_total{bits="4"}'])
    server.complete(PROMPTS[1], 2, bits=4)
    after = dict(re.findall(r"^(matquant_\S+) (\S+)$", server.request("/metrics")[1], re.MULTILINE))
    assert float(after['matquant_steps_total{bits="4"}']) == before + 2


def test_a_killed_engine_ends_the_server(server):
    """vLLM answers an error, and the process ends."""
    os.kill(engine_process(server), signal.SIGKILL)
    try:
        status, _ = server.request("/v1/completions", {"model": "m", "prompt": [1], "max_tokens": 1, "bits": 3})
        assert status >= 500
    except OSError:
        pass  # it has ended already
    server.process.wait(120)
    assert "EngineDeadError" in server.log.read_text() or "died" in server.log.read_text()


def config(scheduler: Any, section: Any = None) -> Any:
    return SimpleNamespace(
        quant_config=SimpleNamespace(bit_choice=SimpleNamespace(max_bits=8)),
        additional_config={} if section is None else {"matquant": section},
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
    )


def test_a_server_without_the_scheduler_says_how_to_start_it():
    from matquant.vllm.endpoint import _move_bits

    for body, section in (({"bits": 3}, None), ({"model": "a"}, {"model_bits": {"a": 3}})):
        with pytest.raises(UserError, match="Restart it with --scheduler-cls matquant.vllm.scheduler.WidthScheduler"):
            _move_bits(dict(body), config(None, section))
    untouched = {"model": "b", "vllm_xargs": {"x": 1}}
    assert not _move_bits(untouched, config(None, {"model_bits": {"a": 3}}))
    assert untouched == {"model": "b", "vllm_xargs": {"x": 1}}
    assert not _move_bits({"bits": 3}, SimpleNamespace(quant_config=None))  # another checkpoint

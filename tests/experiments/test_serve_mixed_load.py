"""Load on a server at mixed bit-widths, against a server of the test in the place of vLLM."""

import argparse
import asyncio
import sys
from typing import Any

import psutil
import pytest
from shared import ROOT, load_script

pytestmark = pytest.mark.slow

aiohttp = pytest.importorskip("aiohttp")
FOLDER = ROOT / "experiments" / "benchmarks"
SHORT = ["--out", "x.json", "--bits", "8,3", "--seconds", "1.5", "--clients", "3", "--switch-seconds", "0.2"]
FAST = ["--warm-up", "1", "--probe-seconds", "0.3", "--sample-seconds", "0.2", "--tokens", "5"]


@pytest.fixture
def script(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return load_script(FOLDER / "serve_mixed_load.py")


class Server:
    """Server whose answers depend on the bit-width of a request.

    Args:
        computed: bit-width at which a request is computed, by what it asks for; others are computed as asked.
        fails: bit-widths of streamed requests that are answered with 500.
        missing: number of tokens that streamed answers lack.
    """

    def __init__(self, computed: dict[int, int] | None = None, fails: tuple[int, ...] = (), missing: int = 0) -> None:
        self.computed, self.fails, self.missing = computed or {}, fails, missing
        self.bits, self.posted, self.busy = 8, [], False

    def application(self) -> Any:
        application = aiohttp.web.Application()
        application.router.add_post("/v1/completions", self.complete)
        application.router.add_get("/v1/matquant/bits", self.state)
        application.router.add_post("/v1/matquant/bits", self.set_bits)
        application.router.add_post("/v1/matquant/planes", self.set_bits)
        return application

    async def complete(self, request: Any) -> Any:
        content = await request.json()
        named = {"m-8bit": 8, "m-3bit": 3}.get(content["model"], self.bits)
        bits = content.get("bits", named)
        if not content.get("stream"):
            shift = float(self.computed.get(bits, bits) if self.busy else bits)
            tokens = ["a"] * content["max_tokens"]
            listed = [{"a": -0.1 * shift, "b": -shift}] * len(tokens)
            logprobs = {"tokens": tokens, "token_logprobs": [-0.1 * shift] * len(tokens), "top_logprobs": listed}
            return aiohttp.web.json_response({"choices": [{"logprobs": logprobs}]})
        if bits in self.fails and self.busy:
            return aiohttp.web.Response(status=500, text="it failed")
        response = aiohttp.web.StreamResponse()
        await response.prepare(request)
        for _ in range(content["max_tokens"] - self.missing * self.busy):
            await response.write(b'data: {"choices": [{"token_ids": [7]}]}\n\n')
            await asyncio.sleep(0.001)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def state(self, _: Any) -> Any:
        state = {"server_bits": "default", "waiting": 2, "running": 1, "kv_cache_usage": 0.5, "switches": 0}
        return aiohttp.web.json_response({"bits": {"layer": self.bits}, "scheduler": state})

    async def set_bits(self, request: Any) -> Any:
        self.busy = True
        content = await request.json()
        self.posted.append((request.path, content["bits"]))
        if request.path.endswith("bits"):
            self.bits = content["bits"]
        return aiohttp.web.json_response({})


def run(script: Any, monkeypatch: Any, server: Server, *arguments: str) -> dict[str, Any]:
    """Record of a load on a server."""
    monkeypatch.setattr(sys, "argv", ["serve_mixed_load.py", *SHORT, *FAST, *arguments])
    parsed: argparse.Namespace = script.parse()

    async def both() -> dict[str, Any]:
        from aiohttp.test_utils import TestServer

        async with TestServer(server.application()) as found:
            load = script.Load(parsed, 100, found.port, psutil.Process())
            await load.run()
            return load.record()

    return asyncio.run(both())


def test_a_steady_load_without_faults(script, monkeypatch):
    server = Server()
    record = run(script, monkeypatch, server, "--disconnect-share", "0.3")
    summary = record["summary"]
    assert (summary["errors"], summary["wrong_bit_widths"]) == (0, 0)
    assert summary["requests"] > summary["disconnected"] > 0
    assert summary["probes"] > summary["posted_switches"] == sum(path.endswith("bits") for path, _ in server.posted)
    assert {bits for path, bits in server.posted if path.endswith("bits")} == {8, 3}
    assert any(path.endswith("planes") for path, _ in server.posted)
    assert {request.get("bits") for request in record["requests"]} == {None, 8, 3}
    assert {request.get("model") for request in record["requests"]} == {None, "m-8bit", "m-3bit"}
    assert all(request["tokens"] > 0 for request in record["requests"])
    assert all(state["server_bits"] in (8, 3) and state["waiting"] == 2 for state in record["states"])
    assert len(record["memory"]) > 3


def test_with_a_policy_nothing_is_switched_and_the_warm_up_ends_with_a_plain_request(script, monkeypatch):
    server = Server()
    policy = '{"bits": [8, 3], "hold_seconds": 0.1}'
    record = run(script, monkeypatch, server, "--policy", policy)
    assert record["summary"]["posted_switches"] == record["summary"]["errors"] == 0
    assert server.posted == []
    assert record["requests"][0]["arrival"] >= 0  # that of the warm-up is left out


@pytest.mark.parametrize("computed", [{3: 8}, {8: 3}])
def test_a_wrong_bit_width_is_found(script, monkeypatch, computed):
    record = run(script, monkeypatch, Server(computed))
    (asked,) = computed
    assert record["summary"]["wrong_bit_widths"] > 0
    assert {(entry["bits"], entry["nearest"]) for entry in record["wrong"]} == {(asked, str(computed[asked]))}


@pytest.mark.parametrize(
    ("fault", "message"), [({"fails": (3,)}, "status 500: it failed"), ({"missing": 1}, "tokens came of")]
)
def test_faults_of_requests_are_counted(script, monkeypatch, fault, message):
    record = run(script, monkeypatch, Server(**fault), "--named-share", "1", "--disconnect-share", "0")
    failed = [request for request in record["requests"] if request["error"] is not None]
    assert record["summary"]["errors"] == len(failed) > 0
    assert all(message in text for text in record["error_messages"])


def test_a_wave_sends_at_its_rates(script, monkeypatch):
    record = run(script, monkeypatch, Server(), "--profile", "wave", "--rates", "5,60,5", "--phase-seconds", "1")
    few, many, last = record["phases"]
    assert many["requests"] > 2 * (few["requests"] + last["requests"])
    assert all(request["end"] > request["first"] >= request["arrival"] for request in record["requests"])
    assert record["summary"]["disconnected"] == record["summary"]["errors"] == 0
    assert {request.get("bits") for request in record["requests"]} == {None}


def test_arguments_of_the_server_come_last(script, monkeypatch):
    rest = ["--", "--served-model-name", "n", "--load-format", "dummy"]
    monkeypatch.setattr(sys, "argv", ["x", *SHORT, "--policy", '{"bits": [8, 3]}', *rest])
    command = script.server_command(script.parse(), ROOT, 1234)
    assert command[-4:] == rest[1:]
    assert command[command.index("--additional-config") + 1] == (
        '{"matquant": {"model_bits": {"m-8bit": 8, "m-3bit": 3}, "policy": {"bits": [8, 3]}}}'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy", '{"bits": [3, 8]}'], "bits must fall from the first to the last"),
        (["--policy", '{"bits": [8, 3], "x": 1}'], "has no setting x"),
        (["--profile", "wave", "--rates", "1,0"], "--rates must be more than 0"),
    ],
)
def test_wrong_arguments_end_before_the_server_starts(script, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["x", *SHORT, *arguments])
    with pytest.raises(SystemExit) as caught:
        script.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err

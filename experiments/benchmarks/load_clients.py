"""Clients of a server at mixed bit-widths, and their records: answers, times, bit-widths and memory."""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import psutil
from load_summary import distance, nearest, slope_per_minute, summarize_phases

from matquant.formats.bits import MAX_BITS
from matquant.vllm.width_settings import SECTION, PolicySettings, WidthSettings

PROBE_TOKENS = 4
LISTED = 5  # log-probabilities that a probe compares at each position


def server_name(bits: int | None) -> str:
    """Served model name that stands for a bit-width; None for that of the server."""
    return "m" if bits is None else f"m-{bits}bit"


def read_policy(content: dict[str, Any]) -> PolicySettings:
    """Checked settings of the load policy. Raises UserError."""
    policy = WidthSettings.from_config({SECTION: {"policy": content}}, MAX_BITS).policy
    assert policy is not None
    return policy


class Load:
    """Clients of one server, and their records.

    Args:
        arguments: the command line.
        vocabulary: number of tokens that prompts are drawn from.

    Attributes:
        requests: one entry for each request, see ``complete``.
        states: state of the server, once a second.
        memory: resident bytes of the server, and used bytes of the device, every few seconds.
        wrong: probes with the bit-width of another one.
    """

    def __init__(self, arguments: argparse.Namespace, vocabulary: int, port: int, process: psutil.Process) -> None:
        self.arguments, self.vocabulary, self.process = arguments, vocabulary, process
        self.url = f"http://127.0.0.1:{port}"
        self.random = random.Random(arguments.seed)
        self.requests: list[dict[str, Any]] = []
        self.states: list[dict[str, Any]] = []
        self.memory: list[dict[str, Any]] = []
        self.wrong: list[dict[str, Any]] = []
        self.probes = self.switches = 0
        self.references: dict[str, Any] = {}
        self.largest = 0.0
        self.phases: list[dict[str, Any]] = []
        self.start = time.perf_counter()

    def now(self) -> float:
        """Seconds from the start of the load."""
        return round(time.perf_counter() - self.start, 4)

    async def run(self) -> None:
        """Run the load, and the measurements beside it."""
        limits = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)  # vLLM closes idle connections after 5 seconds
        timeout = aiohttp.ClientTimeout(total=self.arguments.timeout)
        async with aiohttp.ClientSession(self.url, connector=limits, timeout=timeout) as self.session:
            await self.warm_up()
            self.start = time.perf_counter()
            load = asyncio.create_task(self.wave() if self.arguments.profile == "wave" else self.steady())
            tasks = [load, *(asyncio.create_task(self.every(seconds, call)) for seconds, call in self.measurements())]
            done, _ = await asyncio.wait(
                tasks, return_when=asyncio.FIRST_COMPLETED
            )  # a measurement ends by an error only
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in done:
                task.result()
            await self.sample_memory()

    def measurements(self) -> list[tuple[float, Any]]:
        """Seconds between two calls, and the call, of what runs beside the load."""
        found = [(1.0, self.sample_state), (self.arguments.sample_seconds, self.sample_memory)]
        if self.arguments.probe_seconds > 0:
            found.append((self.arguments.probe_seconds, self.probe_all))
        if self.arguments.profile == "steady" and self.arguments.policy is None:
            found.append((self.arguments.switch_seconds, self.switch))
        return found

    async def every(self, seconds: float, call: Any) -> None:
        """Call a function again and again, at the start of every period."""
        for count in range(1, 10**9):
            await asyncio.sleep(max(0.0, self.start + count * seconds - time.perf_counter()))
            await call()

    async def warm_up(self) -> None:
        """Compute each bit-width once before the load, and keep the answers of the probes."""
        for bits in self.arguments.bits:
            self.references[str(bits)] = await self.probe({"bits": bits})
            await asyncio.gather(*(self.complete({"bits": bits}) for _ in range(self.arguments.warm_up)))
        failed = [request["error"] for request in self.requests if request["error"] is not None]
        if failed:
            sys.exit(f"error: the first request failed: {failed[0]}")
        if self.arguments.policy is not None:  # the warm-up may have lowered the bit-width, and a later step raises it
            settings = read_policy(self.arguments.policy)
            await asyncio.sleep(1 + settings.hold_seconds * len(settings.bits))
            await self.complete({})
        self.requests.clear()

    def body(self) -> dict[str, Any]:
        """Part of a request's body that names its bit-width, or does not."""
        bits = self.random.choice(self.arguments.bits)
        if self.random.random() >= self.arguments.named_share:
            return {}
        return self.random.choice([{"bits": bits}, {"model": server_name(bits)}])

    async def complete(self, named: dict[str, Any], disconnect: bool = False) -> None:
        """Send a request with a random prompt, and record its times in seconds from the start, tokens and error.

        Args:
            named: part of the body.
            disconnect: close the connection after the first token.
        """
        entry = {"arrival": self.now(), "first": None, "end": None, "tokens": 0, "error": None, **named}
        entry["disconnected"] = disconnect
        self.requests.append(entry)
        lengths = [max(1, round(self.random.expovariate(1 / mean))) for mean in self.lengths]
        prompt_tokens, tokens = (min(count, 2 * mean) for count, mean in zip(lengths, self.lengths, strict=True))
        prompt = [self.random.randrange(self.vocabulary) for _ in range(prompt_tokens)]
        content = {"model": "m", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        entry["prompt_tokens"] = prompt_tokens
        try:
            async for count in self.stream(content | named):
                entry["first"] = self.now() if entry["first"] is None else entry["first"]
                entry["tokens"] += count
                if disconnect:
                    return
            entry["end"] = self.now()
            if entry["tokens"] != tokens:
                entry["error"] = f"{entry['tokens']} tokens came of {tokens}"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            entry["error"] = f"{type(error).__name__}: {error}"

    @property
    def lengths(self) -> tuple[int, int]:
        """Mean number of tokens of a prompt, and of an answer."""
        return self.arguments.prompt_tokens, self.arguments.tokens

    async def stream(self, content: dict[str, Any]) -> AsyncIterator[int]:
        """Number of tokens of each part of a streamed answer. Raises ValueError for another answer than 200."""
        body = content | {"stream": True, "return_token_ids": True}
        async with self.session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    part = json.loads(line[6:])
                    if "error" in part:
                        raise ValueError(str(part["error"])[:300])
                    if count := sum(len(choice.get("token_ids") or ()) for choice in part["choices"]):
                        yield count

    async def probe(self, named: dict[str, Any]) -> list[dict[str, float]]:
        """Log-probabilities of the likeliest tokens at each position of the answer to the probe's prompt, the chosen first."""
        prompt = [(7 * index + 3) % self.vocabulary for index in range(24)]
        content = {"model": "m", "prompt": prompt, "max_tokens": PROBE_TOKENS, "temperature": 0, "ignore_eos": True}
        content |= {"logprobs": LISTED, "return_tokens_as_token_ids": True} | named
        async with self.session.post("/v1/completions", json=content) as response:
            if response.status != 200:
                raise RuntimeError(f"a probe was answered with {response.status}: {(await response.text())[:300]}")
            found = (await response.json())["choices"][0]["logprobs"]
        return [
            {token: value, **listed}
            for token, value, listed in zip(
                found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True
            )
        ]

    async def probe_all(self) -> None:
        """Probe every bit-width, by its number and by the name of the model."""
        for bits in self.arguments.bits:
            for named in ({"bits": bits}, {"model": server_name(bits)}):
                self.check(bits, named, await self.probe(named))

    def check(self, bits: int, named: dict[str, Any], answer: list[dict[str, float]]) -> None:
        """Compare the answer of a probe with the first one of its bit-width."""
        self.probes += 1
        found = nearest(answer, {str(bits): self.references[str(bits)], **self.references})
        self.largest = max(self.largest, distance(answer, self.references[str(bits)]))
        if found != str(bits):
            self.wrong.append({"time": self.now(), "named": named, "bits": bits, "nearest": found, "answer": answer})

    async def switch(self) -> None:
        """Change the server's bit-width, and probe a request that does not name one."""
        self.switches += 1
        bits = self.arguments.bits[self.switches % len(self.arguments.bits)]
        await self.post("/v1/matquant/bits", {"bits": bits})
        if self.switches % 2:
            await self.post("/v1/matquant/planes", {"bits": bits})
        self.check(bits, {}, await self.probe({}))

    async def post(self, path: str, content: dict[str, Any]) -> None:
        """Send a request that must be answered with 200."""
        async with self.session.post(path, json=content) as response:
            if response.status != 200:
                raise RuntimeError(f"{path} was answered with {response.status}: {(await response.text())[:300]}")

    async def sample_state(self) -> None:
        """Record the state of the scheduler, and where it computed what."""
        async with self.session.get("/v1/matquant/bits") as response:
            if response.status != 200:
                raise RuntimeError(f"/v1/matquant/bits was answered with {response.status}")
            answer = await response.json()
        state = answer["scheduler"] or {}
        bits = state.get("server_bits", "default")
        if not bits.isdecimal():
            values = set(answer["bits"].values())
            bits = values.pop() if len(values) == 1 else None
        kept = {name: state.get(name) for name in ("waiting", "running", "kv_cache_usage", "switches", "speculation")}
        self.states.append({"time": self.now(), "server_bits": None if bits is None else int(bits), **kept})

    async def sample_memory(self) -> None:
        """Record the resident memory of the server's processes, and the used memory of the devices."""
        if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
            raise RuntimeError("the server has ended")
        resident = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                resident += process.memory_info().rss
        sample = {"time": self.now(), "resident_mb": round(resident / 1e6, 1)}
        if self.arguments.device_memory:
            sample["device_mb"] = await asyncio.to_thread(used_device_memory)
        self.memory.append(sample)

    async def steady(self) -> None:
        """Send requests from a fixed number of clients."""
        seconds = self.arguments.seconds
        self.phases.append({"start": 0.0, "end": seconds, "rate": None})

        async def client() -> None:
            while self.now() < seconds:
                failures = sum(request["error"] is not None for request in self.requests[-20:])
                await self.complete(self.body(), self.random.random() < self.arguments.disconnect_share)
                await asyncio.sleep(1.0 if failures >= 20 else 0.0)

        await asyncio.gather(*(client() for _ in range(self.arguments.clients)))

    async def wave(self) -> None:
        """Send requests as they arrive, at rates that change."""
        tasks, arrival, end = [], 0.0, 0.0
        for rate in self.arguments.rates:
            begin, end = end, end + self.arguments.phase_seconds
            self.phases.append({"start": begin, "end": end, "rate": rate})
            arrival = begin + self.random.expovariate(rate)
            while arrival < end:
                await asyncio.sleep(max(0.0, self.start + arrival - time.perf_counter()))
                disconnect = self.random.random() < self.arguments.disconnect_share
                tasks.append(asyncio.create_task(self.complete(self.body(), disconnect)))
                arrival += self.random.expovariate(rate)
        await asyncio.sleep(max(0.0, self.start + end - time.perf_counter()))
        await asyncio.gather(*tasks)

    def record(self) -> dict[str, Any]:
        """Figures of the load."""
        errors = [request for request in self.requests if request["error"] is not None]
        resident = [(sample["time"], sample["resident_mb"]) for sample in self.memory]
        names = list(self.references)
        pairs = [(a, b) for a in names for b in names if a < b]
        summary = {
            "requests": len(self.requests),
            "disconnected": sum(request["disconnected"] for request in self.requests),
            "errors": len(errors),
            "tokens": sum(request["tokens"] for request in self.requests),
            "seconds": self.memory[-1]["time"],
            "posted_switches": self.switches,
            "probes": self.probes,
            "wrong_bit_widths": len(self.wrong),
            "largest_probe_distance": round(self.largest, 6),
            "least_distance_of_bit_widths": round(
                min((distance(self.references[a], self.references[b]) for a, b in pairs), default=0.0), 6
            ),
            "resident_mb": {
                "first": resident[0][1],
                "last": resident[-1][1],
                "most": max(value for _, value in resident),
            },
            "resident_slope_mb_per_minute": round(slope_per_minute(resident), 3),
        }
        if self.arguments.device_memory:
            device = [(sample["time"], sample["device_mb"]) for sample in self.memory]
            summary["device_slope_mb_per_minute"] = round(slope_per_minute(device), 3)
        return {
            "summary": summary,
            "phases": summarize_phases(self.requests, self.phases),
            "error_messages": sorted({request["error"] for request in errors})[:20],
            "wrong": self.wrong[:20],
            "memory": self.memory,
            "states": self.states,
            "requests": self.requests,
        }


def used_device_memory() -> float:
    """Used memory of all devices in MB, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    return sum(1.048576 * float(line) for line in done.stdout.split())

"""Put a server of vLLM under load at mixed bit-widths, and record errors, wrong bit-widths, latency and memory.

    python experiments/benchmarks/serve_mixed_load.py --out load.json --seconds 600 -- --dtype float32 --enforce-eager
    python experiments/benchmarks/serve_mixed_load.py --model FOLDER --out wave.json --plot wave.png --profile wave \
        --policy '{"bits": [8, 4, 3], "lower_at_waiting": 8}' --device-memory -- --load-format dummy

It needs an environment with vLLM. Without ``--model`` the shipped model is packed first. What follows ``--`` are arguments of
the server; they come last, so that they replace those of this script.

steady    ``--clients`` clients send one request after another. Of each the bit-width is named in the body, by the name of the
          model, or not named; some clients disconnect. Without ``--policy`` the server's bit-width changes every
          ``--switch-seconds`` by ``POST /v1/matquant/bits``, and planes leave the device's memory at every second change.
wave      Requests arrive at the ``--rates``, as a Poisson process, each for ``--phase-seconds``; an arrival waits for no
          answer. By default none names a bit-width, see ``--named-share``.

Probes ask one prompt at every bit-width before the load, and every few seconds during it. An answer whose log-probabilities are
nearer to the first answer of another bit-width than to that of its own is counted as a wrong bit-width. Memory is that of
all processes of the server, so that pages which they share count in each of them.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from load_clients import Load, read_policy, server_name

from matquant.errors import UserError
from matquant.report.provenance import provenance

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}  # GB; unless set already
PROBE_SECONDS = 5.0


def pack_shipped_model(folder: Path) -> Path:
    """Pack the shipped model, rounded to nearest, and return its folder."""
    packed = folder / "packed"
    method = ("method=rtn", "method.per_bit_models=false", "method.slicing=msb", "method.group_size=64")
    places = (f"pack.path={packed}", f"hydra.run.dir={folder / 'run'}", f"store.path={folder / 'store'}")
    command = [sys.executable, str(ROOT / "run.py"), *method, "stages=[quantize,pack]", "pack=nested", "tracking=none"]
    subprocess.run([*command, *places], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return packed


def server_command(arguments: argparse.Namespace, model: Path, port: int) -> list[str]:
    """Command line of the server."""
    section: dict[str, Any] = {"model_bits": {server_name(bits): bits for bits in arguments.bits}}
    if arguments.policy is not None:
        section["policy"] = arguments.policy
    names = [server_name(bits) for bits in (None, *arguments.bits)]
    options = {
        "--model": [str(model)],
        "--served-model-name": names,
        "--host": ["127.0.0.1"],
        "--port": [str(port)],
        "--scheduler-cls": ["matquant.vllm.scheduler.WidthScheduler"],
        "--worker-extension-cls": ["matquant.vllm.worker.WidthExtension"],
        "--middleware": ["matquant.vllm.endpoint.WidthEndpoint"],
        "--additional-config": [json.dumps({"matquant": section})],
    }
    words = [word for name, values in options.items() for word in (name, *values)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words, *arguments.server]


@contextlib.contextmanager
def running_server(command: Sequence[str], port: int, log: Path, seconds: float) -> Iterator[psutil.Process]:
    """Process of a server that answers. Exits with the end of its log if it ends, or takes longer than ``seconds``."""
    with log.open("w") as stream:
        process = psutil.Popen(command, env={**ENVIRONMENT, **os.environ}, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"error: the server did not start; the end of {log}:\n{log.read_text()[-3000:]}")
            time.sleep(1)
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
            _, alive = psutil.wait_procs([process], timeout=60)
            for one in alive:
                one.kill()


def free_port() -> int:
    """Port that no server listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def parse() -> argparse.Namespace:
    """Command line, with the server's arguments in ``server``."""
    given, server = sys.argv[1:], []
    if "--" in given:
        place = given.index("--")
        given, server = given[:place], given[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- ARGUMENTS]",
    )
    numbers = lambda text: [float(word) for word in text.split(",")]  # noqa: E731
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG; load_summary.py draws a record later too")
    parser.add_argument("--model", type=Path, help="packed folder; default: the shipped model")
    parser.add_argument("--profile", choices=("steady", "wave"), default="steady")
    parser.add_argument("--bits", type=lambda text: [int(word) for word in text.split(",")], default=[8, 4, 3, 2])
    parser.add_argument("--policy", type=json.loads, help="settings of the load policy as JSON")
    parser.add_argument("--seconds", type=float, default=600, help="length of a steady load")
    parser.add_argument("--clients", type=int, default=16, help="of a steady load")
    parser.add_argument("--switch-seconds", type=float, default=10)
    parser.add_argument("--rates", type=numbers, default=[1, 4, 16, 4, 1], help="requests a second of a wave")
    parser.add_argument("--phase-seconds", type=float, default=20)
    parser.add_argument(
        "--named-share", type=float, help="share of requests that name a bit-width: 0.75, and 0 in a wave"
    )
    parser.add_argument("--disconnect-share", type=float, help="share of clients that leave: 0.1, and 0 in a wave")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="mean, exponential, at most twice as much")
    parser.add_argument("--tokens", type=int, default=24, help="mean of the answer, as above")
    parser.add_argument("--warm-up", type=int, default=8, help="requests at once at each bit-width before the load")
    parser.add_argument("--probe-seconds", type=float, default=PROBE_SECONDS, help="0 leaves the probes out")
    parser.add_argument("--sample-seconds", type=float, default=5, help="between two measurements of memory")
    parser.add_argument("--device-memory", action="store_true", help="measure it too, with nvidia-smi")
    parser.add_argument("--start-seconds", type=float, default=600, help="limit of the server's start")
    parser.add_argument("--timeout", type=float, default=300, help="of a request, in seconds")
    parser.add_argument("--log", type=Path, help="of the server; default: beside --out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(given)
    is_wave = arguments.profile == "wave"
    defaults = {"named_share": 0.0 if is_wave else 0.75, "disconnect_share": 0.0 if is_wave else 0.1}
    for name, value in defaults.items():
        setattr(arguments, name, value if getattr(arguments, name) is None else getattr(arguments, name))
    if min(arguments.rates) <= 0:
        parser.error(f"--rates must be more than 0; found {arguments.rates}")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib. Leave it out, and draw the record elsewhere with load_summary.py.")
    try:
        if arguments.policy is not None:
            read_policy(arguments.policy)
    except UserError as error:
        parser.error(str(error))
    arguments.server = server
    arguments.log = arguments.log or arguments.out.with_suffix(".log")
    return arguments


def main() -> int:
    """Run one load. Returns 1 after errors or wrong bit-widths."""
    arguments, origin = parse(), provenance()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the server too
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = pack_shipped_model(Path(folder)) if arguments.model is None else arguments.model
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        port = free_port()
        command = server_command(arguments, model, port)
        with running_server(command, port, arguments.log, arguments.start_seconds) as process:
            load = Load(arguments, vocabulary, port, process)
            try:
                asyncio.run(load.run())
            except RuntimeError as error:
                sys.exit(f"error: {error}; the end of {arguments.log}:\n{arguments.log.read_text()[-3000:]}")
    words = ["python", *(model.name if word == str(model) else word for word in command[1:])]
    record = {"provenance": origin, "server": shlex.join(words), **load.record()}
    arguments.out.write_text(dump(record))
    print(json.dumps(record["summary"], indent=1))
    for phase in record["phases"]:
        print(json.dumps(phase))
    if arguments.plot is not None:
        from load_summary import draw

        from matquant.report.drawing import to_png

        arguments.plot.write_bytes(to_png(draw(record)))
    return 1 if record["summary"]["errors"] or record["summary"]["wrong_bit_widths"] else 0


def dump(record: dict[str, Any]) -> str:
    """JSON with one line for each key, and for each entry of a list."""
    parts = []
    for name, value in record.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())

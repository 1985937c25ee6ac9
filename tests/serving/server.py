"""OpenAI server of vLLM in a process of its own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from engine import QUIET


class Server:
    """Server of a packed folder, which answers requests within a ``with`` block.

    Args:
        log: file for its output.
        arguments: further arguments of the command line.
    """

    def __init__(self, folder: Path, log: Path, *arguments: str) -> None:
        self.log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            folder,
            *(() if "--served-model-name" in arguments else ("--served-model-name", "m")),
            "--dtype",
            "float32",
            "--max-model-len",
            "128",
            "--enforce-eager",
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--api-key",
            "secret",
            "--worker-extension-cls",
            "matquant.vllm.worker.WidthExtension",
            "--middleware",
            "matquant.vllm.endpoint.WidthEndpoint",
            *arguments,
        ]
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                list(map(str, command)), env=os.environ | QUIET, stdout=stream, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 300
        while not self._answers():
            assert self.process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(1)

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200
        except OSError:
            return False

    def request(self, path: str, content: Any = None, key: str = "secret") -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
            data=None if content is None else json.dumps(content).encode(),
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                text = response.read().decode()
                return response.status, json.loads(text) if text.startswith("{") else text
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, prompt: list[int], max_tokens: int = 16, **body: Any) -> list[int]:
        """Greedy tokens after a prompt."""
        fixed = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        status, answer = self.request("/v1/completions", fixed | {"return_token_ids": True} | body)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

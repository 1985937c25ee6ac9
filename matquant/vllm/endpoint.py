"""Bit-widths over HTTP: ``vllm serve FOLDER --middleware matquant.vllm.endpoint.WidthEndpoint ...``.

    GET  /v1/matquant/bits                                           current bit-widths
    POST /v1/matquant/bits  {"bits": 3, "prefill_bits": 8}           new bit-widths for all later requests

Running requests are finished first, so that no answer mixes bit-widths. The prefix cache is dropped. The path starts with /v1,
which the API key of the server protects.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel

router = APIRouter()
_lock = asyncio.Lock()


class BitsRequest(BaseModel):
    """Body of a POST request: arguments of ``WidthExtension.set_bits``."""

    bits: int | dict[str, int]
    prefill_bits: int | None = None


class WidthEndpoint:
    """ASGI middleware that adds the routes when the server starts, and does nothing else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        server: FastAPI | None = scope.get("app")
        if server is not None and not getattr(server.state, "matquant_routes", False):
            server.include_router(router)
            server.state.matquant_routes = True
        await self.app(scope, receive, send)


@router.get("/v1/matquant/bits")
async def get_bits(request: Request) -> dict[str, Any]:
    """Return the current bit-widths."""
    return _merge_workers(await request.app.state.engine_client.collective_rpc("get_bits"))


@router.post("/v1/matquant/bits")
async def set_bits(body: BitsRequest, request: Request) -> dict[str, Any]:
    """Set the bit-widths and return them. Answers 400 with the message of the error if they are not available."""
    engine = request.app.state.engine_client
    async with _lock:
        await engine.pause_generation(mode="wait", clear_cache=True)
        try:
            found = await engine.collective_rpc("set_bits", args=(body.bits, body.prefill_bits))
        except Exception as error:  # vLLM reports any error of a worker process as text
            raise HTTPException(400, str(error)) from error
        finally:
            await engine.resume_generation()
    return _merge_workers(found)


def _merge_workers(workers: list[dict[str, list[int]]]) -> dict[str, Any]:
    layers = {name: pair for worker in workers for name, pair in worker.items()}
    return {"bits": {n: p[0] for n, p in layers.items()}, "prefill_bits": {n: p[1] for n, p in layers.items()}}

"""The width over HTTP: ``vllm serve FOLDER --middleware matquant.vllm.endpoint.WidthEndpoint ...``.

    GET  /v1/matquant/bits                                           the widths now
    POST /v1/matquant/bits  {"bits": 3, "prefill_bits": 8}           other ones, for all requests that come after

Requests under way are finished first, so that each answer is of one width; cached prompts of the old width are dropped. It
lies under /v1, which an API key of the server protects.
"""

import asyncio
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from pydantic import BaseModel

router = APIRouter()
_lock = asyncio.Lock()


class Choice(BaseModel):
    """What is asked for: ``bits`` as in ``WidthExtension.set_bits``."""

    bits: int | dict[str, int]
    prefill_bits: int | None = None


class WidthEndpoint:
    """ASGI middleware that does nothing but add the routes when the server starts."""

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
    found = await request.app.state.engine_client.collective_rpc("get_bits")
    return _answer(found)


@router.post("/v1/matquant/bits")
async def set_bits(choice: Choice, request: Request) -> dict[str, Any]:
    engine = request.app.state.engine_client
    async with _lock:
        await engine.pause_generation(mode="wait", clear_cache=True)
        try:
            found = await engine.collective_rpc("set_bits", args=(choice.bits, choice.prefill_bits))
        except Exception as error:  # of a worker's process: vLLM passes on its text
            raise HTTPException(400, str(error)) from error
        finally:
            await engine.resume_generation()
    return _answer(found)


def _answer(workers: list[dict[str, list[int]]]) -> dict[str, Any]:
    layers = {name: pair for worker in workers for name, pair in worker.items()}
    return {"bits": {n: p[0] for n, p in layers.items()}, "prefill_bits": {n: p[1] for n, p in layers.items()}}

"""Bit-widths over HTTP: ``vllm serve FOLDER --middleware matquant.vllm.endpoint.WidthEndpoint ...``.

    GET  /v1/matquant/bits                                           current bit-widths, and the scheduler's state
    POST /v1/matquant/bits  {"bits": 3, "prefill_bits": 8}           new bit-widths for all later requests
    POST /v1/matquant/planes {"bits": 4}                             planes of 4 bits stay in the device's memory, no others
    POST /v1/completions    {..., "bits": 3}                         bit-width of one request; also chat completions, responses
    GET  /metrics                                                    with metrics of the bit-widths, see ``vllm.metrics``

A POST to the first path lets running requests finish, so that no answer mixes bit-widths, and drops the prefix cache. All paths
start with /v1, which the API key of the server protects, except /metrics.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from matquant.errors import UserError
from matquant.vllm import prometheus
from matquant.vllm.width_settings import WidthSettings

router = APIRouter()
_lock = asyncio.Lock()

GENERATING_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
_NEEDS_SCHEDULER = (
    "This server has one bit-width for all requests. "
    "Restart it with --scheduler-cls matquant.vllm.scheduler.WidthScheduler."
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class BitsRequest(BaseModel):
    """Body of a POST request: arguments of ``WidthExtension.set_bits``."""

    bits: int | dict[str, int]
    prefill_bits: int | None = None


class PlanesRequest(BaseModel):
    """Body of a POST request: argument of ``WidthExtension.keep_planes``."""

    bits: int


class WidthEndpoint:
    """ASGI middleware that adds the routes, and passes the bit-width that a request names to the scheduler."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        server: FastAPI | None = scope.get("app")
        if server is not None and scope["type"] == "http":
            if not getattr(server.state, "matquant_routes", False):
                server.include_router(router)
                server.state.matquant_routes = True
            path = scope["path"].rstrip("/")
            if path == "/metrics":
                prometheus.update(await _step_state(server.state.engine_client))
            elif scope["method"] == "POST" and path.endswith(GENERATING_PATHS):
                try:
                    scope, receive = await _name_bits(server.state.engine_client.vllm_config, scope, receive)
                except UserError as error:
                    await _refusal(str(error))(scope, receive, send)
                    return
        await self.app(scope, receive, send)


async def _name_bits(vllm_config: Any, scope: Any, receive: Receive) -> tuple[Any, Receive]:
    """Scope and body of a request whose bit-width is named where vLLM passes it to the scheduler. Raises UserError."""
    body = await _read_body(receive)
    try:
        content = json.loads(body)
    except ValueError:
        content = None  # vLLM answers
    if isinstance(content, dict) and _move_bits(content, vllm_config):
        body = json.dumps(content).encode()
        headers = [pair for pair in scope["headers"] if pair[0].lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
    return scope, _replay(body, receive)


def _move_bits(content: dict[str, Any], vllm_config: Any) -> bool:
    """Move the bit-width of a request to ``vllm_xargs``. Returns False if it has none. Raises UserError."""
    choice = getattr(vllm_config.quant_config, "bit_choice", None)
    arguments = content.get("vllm_xargs") or {}
    found = [value for value in (content.pop("bits", None), arguments.get("bits")) if value is not None]
    if choice is None or not isinstance(arguments, dict):
        return False
    settings = WidthSettings.from_config(vllm_config.additional_config, choice.max_bits)
    if len(found) == 2 and found[0] != found[1]:
        raise UserError(f"The request names two bit-widths: bits={found[0]!r} and vllm_xargs.bits={found[1]!r}.")
    bits = settings.request_bits(found[0] if found else None, content.get("model"))
    if bits is None:
        return False
    if not has_width_scheduler(vllm_config):
        raise UserError(_NEEDS_SCHEDULER)
    content["vllm_xargs"] = arguments | {"bits": bits}
    return True


def has_width_scheduler(vllm_config: Any) -> bool:
    """True if an engine has the scheduler of this project."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    name = scheduler if isinstance(scheduler, str) else getattr(scheduler, "__module__", "")
    return name.startswith("matquant.vllm.scheduler")


async def _read_body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return the body again, and after it the client's further messages."""
    pending = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


def _refusal(message: str) -> JSONResponse:
    """Answer in the form of the OpenAI API."""
    error = {"message": message, "type": "BadRequestError", "param": "bits", "code": 400}
    return JSONResponse({"error": error}, status_code=400)


async def _step_state(engine: Any) -> dict[str, Any] | None:
    """State of the scheduler at the last step; None without the scheduler of this project."""
    if not has_width_scheduler(engine.vllm_config):
        return None
    workers: list[dict[str, Any] | None] = await engine.collective_rpc("get_step_state")
    return workers[0]


@router.get("/v1/matquant/bits")
async def get_bits(request: Request) -> dict[str, Any]:
    """Return the current bit-widths, the state of the scheduler, and bytes of planes in the devices' memory and in all."""
    engine = request.app.state.engine_client
    widths = _merge_workers(await engine.collective_rpc("get_bits"))
    planes = _sum_bytes(await engine.collective_rpc("get_plane_bytes"))
    return widths | {"scheduler": await _step_state(engine), "plane_bytes": planes}


@router.post("/v1/matquant/bits")
async def set_bits(body: BitsRequest, request: Request) -> dict[str, Any]:
    """Set the bit-widths and return them. Answers 400 with the message of the error if they are not available."""
    engine = request.app.state.engine_client
    _check_no_policy(engine.vllm_config)
    async with _lock:
        await engine.pause_generation(mode="wait", clear_cache=True)
        try:
            found = await engine.collective_rpc("set_bits", args=(body.bits, body.prefill_bits))
        except Exception as error:  # vLLM reports any error of a worker process as text
            raise HTTPException(400, str(error)) from error
        finally:
            await engine.resume_generation()
    return _merge_workers(found)


@router.post("/v1/matquant/planes")
async def keep_planes(body: PlanesRequest, request: Request) -> dict[str, int]:
    """Move planes to host memory between two steps, and return bytes. Answers 400 if the server reads more bits now."""
    try:
        workers = await request.app.state.engine_client.collective_rpc("keep_planes", args=(body.bits,))
    except Exception as error:  # vLLM reports any error of a worker process as text
        raise HTTPException(400, str(error)) from error
    return _sum_bytes(workers)


def _sum_bytes(workers: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(worker[name] for worker in workers) for name in ("resident", "total")}


def _check_no_policy(vllm_config: Any) -> None:
    """Answer 400 if the load decides the bit-width."""
    choice = getattr(vllm_config.quant_config, "bit_choice", None)
    if choice is None or not has_width_scheduler(vllm_config):
        return
    if WidthSettings.from_config(vllm_config.additional_config, choice.max_bits).policy is not None:
        raise HTTPException(
            400,
            "The load decides the bit-width of this server (policy). Name bits in a request, or start without a policy.",
        )


def _merge_workers(workers: list[dict[str, list[int]]]) -> dict[str, Any]:
    layers = {name: pair for worker in workers for name, pair in worker.items()}
    return {"bits": {n: p[0] for n, p in layers.items()}, "prefill_bits": {n: p[1] for n, p in layers.items()}}

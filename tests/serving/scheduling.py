"""vLLM's real scheduler and KV cache manager with this project's steps, and a model that answers token 7."""

import collections
import os
from pathlib import Path
from typing import Any

import torch
from engine import QUIET
from packing import Opened
from shared import TINY

BLOCK = 32
os.environ.update(QUIET)


def pack_tiny(folder: Path) -> str:
    """Folder of the shipped model, packed."""
    return str(Opened(TINY, folder / "store", group_size=64).pack(folder / "packed"))


class Engine:
    """Scheduler, and steps of a model in its place.

    Args:
        ahead: number of steps that are scheduled before the outputs of the first of them arrive.
    """

    def __init__(
        self, folder: str, seats: int = 4, blocks: int = 100, ahead: int = 0, section: Any = None, **arguments: Any
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        from matquant.vllm.scheduler import WidthScheduler

        config = EngineArgs(
            model=folder,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=seats,
            block_size=BLOCK,
            enforce_eager=True,
            scheduler_cls="matquant.vllm.scheduler.WidthScheduler",
            additional_config={} if section is None else {"matquant": section},
            **arguments,
        ).create_engine_config()
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = ahead > 0  # vLLM switches it off on a CPU
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=64, dtype=torch.float32)
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.scheduler = WidthScheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=False,
        )
        self.ahead, self.pending = ahead, collections.deque()
        self.accepted = 0  # drafts of each request, if it has so many
        self.steps: list[tuple[Any, dict[str, int]]] = []  # bit-width, and tokens by request
        self.errors: list[str] = []
        self.requests: dict[str, Any] = {}
        self.started: list[str] = []

    def add(self, bits: Any, prompt: int = 40, tokens: int = 4, seed: int | None = None) -> str:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        name = str(len(self.requests))
        first = len(self.requests) if seed is None else seed
        parameters = SamplingParams(
            max_tokens=tokens, ignore_eos=True, extra_args=None if bits is None else {"bits": bits}
        )
        request = Request(name, [1 + first, *([5] * (prompt - 1))], parameters, None, block_hasher=self.hasher)
        self.requests[name] = request
        self.scheduler.add_request(request)
        return name

    def step(self) -> dict[str, int]:
        output = self.scheduler.schedule()
        tokens = dict(output.num_scheduled_tokens)
        self.steps.append((output.matquant_step.bits, tokens))
        self.started += [name for name in tokens if name not in self.started]
        self.pending.append(output)
        while len(self.pending) > self.ahead:
            self.deliver()
        return tokens

    def deliver(self) -> None:
        """Outputs of the oldest step that has not delivered any."""
        from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

        output = self.pending.popleft()
        names = list(output.num_scheduled_tokens)
        ends = {**{r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}}
        cached = output.scheduled_cached_reqs
        ends |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        reads_prompt = {n: ends[n] + output.num_scheduled_tokens[n] < self.requests[n].num_prompt_tokens for n in names}
        found = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: index for index, name in enumerate(names)},
                sampled_token_ids=[[] if reads_prompt[name] else self.sampled(output, name) for name in names],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        if not self.ahead and (drafts := output.num_spec_tokens_to_schedule):
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, [[7] * drafts for _ in names]))
        for outputs in found.values():
            self.errors += [o.request_id for o in outputs.outputs if str(o.finish_reason) == "error"]

    def sampled(self, output: Any, name: str) -> list[int]:
        drafts = output.scheduled_spec_decode_tokens.get(name) or ()
        return [7] * (1 + min(self.accepted, len(drafts)))

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError(f"not done after {limit} steps: {self.steps[-8:]}")

    def assert_one_width_a_step(self, widths: dict[str, Any]) -> None:
        for width, tokens in self.steps:
            assert {widths[name] for name in tokens} <= {width}

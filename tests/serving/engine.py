"""One vLLM engine in a process of its own: generates tokens at several bit-widths and prints them as JSON.

The tests run ``python engine.py JOB`` with a JSON file: ``model``, ``engine`` (arguments of ``LLM``), ``prompts`` (token ids),
``tokens`` (number of new tokens), and ``steps``. Each step is a list of arguments of ``set_bits``, or null to change nothing,
or an object with ``bits``, the bit-width of each prompt's request, or with ``costs``, the seconds of a step with and of one
without drafts, in place of those that are measured.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ.update(QUIET)


def main(job: dict) -> None:
    if job["engine"].get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # starts three times as fast
    else:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    from vllm import LLM, SamplingParams

    from matquant.vllm import set_bits

    extension = "matquant.vllm.worker.WidthExtension"
    llm = LLM(job["model"], max_model_len=128, max_num_seqs=4, worker_extension_cls=extension, **job["engine"])
    length = {"max_tokens": job["tokens"], "temperature": 0, "ignore_eos": True}
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    found = []
    for step in job["steps"]:
        if isinstance(step, list):
            set_bits(llm, *step)
        content = step if isinstance(step, dict) else {}
        if "costs" in content:
            set_costs(llm.llm_engine.engine_core.engine_core.scheduler, *content["costs"])
            llm.collective_rpc(count_calls)
        requested = content.get("bits", [None] * len(prompts))
        parameters = [
            SamplingParams(**length, extra_args=None if bits is None else {"bits": bits}) for bits in requested
        ]
        outputs = llm.generate(prompts, parameters, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
        if "costs" in content:
            state = llm.collective_rpc("get_step_state")[0]["speculation"]
            print("COSTS " + json.dumps([state, *llm.collective_rpc(count_calls)[0]]), flush=True)
    print("TOKENS " + json.dumps(found), flush=True)
    if "speculative_config" in job["engine"]:
        print("DRAFTS " + json.dumps(drafts(llm)), flush=True)


def set_costs(scheduler: Any, drafts: float, plain: float) -> None:
    """Let a clock move by the costs of each step, and decide anew by few steps."""
    from matquant.vllm.draft_policy import DraftPolicy
    from matquant.vllm.step_drafts import StepDrafts

    now, schedule = [0.0], type(scheduler).schedule

    def timed(*args: Any, **kwargs: Any) -> Any:
        output = schedule(scheduler, *args, **kwargs)
        now[0] += drafts if output.matquant_step.makes_drafts else plain
        return output

    scheduler.schedule = timed
    scheduler._drafts = StepDrafts(DraftPolicy(first_steps=4), lambda: now[0])


def count_calls(worker: Any) -> list[int]:
    """Number of forward passes of the draft model and of the target since the last call, without replays of CUDA graphs."""
    models = (worker.model_runner.drafter.model, worker.model_runner.model)
    counts = []
    for model in models:
        if not hasattr(model, "calls"):
            model.calls = 0
            model.register_forward_pre_hook(lambda *_, model=model: setattr(model, "calls", model.calls + 1))
        counts.append(model.calls)
        model.calls = 0
    return counts


def nested_layers(worker: Any) -> tuple[list[Any], int]:
    """Nested layers of the target and of the draft model, and the number of layers of vLLM that fuse some of them."""
    from matquant.vllm.fused_linears import FusedLinears
    from matquant.vllm.sharded_linear import ShardedNestedLinear

    models = (worker.model_runner.model, worker.model_runner.drafter.model)
    modules = [module for model in models for module in model.modules()]
    layers = [module for module in modules if isinstance(module, ShardedNestedLinear)]
    return layers, sum(isinstance(module, FusedLinears) for module in modules)


def drafts(llm: Any) -> dict[str, int]:
    """Drafted and accepted tokens, and the number of layers that read planes of others, and of such whose planes those are."""
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    ((layers, fused),) = llm.collective_rpc(nested_layers)
    return {
        "drafted": counters["vllm:spec_decode_num_draft_tokens"],
        "accepted": counters["vllm:spec_decode_num_accepted_tokens"],
        "readers": sum(layer.is_reader for layer in layers),
        "owners": len({layer.planes.data_ptr() for layer in layers if not layer.is_reader}),
        "storages": len({layer.planes.untyped_storage().data_ptr() for layer in layers}),
        "fused": fused,
        "draft_bits": max((layer.bits[0] for layer in layers if layer.is_reader), default=0),
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

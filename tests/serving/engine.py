"""One vLLM engine in a process of its own: generates tokens at several bit-widths and prints them as JSON.

The tests run ``python engine.py JOB`` with a JSON file: ``model``, ``engine`` (arguments of ``LLM``), ``prompts`` (token ids),
``tokens`` (number of new tokens), and ``steps``. Each step is a list of arguments of ``set_bits``, or null to change nothing.
"""

import json
import os
import sys
from pathlib import Path

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
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    found = []
    for step in job["steps"]:
        if step is not None:
            set_bits(llm, *step)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    print("TOKENS " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))

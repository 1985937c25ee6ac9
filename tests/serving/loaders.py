"""Load exports with one stock program, without this project, and print the tokens that it generates.

    python loaders.py transformers|gptqmodel|vllm JOB

A job is a JSON file with folders, prompts (token ids), tokens (number of new tokens), and vLLM's dtype. Prints a line of JSON
for each folder: the tokens, or the message of the error. vLLM loads one folder only.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def transformers(job: dict[str, Any], folder: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    return _generate(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu"), job)


def gptqmodel(job: dict[str, Any], folder: str) -> list[list[int]]:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    return _generate(GPTQModel.load(folder, device="cpu", dtype=torch.float16, backend=BACKEND.TORCH), job)


def vllm(job: dict[str, Any], folder: str) -> list[list[int]]:
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype=job["dtype"], max_model_len=128, max_num_seqs=4, enforce_eager=True)
    sampling = SamplingParams(max_tokens=job["tokens"], temperature=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def _generate(model: Any, job: dict[str, Any]) -> list[list[int]]:
    import torch

    torch.set_num_threads(1)
    length, found = {"max_new_tokens": job["tokens"], "min_new_tokens": job["tokens"]}, []
    for prompt in job["prompts"]:
        out = model.generate(input_ids=torch.tensor([prompt]), do_sample=False, **length)
        found.append(out[0, len(prompt) :].tolist())
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[2]).read_text())
    for folder in job["folders"]:
        try:
            found: Any = {"transformers": transformers, "gptqmodel": gptqmodel, "vllm": vllm}[sys.argv[1]](job, folder)
        except Exception as error:  # the test compares the message
            found = f"{type(error).__name__}: {error}"
        print("FOUND " + json.dumps([Path(folder).name, found]), flush=True)


if __name__ == "__main__":
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    main()

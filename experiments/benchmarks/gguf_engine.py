"""Program for an environment with llama-cpp-python and without this project: runs GGUF files in llama.cpp.

    python gguf_engine.py JOB.json

Fields of the job; all but ``files`` may be empty:

    quantize   lists [source, target, type]: files that llama.cpp makes of others, before anything else (type Q8_0, F16 or F32)
    files      GGUF files to run
    windows    token ids of texts
    prompts    token ids to continue
    tokens     number of tokens to generate after each prompt
    texts      strings to tokenize
    threads    of llama.cpp
    out        folder of the results, NUMBER.npz for each file

The arrays of a file are ``logits`` [windows, length, vocabulary] float32, ``greedy`` [prompts, tokens], ``texts`` (JSON),
and ``seconds``: to load, per token of the windows, and per generated token.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def quantize(source: str, target: str, kind: str, threads: int) -> None:
    """Quantize a file, or for F32 dequantize it, with llama.cpp's own quantizer."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    params.nthread = threads
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if status:
        raise RuntimeError(f"llama.cpp cannot quantize {source}: status {status}")


def logits_of(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    """Logits of every token of a text: float32 [ids, vocabulary]."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def greedy(model: llama_cpp.Llama, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """Most likely tokens after a prompt, and the seconds for them without those for the prompt."""
    model.reset()
    model.eval(prompt)
    found: list[int] = []
    start = time.perf_counter()
    for _ in range(tokens):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(found[-1:])
    return found, time.perf_counter() - start


def run(file: str, job: dict[str, Any]) -> dict[str, Any]:
    """Results of one file."""
    texts = [*job["windows"], *(prompt + [0] * (job["tokens"] + 1) for prompt in job["prompts"]), [0]]
    longest = max(map(len, texts))
    start = time.perf_counter()
    model = llama_cpp.Llama(
        file,
        n_ctx=longest,
        n_batch=longest,
        logits_all=True,
        verbose=False,
        n_threads=job["threads"],
        n_threads_batch=job["threads"],
    )
    loaded = time.perf_counter()
    logits = [logits_of(model, ids) for ids in job["windows"]]
    read = time.perf_counter()
    generated = [greedy(model, prompt, job["tokens"]) for prompt in job["prompts"]]
    seconds = [
        loaded - start,
        (read - loaded) / max(1, sum(map(len, job["windows"]))),
        sum(spent for _, spent in generated) / max(1, len(generated) * job["tokens"]),
    ]
    words = [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
    model.close()
    return {
        "logits": np.array(logits),
        "greedy": np.array([tokens for tokens, _ in generated]),
        "texts": json.dumps(words),
        "seconds": np.array(seconds),
    }


def main() -> None:
    """Run the job of the command line."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for source, target, kind in job["quantize"]:
        quantize(source, target, kind, job["threads"])
    for number, file in enumerate(job["files"]):
        np.savez(Path(job["out"], f"{number}.npz"), **run(file, job))


if __name__ == "__main__":
    main()

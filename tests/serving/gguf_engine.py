"""Program for an environment with llama-cpp-python: loads GGUF files, and writes tokens and logits.

    python gguf_engine.py JOB.json

The job has ``files``, ``ids`` (token ids of one text), ``prompts`` (lists of token ids), ``tokens`` to generate, ``texts`` to
tokenize, ``out`` (a folder) and ``threads``. For each file, ``out/NUMBER.npz`` gets ``logits`` [ids, vocabulary] of the text,
``greedy`` [prompts, tokens], and ``texts`` (JSON with the ids of each text).
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def logits_of(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    """Logits of every token: float32 [ids, vocabulary]."""
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def greedy(model: llama_cpp.Llama, prompt: list[int], tokens: int) -> list[int]:
    """Most likely tokens after a prompt."""
    model.reset()
    model.eval(prompt)
    found: list[int] = []
    for _ in range(tokens):
        found.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(found[-1:])
    return found


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    for number, file in enumerate(job["files"]):
        longest = max(len(job["ids"]), *(len(prompt) + job["tokens"] + 1 for prompt in job["prompts"]))
        model = llama_cpp.Llama(
            file, n_ctx=longest, n_batch=longest, logits_all=True, verbose=False, n_threads=job["threads"]
        )
        texts = [model.tokenize(text.encode(), add_bos=True, special=True) for text in job["texts"]]
        np.savez(
            Path(job["out"], f"{number}.npz"),
            logits=logits_of(model, job["ids"]),
            greedy=np.array([greedy(model, prompt, job["tokens"]) for prompt in job["prompts"]]),
            texts=json.dumps(texts),
        )
        model.close()


if __name__ == "__main__":
    main()

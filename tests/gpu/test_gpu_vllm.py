"""vLLM engine on a GPU with the plugin and CUDA graphs: its greedy tokens are those of Transformers. Needs vLLM."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import NEEDS_GPU, TINY
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import matquant  # noqa: F401 - makes the format known to Transformers

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]

ENGINE = Path(__file__).parent.parent / "serving" / "engine.py"
DEVICE, DTYPE = "cuda", "float16"
ARGUMENTS: dict[str, Any] = {"dtype": DTYPE, "gpu_memory_utilization": 0.3}
PROMPTS = [[5, 9, 100, 7], [1000, 3], [17] * 9]
TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, rounded to nearest and packed."""
    from packing import Opened

    folder = tmp_path_factory.mktemp("vllm")
    return Opened(TINY, folder / "store").pack(folder / "packed")


def expected(folder: Path, *choices: tuple[int, int]) -> list[list[list[int]]]:
    """Greedy tokens of Transformers for each prompt, at each pair of bit-widths of decoding and prefill."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE)).to(DEVICE).eval()
    settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    found = []
    for bits, prefill in choices:
        model.set_bits(bits, prefill)
        prompts = [torch.tensor([prompt], device=DEVICE) for prompt in PROMPTS]
        outputs = [model.generate(ids, attention_mask=torch.ones_like(ids), **settings) for ids in prompts]
        found.append([out[0, ids.shape[1] :].tolist() for out, ids in zip(outputs, prompts, strict=True)])
    return found


def run(folder: Path, tmp_path: Path, steps: list[Any], **engine: Any) -> str:
    """Output of ``engine.py``."""
    job = {"model": str(folder), "prompts": PROMPTS, "tokens": TOKENS, "steps": steps, "engine": ARGUMENTS | engine}
    (tmp_path / "job.json").write_text(json.dumps(job))
    environment = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    done = subprocess.run(
        [sys.executable, ENGINE, tmp_path / "job.json"], text=True, capture_output=True, env=environment
    )
    assert "TOKENS " in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def lines(output: str, kind: str) -> list[Any]:
    """Contents of the lines that ``engine.py`` printed after a word."""
    return [json.loads(line.removeprefix(f"{kind} ")) for line in output.splitlines() if line.startswith(f"{kind} ")]


def test_tokens_are_those_of_transformers_after_every_switch(folder, tmp_path):
    choices = [(8, 8), (4, 4), (3, 3), (2, 2), (8, 8), (2, 8), (4, 4)]
    output = run(folder, tmp_path, [[bits] if bits == prefill else [bits, prefill] for bits, prefill in choices])
    (found,) = lines(output, "TOKENS")
    assert found == expected(folder, *choices)
    assert len({str(tokens) for tokens in found}) == 5  # of four bit-widths, and of one with another for prefill


def test_experts_predict_as_in_transformers(tmp_path):
    """The routes of a random model lie close together, so that float16 may choose other experts for some tokens."""
    from architectures import save
    from packing import Opened

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": 4096}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, initializer_range=0.1))
    folder = Opened(save(model, tmp_path / "model"), tmp_path / "store").pack(tmp_path / "packed")
    choices = [(8, 8), (4, 4), (2, 2), (2, 8)]
    output = run(folder, tmp_path, [[bits] if bits == prefill else [bits, prefill] for bits, prefill in choices])
    (found,) = lines(output, "TOKENS")
    for ours, theirs in zip(found, expected(folder, *choices), strict=True):
        pairs = [(a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)]
        assert sum(a == b for a, b in pairs) > 0.6 * len(pairs)
    assert len({str(tokens) for tokens in found}) == len(choices)


def test_drafts_that_come_and_go_leave_the_tokens_of_plain_decoding(folder, tmp_path):
    """Steps without drafts have CUDA graphs of their own, see ``matquant.vllm.plain_graphs``."""
    draft = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
    output = run(
        folder,
        tmp_path,
        [{"costs": costs} for costs in ([0.5, 1.0], [50.0, 1.0], [0.5, 1.0])],
        hf_overrides={"bits": 8},
        speculative_config=draft,
        additional_config={"matquant": {"draft_bits": 3}},
        scheduler_cls="matquant.vllm.scheduler.WidthScheduler",
        disable_log_stats=False,
    )
    assert lines(output, "TOKENS") == [expected(folder, (8, 8)) * 3]
    decisions = [
        [r["drafts"] for r in state["ranges"] if r["requests"] == [3, 4]] for state, *_ in lines(output, "COSTS")
    ]
    assert decisions[1] == [False]

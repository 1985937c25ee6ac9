"""Exports of the shipped model in programs that know nothing of this project; ``make test-exports`` runs it.

Where a program refuses a width, its words are part of the test, so that a newer version that takes it shows.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from packing import Opened
from shared import TINY

from matquant.inference import replace_linears, set_bits

STOCK, VLLM = os.environ.get("STOCK_PYTHON"), os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(not (STOCK and VLLM), reason="needs environments of its own: make test-exports")

PROMPTS = [[5, 9, 100, 7, 300], [17] * 6]
TOKENS = 20
FORMS = ("gptq", "compressed_tensors")
FORM_WIDTHS = (2, 3, 4, 8)  # of both formats
OWN = {"q_proj": 2, "k_proj": 4, "v_proj": 3, "down_proj": 5}  # of the allocation; all others 4
MISMATCH = "You set `ignore_mismatched_sizes` to `False`"

# By width: slices as the default method cuts them, where 8 bits are the nearest codes, and as MatGPTQ does ("v1").
TRANSFORMERS_REFUSES = {"gptq-alloc": MISMATCH, "compressed_tensors-7": MISMATCH}
VLLM_REFUSES = {
    "gptq-3": "Marlin does not support weight_bits = uint8b128",
    "gptq-7": "Unsupported quantization config: bits=8, sym=False",
    "gptq-v1-2": "Unsupported quantization config: bits=2, sym=True",
    "compressed_tensors-3": "Quant type (uint5b16) not supported by CPUWNA16",
    "compressed_tensors-v1-8": "Quant type (uint8b128) not supported by CPUWNA16",
}
VLLM_TAKES = ("gptq-4", "gptq-v1-4", "compressed_tensors-4", "compressed_tensors-v1-4")


class Exports:
    """Folders by name, and what stock Transformers generates with the decoded weights of each one's slice."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.expected = folder, {}
        for tag, slicing, offset in (("", "msb", 8.0), ("v1-", "round", 0.0)):
            opened = Opened(
                TINY, folder / f"store-{slicing}", group_size=128, block_size=128, slicing=slicing, offset=offset
            )
            slices: dict[str, Any] = {f"{tag}{width}": width for width in range(2, 9)}
            slices[f"{tag}alloc"] = {name: OWN.get(name.rpartition(".")[2], 4) for name in opened.names()}
            for form in FORMS:
                for name, widths in slices.items():
                    fit = "nearest" if widths == 8 and slicing == "msb" else "exact"
                    if not tag or widths in FORM_WIDTHS:
                        opened.pack(folder / f"{form}-{name}", widths, name=form, fit=fit)
            model = tf.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
            replace_linears(model, opened.parent)
            for name, widths in slices.items():
                set_bits(model, widths)
                self.expected[name] = [self._generate(model, prompt) for prompt in PROMPTS]

    def _generate(self, model: Any, prompt: list[int]) -> list[int]:
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        return model.generate(torch.tensor([prompt]), do_sample=False, **length)[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


def load(
    python: str | None, program: str, folders: list[Path], tmp_path: Path, dtype: str = "float16"
) -> dict[str, Any]:
    job = {"folders": list(map(str, folders)), "prompts": PROMPTS, "tokens": TOKENS, "dtype": dtype}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [str(python), Path(__file__).with_name("loaders.py"), program, tmp_path / "job.json"]
    alone = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, text=True, capture_output=True, cwd=tmp_path, env=alone)
    lines = [line.removeprefix("FOUND ") for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert len(lines) == len(folders), done.stderr[-3000:]
    return dict(map(json.loads, lines))


def slice_of(name: str) -> str:
    return name.partition("-")[2]


@pytest.mark.parametrize("form", FORMS)
def test_transformers(exports, tmp_path, form):
    found = load(STOCK, "transformers", sorted(exports.folder.glob(f"{form}-*")), tmp_path)
    for name, tokens in found.items():
        if name in TRANSFORMERS_REFUSES:
            assert TRANSFORMERS_REFUSES[name] in tokens
        else:
            assert tokens == exports.expected[slice_of(name)], name


def test_gptqmodel_takes_an_allocation(exports, tmp_path):
    found = load(STOCK, "gptqmodel", [exports.folder / "gptq-alloc"], tmp_path)
    assert found == {"gptq-alloc": exports.expected["alloc"]}


@pytest.mark.parametrize("name", VLLM_TAKES)
def test_vllm(exports, tmp_path, name):
    found = load(VLLM, "vllm", [exports.folder / name], tmp_path)
    assert found == {name: exports.expected[slice_of(name)]}


@pytest.mark.parametrize("name", VLLM_REFUSES)
def test_vllm_on_a_cpu_refuses(exports, tmp_path, name):
    found = load(VLLM, "vllm", [exports.folder / name], tmp_path)
    assert VLLM_REFUSES[name] in found[name]

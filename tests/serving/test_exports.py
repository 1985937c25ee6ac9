"""Exports of the shipped model in programs without this project. ``make test-exports`` runs the tests.

If a program does not support a bit-width, the test asserts on its message, so that it fails when a newer version supports it.
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
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not (STOCK and VLLM), reason="needs environments of its own: make test-exports"),
]

PROMPTS = [[5, 9, 100, 7, 300], [17] * 6]
TOKENS = 20
FORMS = ("gptq", "compressed_tensors")
V1_BITS = (2, 3, 4, 8)
OWN_BITS = {"q_proj": 2, "k_proj": 4, "v_proj": 3, "down_proj": 5}  # allocation by projection; others 4
MISMATCH = "You set `ignore_mismatched_sizes` to `False`"

# Names end with the bits of the slice: msb slicing, where 8 bits use the nearest codes, and round slicing ("v1").
TRANSFORMERS_ERRORS = {"gptq-alloc": MISMATCH, "compressed_tensors-7": MISMATCH}
VLLM_ERRORS = {
    "gptq-3": "Marlin does not support weight_bits = uint8b128",
    "gptq-7": "Unsupported quantization config: bits=8, sym=False",
    "gptq-v1-2": "Unsupported quantization config: bits=2, sym=True",
    "compressed_tensors-3": "Quant type (uint5b16) not supported by CPUWNA16",
    "compressed_tensors-v1-8": "Quant type (uint8b128) not supported by CPUWNA16",
}
VLLM_SUPPORTED = ("gptq-4", "gptq-v1-4", "compressed_tensors-4", "compressed_tensors-v1-4")


class Exports:
    """Exported folders by name, and the tokens that stock Transformers generates with the weights of each slice."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.expected = folder, {}
        for tag, slicing, offset in (("", "msb", 8.0), ("v1-", "round", 0.0)):
            opened = Opened(
                TINY, folder / f"store-{slicing}", group_size=128, slicing=slicing, zero_point_offset=offset
            )
            slices: dict[str, Any] = {f"{tag}{bits}": bits for bits in range(2, 9)}
            slices[f"{tag}alloc"] = {name: OWN_BITS.get(name.rpartition(".")[2], 4) for name in opened.names()}
            for form in FORMS:
                for name, bits in slices.items():
                    fit = "nearest" if bits == 8 and slicing == "msb" else "exact"
                    if not tag or bits in V1_BITS:
                        opened.pack(folder / f"{form}-{name}", bits, name=form, rounding=fit)
            model = tf.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
            replace_linears(model, opened.parent)
            for name, bits in slices.items():
                set_bits(model, bits)
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
        if name in TRANSFORMERS_ERRORS:
            assert TRANSFORMERS_ERRORS[name] in tokens
        else:
            assert tokens == exports.expected[slice_of(name)], name


def test_gptqmodel_with_an_allocation(exports, tmp_path):
    found = load(STOCK, "gptqmodel", [exports.folder / "gptq-alloc"], tmp_path)
    assert found == {"gptq-alloc": exports.expected["alloc"]}


@pytest.mark.parametrize("name", VLLM_SUPPORTED)
def test_vllm(exports, tmp_path, name):
    found = load(VLLM, "vllm", [exports.folder / name], tmp_path)
    assert found == {name: exports.expected[slice_of(name)]}


@pytest.mark.parametrize("name", VLLM_ERRORS)
def test_vllm_on_a_cpu_raises(exports, tmp_path, name):
    found = load(VLLM, "vllm", [exports.folder / name], tmp_path)
    assert VLLM_ERRORS[name] in found[name]

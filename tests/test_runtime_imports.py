"""The runtime needs torch, numpy, safetensors and Transformers only: a serving host installs nothing else."""

import subprocess
import sys

import pytest
from shared import ROOT

pytestmark = pytest.mark.slow

QUANTIZATION_PACKAGES = {"hydra", "omegaconf", "lm_eval", "wandb", "datasets", "numba", "scipy", "matplotlib"}
UPPER_LAYERS = (
    "models",
    "data",
    "transforms",
    "calibration",
    "quantize",
    "refine",
    "evaluate",
    "search",
    "pack",
    "report",
    "stages",
    "cli",
    "config",
)
MODULES = (
    "matquant.formats.packed",
    "matquant.inference",
    "matquant.transformers.quantizer",
    "matquant.transformers.speculation",
    "matquant.vllm",
    "matquant.vllm.worker",
    "matquant.vllm.vllm_ops",
    "matquant.vllm.width_policy",
)


# Each module in a process of its own, forked from one that has imported packages that all of them may.
IMPORT_EACH = """
import importlib, os, sys
import torch, transformers
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        print(module, *sys.modules, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """Names of all modules that are loaded after the import of each of ``MODULES``."""
    command = [sys.executable, "-c", IMPORT_EACH, *MODULES]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: set(names) for name, *names in map(str.split, lines)}


@pytest.mark.parametrize("module", MODULES)
def test_runtime_imports_no_quantization(module, loaded):
    assert module in loaded[module]
    assert not loaded[module] & QUANTIZATION_PACKAGES
    upper = tuple(f"matquant.{layer}" for layer in UPPER_LAYERS)
    assert not {name for name in loaded[module] if name.startswith(upper)}


def test_transformers_registers_the_formats_when_it_is_imported_after_matquant():
    program = (
        "import matquant, sys; assert 'transformers' not in sys.modules\n"
        "import transformers.modeling_utils\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; print(*known)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {"matquant", "matgptq_quant"} <= set(run.stdout.split())


def test_the_command_line_answers_before_it_loads_torch():
    program = "import sys, matquant.cli; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers"} & set(run.stdout.split())

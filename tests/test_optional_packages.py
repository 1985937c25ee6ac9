"""Lean installation: loading works without the extras, and whatever needs one names it."""

import subprocess
import sys

import pytest
from architectures import make_model, save
from packing import Opened
from shared import ROOT

from matquant import cli
from matquant.errors import UserError

pytestmark = pytest.mark.slow

# Packages of the extras cannot be imported in a program that begins with this.
_WITHOUT = """
import importlib.machinery, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def run_without(missing, program, *arguments):
    code = _WITHOUT.format(missing=set(missing)) + program
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_a_packed_model_loads_without_any_extra(tmp_path):
    opened = Opened(save(make_model("llama"), tmp_path / "model"), tmp_path / "store")
    folder = opened.pack(tmp_path / "packed", widths=3)
    program = (
        "import matquant, torch, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, bits=2)\n"
        "print(model(torch.arange(5)[None]).logits.shape)"
    )
    # Transformers itself imports the others where their metadata say that they are installed.
    run = run_without(["hydra", "omegaconf", "lm_eval", "numba", "matplotlib"], program, str(folder))
    assert run.returncode == 0, run.stderr
    assert "torch.Size([1, 5," in run.stdout


@pytest.mark.parametrize("package", ["hydra", "omegaconf"])
def test_the_command_line_names_its_extra(package):
    run = run_without([package], "from matquant.entry import main; sys.argv = ['matquant', '--help']; main()")
    assert run.returncode == 2
    assert run.stderr == (
        f"error: The command line needs the package {package}, which is not installed: pip install 'matquant[quantize]'.\n"
    )


@pytest.mark.parametrize(
    ("package", "override", "sentence"),
    [
        ("lm_eval", "eval=offline_tasks", "pip install 'matquant[eval]'"),
        ("wandb", "tracking=wandb", "pip install 'matquant[track]'"),
        ("scipy", "search.average_bits=3", "pip install 'matquant[search]'"),
    ],
)
def test_a_setting_names_the_extra_that_it_needs(matquant, monkeypatch, package, override, sentence):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    tracking = [] if package == "wandb" else ["tracking=none"]
    status, _, err = matquant(override, *tracking)
    assert status == 2
    assert f"needs the package {package}, which is not installed: {sentence}" in err


def test_commands_are_names_for_overrides(monkeypatch, capsys):
    for command, expected in {
        ("quantize",): ["stages:\n- quantize\n"],
        ("pack", "pack=gptq"): ["stages:\n- quantize\n", "name: gptq"],
        ("pack",): ["stages:\n- quantize\n", "name: nested"],
        ("generate", "prompt=a"): ["- quantize\n- generate\n"],
        ("evaluate", "stages=[evaluate]"): ["stages:\n- evaluate\n"],
    }.items():
        monkeypatch.setattr(sys, "argv", ["run.py", *command, "--cfg", "job"])
        cli.main()
        out = capsys.readouterr().out
        assert all(part in out for part in expected), (command, out)


def test_an_unknown_command_is_refused_with_those_that_exist(matquant):
    status, _, err = matquant("quantise")
    assert status == 2
    assert "'quantise' is no command; there are quantize, evaluate, pack, generate, serve, store" in err


def test_serve_starts_the_server_of_vllm_with_the_endpoint():
    command = cli.server_command(["folder", "--port", "1", "--middleware=mine"])
    assert command[1:] == [
        *("-m", "vllm.entrypoints.openai.api_server", "--model", "folder", "--port", "1", "--middleware=mine"),
        *("--worker-extension-cls", "matquant.vllm.worker.WidthExtension"),
    ]
    for wrong in ([], ["--port", "1"]):
        with pytest.raises(UserError, match="matquant serve needs a packed folder"):
            cli.server_command(wrong)

"""Checkpoints with Python code of their own, a variant of Llama, for what no architecture of Transformers does."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from architectures import SIZES
from shared import TINY
from transformers import LlamaConfig, LlamaForCausalLM

_CODE = """
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_{name}"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
{body}
"""


def save_own_model(folder: Path, name: str, body: str) -> Path:
    """Checkpoint of a random Llama whose class has this body.

    Args:
        name: different for each body, since Python caches modules.
        body: indented source of the class.
    """
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder)
    (folder / f"own_{name}.py").write_text(_CODE.format(name=name, body=body))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    remote = {"AutoConfig": f"own_{name}.OwnConfig", "AutoModelForCausalLM": f"own_{name}.OwnModel"}
    config |= {"model_type": f"own_{name}", "auto_map": remote, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder

"""Small parents, rounded to nearest, and folders packed from them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from matquant.config import ModelConfig
from matquant.evaluate.variants import Variant
from matquant.models.blocks import BlockModel
from matquant.models.load import open_model
from matquant.pack.settings import PackConfig
from matquant.pack.stage import Packing
from matquant.quantize.driver import CalibrationOptions, Driver, layers_to_quantize
from matquant.quantize.parent import Parent
from matquant.quantize.solver import SolverOptions
from matquant.store import Store

RESULTS: dict[str, Any] = {"model": "m", "method": "rtn", "command": "", "baseline": {}, "slices": []}


class Opened:
    """A checkpoint that is opened for quantizing, and its parent.

    Args:
        options: of the solver, in place of 8 bits in groups of 32.
    """

    def __init__(self, folder: Path, store: Path, skip: str | None = None, head: bool = False, **options: Any) -> None:
        config = ModelConfig(
            label=None, name=None, path=str(folder), revision=None, dtype="auto", trust_remote_code=False
        )
        self.folder, self.loaded = folder, open_model(config)
        self.blocks = BlockModel(self.loaded.model, self.loaded.checkpoint)
        self.layers = layers_to_quantize(self.blocks, lambda name: skip is not None and skip in name, head=head)
        solver = SolverOptions(**{"weights": {8: 1.0}, "group_size": 32, "block_size": 32} | options)
        calibration = CalibrationOptions(streams=(8,), asymmetric=False, staged=False, batch_size=1)
        driver = Driver(self.blocks, self.layers, solver, calibration, device=torch.device("cpu"), dtype=torch.float32)
        build = lambda draft: {"blocks": driver.run(draft, None)}  # noqa: E731
        self.parent = Parent(
            Store(store).open_or_build("parent", {"folder": str(folder), "o": str(options), "s": skip}, build)
        )

    def pack(self, folder: Path, widths: Any = 8, **config: Any) -> Path:
        names = [name for block in self.layers for name in block]
        settings = PackConfig(**{"name": "nested", "path": str(folder)} | config)
        packing = Packing(settings, names, 8, folder)
        packing.run(self.loaded, self.blocks, [Variant(name="v", parent=self.parent, widths=widths)], RESULTS)
        return folder


def read(folder: Path, **asked: Any) -> Any:
    """As a user loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **asked)

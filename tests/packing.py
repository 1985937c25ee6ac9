"""Small parents, rounded to nearest, and folders packed from them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from shared import ROOT
from torch import Tensor
from transformers import AutoModelForCausalLM

from matquant.cli import register
from matquant.config import from_hydra
from matquant.formats.packed import LayerSpec
from matquant.formats.parent import Parent, read_block, write_block
from matquant.formats.slice_spec import SliceSpec
from matquant.inference import replace_linears
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig
from matquant.models.fixed_layers import fixed_layers
from matquant.models.loading import load_model, open_model
from matquant.pack.config import PackConfig
from matquant.pack.stage import Packing
from matquant.quantize.base import QuantizerTask
from matquant.quantize.driver import BlockwiseQuantizer
from matquant.quantize.layer_selection import layers_to_quantize
from matquant.quantize.rtn.config import RtnConfig
from matquant.store import Store
from matquant.store.draft import Draft
from matquant.transforms.config import TransformConfig

RESULTS: dict[str, Any] = {"model": "m", "method": "rtn", "command": "", "baseline": {}, "slices": []}
IDS = torch.arange(12)[None] * 7 % 128


class Opened:
    """A checkpoint that is opened for quantizing, and its parent.

    Args:
        skip: part of the names of layers that stay as they are.
        transform: settings of the transform that the weights pass.
        scale_shares: bit-widths with scales of their own, and the share of the base scales that they are.
        options: of the solver, in place of 8 bits in groups of 32.
    """

    def __init__(
        self,
        folder: Path,
        store: Path,
        skip: str = "-",
        head: bool = False,
        transform: TransformConfig | None = None,
        scale_shares: Mapping[int, float] | None = None,
        **options: Any,
    ) -> None:
        self.config = ModelConfig(path=str(folder))
        self.loaded = open_model(self.config)
        built = None if transform is None else transform.build(self.loaded.model)
        self.blocks = BlockModel(self.loaded.model, self.loaded.checkpoint, built)
        description = self.blocks.transform_description
        about = {} if description is None else {"transform": description}
        fixed = fixed_layers(self.blocks, torch.device("cpu"), torch.float32, lm_head=head)
        self.layers = layers_to_quantize(self.blocks, lambda name: skip in name, lm_head=head, fixed=fixed)
        self.head = head
        self.method = RtnConfig(**{"slicing": "msb", "scale": "search", "group_size": 32} | options)
        lambdas = {self.method.master_bits: 1.0}
        self.quantizer = self.method.build(QuantizerTask.of(lambdas, self.method.master_bits, self.loaded.dtype))
        driver = BlockwiseQuantizer(
            self.blocks, self.layers, self.quantizer, device=torch.device("cpu"), dtype=torch.float32
        )
        self.parent = Parent(
            Store(store).open_or_build("parent", {}, lambda draft: {"blocks": driver.run(draft, None)} | about)
        )
        if scale_shares:
            self.parent = _with_own_scales(self.parent, Store(store), scale_shares)

    def names(self) -> list[str]:
        return [name for block in self.layers for name in block]

    def specs(self) -> dict[str, LayerSpec]:
        blocks = [self.parent.block(index) for index in range(len(self.parent.blocks))]
        weights = {name: weight for block in blocks for name, weight in block.items()}
        return {name: LayerSpec.from_weight(weights[name]) for name in self.names()}

    def pack(self, folder: Path, widths: Any = 8, **config: Any) -> Path:
        settings = PackConfig(**{"name": "nested", "path": str(folder)} | config)
        packing = Packing(settings, self.specs(), self.method, folder, self.loaded)
        packing.run(self.loaded, self.blocks, [SliceSpec(name="v", parent=self.parent, bits=widths)], RESULTS)
        return folder

    def in_memory(self) -> Any:
        """The model with the parent's layers put in by ``replace_linears``, nothing packed."""
        model = load_model(self.config).model
        BlockModel(model)
        if self.head:  # a head that is tied to the embeddings becomes a layer of its own
            model.lm_head = torch.nn.Linear(*model.lm_head.weight.shape[::-1], bias=False)
        replace_linears(model, self.parent)
        return model.float().requires_grad_(False)


def _with_own_scales(parent: Parent, store: Store, shares: Mapping[int, float]) -> Parent:
    """Copy of a parent in which some bit-widths have a share of the base scales as their own."""

    def build(draft: Draft) -> dict[str, Any]:
        for record in parent.blocks:
            weights, header = read_block(parent.artifact, record["file"])
            own = {
                name: dataclasses.replace(
                    weight,
                    own_scales={
                        bits: (weight.scales * share).to(weight.scales.dtype) for bits, share in shares.items()
                    },
                    format=dataclasses.replace(weight.format, scale_bits=tuple(shares)),
                )
                for name, weight in weights.items()
            }
            write_block(draft, record["file"], own, header)
        return dict(parent.artifact.about)

    return Parent(store.open_or_build("parent", {"shares": {str(k): v for k, v in shares.items()}}, build))


def method() -> Any:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return from_hydra(compose("config")).method


def read(folder: Path, **asked: Any) -> Any:
    """Packed model, loaded by Transformers in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **asked)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits

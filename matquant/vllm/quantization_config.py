"""Which of a model's layers are nested, and at which widths: what vLLM asks a quantization for.

Importing this module registers it. Widths are those of the checkpoint's config, or of ``--hf-overrides``:
``{"bits": 3, "prefill_bits": 8, "max_bits": 4}``; ``bits`` may also be the path of an allocation's file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from matquant.errors import UserError
from matquant.formats import matgptq, packed
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.formats.validation import check_files
from matquant.inference.shard import WeightShard
from matquant.vllm.bit_widths import Widths, check_graphs, chosen
from matquant.vllm.experts_method import NestedExpertsMethod
from matquant.vllm.linear_method import NestedLinearMethod
from matquant.vllm.sharded_linear import ShardedNestedLinear


@register_quantization_config(packed.QUANT_METHOD)
class NestedConfig(QuantizationConfig):
    """The quantization of one nested checkpoint.

    Attributes:
        spec: what the checkpoint holds.
        widths: at which widths it is read.
        names: of the checkpoint's layers, by the name that vLLM gives them.
    """

    def __init__(self, spec: packed.NestedSpec) -> None:
        super().__init__()
        self.spec = spec
        self.widths: Widths = chosen(spec, {})
        self.names = {name: name for name in spec.layers}
        self._renamings: list[Any] = []
        self._checked, self._decode_tokens = False, 1

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NestedConfig":
        return cls(packed.parse(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Take what ``--hf-overrides`` says of widths, and the names that the model's files would have on the hub."""
        if Path(model_name).is_dir():
            check_files([Path(model_name) / name for name in self.spec.files], self.spec.files)
        if hf_config is not None:
            self.widths = chosen(self.spec, {key: getattr(hf_config, key, None) for key in Widths.KEYS})
            self._renamings = _hub_renamings(hf_config.model_type)
            self.apply_vllm_mapper(WeightsMapper(orig_to_new_renaming=self._renamings))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        # Some patterns end in a dot, so the name of a tensor is what can be mapped.
        mapped = {hf_to_vllm_mapper.map_name(f"{name}.weight"): stored for name, stored in self.names.items()}
        self.names = {name.removesuffix(".weight"): stored for name, stored in mapped.items() if name is not None}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Tensors are stored under the names that Transformers' models have; vLLM expects those of the hub."""
        return WeightsMapper(orig_to_new_renaming=self._renamings)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._check_engine()
        if isinstance(layer, RoutedExperts):
            return NestedExpertsMethod.of(layer, prefix, self.names, self._part)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        owner, _, last = prefix.rpartition(".")
        fused = [f"{owner}.{name}" if owner else name for name in self.packed_modules_mapping.get(last, [last])]
        names = [prefix] if prefix in self.names else fused
        if any(self._is_nested(name) for name in names):
            return NestedLinearMethod(names, self._part)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _is_nested(self, name: str) -> bool:
        return name in self.names

    def _layer(self, name: str, cut: WeightShard) -> tuple[str, LayerSpec, dict[str, TensorSpec]]:
        """A nested layer's name in the checkpoint, what it is, and what is stored of it by the last part of its name."""
        stored = self.names[name]
        layer = self.spec.layers[stored]
        tensors = layer.tensors(stored, self.spec.max_bits)
        return stored, layer, {key.removeprefix(f"{stored}."): tensor for key, tensor in tensors.items()}

    def _part(self, name: str, cut: WeightShard) -> ShardedNestedLinear | None:
        """The part of a layer by vLLM's name for it; None for one that is not nested."""
        if not self._is_nested(name):
            return None
        stored, layer, tensors = self._layer(name, cut)
        if (cut.out_features, cut.in_features) != (layer.out_features, layer.in_features):
            raise UserError(
                f"{stored} is [{layer.out_features}, {layer.in_features}] in the checkpoint, and vLLM's model has "
                f"[{cut.out_features}, {cut.in_features}] there. Its config belongs to another model."
            )
        decode, prefill = self.widths.of(stored)
        planes = layer.planes(self.widths.max_bits)
        return ShardedNestedLinear(
            stored, layer, tensors, cut, planes=planes, bits=decode, prefill=prefill, decode_tokens=self._decode_tokens
        )

    def _check_engine(self) -> None:
        """Once, when the model is made: what the engine can do at these widths."""
        if not self._checked:
            engine = get_current_vllm_config()
            self._decode_tokens = 1 + getattr(engine, "num_speculative_tokens", 0)
            check_graphs(engine.compilation_config.cudagraph_mode, self.widths)
            self._checked = True

    def get_name(self) -> str:
        return packed.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


@register_quantization_config(matgptq.QUANT_METHOD)
class MatGptqConfig(NestedConfig):
    """The quantization of a published MatGPTQ checkpoint, which does not name its layers: all linear ones but a few."""

    def __init__(self, about: matgptq.MatGptqSpec, skipped: Sequence[str]) -> None:
        super().__init__(packed.NestedSpec(layers={}, bits=about.bits, max_bits=matgptq.MASTER_BITS))
        self._about, self._skipped = about, skipped

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MatGptqConfig":
        return cls(matgptq.parse(config), [str(name) for name in config.get("modules_to_not_convert") or ()])

    def get_name(self) -> str:
        return matgptq.QUANT_METHOD

    def _is_nested(self, name: str) -> bool:
        return not any(part in name for part in ("lm_head", *self._skipped))

    def _layer(self, name: str, cut: WeightShard) -> tuple[str, LayerSpec, dict[str, TensorSpec]]:
        size = cut.in_features if self._about.group_size == -1 else self._about.group_size
        if cut.in_features % size:
            raise UserError(f"{name}: groups of {size} do not divide its {cut.in_features} input features.")
        layer = matgptq.layer(cut.out_features, cut.in_features, size, self._about.scale_dtype)
        tensors = self._about.tensors({name: layer})
        return name, layer, {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}


def _hub_renamings(model_type: str) -> list[Any]:
    """From the names in a Transformers model to those in published files, where Transformers renames when it loads."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    known = get_checkpoint_conversion_mapping(model_type) or []
    return [change.reverse_transform() for change in reversed(known) if type(change) is WeightRenaming]

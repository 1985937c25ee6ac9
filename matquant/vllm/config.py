"""Which of a model's layers are nested, and at which widths: what vLLM asks a quantization for.

Importing this module registers it. Widths are those of the checkpoint's config, or of ``--hf-overrides``:
``{"bits": 3, "prefill_bits": 8, "max_bits": 4}``; ``bits`` may also be the path of an allocation's file.
"""

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
from matquant.inference.cut import Cut
from matquant.pack.spec import QUANT_METHOD, NestedSpec, parse
from matquant.vllm import ops
from matquant.vllm.experts import NestedExpertsMethod
from matquant.vllm.linear import NestedLinearMethod
from matquant.vllm.parts import NestedPart
from matquant.vllm.widths import Widths, check_graphs, chosen


@register_quantization_config(QUANT_METHOD)
class NestedConfig(QuantizationConfig):
    """The quantization of one nested checkpoint.

    Attributes:
        spec: what the checkpoint holds.
        widths: at which widths it is read.
        names: of the checkpoint's layers, by the name that vLLM gives them.
    """

    def __init__(self, spec: NestedSpec) -> None:
        super().__init__()
        self.spec = spec
        self.widths: Widths = chosen(spec, {})
        self.names = {name: name for name in spec.layers}
        self._renamings: list[Any] = []
        self._checked = False

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NestedConfig":
        return cls(parse(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Take what ``--hf-overrides`` says of widths, and the names that the model's files would have on the hub."""
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
        if any(name in self.names for name in names):
            return NestedLinearMethod(names, self._part)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _part(self, name: str, cut: Cut) -> NestedPart | None:
        """The part of a layer by vLLM's name for it; None for one that is not nested."""
        if name not in self.names:
            return None
        stored = self.names[name]
        spec = self.spec.layers[stored]
        if (cut.out_features, cut.in_features) != (spec.out_features, spec.in_features):
            raise UserError(
                f"{stored} is [{spec.out_features}, {spec.in_features}] in the checkpoint, and vLLM's model has "
                f"[{cut.out_features}, {cut.in_features}] there. Its config belongs to another model."
            )
        tensors = {
            key.removeprefix(f"{stored}."): tensor for key, tensor in spec.tensors(stored, self.spec.max_bits).items()
        }
        decode, prefill = self.widths.of(stored)
        planes = spec.planes(self.widths.max_bits)
        return NestedPart(stored, spec, tensors, cut, planes=planes, bits=decode, prefill=prefill)

    def _check_engine(self) -> None:
        """Once, when the model is made: what the engine can do at these widths."""
        if not self._checked:
            engine = get_current_vllm_config()
            ops.set_decode_tokens(1 + getattr(engine, "num_speculative_tokens", 0))
            check_graphs(engine.compilation_config.cudagraph_mode, self.widths)
            self._checked = True

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []


def _hub_renamings(model_type: str) -> list[Any]:
    """From the names in a Transformers model to those in published files, where Transformers renames when it loads."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    known = get_checkpoint_conversion_mapping(model_type) or []
    return [change.reverse_transform() for change in reversed(known) if type(change) is WeightRenaming]

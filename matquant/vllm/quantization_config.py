"""Quantization configs of vLLM for nested and MatGPTQ checkpoints. Importing this module registers them.

Bit-widths are those of the checkpoint's config, or of ``--hf-overrides``: ``{"bits": 3, "prefill_bits": 8, "max_bits": 4}``.
``bits`` may also be the path of an allocation file.

A draft model of speculative decoding that is the same folder reads the planes of the target, at the bit-width ``draft_bits`` of
``vllm.width_settings``.
"""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import vllm
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
from matquant.formats.bit_choice import BitChoice, RequestedBits, choose_bits
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.formats.validation import check_files
from matquant.inference.shard import WeightShard
from matquant.vllm import compat
from matquant.vllm.cuda_graphs import check_graph_mode
from matquant.vllm.experts_method import NestedExpertsMethod
from matquant.vllm.linear_method import NestedLinearMethod
from matquant.vllm.sharded_linear import ShardedNestedLinear, share_equal_parameters
from matquant.vllm.step_drafts import may_leave_out_drafts
from matquant.vllm.width_settings import WidthSettings
from matquant.vllm.worker import begin_step

compat.hook_steps(begin_step)  # in all processes, before a worker is made
compat.hook_draft_model(share_equal_parameters)
compat.hook_proposals()
compat.hook_plain_steps(may_leave_out_drafts)

# Layers whose planes a draft model may read, by folder, name, shard and number of planes.
_resident: weakref.WeakValueDictionary[tuple[object, ...], ShardedNestedLinear] = weakref.WeakValueDictionary()


@register_quantization_config(packed.QUANT_METHOD)
class VllmNestedConfig(QuantizationConfig):
    """Quantization config of a nested checkpoint.

    Attributes:
        spec: description of the checkpoint.
        bit_choice: bit-widths at which it is read.
        names: names of the layers in the checkpoint, by vLLM's names.
    """

    def __init__(self, spec: packed.NestedSpec) -> None:
        super().__init__()
        self.spec = spec
        self.bit_choice: BitChoice = choose_bits(spec, RequestedBits())
        self.names = {name: name for name in spec.layers}
        self._renamings: list[Any] = []
        self._checked, self._decode_tokens, self._is_dummy = False, 1, False
        self._folder, self._draft_bits, self._is_draft = "", 0, False
        self._file_error: UserError | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmNestedConfig":
        _check_release()
        return cls(packed.parse_nested_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: PretrainedConfig | None = None, revision: str | None = None
    ) -> None:
        """Check the files, apply bit-widths from ``--hf-overrides``, and map names as the hub's files would have them.

        vLLM does not say here whether it will read the files: an error is raised when the model is made.
        """
        self._folder = model_name
        if Path(model_name).is_dir():
            try:
                check_files([Path(model_name) / name for name in self.spec.files], self.spec.files)
            except UserError as error:
                self._file_error = error
        if hf_config is not None:
            self.bit_choice = choose_bits(self.spec, RequestedBits.from_config(hf_config))
            self._renamings = _hub_renamings(hf_config.model_type)
            self.apply_vllm_mapper(self.get_checkpoint_weight_mapper())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        # Some patterns end in a dot, so they match names of tensors and not of layers.
        mapped = {compat.map_name(hf_to_vllm_mapper, f"{name}.weight"): stored for name, stored in self.names.items()}
        self.names = {name.removesuffix(".weight"): stored for name, stored in mapped.items() if name is not None}

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Map stored names, which are those of Transformers' models, to those of the hub, which vLLM expects."""
        return compat.renaming_mapper(WeightsMapper, self._renamings)

    def get_cache_scale_mapper(self) -> WeightsMapper | None:
        checkpoint_mapper = self.get_checkpoint_weight_mapper()
        return compat.cache_scale_mapper(QuantizationConfig, super().get_cache_scale_mapper(), checkpoint_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        self._check_engine()
        prefix = self._begin_layer(prefix)
        if isinstance(layer, RoutedExperts):
            return NestedExpertsMethod.for_layer(layer, prefix, self.names, self._make_shard, self._is_dummy)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        owner, _, last = prefix.rpartition(".")
        fused = [f"{owner}.{name}" if owner else name for name in self.packed_modules_mapping.get(last, [last])]
        names = [prefix] if prefix in self.names else fused
        if any(self._is_nested(name) for name in names):
            return NestedLinearMethod(names, self._make_shard, self._is_dummy)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _begin_layer(self, prefix: str) -> str:
        """Note if a layer belongs to a draft model, and return its name without the prefix of draft models."""
        self._is_draft = prefix.startswith(compat.DRAFT_PREFIX)
        return prefix.removeprefix(compat.DRAFT_PREFIX)

    def _is_nested(self, name: str) -> bool:
        return name in self.names

    def _stored_layer(self, name: str, shard: WeightShard) -> tuple[str, LayerSpec, dict[str, TensorSpec]]:
        """Name of a nested layer in the checkpoint, its specification, and its tensors by last part of their name.

        Args:
            name: vLLM's name of the layer.
            shard: holds the size of the whole layer in vLLM's model.
        """
        stored = self.names[name]
        layer = self.spec.layers[stored]
        tensors = layer.tensors(stored, self.spec.max_bits)
        return stored, layer, {key.removeprefix(f"{stored}."): tensor for key, tensor in tensors.items()}

    def _make_shard(self, name: str, shard: WeightShard) -> ShardedNestedLinear | None:
        """Shard of a layer by vLLM's name of it; None for a layer that is not nested. Raises UserError."""
        if not self._is_nested(name):
            return None
        stored, layer, tensors = self._stored_layer(name, shard)
        if (shard.out_features, shard.in_features) != (layer.out_features, layer.in_features):
            raise UserError(
                f"{stored} is [{layer.out_features}, {layer.in_features}] in the checkpoint and "
                f"[{shard.out_features}, {shard.in_features}] in vLLM's model. The config belongs to another model."
            )
        planes = layer.plane_count(self.bit_choice.max_bits)
        key = (self._folder, stored, shard, planes)
        if self._is_draft and (target := _resident.get(key)) is not None:
            return target.reader(self._draft_bits)
        decode, prefill = self.bit_choice.of(stored)
        made = ShardedNestedLinear(
            stored,
            layer,
            tensors,
            shard,
            num_planes=planes,
            bits=decode,
            prefill=prefill,
            decode_tokens=self._decode_tokens,
        )
        if not self._is_draft:
            _resident[key] = made
        return made

    def _check_engine(self) -> None:
        """Check once, when the model is made, the files and that the engine supports the bit-widths. Raises UserError."""
        if not self._checked:
            engine = get_current_vllm_config()
            self._is_dummy = engine.load_config.load_format == "dummy"
            if self._file_error is not None and not self._is_dummy:
                raise self._file_error
            self._decode_tokens = 1 + getattr(engine, "num_speculative_tokens", 0)
            self._draft_bits = WidthSettings.from_config(engine.additional_config, self.bit_choice.max_bits).draft_bits
            check_graph_mode(engine.compilation_config.cudagraph_mode, self.bit_choice)
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
class VllmMatGptqConfig(VllmNestedConfig):
    """Quantization config of a published MatGPTQ checkpoint.

    Such a checkpoint does not list its layers: all linear layers are quantized but the head and ``modules_to_not_convert``.
    """

    def __init__(self, spec: matgptq.MatGptqSpec, skipped: Sequence[str]) -> None:
        super().__init__(packed.NestedSpec(layers={}, bits=spec.bits, max_bits=matgptq.MASTER_BITS))
        self._matgptq, self._skipped = spec, skipped

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmMatGptqConfig":
        _check_release()
        skipped = [str(name) for name in config.get("modules_to_not_convert") or ()]
        return cls(matgptq.parse_matgptq_config(config), skipped)

    def get_name(self) -> str:
        return matgptq.QUANT_METHOD

    def _is_nested(self, name: str) -> bool:
        return not any(part in name for part in ("lm_head", *self._skipped))

    def _stored_layer(self, name: str, shard: WeightShard) -> tuple[str, LayerSpec, dict[str, TensorSpec]]:
        layer = self._matgptq.layer_spec(name, shard.out_features, shard.in_features)
        tensors = self._matgptq.tensors({name: layer})
        return name, layer, {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items()}


def _check_release() -> None:
    compat.check_release(vllm.__version__)
    compat.warn_if_newer(vllm.__version__)


def _hub_renamings(model_type: str) -> list[Any]:
    """Renamings from a Transformers model to the hub's files, for architectures whose tensors Transformers renames."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    known = get_checkpoint_conversion_mapping(model_type) or []
    return [change.reverse_transform() for change in reversed(known) if type(change) is WeightRenaming]

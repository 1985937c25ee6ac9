"""Loading of packed checkpoints: the quantizer that Transformers calls, and the classes of ``quantization_config``.

Order of the calls in ``from_pretrained``:
  1. The config class parses and checks ``quantization_config``.
  2. ``update_attn_implementation`` reads the caller's arguments (``bits``, ``prefill_bits``, ``max_bits``) from the model's
     config, and selects the files that hold the planes.
  3. ``_process_model_before_weight_loading`` checks the files against the model, and places nested layers on the meta device.
  4. Transformers loads each tensor to its device; ``update_weight_conversions`` stacks planes into one buffer.
  5. ``_process_model_after_weight_loading`` sets the bit-widths.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from matquant import inference
from matquant.errors import UserError
from matquant.formats import matgptq, packed
from matquant.formats.bit_choice import Bits, RequestedBits, choose_bits
from matquant.formats.matgptq import MatGptqSpec, parse_matgptq_config
from matquant.formats.packed import NestedSpec, TensorSpec, index_name, parse_nested_config
from matquant.formats.safetensors_headers import StoredTensor, read_headers
from matquant.formats.shard_index import INDEX, index_names
from matquant.formats.validation import check_files, check_tensors
from matquant.inference.model_surgery import fuse_layers
from matquant.transformers.conversion import matgptq_converters, nested_converters
from matquant.transformers.layers import PackedLinear, dense_tensors, optional_tensors, place_layers
from matquant.transformers.model_names import ModelNames

_ROTARY_FREQUENCIES = r"rotary_emb\.inv_freq$"  # stored in old checkpoints, computed by today's models


class HfNestedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a nested checkpoint. Raises UserError for a damaged one."""

    quant_method: Any = packed.QUANT_METHOD

    def __init__(self, **content: Any) -> None:
        self.spec: NestedSpec = parse_nested_config(content)

    @classmethod
    def from_spec(cls, spec: NestedSpec) -> "HfNestedConfig":
        """Config of a checkpoint that is parsed already."""
        config = cls.__new__(cls)
        config.spec = spec
        return config

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_json()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class HfMatGptqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a published MatGPTQ checkpoint. Raises UserError for a damaged one."""

    quant_method: Any = matgptq.QUANT_METHOD

    def __init__(self, **content: Any) -> None:
        self.spec: MatGptqSpec = parse_matgptq_config(content)

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_json()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class NestedQuantizer(HfQuantizer):
    """Loader of nested and MatGPTQ checkpoints; it does not quantize.

    Attributes:
        nested: description of a nested checkpoint; None for a MatGPTQ one.
        matgptq: description of a MatGPTQ checkpoint; None for a nested one.
        requested: arguments of the caller of ``from_pretrained``.
        spec: layers, planes and bit-widths that are loaded. For a MatGPTQ checkpoint it is set with its files.
    """

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        parsed = quantization_config.spec
        self.nested: NestedSpec | None = parsed if isinstance(parsed, NestedSpec) else None
        self.matgptq: MatGptqSpec | None = parsed if isinstance(parsed, MatGptqSpec) else None
        self.requested = RequestedBits()
        self.spec: NestedSpec

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UserError(
                "Nested layers cannot be offloaded to disk: device_map names 'disk'. Load fewer planes with max_bits= instead."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        self.requested = RequestedBits.from_config(config)
        config.transformers_weights = None
        index = INDEX
        if self.nested is not None:
            self.spec = _requested_spec(self.nested, self.requested)
            planes = _plane_count(self.spec)
            if planes in self.nested.plane_indices and planes < _plane_count(self.nested):
                index = config.transformers_weights = index_name(planes)
        if (folder := Path(config.name_or_path)).is_dir():
            _check_index(folder, index)
        return config

    update_tp_plan = update_attn_implementation  # before Transformers 5.19, this is the first call with a config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files:
            raise UserError("A packed model is loaded from its folder; it cannot be made from a state dict.")
        check_files(files, {} if self.nested is None else self.nested.files)
        headers = read_headers(files[0].parent, [file.name for file in files])
        needed, unused = self._select_tensors(headers)
        unused |= {*(model._keys_to_ignore_on_load_unexpected or ())}
        model._keys_to_ignore_on_load_unexpected = unused
        names = ModelNames(model)
        self.spec = names.rename_spec(self.spec)
        place_layers(model, self.spec)
        dense = dense_tensors(model, self.spec)
        needed = {new: tensor for name, tensor in needed.items() if (new := names.of(name)) is not None}
        stored = {new: tensor for name, tensor in headers.items() if (new := names.of(name)) is not None}
        for name in stored.keys() - needed.keys() - dense.keys():
            if any(re.search(pattern, name) for pattern in unused):
                del stored[name]
        optional = optional_tensors(model, stored, dense) | {name for name in dense if names.may_be_missing(name)}
        check_tensors(stored, needed, dense, optional)
        self.quantization_config = HfNestedConfig.from_spec(self.spec)

    def _select_tensors(self, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, TensorSpec], set[str]]:
        """Tensors of the nested layers to load, and patterns of stored tensors to ignore."""
        if self.matgptq is not None:
            self.spec = _requested_spec(self.matgptq.to_nested_spec(stored), self.requested)
            return self.matgptq.tensors(self.spec.layers), {_ROTARY_FREQUENCIES}
        assert self.nested is not None
        dropped = {rf"\.plane{d}$" for d in range(_plane_count(self.spec), _plane_count(self.nested))}
        dropped |= {rf"\.scales{bits}$" for bits in range(self.spec.max_bits + 1, self.nested.max_bits + 1)}
        return self.spec.tensors(), dropped

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        if self.matgptq is not None:  # tensors have the names of the original checkpoint
            return [*weight_conversions, *matgptq_converters(self.spec, _plane_count(self.spec))]
        return nested_converters(_plane_count(self.spec))  # tensors have the names of the model: nothing is renamed

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for layer in model.modules():
            if isinstance(layer, PackedLinear):
                layer.is_loaded = True
        model._weight_conversions = nested_converters(_plane_count(self.spec))  # for save_pretrained
        for name in ("bits", "prefill_bits", "max_bits"):
            setattr(model.config, name, None)  # from here on quantization_config holds the bit-widths
        model.requires_grad_(False)  # planes and scales cannot be trained; adapters on the layers can
        model.set_bits = functools.partial(set_bits, model)  # a bound method of an attribute cannot be pickled
        model.set_bits({name: self.spec.bits_of(name) for name in self.spec.layers}, self.spec.prefill_bits)
        fuse_layers(model)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # as the base of adapters

    @property
    def is_compileable(self) -> bool:
        return True


def set_bits(model: Any, bits: Bits, prefill: int | None = None) -> dict[str, int]:
    """Set the bit-widths of a loaded model, as ``model.set_bits``; ``save_pretrained`` writes them.

    Args:
        bits: one bit-width, a bit-width for some layers by name, or the file of an allocation (.yaml, .txt).
        prefill: bit-width of all layers in forward passes that read prompts; None for that of decoding.

    Returns:
        Bit-width of every nested layer, by name.

    Raises:
        UserError: a layer does not exist, or its planes do not hold the bit-width. Nothing has changed then.
    """
    layer_bits = inference.set_bits(model, bits, prefill)
    uniform = len(set(layer_bits.values())) == 1
    config = model.config.quantization_config
    config.spec = dataclasses.replace(
        config.spec, bits=max(layer_bits.values()), layer_bits={} if uniform else layer_bits, prefill_bits=prefill
    )
    return layer_bits


def _check_index(folder: Path, name: str) -> None:
    """Check that an index, if there is one, is readable and its files exist, since Transformers fails without a clear message.

    Raises:
        UserError: the index is damaged, or a file is missing.
    """
    if (folder / name).is_file():
        for file in index_names(folder, name):
            if not (folder / file).is_file():
                raise UserError(f"{folder} is not complete: {file}, which {name} lists, is missing. Download it again.")


def _plane_count(spec: NestedSpec) -> int:
    return max(layer.plane_count(spec.max_bits) for layer in spec.layers.values())


def _requested_spec(spec: NestedSpec, requested: RequestedBits) -> NestedSpec:
    """Description of the part of a checkpoint that a caller requests. It has no files of its own."""
    choice = choose_bits(spec, requested)
    return dataclasses.replace(
        spec,
        bits=choice.bits,
        layer_bits=choice.layer_bits,
        prefill_bits=choice.prefill_bits,
        max_bits=choice.max_bits,
        files={},
        plane_indices=(),
    )

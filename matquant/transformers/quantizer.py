"""The quantizer that Transformers asks to make room for nested layers, and the config that it is made from.

Lifecycle, in the order in which ``from_pretrained`` calls it:
  1. the config is parsed and checked;
  2. ``update_attn_implementation`` sees the model's config, with what the caller asked for (``bits``, ``prefill_bits``,
     ``max_bits``), and chooses the files that hold the planes;
  3. ``_process_model_before_weight_loading`` checks the files against the model, and puts nested layers without values
     into it;
  4. Transformers reads each tensor to its device, ``update_weight_conversions`` says how planes become one buffer;
  5. ``_process_model_after_weight_loading`` sets the widths.
"""

import dataclasses
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from matquant import inference
from matquant.errors import UserError
from matquant.formats import allocation, matgptq
from matquant.formats import packed as nested
from matquant.formats.matgptq import MatGptqSpec
from matquant.formats.packed import NestedSpec, check_bits, index_name
from matquant.formats.shard_index import INDEX, index_names
from matquant.transformers.conversion import nested_converters, published_converters
from matquant.transformers.layers import dense_tensors, dispensable, place_layers


class NestedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a nested checkpoint. Raises UserError for a damaged one."""

    quant_method: Any = nested.QUANT_METHOD

    def __init__(self, **content: Any) -> None:
        self.spec: NestedSpec = nested.parse(content)

    @classmethod
    def of(cls, spec: NestedSpec) -> "NestedConfig":
        made = cls.__new__(cls)
        made.spec = spec
        return made

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_json()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


class MatGptqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a published MatGPTQ checkpoint. Raises UserError for a damaged one."""

    quant_method: Any = matgptq.QUANT_METHOD

    def __init__(self, **content: Any) -> None:
        self.spec: MatGptqSpec = matgptq.parse(content)

    def to_dict(self) -> dict[str, Any]:
        return self.spec.to_json()

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the caller of ``from_pretrained`` wants; None leaves it to the checkpoint."""

    bits: int | Mapping[str, int] | str | Path | None
    prefill_bits: int | None
    max_bits: int | None

    @classmethod
    def take(cls, config: Any) -> "Asked":
        """From the entries of a model's config."""
        return cls(**{field.name: getattr(config, field.name, None) for field in dataclasses.fields(cls)})


class NestedQuantizer(HfQuantizer):
    """Loads nested and published checkpoints; it does not quantize."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        own = quantization_config.spec
        self.whole: NestedSpec | None = own if isinstance(own, NestedSpec) else None  # the nested checkpoint
        self.published: MatGptqSpec | None = own if isinstance(own, MatGptqSpec) else None  # or the published one
        self.asked = Asked(bits=None, prefill_bits=None, max_bits=None)
        self.spec: NestedSpec  # of what is loaded; of a published checkpoint known when its files are

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UserError(
                "Nested layers cannot stay on disk: device_map names 'disk'. Load fewer planes instead, with max_bits=."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        self.asked = Asked.take(config)
        config.transformers_weights = None
        index = INDEX
        if self.whole is not None:
            self.spec = _reduced(self.whole, self.asked)
            if (planes := _planes(self.spec)) in self.whole.plane_indices and planes < _planes(self.whole):
                index = config.transformers_weights = index_name(planes)
        if (folder := Path(config.name_or_path)).is_dir():
            _check_index(folder, index)
        return config

    update_tp_plan = update_attn_implementation  # the name of the first call with a config before Transformers 5.19

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        # Imported late: this module is imported while Transformers, and whoever imported that, are half imported.
        from matquant.formats.safetensors_headers import read_headers
        from matquant.formats.validation import check_files, check_tensors

        files = [Path(file) for file in checkpoint_files or ()]
        if not files:
            raise UserError("A packed model is loaded from its folder; it cannot be made from a state dict.")
        check_files(files, {} if self.whole is None else self.whole.files)
        stored = read_headers(files[0].parent, [file.name for file in files])
        unused = {*(model._keys_to_ignore_on_load_unexpected or ())}  # patterns of what may be there and is not needed
        if self.published is not None:
            self.spec = _reduced(self.published.nested(stored), self.asked)
            needed = self.published.tensors(self.spec.layers)
            unused |= {r"rotary_emb\.inv_freq$"}  # that old checkpoints hold
        elif self.whole is not None:
            needed = self.spec.tensors()
            unused |= {rf"\.plane{d}$" for d in range(_planes(self.spec), _planes(self.whole))}
        model._keys_to_ignore_on_load_unexpected = unused
        place_layers(model, self.spec)
        dense = dense_tensors(model, self.spec)
        for name in stored.keys() - needed.keys() - dense.keys():
            if any(re.search(pattern, name) for pattern in unused):
                del stored[name]
        check_tensors(stored, needed, dense, dispensable(model, stored, dense))
        self.quantization_config = NestedConfig.of(self.spec)

    def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
        if self.published is not None:  # under the names of the original checkpoint
            return [*weight_conversions, *published_converters(self.spec, _planes(self.spec))]
        return nested_converters(_planes(self.spec))  # under the names of the model: nothing is to be renamed

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model._weight_conversions = nested_converters(_planes(self.spec))  # for save_pretrained
        for name in ("bits", "prefill_bits", "max_bits"):
            setattr(model.config, name, None)  # the widths are in quantization_config from here on
        model.requires_grad_(False)  # nested layers have no backward pass
        model.set_bits = types.MethodType(set_bits, model)
        model.set_bits({name: self.spec.width(name) for name in self.spec.layers}, self.spec.prefill_bits)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def set_bits(model: Any, bits: int | Mapping[str, int] | str | Path, prefill: int | None = None) -> dict[str, int]:
    """``model.set_bits``: as ``matquant.inference.set_bits``, and remembered for ``save_pretrained``.

    Args:
        bits: a width, a width for some layers by name, or an allocation's file (.yaml, .txt).
        prefill: the width of all layers for calls with more than one token per sequence; None for the same.

    Returns:
        The width of every nested layer, by name.

    Raises:
        UserError: a layer is not there, or has not the planes of a width; nothing has changed then.
    """
    widths = inference.set_bits(model, _by_layer(bits) if isinstance(bits, str | Path) else bits, prefill)
    same = len(set(widths.values())) == 1
    config = model.config.quantization_config
    config.spec = dataclasses.replace(
        config.spec, bits=max(widths.values()), layer_bits={} if same else widths, prefill_bits=prefill
    )
    return widths


def _check_index(folder: Path, name: str) -> None:
    """Refuse a damaged index in a sentence, before Transformers stumbles over it; there may be none."""
    if (folder / name).is_file():
        for file in index_names(folder, name):
            if not (folder / file).is_file():
                raise UserError(f"{folder} is not complete: {file}, which {name} names, is missing. Download it again.")


def _by_layer(bits: Mapping[str, int] | str | Path) -> Mapping[str, int]:
    return allocation.read(Path(bits)).widths if isinstance(bits, str | Path) else bits


def _planes(spec: NestedSpec) -> int:
    return max(layer.planes(spec.max_bits) for layer in spec.layers.values())


def _reduced(spec: NestedSpec, asked: Asked) -> NestedSpec:
    """What is loaded: the planes and widths that the caller asked for. It has no files of its own.

    A checkpoint's one width is lowered to ``max_bits``; an allocation's widths are not, as that would be another model.
    """
    most = spec.max_bits if asked.max_bits is None else check_bits(asked.max_bits, "max_bits", spec.max_bits)
    bits, layer_bits = min(spec.bits, most), dict(spec.layer_bits)
    if isinstance(asked.bits, int):
        bits, layer_bits = check_bits(asked.bits, "bits", most), {}
    elif not isinstance(asked.bits, Mapping | str | Path | None):
        raise UserError(f"bits is a width, a width for layers by name, or an allocation's file; found {asked.bits!r}.")
    elif asked.bits is not None:
        layer_bits = {**layer_bits, **_by_layer(asked.bits)}
    if unknown := [name for name in layer_bits if name not in spec.layers]:
        raise UserError(f"bits gives a width to {unknown[0]!r}, which is no nested layer of this checkpoint.")
    for name, width in layer_bits.items():
        check_bits(width, f"bits of {name}", most)
    prefill = spec.prefill_bits if asked.prefill_bits is None and asked.bits is None else asked.prefill_bits
    return dataclasses.replace(
        spec,
        bits=bits,
        layer_bits=layer_bits,
        max_bits=most,
        files={},
        plane_indices=(),
        prefill_bits=None if prefill is None else check_bits(prefill, "prefill_bits", most),
    )

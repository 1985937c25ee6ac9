"""GGUF: one slice as one file that llama.cpp and programs built on it load.

The file holds hyperparameters, tokenizer and chat template beside the weights. The layers of the slice have the smallest type
that holds them exactly, or the nearest type of their bit-width; ``matquant.pack.gguf`` has the parts.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.formats.nested import NestedWeight
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.models.gguf import gguf_package, read_tensors
from matquant.models.loading import LoadedModel
from matquant.pack.config import PackConfig
from matquant.pack.formats.base import CheckpointFormat, PackRequest, PackResult
from matquant.pack.gguf import type_choice
from matquant.pack.gguf.architectures import Architecture, architecture_of, hyperparameters, rope_tensors
from matquant.pack.gguf.block_types import QUANT_BLOCK, BlockType
from matquant.pack.gguf.tensor_plan import PlannedTensor, plan_tensors
from matquant.pack.gguf.type_choice import SliceLayer
from matquant.pack.gguf.vocabulary import Vocabulary, vocabulary_of
from matquant.quantize.config import MethodConfig
from matquant.store.files import translate_os_errors
from matquant.version import version

_WEIGHT = ".weight"
_ROUTER = "ffn_gate_inp"  # part of the names of tensors that llama.cpp reads in F32 only
_FILE_TYPES = {"Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M"}


class GgufFormat(CheckpointFormat):
    """One slice in one GGUF file."""

    name = "gguf"

    def check(self, config: PackConfig, method: MethodConfig, layers: Mapping[str, LayerSpec]) -> None:
        """Refuse settings that one file of one slice does not have, rows without whole blocks, and an inexact slice."""
        for setting, value in {"prefill_bits": config.prefill_bits, "shard_gb": config.shard_gb}.items():
            if value is not None:
                raise UserError(
                    f"pack=gguf writes one slice to one file, so pack.{setting} has no meaning. Leave it out."
                )
        uneven = [name for name, spec in layers.items() if spec.in_features % QUANT_BLOCK]
        if uneven:
            more = f" and {len(uneven) - 1} more layers" if len(uneven) > 1 else ""
            raise UserError(
                f"pack=gguf stores blocks of {QUANT_BLOCK} columns, but {uneven[0]}{more} has {layers[uneven[0]].in_features} "
                "input features. Leave such layers unquantized (method.skip), or use pack=nested."
            )
        bits = config.uniform_bits
        if bits is None or config.rounding == "nearest":
            return
        known = {name: type_choice.representative(spec, bits) for name, spec in layers.items()}
        inexact = {
            name: bits
            for name, layer in known.items()
            if layer is not None and type_choice.exact_type([layer], config.stored_bits) is None
        }
        if inexact:
            raise type_choice.refusal(inexact, layers, config.stored_bits)

    def check_model(self, config: PackConfig, loaded: LoadedModel) -> None:
        """Refuse architectures, tensors and tokenizers that llama.cpp does not have."""
        gguf_package("pack=gguf")
        own, tied = loaded.model.config, set(loaded.model.all_tied_weights_keys)
        architecture = architecture_of(own)
        stored = {name: tensor for name, tensor in loaded.checkpoint.stored().items() if name not in tied}
        plan_tensors({name: TensorSpec(tuple(t.shape), t.dtype) for name, t in stored.items()}, own, architecture)
        vocabulary_of(Path(own.name_or_path), loaded.tokenizer, own)

    def write(self, request: PackRequest) -> PackResult:
        """Write the file; a slice that is not exact is refused before anything is written."""
        file = _Writing(request)
        with translate_os_errors(request.folder, setting="pack.path"):
            record = file.write(request.folder / file.name)
        stored = None if record["exact"] else file.stored_weights
        return PackResult(quantization_config=None, record=record, stored_weights=stored)


class _Writing:
    """Writing of one file.

    Attributes:
        name: of the file.
    """

    def __init__(self, request: PackRequest) -> None:
        self.request, source = request, request.source
        self.config = source.loaded.model.config
        self.architecture: Architecture = architecture_of(self.config)
        self.vocabulary: Vocabulary = vocabulary_of(source.folder, source.loaded.tokenizer, self.config)
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", source.loaded.label).strip("-.") or "model"
        bits = f"{request.bits}bit" if isinstance(request.bits, int) else "allocation"
        self.name = f"{label}-{bits}.gguf"
        self._blocks = {n: i for i, block in enumerate(source.parent.blocks) for n in block["layers"]}
        nested = {
            f"{name}{_WEIGHT}": TensorSpec((spec.out_features, spec.in_features), torch.float32)
            for name, spec in source.layers.items()
        }
        self.tensors = plan_tensors(nested | source.dense, self.config, self.architecture)
        self._layers = {name: SliceLayer.measure(name, weight, self._bits(name)) for name, weight in source.weights()}
        self._kinds = self._choose_types()
        self._errors: dict[str, float] = {}
        self._dense_errors: list[float] = []
        self._done: set[str] = set()

    def write(self, path: Path) -> dict[str, Any]:
        """Write the file; return the record for the results."""
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture.name)
        extra = rope_tensors(self.config)
        try:
            for tensor in self.tensors:
                self._add_info(writer, tensor)
            for name, values in extra.items():
                writer.add_tensor_info(name, values.shape, values.numpy().dtype, values.nbytes)
            self._add_metadata(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in self.tensors:
                writer.write_tensor_data(self._data(tensor))
            for values in extra.values():
                writer.write_tensor_data(values.numpy())
        finally:
            writer.close()
        return self._record()

    def stored_weights(self, folder: Path, index: int) -> dict[str, Tensor]:
        """Weights of a block that the file holds, float32 [out_features, in_features] by layer."""
        names = {name for name, block in self._blocks.items() if block == index}
        wanted = {t.name: t for t in self.tensors if any(layer.name in names for layer in self._nested(t))}
        specs = self.request.source.layers
        found = {name: torch.empty(specs[name].out_features, specs[name].in_features) for name in names}
        for name, data in read_tensors(folder / self.name, list(wanted)):
            for piece, values in zip(wanted[name].pieces, data.view(-1, *data.shape[-2:]), strict=True):
                rows = slice(None) if piece.rows is None else piece.rows
                found[piece.source.removesuffix(_WEIGHT)][rows] = values
        return found

    def _bits(self, layer: str) -> int:
        bits = self.request.bits
        return bits if isinstance(bits, int) else bits[layer]

    def _weight(self, layer: str) -> NestedWeight:
        return self.request.source.parent.block(self._blocks[layer])[layer]

    def _nested(self, tensor: PlannedTensor) -> list[SliceLayer]:
        """Nested layers of a tensor; none if it is not quantized."""
        found = [self._layers.get(piece.source.removesuffix(_WEIGHT)) for piece in tensor.pieces]
        return [layer for layer in found if layer is not None]

    def _choose_types(self) -> dict[str, BlockType | str]:
        """Type of each tensor by its name in the file: of nested layers, or the name of that of others.

        Raises:
            UserError: a layer has no exact type, and the nearest is not allowed.
        """
        request, kinds, refused = self.request, dict[str, BlockType | str](), dict[str, int]()
        for tensor in self.tensors:
            layers = self._nested(tensor)
            if len(layers) < len(tensor.pieces):
                kinds[tensor.name] = self._dense_type(tensor)
            elif request.allow_nearest:
                columns = tensor.shape[-1]
                kinds[tensor.name] = type_choice.nearest_type(layers, self._weight, columns, request.stored_bits)
            elif kind := type_choice.exact_type(layers, request.stored_bits):
                kinds[tensor.name] = kind
            else:
                refused |= {layer.name: layer.bits for layer in layers}
        if refused:
            raise type_choice.refusal(refused, request.source.layers, request.stored_bits, self._reason(refused))
        return kinds

    def _reason(self, refused: Mapping[str, int]) -> str:
        """Sentence on layers whose bit-width has an exact type but whose scales leave the range of float16."""
        specs = self.request.source.layers
        known = {name: type_choice.representative(specs[name], bits) for name, bits in refused.items()}
        fitting = [
            n for n, layer in known.items() if layer and type_choice.exact_type([layer], self.request.stored_bits)
        ]
        if not fitting:
            return ""
        name = fitting[0]
        scales = self._weight(name).scales_at(refused[name]).float().abs()
        return (
            f"GGUF has scales in float16: those of {name} lie in {scales[scales > 0].min():.3g}..{scales.max():.3g} in "
            f"{str(specs[name].format.scale_dtype).removeprefix('torch.')} and do not all fit. "
        )

    def _dense_values(self, tensor: PlannedTensor) -> Tensor:
        """Values of a tensor that is not (or not all) quantized: float32, or as stored."""
        parts = []
        for piece in tensor.pieces:
            layer = self._layers.get(piece.source.removesuffix(_WEIGHT))
            if layer is None:
                parts.append(piece.of(self.request.source.read(piece.source)))
            else:  # an expert beside others that are not quantized
                parts.append(piece.of_weight(self._weight(layer.name)).dequantize(layer.bits))
        joined = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts])
        return joined.float().view(tensor.shape) + tensor.shift

    def _dense_type(self, tensor: PlannedTensor) -> str:
        if len(tensor.shape) == 1 or _ROUTER in tensor.name:
            return "F32"
        return type_choice.dense_type(self._dense_values(tensor), self.request.dense_type)

    def _add_info(self, writer: Any, tensor: PlannedTensor) -> None:
        import gguf
        import numpy as np

        kind = self._kinds[tensor.name]
        name = kind if isinstance(kind, str) else kind.name
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, gguf.GGMLQuantizationType[name])
        size = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), size, gguf.GGMLQuantizationType[name])

    def _data(self, tensor: PlannedTensor) -> Any:
        """Bytes of a tensor."""
        kind = self._kinds[tensor.name]
        if isinstance(kind, str):
            values = self._dense_values(tensor)
            dense = type_choice.encode_dense(values, kind)
            self._dense_errors.append(type_choice.relative_error(type_choice.dequantize_dense(dense, kind), values))
            return dense
        parts = []
        for piece, layer in zip(tensor.pieces, self._nested(tensor), strict=True):
            weight = piece.of_weight(self._weight(layer.name))
            data = type_choice.encode(layer, weight, kind)
            self._note_error(layer, kind, data, weight.dequantize(layer.bits))
            parts.append(data)
        return torch.cat(parts).numpy()

    def _note_error(self, layer: SliceLayer, kind: BlockType, data: Tensor, exact: Tensor) -> None:
        """Compare the values that the package gguf reads with the slice; record the error, and the progress of a layer.

        Raises:
            RuntimeError: the type was chosen as exact, and is not.
        """
        error = type_choice.relative_error(type_choice.dequantize(data, kind.name), exact)
        if error and kind in layer.exact:
            raise RuntimeError(f"{layer.name} is not exact in {kind.name}: relative error {error}")
        self._errors[layer.name] = max(error, self._errors.get(layer.name, 0.0))
        if layer.name not in self._done:
            self._done.add(layer.name)
            self.request.progress(1)

    def _add_metadata(self, writer: Any) -> None:
        """Add everything but the tensors: ``general``, the architecture's hyperparameters, vocabulary, and ``matquant``."""
        import gguf

        source = self.request.source
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(source.loaded.label)
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(int(getattr(gguf.LlamaFileType, self._file_type())))
        writer.add_string("general.quantized_by", f"matquant {version()}")
        for key, value in hyperparameters(self.config, self.architecture).items():
            add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
            add[type(value)](f"{self.architecture.name}.{key}", value)
        self.vocabulary.write(writer)
        bits = self.request.bits
        writer.add_string("matquant.bits", str(bits) if isinstance(bits, int) else "allocation")
        writer.add_bool("matquant.exact", self._is_exact())
        writer.add_string("matquant.parent", source.parent.artifact.key)
        writer.add_string("matquant.parent.sha256", source.parent.artifact.sha256)

    def _file_type(self) -> str:
        counts = Counter(kind.name for kind in self._kinds.values() if not isinstance(kind, str))
        ((most, _),) = counts.most_common(1) if counts else (("F16", 0),)
        return _FILE_TYPES.get(most, f"MOSTLY_{most}")

    def _is_exact(self) -> bool:
        """True if all nested layers have exact types."""
        return all(
            kind in layer.exact
            for tensor in self.tensors
            if not isinstance(kind := self._kinds[tensor.name], str)
            for layer in self._nested(tensor)
        )

    def _record(self) -> dict[str, Any]:
        bits, errors = self.request.bits, self._errors
        names = [kind if isinstance(kind, str) else kind.name for kind in self._kinds.values()]
        exact = self._is_exact()
        return {
            "bits": bits if isinstance(bits, int) else "allocation",
            "file": self.name,
            "types": dict(sorted(Counter(names).items())),
            "exact": exact,
            "error": None if exact else {"mean": sum(errors.values()) / len(errors), "largest": max(errors.values())},
            "dense_error": max(self._dense_errors, default=0.0),
        }

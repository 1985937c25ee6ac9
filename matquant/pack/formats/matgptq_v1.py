"""Format of the published MatGPTQ checkpoints, which ``matquant.formats.matgptq`` describes."""

from collections.abc import Mapping

import torch

from matquant.errors import UserError
from matquant.formats.groups import WHOLE_ROW
from matquant.formats.matgptq import CODES, DTYPES, MASTER_BITS, SCALES, MatGptqSpec
from matquant.formats.packed import LayerSpec, TensorSpec
from matquant.formats.shard_index import INDEX
from matquant.pack.config import PackConfig
from matquant.pack.formats.base import CheckpointFormat, PackRequest, PackResult, check_equal_groups
from matquant.pack.shards import ShardWriter, aligned
from matquant.quantize.config import MethodConfig

_INSTEAD = "pack=nested holds this parent as it is; method=matgptq_v1 makes one for this format."


class MatGptqV1Format(CheckpointFormat):
    """Symmetric 8-bit codes that are sliced by rounding, with one bit-width for all layers."""

    name = "matgptq_v1"

    def check(self, config: PackConfig, method: MethodConfig, layers: Mapping[str, LayerSpec]) -> None:
        """Refuse codes of the method, bit-widths and layers that the format cannot store."""
        if method.slicing != "round" or not method.symmetric or method.master_bits != MASTER_BITS:
            kind = "symmetric" if method.symmetric else "asymmetric"
            raise UserError(
                f"pack=matgptq_v1 holds symmetric {MASTER_BITS}-bit codes that are cut by round; method={method.name} makes "
                f"{kind} {method.master_bits}-bit codes that are cut by {method.slicing}. {_INSTEAD}"
            )
        if config.allocation_file is not None or config.prefill_bits is not None:
            raise UserError(
                "pack=matgptq_v1 holds one bit-width for all layers. Give pack.bits a bit-width, or use pack=nested."
            )
        if config.max_bits not in (None, MASTER_BITS):
            raise UserError(
                "pack=matgptq_v1 stores whole codes: pack.max_bits cannot leave out planes. Use pack=nested."
            )
        if any(layer.format.scale_bits for layer in layers.values()):
            raise UserError(
                f"pack=matgptq_v1 holds one set of scales for all bit-widths; method={method.name} makes sets for single "
                f"bit-widths. Set method.scale_bits=[], or use pack=nested."
            )
        check_equal_groups(self.name, layers)
        _shared_format(layers)

    def write(self, request: PackRequest) -> PackResult:
        source, bits = request.source, request.bits
        if not isinstance(bits, int) or request.prefill_bits is not None:
            raise UserError(
                "pack=matgptq_v1 holds one bit-width for all layers. Give pack.bits a bit-width, or use pack=nested."
            )
        group_size, scale_dtype = _shared_format(source.layers)
        spec = MatGptqSpec(group_size=group_size, bits=bits, scale_dtype=scale_dtype)
        if any(
            source.origins[f"{n}.weight"].expert is not None for n in source.layers if f"{n}.weight" in source.origins
        ):
            raise UserError(
                "pack=matgptq_v1 has no names for experts that are one tensor in the model. Use pack=nested."
            )
        stored = spec.tensors(source.layers)
        parts: list[dict[str, TensorSpec]] = [aligned(source.dense)]
        parts += [{name: t for name, t in stored.items() if name.endswith(kind)} for kind in (SCALES, CODES)]
        with ShardWriter(request.folder, parts, request.file_bytes) as files:
            for name, weight in source.weights():
                files.write(name + SCALES, weight.scales)
                files.write(name + CODES, weight.codes)
                request.progress(1)
            for name in parts[0]:
                files.write(name, source.read(name))
            files.write_index(INDEX)
        return PackResult(quantization_config=spec.to_json(), record={"bits": spec.bits})


def _shared_format(layers: Mapping[str, LayerSpec]) -> tuple[int, torch.dtype]:
    """Group size and scale dtype that all layers share. Raises UserError if they differ."""
    by_row = all(s.format.group_size == s.in_features for s in layers.values())
    sizes = {WHOLE_ROW} if by_row else {s.format.group_size for s in layers.values()}
    dtypes = {s.format.scale_dtype for s in layers.values()}
    for name, layer in layers.items():
        fmt = layer.format
        if (fmt.op_args[1:], fmt.has_zero_points) != ((MASTER_BITS, "round", 0.0, 1.0), False):
            raise UserError(
                f"pack=matgptq_v1 holds symmetric {MASTER_BITS}-bit codes that are cut by round, and {name} has others. "
                f"{_INSTEAD}"
            )
    if len(sizes) > 1 or len(dtypes) > 1 or not dtypes <= set(DTYPES.values()):
        raise UserError(
            "pack=matgptq_v1 has one group size for all layers, and scales in float16 or bfloat16; these layers have groups "
            f"of {', '.join(map(str, sorted(sizes)))} and scales in {', '.join(map(str, dtypes))}. Choose a method.group_size "
            "that fits all of them, such as -1 (one scale per row), or use pack=nested."
        )
    return sizes.pop(), dtypes.pop()

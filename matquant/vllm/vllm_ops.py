"""Matmul whose bit-width is read when it runs, not when the model is traced or compiled.

vLLM traces a model once, without guards. A bit-width stored as a number in the layer would become part of the compiled code.
Here it is a tensor in host memory and an input of the operator, so that one compiled model serves all bit-widths. A captured
CUDA graph keeps the bit-widths of its capture, see ``vllm.cuda_graphs``.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from matquant.errors import UserError
from matquant.inference import ops  # noqa: F401 - defines nested_linear
from matquant.inference.argument_checks import check_x
from matquant.inference.row_ranges import multiply_ranges

_library = torch.library.Library("matquant", "FRAGMENT")
_library.define(
    "nested_linear_runtime_bits(Tensor x, Tensor planes, Tensor[] scales, int[] scale_bits, Tensor? zeros, Tensor? bias, "
    "Tensor[] step_bits, int[] out_features, int in_features, int group_size, int master_bits, str slicing, float offset, "
    "float stretch) -> Tensor"
)


def new_step_bits(decode: int, prefill: int, decode_tokens: int = 1) -> Tensor:
    """Bit-widths of one weight by kind of step, on the host: int64 [3].

    Args:
        decode: bit-width of steps in which all sequences decode.
        prefill: bit-width of all other steps.
        decode_tokens: largest number of new tokens of a sequence that decodes; more than 1 with speculative decoding.
    """
    return torch.tensor([decode, prefill, decode_tokens], dtype=torch.int64, device="cpu")


def current_bits(step_bits: Tensor) -> int:
    """Bit-width of vLLM's current step, see ``new_step_bits``.

    Raises:
        UserError: the bit-widths differ, and the attention backend does not say which kind of step this is.
    """
    return all_current_bits(step_bits[None])[0]


def all_current_bits(step_bits: Tensor) -> list[int]:
    """Bit-widths of several weights in vLLM's current step, from int64 [weights, 3]; errors as ``current_bits``."""
    is_decode_step = functools.cache(_is_decode_step)
    return [
        decode if decode == prefill or is_decode_step(decode_tokens) else prefill
        for decode, prefill, decode_tokens in step_bits.tolist()
    ]


def _is_decode_step(decode_tokens: int) -> bool:
    """True if every sequence of vLLM's current step has at most ``decode_tokens`` new tokens."""
    context_module = sys.modules.get("vllm.forward_context")
    if context_module is None or not context_module.is_forward_context_available():
        return False
    context = context_module.get_forward_context()
    mode = context.cudagraph_runtime_mode.name
    if (
        mode != "NONE"
    ):  # full graphs are of decode steps, see cuda_graphs.check_graph_mode; piecewise graphs of all others
        return bool(mode == "FULL")
    metadata = context.attn_metadata
    if not metadata:  # a run that only measures memory
        return False
    microbatches = metadata if isinstance(metadata, list) else [metadata]
    return all(_only_decodes(layers, decode_tokens) for layers in microbatches)


def _only_decodes(metadata_by_layer: Mapping[str, Any], decode_tokens: int) -> bool:
    """True if the attention metadata of a step has no sequence with more than ``decode_tokens`` new tokens.

    Raises:
        UserError: the metadata of no layer says it.
    """
    for metadata in metadata_by_layer.values():
        if (longest := getattr(metadata, "max_query_len", None)) is not None:
            return int(longest) <= decode_tokens
    for metadata in metadata_by_layer.values():  # of FlashInfer and state space models
        if (prefills := getattr(metadata, "num_prefills", None)) is not None:
            return int(prefills) == 0
    kinds = sorted({type(metadata).__name__ for metadata in metadata_by_layer.values()})
    raise UserError(
        f"prefill_bits differs from bits, but the attention metadata of vLLM ({', '.join(kinds)}) does not say whether a "
        "step reads prompts. Start vLLM with another --attention-backend, or set one bit-width for both."
    )


def _linear_runtime_bits(
    x: Tensor,
    planes: Tensor,
    scales: Sequence[Tensor],
    scale_bits: Sequence[int],
    zeros: Tensor | None,
    bias: Tensor | None,
    step_bits: Sequence[Tensor],
    out_features: Sequence[int],
    in_features: int,
    *op_args: Any,
) -> Tensor:
    """Outputs of one or more layers, which are ranges of row tiles of one weight; each but the last has a multiple of 64 rows.

    Neighbours of equal bit-width share a launch.
    """
    bits = [current_bits(one) for one in step_bits]
    outputs = multiply_ranges(x, planes, scales, scale_bits, zeros, bias, bits, out_features, in_features, *op_args)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _fake_linear_runtime_bits(
    x: Tensor,
    planes: Tensor,
    scales: Sequence[Tensor],
    scale_bits: Sequence[int],
    zeros: Tensor | None,
    bias: Tensor | None,
    step_bits: Sequence[Tensor],
    out_features: Sequence[int],
    in_features: int,
    *op_args: Any,
) -> Tensor:
    check_x(x, planes, bias, sum(out_features), in_features)
    return x.new_empty(*x.shape[:-1], sum(out_features))


for _key in ("CPU", "CUDA"):
    _library.impl("nested_linear_runtime_bits", _linear_runtime_bits, _key)
torch.library.register_fake("matquant::nested_linear_runtime_bits", _fake_linear_runtime_bits, lib=_library)

"""The matmul of a layer whose width is read when it runs, not when it is traced or compiled.

vLLM traces a model once, without guards. A width that were a number in the layer would be part of the compiled code; here it
is a tensor in memory of the host, an input like any other, so that one compiled model serves all widths. A captured CUDA
graph keeps the widths that it was captured with; ``worker.py`` keeps a set of graphs for each.
"""

import sys

import torch
from torch import Tensor

from matquant.formats.nested import Slicing
from matquant.inference import ops  # noqa: F401 - defines nested_linear
from matquant.inference.argument_checks import check_x

_library = torch.library.Library("matquant", "FRAGMENT")
_library.define(
    "nested_linear_at(Tensor x, Tensor planes, Tensor scales, Tensor? zeros, Tensor? bias, Tensor widths, int out_features, "
    "int group_size, int master_bits, str slicing, float offset) -> Tensor"
)


def new_widths(decode: int, prefill: int, decode_tokens: int = 1) -> Tensor:
    """The widths of one weight, on the host: int64 [3].

    Args:
        decode: of steps that only decode.
        prefill: of all others.
        decode_tokens: how many tokens of a sequence one step decodes, at most.
    """
    return torch.tensor([decode, prefill, decode_tokens], dtype=torch.int64, device="cpu")


def width_now(widths: Tensor) -> int:
    """The width of the step that is under way."""
    decode, prefill, decode_tokens = widths.tolist()
    return decode if decode == prefill or _only_decodes(decode_tokens) else prefill


def _only_decodes(decode_tokens: int) -> bool:
    """Whether no sequence of vLLM's current step has more new tokens than that."""
    context_module = sys.modules.get("vllm.forward_context")
    if context_module is None or not context_module.is_forward_context_available():
        return False
    context = context_module.get_forward_context()
    mode = context.cudagraph_runtime_mode.name
    if mode != "NONE":  # graphs of whole steps are of decoding, see widths.check_graphs; pieces are of everything else
        return mode == "FULL"
    metadata = context.attn_metadata
    every = metadata if isinstance(metadata, list) else [metadata]
    longest = [_longest(layers) for layers in every]
    return all(length is not None and length <= decode_tokens for length in longest)


def _longest(layers: object) -> int | None:
    """New tokens of the longest sequence, as an attention layer's metadata has it."""
    if not isinstance(layers, dict):
        return None
    return next((int(m.max_query_len) for m in layers.values() if hasattr(m, "max_query_len")), None)


def _linear_at(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    widths: Tensor,
    out_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
) -> Tensor:
    return torch.ops.matquant.nested_linear.default(
        x, planes, scales, zeros, bias, width_now(widths), out_features, group_size, master_bits, slicing, offset
    )


def _fake_linear_at(
    x: Tensor,
    planes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    widths: Tensor,
    out_features: int,
    group_size: int,
    master_bits: int,
    slicing: Slicing,
    offset: float,
) -> Tensor:
    check_x(x, planes, bias, out_features)
    return x.new_empty(*x.shape[:-1], out_features)


for _key in ("CPU", "CUDA"):
    _library.impl("nested_linear_at", _linear_at, _key)
torch.library.register_fake("matquant::nested_linear_at", _fake_linear_at, lib=_library)

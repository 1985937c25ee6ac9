"""Structure of a decoder's residual stream, found by tracing a few tokens: layers that read it, and layers that write.

Supported are decoders whose blocks read the residual stream through RMSNorms that linear layers follow directly, and
write to it with linear layers (Llama, Mistral, Qwen, Phi-3, Granite and others).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError, shorten
from matquant.models.blocks import BlockModel
from matquant.models.patched_forward import ForwardStopped
from matquant.models.tensor_swap import swapped_tensors
from matquant.models.tracing import block_kind, tensor_identity

_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class NormReaders:
    """RMSNorm on the residual stream.

    Attributes:
        norm: its full name.
        unit: weight of a norm without gain: 1, or 0 for a norm that multiplies by 1 + weight (Gemma).
        readers: full names of the linear layers that read its output.
    """

    norm: str
    unit: float
    readers: tuple[str, ...]

    def renamed(self, old: str, new: str) -> "NormReaders":
        """Counterpart in another block, by the full names of both blocks."""
        readers = tuple(new + name.removeprefix(old) for name in self.readers)
        return NormReaders(norm=new + self.norm.removeprefix(old), unit=self.unit, readers=readers)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResidualStream:
    """Modules that read and write the residual stream, by full name.

    Attributes:
        embedding: token embeddings.
        norms: norms with their readers; the last one is the final norm, whose reader is the head.
        writers: linear layers whose output is added to the residual stream.
        traced_blocks: blocks that were traced, one of each kind.
    """

    embedding: str
    norms: tuple[NormReaders, ...]
    writers: tuple[str, ...]
    traced_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Call:
    """Call of a module: its input and output, and the identity of the input at the time of the call.

    The tensors are kept, since a new tensor may get the address of a freed one.
    """

    input_identity: tuple[Any, ...]
    input: Tensor
    output: Any


_Calls = Mapping[str, list[_Call]]


@torch.no_grad()
def trace_residual_stream(model: BlockModel) -> ResidualStream:
    """Trace one block of each kind, the embeddings and the head, on the CPU in float32.

    Raises:
        UserError: the structure is not supported; names the module that does not fit.
    """
    kinds: dict[tuple[Any, ...], tuple[int, list[NormReaders], list[str]]] = {}
    norms: list[NormReaders] = []
    writers: list[str] = []
    with torch.inference_mode(False):  # tensors count in-place writes only outside of it
        embedding = _trace_embedding(model)
        for index, name in enumerate(model.block_names):
            kind = block_kind(model.blocks[index])
            if kind not in kinds:
                kinds[kind] = (index, *_trace_block(model, index))
            traced, own_norms, own_writers = kinds[kind]
            old = model.block_names[traced]
            norms += [norm.renamed(old, name) for norm in own_norms]
            writers += [name + writer.removeprefix(old) for writer in own_writers]
        norms.append(_trace_head(model))
    _check_outside(model, embedding, norms[-1])
    traced_blocks = tuple(index for index, _, _ in kinds.values())
    return ResidualStream(embedding=embedding, norms=tuple(norms), writers=tuple(writers), traced_blocks=traced_blocks)


def unsupported(model: BlockModel, reason: str) -> UserError:
    """Error for an architecture whose residual stream cannot be rotated."""
    return UserError(
        f"transform=rotation does not support {type(model.model).__name__}: {reason}. Use transform=none for this "
        "model."
    )


def _trace_embedding(model: BlockModel) -> str:
    """Full name of the embeddings, whose output must be the input of block 0 up to a constant factor."""
    module = model.model.get_input_embeddings()
    name: str = next(n for n, m in model.model.named_modules() if m is module)
    with model.embeddings_on_device(_CPU, torch.float32), _recorded({name: module}) as calls:
        hidden, _ = model.capture_batch(model.probe_ids(_CPU))
    embedded = calls[name][-1].output  # earlier calls may be those of a shorter batch
    if embedded.shape == hidden.shape:
        factor = (hidden * embedded).sum() / embedded.square().sum()
        if torch.allclose(hidden, factor * embedded, rtol=1e-3, atol=1e-5):
            return name
    raise unsupported(model, f"the output of {name} is changed before the first block")


def _trace_block(model: BlockModel, index: int) -> tuple[list[NormReaders], list[str]]:
    """Norms with their readers, and writers of one block."""
    hidden, kwargs = model.probe(_CPU, torch.float32)
    layers, path = model.linears(index), model.block_names[index]
    if model.expert_groups(index):
        raise unsupported(model, f"{path} has experts, whose tokens are selected before linear layers read them")
    norms = _norm_candidates(model.blocks[index], path, hidden.shape[-1])
    with model.on_device(index, _CPU, torch.float32):
        with _recorded(norms) as normed, _recorded(layers) as called:
            model.run_block(index, hidden, kwargs[index])
        if uncalled := [name for name in layers if name not in called]:
            raise unsupported(model, f"the probe did not call {shorten(uncalled)}")
        found = [_readers(model, name, norms[name], normed, called) for name in normed]
        read = {reader for norm in found for reader in norm.readers}
        writers = [n for n, layer in layers.items() if n not in read and layer.out_features == hidden.shape[-1]]
    if not found or not writers:
        raise unsupported(model, f"{path} has no RMSNorm that linear layers follow, or no linear layer that writes")
    return found, writers


def _trace_head(model: BlockModel) -> NormReaders:
    """Final norm, whose reader is the head."""
    hidden, _ = model.probe(_CPU, torch.float32)
    heads = model.linears(len(model))
    if not heads:
        raise unsupported(model, "its head is not a linear layer")
    norms = _norm_candidates(model.model, "", hidden.shape[-1])
    norms = {name: norm for name, norm in norms.items() if not name.startswith(f"{model.name}.")}
    (head,) = heads.values()
    with model.embeddings_on_device(_CPU, torch.float32):
        with _recorded(norms) as normed, _recorded(heads, stop=head) as called, suppress(ForwardStopped):
            model.head(model.probe_ids(_CPU), hidden)
        found = [_readers(model, name, norms[name], normed, called) for name in normed]
    if len(found) != 1:
        raise unsupported(model, f"{len(found)} norms precede its head instead of one")
    return found[0]


def _norm_candidates(module: nn.Module, path: str, hidden_size: int) -> dict[str, nn.Module]:
    """Modules whose weight is a vector of the hidden size, by full name."""
    found = {}
    for name, inner in module.named_modules(prefix=path):
        weight = inner._parameters.get("weight")
        if weight is not None and tuple(weight.shape) == (hidden_size,):
            found[name] = inner
    return found


def _readers(model: BlockModel, name: str, norm: nn.Module, normed: _Calls, called: _Calls) -> NormReaders:
    """Readers of the output of one norm, which is on the CPU."""
    unit = _unit_weight(norm)
    if unit is None:
        raise unsupported(model, f"{name} is not an RMSNorm without bias ({type(norm).__name__})")
    outputs = {tensor_identity(call.output) for call in normed[name]}
    readers = tuple(layer for layer, calls in called.items() if calls[0].input_identity in outputs)
    if not readers:
        raise unsupported(model, f"no linear layer reads the output of {name} directly")
    return NormReaders(norm=name, unit=unit, readers=readers)


def _unit_weight(norm: nn.Module) -> float | None:
    """Weight of an RMSNorm without gain: 1 or 0; None for another kind of norm. The norm is on the CPU."""
    weight: Any = norm.weight
    if len(list(norm.parameters())) != 1:
        return None
    # A LayerNorm subtracts the mean of 1; an RMSNorm does not.
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) + 1
    expected = x * x.square().mean(-1, keepdim=True).rsqrt()
    for unit in (1.0, 0.0):
        with swapped_tensors(norm, {"weight": torch.full_like(weight, unit)}):
            if torch.allclose(norm(x), expected, rtol=1e-3, atol=1e-3):
                return unit
    return None


def _check_outside(model: BlockModel, embedding: str, final_norm: NormReaders) -> None:
    """Raise UserError for parameters outside of blocks that are neither embeddings, final norm nor head."""
    known = (embedding, final_norm.norm, *final_norm.readers)
    others = [
        name
        for name, _ in model.model.named_parameters()
        if not name.startswith(f"{model.name}.") and name.rpartition(".")[0] not in known
    ]
    if others:
        raise unsupported(model, f"it has other parameters outside of its blocks: {shorten(others)}")


@contextmanager
def _recorded(modules: Mapping[str, nn.Module], stop: nn.Module | None = None) -> Iterator[dict[str, list[_Call]]]:
    """Record the calls of modules by name, in order of their first call; end the forward pass at ``stop``."""
    calls: dict[str, list[_Call]] = {}
    handles = []
    for name, module in modules.items():

        def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            calls.setdefault(name, []).append(_Call(tensor_identity(value), value, None))
            if called is stop:
                raise ForwardStopped

        def after(_called: nn.Module, _args: tuple[Any, ...], output: Any, name: str = name) -> None:
            last = calls[name][-1]
            calls[name][-1] = _Call(last.input_identity, last.input, output)

        handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()

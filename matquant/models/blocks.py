"""A causal language model as a sequence of decoder blocks that are loaded and run one at a time.

Blocks are found in the module tree, independent of an architecture's names. Everything outside of them is left to the
model's own forward (``matquant.models.patched_forward``).
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from matquant.errors import UserError, shorten
from matquant.formats.parent import TRANSFORM_KEY
from matquant.inference.experts import SourceView
from matquant.inference.linear_modules import is_linear
from matquant.models.activation_cache import ActivationCache, OffloadTarget
from matquant.models.block_kwargs import BlockKwargs, PerBlockKwargs, share_tensors
from matquant.models.checkpoint import Checkpoint
from matquant.models.discovery import find_blocks, make_linear
from matquant.models.materializer import TensorFunction, WeightMaterializer
from matquant.models.patched_forward import OutputForm, PatchedForward, hidden_of, unsupported_errors
from matquant.models.tensor_swap import named_tensors, set_tensor, swapped_tensors, tensor_slot
from matquant.models.tied_weights import untie_head

# Long enough for every expert of a small mixture to be called, short enough to take no time.
_PROBE_TOKENS = 32


def compute_dtype(stored: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Dtype of the computation: float32 on a CPU, the stored dtype elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else stored


class ModelTransform(Protocol):
    """Interface of ``matquant.transforms.WeightTransform`` that a ``BlockModel`` uses."""

    unties_embeddings: bool

    def plan(self, model: "BlockModel") -> Mapping[str, TensorFunction]:
        """Function of each tensor that changes, by full name."""

    def to_json(self) -> dict[str, Any]:
        """JSON-able description."""


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """Arguments of all blocks for a set of sequences, batch by batch.

    Attributes:
        hidden: hidden states in front of block 0, [sequences, length, ...].
        rows: sequences of each batch.
        kwargs: other arguments of each batch; tensors that are equal in several batches are stored once.
    """

    hidden: ActivationCache
    rows: list[slice]
    kwargs: list[PerBlockKwargs]


class BlockModel:
    """Decoder blocks of a causal language model of Transformers, to be run one at a time.

    ``Conv1D`` and fused experts in blocks are replaced by ``nn.Linear`` on the same storage, so that every weight is
    [out_features, in_features] and every layer has a name.

    Weights are transformed, converted and put on a device inside the contexts ``on_device``, ``embeddings_on_device``
    and ``head_on_device``; the model's own tensors stay unchanged outside of them.

    Args:
        model: in eval mode.
        checkpoint: reader of the weights that are on the meta device.
        transform: weight transform that all weights pass where they are materialized. If it unties the embeddings, a
            tied head becomes a parameter of its own.

    Attributes:
        source_views: location in the checkpoint of the weights that have another name or shape there, by full name.
        untied_head: True if the transform untied the head from the embeddings.

    Raises:
        UserError: the model has no list of blocks, or the transform does not support it.
    """

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint | None = None, transform: ModelTransform | None = None
    ) -> None:
        self.model: Any = model
        self.name, blocks = find_blocks(model)
        self.blocks: list[nn.Module] = list(blocks)
        self.block_names: list[str] = [f"{self.name}.{i}" for i in range(len(self.blocks))]
        self.source_views: dict[str, SourceView] = {}
        for block, name in zip(self.blocks, self.block_names, strict=True):
            self.source_views |= make_linear(block, name)
        self._linears: list[dict[str, nn.Linear]] = [
            {f"{name}.{n}": m for n, m in block.named_modules() if is_linear(m)}
            for block, name in zip(self.blocks, self.block_names, strict=True)
        ]
        weights: list[Tensor] = [layer.weight for layers in self._linears for layer in layers.values()]
        self.dtype: torch.dtype = max(weights, key=Tensor.numel).dtype  # small layers may be kept in float32
        self.untied_head = False
        self._materializer = WeightMaterializer(checkpoint, self.source_views, self.dtype)
        self._forward = PatchedForward(model, self.blocks, self.name)
        self._probes: dict[tuple[torch.device, torch.dtype], tuple[Tensor, PerBlockKwargs]] = {}
        self.transform = transform
        if transform is not None:
            self._apply(transform)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def vocab_size(self) -> int:
        """Number of logits of each token."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def transform_description(self) -> dict[str, Any] | None:
        """Description of the transform of the weights: own, or recorded in the config of a transformed checkpoint."""
        if self.transform is not None:
            return self.transform.to_json()
        return getattr(self.model.config, TRANSFORM_KEY, None)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Linear layers of a block by full name, in module order; weights are [out_features, in_features].

        The head counts as a block after the last one, ``len(self)``. It has one layer, or none if the head is not
        linear.
        """
        if index == len(self.blocks):
            head = self.model.get_output_embeddings()
            return {n: m for n, m in self.model.named_modules() if m is head and is_linear(m)}
        return dict(self._linears[index])

    def expert_groups(self, index: int) -> dict[str, str]:
        """Group name of each layer of a block that belongs to one of several experts.

        The name has ``*`` for the expert's number: ``model.layers.0.mlp.experts.*.down_proj``.
        """
        found = {}
        for name in self.linears(index):
            head, marker, tail = name.rpartition("experts.")
            number, _, rest = tail.partition(".")
            if marker and number.isdecimal():
                found[name] = f"{head}{marker}*.{rest}"
        return found

    # Running

    @torch.no_grad()
    def capture_batch(self, input_ids: Tensor, like: PerBlockKwargs | None = None) -> tuple[Tensor, PerBlockKwargs]:
        """Record the hidden states in front of block 0 and the other arguments of each block.

        Args:
            input_ids: int64 [batch, length], on the device of the embeddings.
            like: arguments of an earlier batch. Tensors that are equal in both (usually masks and position embeddings)
                are taken from there, so that many batches store them once.

        Returns:
            Hidden states [batch, length, hidden], and the other arguments of each block.

        Raises:
            UserError: the model does not run its blocks one after the other, each once.
        """
        self._detect_output_forms(input_ids)
        hidden, recorded = self._forward.record(input_ids)
        if like is None:
            return hidden, recorded
        memo: dict[tuple[int, int], Any] = {}
        return hidden, [share_tensors(new, old, memo) for new, old in zip(recorded, like, strict=True)]

    def capture_block_inputs(
        self,
        sequences: Tensor,
        batch_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        offload: OffloadTarget | None = None,
    ) -> BlockInputs:
        """Capture all sequences batch by batch, see ``capture_batch``, with the embeddings on ``device`` in ``dtype``.

        Args:
            sequences: int64 [sequences, length].
            offload: storage of the hidden states; ``device`` if None. The other arguments stay on ``device``.
        """
        rows = [slice(i, min(i + batch_size, len(sequences))) for i in range(0, len(sequences), batch_size)]
        captured: list[PerBlockKwargs] = []
        cache: ActivationCache | None = None
        with self.embeddings_on_device(device, dtype):
            for batch in rows:
                # All batches share the tensors of the first one, except a smaller last batch.
                hidden, kwargs = self.capture_batch(sequences[batch].to(device), captured[0] if captured else None)
                if cache is None:
                    shape = (len(sequences), *hidden.shape[1:])
                    cache = ActivationCache(shape, hidden.dtype, offload or torch.device(device), torch.device(device))
                cache[batch] = hidden
                captured.append(kwargs)
        if cache is None:
            raise ValueError("there are no sequences")
        return BlockInputs(cache, rows, captured)

    def run_block(self, index: int, hidden: Tensor, kwargs: BlockKwargs) -> Tensor:
        """Output of block ``index`` for hidden states [batch, length, hidden], same shape; keeps the autograd graph."""
        args, named = kwargs.bind(hidden)
        return hidden_of(self.blocks[index](*args, **named))

    def head(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] for hidden states after the last block; keeps the autograd graph."""
        self._detect_output_forms(input_ids)
        return self._forward.logits(input_ids, hidden)

    def probe(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, PerBlockKwargs]:
        """Result of ``capture_batch`` for a few tokens; computed once per device and dtype.

        Raises:
            UserError: the architecture is not supported.
        """
        if (device, dtype) not in self._probes:
            with unsupported_errors(self.model), self.embeddings_on_device(device, dtype):
                self._probes[device, dtype] = self.capture_batch(self.probe_ids(device))
        return self._probes[device, dtype]

    def probe_ids(self, device: torch.device) -> Tensor:
        """Tokens of the probe, int64 [1, length]."""
        return (torch.arange(_PROBE_TOKENS, device=device) % self.vocab_size)[None]

    @torch.no_grad()
    def _detect_output_forms(self, input_ids: Tensor) -> None:
        """Detect the form of the blocks' outputs, once for each class of blocks."""
        forms = self._forward.output_forms
        for index, block in enumerate(self.blocks):
            if type(block) not in forms:
                hidden, recorded = self._forward.record(input_ids[:1, :2], index + 1)
                args, kwargs = recorded[index].bind(hidden)
                with self.on_device(index, hidden.device, hidden.dtype):
                    forms[type(block)] = OutputForm.of(block(*args, **kwargs))

    # Weights

    def fill(self, exclude: Collection[str], device: torch.device | str, dtype: torch.dtype) -> None:
        """Set all tensors for good, transformed, on ``device`` in ``dtype``, except those named in ``exclude``."""
        self._materializer.fill(self.model, exclude, device, dtype)
        self._record_transform()

    @torch.no_grad()
    def transform_in_place(self) -> None:
        """Transform the model's own tensors for good; their devices and dtypes stay.

        Raises:
            UserError: a tensor has no values (it is on the meta device).
        """
        tensors = {name: tensor for name, tensor in named_tensors(self.model) if name in self._materializer.plan}
        if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
            raise UserError(f"{shorten(empty)} have no values (meta device). Load the model before it is transformed.")
        for name, tensor in tensors.items():
            values = self._materializer.transform(name, tensor, tensor.device)
            set_tensor(self.model, name, nn.Parameter(values, requires_grad=tensor.requires_grad))
        self._materializer.plan = {}
        self._record_transform()

    def read_tensor(self, name: str) -> Tensor:
        """Values of a parameter or buffer by full name, transformed, on the CPU."""
        slots, key = tensor_slot(self.model, name)
        ((_, values),) = self._materializer.read({name: slots[key]})
        return values.to("cpu")

    def transform_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """Apply the weight transform to the values of a tensor by full name, on the CPU."""
        return self._materializer.transform(name, tensor)

    @contextmanager
    def on_device(self, index: int, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
        """Put a block on ``device`` in ``dtype`` inside the context; ``len(self)`` is everything outside of blocks.

        With float32 all floating-point tensors are converted, else only those in the dtype of the blocks: tensors that
        a half-precision model keeps in float32 stay so.
        """
        if index == len(self.blocks):
            with self.head_on_device(device, dtype):
                yield
        else:
            block, name = self.blocks[index], self.block_names[index]
            with self._materializer.materialized(block, name, lambda _: True, device, dtype):
                yield

    @contextmanager
    def head_on_device(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
        """Put final norm, head and whatever else is outside of blocks on the device, as ``head`` needs it.

        Untied embeddings on the meta device stay without values, since ``head`` does not use them.
        """
        tied = self._embedding() is getattr(self.model.get_output_embeddings(), "weight", None)
        with self._outside_on_device(device, dtype, None if tied else self._embedding()):
            yield

    @contextmanager
    def embeddings_on_device(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
        """Put everything outside of blocks except an untied head on the device, as ``capture_batch`` needs it."""
        head = getattr(self.model.get_output_embeddings(), "weight", None)
        with self._outside_on_device(device, dtype, None if head is self._embedding() else head):
            yield

    @contextmanager
    def whole_on_device(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
        """Put the whole model on the device inside the context."""
        with ExitStack() as stack:
            stack.enter_context(self._outside_on_device(device, dtype, None))
            for index in range(len(self.blocks)):
                stack.enter_context(self.on_device(index, device, dtype))
            yield

    @contextmanager
    def _outside_on_device(
        self, device: torch.device | str, dtype: torch.dtype, without: Tensor | None
    ) -> Iterator[None]:
        """Put everything outside of blocks on the device; a meta tensor ``without`` becomes zeros without storage."""
        empty = {}
        for name, tensor in named_tensors(self.model):
            if tensor is without and tensor.is_meta:
                empty[name] = torch.zeros((), device=device, dtype=dtype).expand(tensor.shape)

        def wanted(name: str) -> bool:
            return not name.startswith(f"{self.name}.") and name not in empty

        with swapped_tensors(self.model, empty), self._materializer.materialized(self.model, "", wanted, device, dtype):
            yield

    def _embedding(self) -> Tensor:
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @contextmanager
    def with_weights(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace the weights of some layers of block ``index`` inside the context.

        Gradients flow through the new weights to the tensors that they were computed from. The embeddings keep their
        values if a tied head is replaced.

        Args:
            weights: [out_features, in_features] by full layer name, on any device in any float dtype; they are
                converted to device and dtype of the layer. Other layers keep their weights.

        Raises:
            ValueError: a name is not a linear layer of the block, or a shape is wrong.
        """
        layers = self.linears(index)
        inside = index < len(self.blocks)
        owner, prefix = (self.blocks[index], len(self.block_names[index]) + 1) if inside else (self.model, 0)
        tensors = {}
        for name, weight in weights.items():
            if name not in layers:
                where = self.block_names[index] if inside else "the head"
                raise ValueError(f"{name} is not a linear layer of {where}")
            own = layers[name].weight
            if weight.shape != own.shape:
                raise ValueError(f"{name} needs a weight of shape {tuple(own.shape)}; found {tuple(weight.shape)}")
            tensors[f"{name[prefix:]}.weight"] = weight.to(own.device, own.dtype)
        with swapped_tensors(owner, tensors):
            yield

    def _apply(self, transform: ModelTransform) -> None:
        """Let all weights pass the transform from now on."""
        if recorded := getattr(self.model.config, TRANSFORM_KEY, None):
            raise UserError(
                f"The weights of the model passed the transform {recorded.get('name')} already. Load the original model."
            )
        plan = transform.plan(self)
        if unsupported := [name for name in plan if name in self.source_views]:
            raise UserError(
                f"The transform changes weights that {type(self.model).__name__} does not store as linear layers: "
                f"{shorten(unsupported)}. Quantize this model without a transform."
            )
        if transform.unties_embeddings:
            self.untied_head = untie_head(self.model)
        self._materializer.plan = dict(plan)
        self._probes.clear()  # they were computed with the original embeddings

    def _record_transform(self) -> None:
        """Record in the model's config that its own tensors are transformed."""
        if self.transform is not None:
            setattr(self.model.config, TRANSFORM_KEY, self.transform.to_json())

"""A causal language model as a row of decoder blocks, found from the module tree and not from an architecture's names.

The blocks are run one at a time, and everything around them is left to the model itself. Its own forward runs with
every block's forward replaced: by one that notes what the block would be called with (``prepare``), or by one that
hands in a hidden state that is already known (``head``). So embeddings, masks, positions, final norm, head and
soft-capping are the model's own, whatever its architecture.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from matquant.errors import UserError
from matquant.inference.experts import SourceView
from matquant.models.activation_cache import ActivationCache, OffloadTarget
from matquant.models.block_kwargs import BlockKwargs, BlockKwargsList, share_tensors, split_block_args
from matquant.models.checkpoint import Checkpoint
from matquant.models.discovery import find_blocks, make_linear
from matquant.models.materializer import WeightMaterializer
from matquant.models.tensor_swap import named_tensors, patched_forwards, swapped_tensors

# Long enough that every expert of a small mixture has a chance to be called, short enough to cost nothing.
_PROBE_TOKENS = 32


def compute_dtype(stored: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype to compute in: float32 on a CPU, the stored dtype elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else stored


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """Every batch of some windows on its way into block 0.

    Attributes:
        hidden: what enters block 0.
        rows: of each batch.
        calls: of each batch; tensors that are equal in several batches are held once.
    """

    hidden: ActivationCache
    rows: list[slice]
    calls: list[BlockKwargsList]


class BlockModel:
    """The blocks of a causal language model of Transformers, to be run one at a time.

    What holds matrices of a block in another form (``Conv1D``, experts that are one tensor) is replaced by ``nn.Linear``
    over the same storage, so that every weight is [out, in] and every layer has a name.

    Args:
        model: in eval mode. Its weights stay where they are; ``on_device`` and ``outside_on_device`` lend converted
            copies.
        checkpoint: reads the weights that are on the meta device, for as long as they are lent.

    Raises:
        UserError: no list of blocks was found.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint | None = None) -> None:
        self.model: Any = model
        self.name, blocks = find_blocks(model)
        self.blocks: list[nn.Module] = list(blocks)
        self.block_names: list[str] = [f"{self.name}.{i}" for i in range(len(self.blocks))]
        self.origins: dict[str, SourceView] = {}  # of weights with a new name or shape, by full name
        for block, name in zip(self.blocks, self.block_names, strict=True):
            self.origins |= make_linear(block, name)
        linear = next(m for m in self.blocks[0].modules() if isinstance(m, nn.Linear))
        self.dtype: torch.dtype = linear.weight.dtype
        self._values = WeightMaterializer(checkpoint, self.origins, self.dtype)
        # Of the tuple that a block returns; 0 when it returns a tensor, None before it is known.
        self._output_length: int | None = None
        self._probes: dict[tuple[torch.device, torch.dtype], tuple[Tensor, BlockKwargsList]] = {}

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def vocabulary(self) -> int:
        """How many logits the head gives for each token."""
        return self.model.config.get_text_config().vocab_size

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of a block by their full dotted names, in module order; weights are [out, in].

        What follows the last block counts as one more, ``len(self)``: its only layer is the head, if that is linear.
        """
        if index == len(self.blocks):
            head = self.model.get_output_embeddings()
            return {n: m for n, m in self.model.named_modules() if m is head and isinstance(m, nn.Linear)}
        prefix = self.block_names[index]
        return {f"{prefix}.{n}": m for n, m in self.blocks[index].named_modules() if isinstance(m, nn.Linear)}

    def expert_groups(self, index: int) -> dict[str, str]:
        """For each layer of a block that belongs to one of several experts, the name of all that do the same there.

        Such as ``model.layers.0.mlp.experts.*.down_proj`` for ``model.layers.0.mlp.experts.3.down_proj``.
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
    def prepare(self, input_ids: Tensor, like: BlockKwargsList | None = None) -> tuple[Tensor, BlockKwargsList]:
        """What enters block 0, and what each block is called with; no block and no head is computed.

        Args:
            input_ids: int64 [batch, length], on the device of the embeddings.
            like: calls of an earlier batch. What is equal in both (masks and position embeddings, as a rule) is taken
                from there, so that many batches hold it once. What differs stays as it is.

        Returns:
            Hidden states [batch, length, hidden], and a call for each block.

        Raises:
            UserError: the model does not run its blocks one after the other, each once.
        """
        entering, calls = self._record(input_ids, len(self.blocks))
        if like is None:
            return entering, calls
        memo: dict[tuple[int, int], Any] = {}
        return entering, [share_tensors(new, old, memo) for new, old in zip(calls, like, strict=True)]

    def capture_block_inputs(
        self,
        windows: Tensor,
        batch_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        place: OffloadTarget | None = None,
    ) -> BlockInputs:
        """``prepare`` for all windows, batch by batch, with the embeddings on ``device`` in ``dtype`` meanwhile.

        Args:
            windows: int64 [sequences, length].
            place: where the hidden states stay; ``device`` when None. BlockKwargsList are on ``device``.
        """
        rows = [slice(i, min(i + batch_size, len(windows))) for i in range(0, len(windows), batch_size)]
        calls: list[BlockKwargsList] = []
        hidden: ActivationCache | None = None
        with self.entry_on_device(device, dtype):
            for batch in rows:
                ids = windows[batch].to(device)
                # BlockKwargsList of the first batch serve all others but a smaller last one.
                entering, recorded = self.prepare(ids, calls[0] if calls else None)
                if hidden is None:
                    shape = (*windows.shape, entering.shape[-1])
                    hidden = ActivationCache(shape, entering.dtype, place or torch.device(device), torch.device(device))
                hidden[batch] = entering
                calls.append(recorded)
        if hidden is None:
            raise ValueError("there are no windows")
        return BlockInputs(hidden, rows, calls)

    @torch.no_grad()
    def run_block(self, index: int, hidden: Tensor, call: BlockKwargs) -> Tensor:
        """What block ``index`` makes of hidden states [batch, length, hidden]; the same shape and dtype."""
        args, kwargs = call.fill(hidden)
        return first(self.blocks[index](*args, **kwargs))

    @torch.no_grad()
    def head(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] from what leaves the last block [batch, length, hidden]."""
        last = self.blocks[-1]

        def passing(block: nn.Module) -> Callable[..., Any]:
            return lambda *args, **kwargs: self._output(hidden if block is last else split_block_args(args, kwargs)[0])

        self._learn_output(input_ids)
        with patched_forwards(self.blocks, [passing(block) for block in self.blocks]):
            return self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits

    def probe(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, BlockKwargsList]:
        """``prepare`` of a few tokens, done once for a device and dtype."""
        if (device, dtype) not in self._probes:
            with self.entry_on_device(device, dtype):
                self._probes[device, dtype] = self.prepare(self.probe_ids(device))
        return self._probes[device, dtype]

    def probe_ids(self, device: torch.device) -> Tensor:
        """int64 [1, length]."""
        return (torch.arange(_PROBE_TOKENS, device=device) % self.vocabulary)[None]

    # Placing

    def fill(self, but: Collection[str], device: torch.device | str, dtype: torch.dtype) -> None:
        """Give all tensors their values for good, on ``device`` in ``dtype``, except the named ones."""
        self._values.fill(self.model, but, device, dtype)

    @contextmanager
    def on_device(self, index: int, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
        """Inside, block ``index`` (or all that is in no block, ``len(self)``) is on ``device`` in ``dtype``.

        Afterwards it has its own tensors again.

        In float32 everything floating is converted, else only what has the blocks' dtype: what a half-precision model
        keeps in float32 stays so.
        """
        if index == len(self.blocks):
            with self.outside_on_device(device, dtype):
                yield
        else:
            with self._values.converted(self.blocks[index], self.block_names[index], lambda _: True, device, dtype):
                yield

    @contextmanager
    def outside_on_device(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
        """Inside, all that is not in blocks (embeddings, norms, head) is on ``device`` in ``dtype``, as ``head`` needs it.

        Embeddings that are on the meta device and no head of their own stay without values: ``head`` makes no use of them.
        """
        tied = self._embedding() is getattr(self.model.get_output_embeddings(), "weight", None)
        with self._outside(device, dtype, None if tied else self._embedding()):
            yield

    @contextmanager
    def entry_on_device(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
        """Inside, all that ``prepare`` needs is on ``device`` in ``dtype``: what is not in blocks, but not an untied head."""
        head = getattr(self.model.get_output_embeddings(), "weight", None)
        with self._outside(device, dtype, None if head is self._embedding() else head):
            yield

    @contextmanager
    def _outside(self, device: torch.device | str, dtype: torch.dtype, without: Tensor | None) -> Iterator[None]:
        """All that is in no block but ``without``; that has zeros, which take no memory, if it is on the meta device."""

        def wanted(name: str) -> bool:
            return not name.startswith(f"{self.name}.")

        empty = {}
        for name, tensor in named_tensors(self.model):
            if tensor is without and tensor.is_meta:
                empty[name] = torch.zeros((), device=device, dtype=dtype).expand(tensor.shape)
        with swapped_tensors(self.model, empty), self._values.converted(self.model, "", wanted, device, dtype):
            yield

    def _embedding(self) -> Tensor:
        return self.model.get_input_embeddings().weight

    @contextmanager
    def with_weights(self, index: int, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the named layers of block ``index`` have these weights; afterwards their own tensors again.

        A head (block ``len(self)``) that is tied to the embeddings leaves those as they are.

        Args:
            weights: [out, in] by full layer name, of any device and float dtype; they are converted to those that the
                layer has at the time. Layers that are not named stay as they are.

        Raises:
            ValueError: a name that is not a linear layer of the block, or a wrong shape.
        """
        layers = self.linears(index)
        inside = index < len(self.blocks)
        owner, prefix = (self.blocks[index], len(self.block_names[index]) + 1) if inside else (self.model, 0)
        tensors = {}
        for name, weight in weights.items():
            if name not in layers:
                raise ValueError(f"{name} is no linear layer of {self.block_names[index] if inside else 'the head'}")
            own = layers[name].weight
            if weight.shape != own.shape:
                raise ValueError(f"{name} needs a weight of shape {tuple(own.shape)}, got {tuple(weight.shape)}")
            tensors[f"{name[prefix:]}.weight"] = weight.to(own.device, own.dtype)
        with swapped_tensors(owner, tensors):
            yield

    # The model's own forward, with other blocks

    def _record(self, input_ids: Tensor, count: int) -> tuple[Tensor, BlockKwargsList]:
        """What enters block 0, and the calls of the first ``count`` blocks; the forward pass ends there."""
        entering: list[Tensor] = []
        calls: BlockKwargsList = []

        def recorder(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if index != len(calls):
                    raise UserError(self.out_of_order(f"block {index} was called as number {len(calls)}"))
                hidden, call = split_block_args(args, kwargs)
                if index == 0:
                    entering.append(hidden)
                calls.append(call)
                if len(calls) == count:
                    raise Stop
                return self._output(hidden)

            return forward

        if count > 1:
            self._learn_output(input_ids)
        with patched_forwards(self.blocks, [recorder(i) for i in range(len(self.blocks))]):
            try:
                self.model(input_ids=input_ids, use_cache=False)
            except Stop:
                return entering[0], calls
        raise UserError(self.out_of_order(f"only {len(calls)} of {len(self.blocks)} were called"))

    def out_of_order(self, found: str) -> str:
        """That the model is not supported, and why."""
        return (
            f"{type(self.model).__name__} does not run the blocks {self.name} one after the other, each once: {found}. "
            "This architecture is not supported."
        )

    def _output(self, hidden: Tensor) -> Any:
        """Hidden states in the form that the model expects of a block."""
        return (hidden, *(None,) * (self._output_length - 1)) if self._output_length else hidden

    def _learn_output(self, input_ids: Tensor) -> None:
        """Find out, once, whether blocks return a tensor or a tuple."""
        if self._output_length is not None:
            return
        hidden, calls = self._record(input_ids[:1, :2], 1)
        args, kwargs = calls[0].fill(hidden)
        with self.on_device(0, hidden.device, hidden.dtype):
            output = self.blocks[0](*args, **kwargs)
        self._output_length = len(output) if isinstance(output, tuple) else 0


class Stop(Exception):
    """Leaves the model's forward once everything is recorded."""


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

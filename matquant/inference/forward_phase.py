"""Phase of a model's forward pass, prefill or decoding: nested layers may read a different bit-width in each.

The phase is a property of the model's call. A shape inside the model does not tell it: some modules flatten their input to
[tokens, hidden], so that a step of three sequences looks like a prompt of three tokens, and an expert may receive one token of
a long prompt. Hooks on the model therefore derive the phase from the arguments of its forward pass, and all nested layers of
the model read it from one ``ForwardPhase``.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn


class ForwardPhase(threading.local):
    """Phase of the forward pass that the current thread executes. The nested layers of a model share one.

    Works under ``torch.compile``, also without graph breaks. Copies and pickles do not contain the phase: a copy of a model
    has a phase of its own, which all layers of the copy share.
    """

    def __init__(self) -> None:
        self._step = _Step()  # torch.compile traces assignments to this object, but loses those to a thread-local

    def __reduce__(self) -> tuple[Any, ...]:
        return ForwardPhase, ()

    @property
    def is_decoding(self) -> bool | None:
        """True in a forward pass that decodes, False in one that reads prompts, None outside of the model's forward pass."""
        return self._step.is_decoding

    def follow(self, module: nn.Module, depth: int) -> None:
        """Derive the phase from the arguments of each call of ``module``.

        Args:
            module: model, or a part of one, whose forward takes ``input_ids``.
            depth: 0 for the whole model, larger for parts of it. A part decides only when it is called on its own.
        """
        names = _argument_names(type(module).forward)
        module.register_forward_pre_hook(functools.partial(self._enter, depth, names), with_kwargs=True)
        module.register_forward_hook(functools.partial(self._leave, depth), always_call=True)

    def _enter(
        self, depth: int, names: tuple[str, ...], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._step.depth is None or depth <= self._step.depth:
            self._step.depth = depth
            self._step.is_decoding = is_decode_call(dict(zip(names, args, strict=False)) | kwargs)

    def _leave(self, depth: int, *_: Any) -> None:
        if self._step.depth == depth:
            self._step.depth = self._step.is_decoding = None


class _Step:
    """Current forward pass of one thread.

    Attributes:
        depth: depth of the module that decided the phase; None outside of a forward pass.
        is_decoding: the phase; None if the arguments do not tell it.
    """

    depth: int | None = None
    is_decoding: bool | None = None


def takes_tokens(module: nn.Module) -> bool:
    """True for a model of Transformers, or a part of one that takes ``input_ids``."""
    return "input_ids" in _argument_names(type(module).forward)


@functools.cache
def _argument_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's arguments without ``self``, in order."""
    return tuple(inspect.signature(method).parameters)[1:]


def is_decode_call(arguments: Mapping[str, Any]) -> bool | None:
    """True if a call of a model decodes, False if it reads prompts, None if its arguments hold no tokens.

    A call decodes if no sequence has more than one new token. Several new tokens are decoded by a call that verifies
    candidates: it has a cache, and ``logits_to_keep`` is the number of new tokens. Assisted generation makes such calls. Calls
    for a prompt or a part of it keep the logits of one token, or do not say how many. A call in which some sequences decode and
    others read a prompt (continuous batching) is a prefill. A prompt, or its last part, of one token counts as decoding.

    Args:
        arguments: arguments of the model's forward by name: ``input_ids`` [batch, tokens] or ``inputs_embeds`` [batch, tokens,
            hidden]; ``max_length_q`` for sequences that are joined in one row; ``past_key_values``; ``logits_to_keep``.
    """
    tokens = _new_tokens(arguments)
    if tokens is None:
        return None
    kept = arguments.get("logits_to_keep")
    verifies = isinstance(kept, int) and arguments.get("past_key_values") is not None and kept == tokens
    return tokens == 1 or verifies


def _new_tokens(arguments: Mapping[str, Any]) -> int | None:
    """Largest number of new tokens of a sequence."""
    if isinstance(length := arguments.get("max_length_q"), int):
        return length
    for name in ("input_ids", "inputs_embeds"):
        if (tensor := arguments.get(name)) is not None:
            return int(tensor.shape[1])
    return None

"""Self-speculative decoding in Transformers: a low slice drafts tokens, a high slice of the same planes verifies them.

    with matquant.speculate(model, draft=2, target=8) as speculation:
        model.generate(**inputs, max_new_tokens=200)
    print(speculation.acceptance_rate)

There is no second model, and drafting uses the target's KV cache: the cache always ends before the last token, so a round

  1. reads the last token and the drafted ones at the draft's bit-widths, one token a call, and removes their keys and values;
  2. reads the same tokens at the target's bit-widths in one call, which writes their keys and values again;
  3. keeps drafts by speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1), and removes the other ones.

Tokens are distributed as those of the target alone. With greedy decoding they are equal, except where a call with several
tokens rounds differently from a call with one and two logits are closer than that.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from matquant.errors import UserError, shorten
from matquant.formats.bit_choice import Bits, bits_by_layer
from matquant.inference import NestedLinear, nested_layers

logger = logging.getLogger(__name__)

_CROPPABLE = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")  # kinds of cache layers
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_WARM_UP, _PLAIN, _SPECULATIVE = 1, 4, 8  # rounds of each kind before costs are compared
_DECAY = 0.9  # weight of the costs so far when a round is added

BitsPair = tuple[int, int]  # of decoding and of prefill


def speculate(
    model: Any, draft: Bits = 2, target: Bits | None = None, tokens: int = 4, adaptive: bool = True
) -> "Speculation":
    """Make ``model.generate`` speculative within a ``with`` block.

    Args:
        model: model of Transformers with nested layers.
        draft: bit-widths that draft: one for all layers, one by layer, or the file of an allocation.
        target: bit-widths whose distribution the tokens have, in the same form; None for those that the model has.
        tokens: number of drafted tokens a round.
        adaptive: decode without drafts from the moment when that is measured to be faster, and log it.

    Raises:
        UserError: the model has no nested layers, its planes lack a bit-width, or ``tokens`` is less than 1.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise UserError(
            f"tokens, the number of drafted tokens a round, must be a whole number from 1; found {tokens!r}."
        )
    layers = nested_layers(model)
    if not layers:
        raise UserError("The model has no nested layers, so there is no low slice to draft with. Load a packed folder.")
    return Speculation(
        model, _bits_by_layer(layers, draft), {} if target is None else _bits_by_layer(layers, target), tokens, adaptive
    )


def _bits_by_layer(layers: Mapping[str, NestedLinear], bits: Bits) -> dict[str, BitsPair]:
    """Bit-widths of the layers that ``bits`` names, for both phases. Raises UserError."""
    by_layer = bits_by_layer(bits, layers)
    for name, value in by_layer.items():
        layers[name].check_bits(value, name)
    return {name: (value, value) for name, value in by_layer.items()}


class Speculation:
    """Context in which ``model.generate`` is speculative, and what was measured in it. See ``speculate``.

    Attributes:
        rounds: number of rounds that drafted.
        drafted, accepted: number of drafted tokens, and of those that were kept.
        payoff: costs of rounds with and without drafts; None if not adaptive.
    """

    def __init__(
        self, model: Any, draft: Mapping[str, BitsPair], target: Mapping[str, BitsPair], tokens: int, adaptive: bool
    ) -> None:
        self.model, self.draft, self.target, self.tokens = model, draft, target, tokens
        self.rounds = self.drafted = self.accepted = 0
        self.payoff = Payoff() if adaptive else None
        self._layers = nested_layers(model)

    @property
    def acceptance_rate(self) -> float:
        """Fraction of the drafted tokens that were kept; NaN before the first one."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    def __enter__(self) -> "Speculation":
        if "generate" in vars(self.model):
            raise UserError("model.generate is already replaced; leave the other speculate block first.")
        self._before = {name: (layer.decode_bits, layer.prefill_bits) for name, layer in self._layers.items()}
        self._prefill = {**self._before, **self.target}
        self._verify = {name: (decode, decode) for name, (decode, _) in self._prefill.items()}
        self._set(self._prefill)
        self.model.generate = functools.partial(self._generate, self.model.generate)
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.generate
        self._set(self._before)

    def _set(self, bits: Mapping[str, BitsPair]) -> None:
        for name, pair in bits.items():
            self._layers[name].set_bits(*pair)

    def _generate(self, generate: Callable[..., Any], *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Generate as ``model.generate`` does, with the decoding loop of this class."""
        if kwargs.get("assistant_model") is not None or kwargs.get("custom_generate") is not None:
            raise UserError("speculate has a decoding loop of its own; leave assistant_model and custom_generate out.")
        loop = functools.partial(_decode, self, streamer)
        try:  # `generate` passes the prompt to the streamer, but does not pass the streamer to the loop
            return generate(*args, streamer=streamer, custom_generate=loop, **kwargs)
        finally:
            self._set(self._prefill)

    def use_drafts(self) -> bool:
        """True if the next round should draft."""
        return self.payoff is None or self.payoff.use_drafts()


class Payoff:
    """Decision between rounds with and without drafts from the measured seconds per token.

    The first rounds of each kind only warm up. After that the cheaper kind is used: rounds with drafts as long as they stay the
    cheaper ones, and none again once they do not, since acceptance and context change slowly.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.off = False
        self._rounds = {True: 0, False: 0}
        self._seconds, self._tokens = {True: 0.0, False: 0.0}, {True: 0.0, False: 0.0}

    def use_drafts(self) -> bool:
        """True if the next round should draft."""
        return not self.off and self._rounds[False] >= _WARM_UP + _PLAIN

    def seconds_per_token(self, drafts: bool) -> float:
        """Mean seconds per token of rounds with or without drafts, later rounds count more; NaN if not measured."""
        return self._seconds[drafts] / self._tokens[drafts] if self._tokens[drafts] else float("nan")

    def record(self, drafts: bool, seconds: float, tokens: int) -> None:
        """Record a round, and decide."""
        self._rounds[drafts] += 1
        if self._rounds[drafts] > _WARM_UP:
            self._seconds[drafts] = _DECAY * self._seconds[drafts] + seconds
            self._tokens[drafts] = _DECAY * self._tokens[drafts] + tokens
        plain, speculative = self.seconds_per_token(False), self.seconds_per_token(True)
        if not self.off and self._rounds[True] >= _WARM_UP + _SPECULATIVE and speculative >= plain:
            self.off = True
            logger.warning(
                "Speculative decoding is off from here on: it takes %.3g ms a token, decoding without drafts %.3g ms.",
                1000 * speculative,
                1000 * plain,
            )


@dataclasses.dataclass
class _Sequence:
    """One sequence that is decoded.

    Attributes:
        model: the model.
        ids: token ids so far, [1, length]. The cache holds all but the last one.
        inputs: arguments of the model's forward for the whole sequence, the cache among them.
        config: generation config.
        processors: logits processors.
        finished: True when a stopping criterion has applied.
    """

    model: Any
    ids: Tensor
    inputs: dict[str, Any]
    config: GenerationConfig
    processors: Any
    finished: bool = False

    @property
    def cache(self) -> Any:
        return self.inputs["past_key_values"]

    def forward(self, ids: Tensor, count: int, inputs: Mapping[str, Any]) -> Any:
        """Outputs of the model for the last ``count`` tokens of ``ids``, which the cache does not hold."""
        model_inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=count, is_first_iteration=False, **inputs
        )
        if "logits_to_keep" in model_inputs:
            model_inputs["logits_to_keep"] = count
        return self.model(**model_inputs, return_dict=True)

    def extend(self, inputs: Mapping[str, Any], outputs: Any, count: int) -> dict[str, Any]:
        """Arguments of forward for a sequence that is ``count`` tokens longer."""
        extended: dict[str, Any] = self.model._update_model_kwargs_for_generation(
            outputs, dict(inputs), is_encoder_decoder=False, num_new_tokens=count
        )
        return extended

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Processed scores [count, vocabulary] from logits [count, vocabulary] of the last positions of ``ids``."""
        start = ids.shape[1] - len(logits) + 1
        rows = [self.processors(ids[:, : start + i], row[None]) for i, row in enumerate(logits)]
        return torch.cat(rows)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Distribution from which a token is chosen, [count, vocabulary]; all on one token for greedy decoding."""
        if self.config.do_sample:
            return scores.softmax(-1)
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


def _decode(
    speculation: Speculation,
    streamer: Any,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Any:
    """Decoding loop that ``generate`` calls. Returns the ids [1, length], or ``GenerateDecoderOnlyOutput``."""
    _check_request(model, generation_config)
    if len(input_ids) > 1:
        logger.warning(
            "Speculative decoding is off for this batch of %d sequences: it needs a single one.", len(input_ids)
        )
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=streamer, **model_kwargs
        )
    sequence = _Sequence(model, input_ids, model_kwargs, generation_config, logits_processor)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    sequence.inputs = sequence.extend(model_kwargs, outputs, 1)
    _prepare_cache(sequence.inputs.get("past_key_values"))
    kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
    logits = outputs.logits[0, -1:].float()
    scores = sequence.scores(input_ids, logits)
    tokens = torch.multinomial(sequence.probabilities(scores), 1)[:, 0]
    while True:
        tokens = _until_stop(sequence, tokens, stopping_criteria)
        for name, values in (("scores", scores), ("logits", logits)):
            kept[name] += values[: len(tokens), None].unbind()
        if streamer is not None:
            streamer.put(tokens.cpu())
        if sequence.finished:
            break
        tokens, scores, logits = _timed_round(speculation, sequence)
    if streamer is not None:
        streamer.end()
    return _result(sequence, kept)


def _check_request(model: Any, config: GenerationConfig) -> None:
    """Check that a call of ``generate`` can be speculative. Raises UserError."""
    mode = config.get_generation_mode()
    if model.config.is_encoder_decoder or mode not in _MODES:
        kind = "an encoder-decoder model" if model.config.is_encoder_decoder else mode.value
        raise UserError(f"speculate works for greedy decoding and sampling with a decoder; found {kind}.")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise UserError(
            "speculate returns no attentions and no hidden states; leave output_attentions and the like out."
        )


def _prepare_cache(cache: Any) -> None:
    """Check that tokens can be removed from the end of a cache, and enable it for sliding windows. Raises UserError."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    if not kinds or (other := sorted(kinds.difference(_CROPPABLE))):
        found = shorten(other) if kinds else f"use_cache={cache is not None}"
        raise UserError(
            f"speculate removes rejected tokens from the KV cache, which this one does not support: {found}. Use a model "
            "with attention in all layers and the default cache (no cache_implementation)."
        )
    if hasattr(cache, "activate_past_recording"):
        cache.activate_past_recording()


def _until_stop(sequence: _Sequence, tokens: Tensor, stopping_criteria: Any) -> Tensor:
    """Append tokens [count] to the sequence up to the first at which it stops, and return those that were appended."""
    for count, token in enumerate(tokens, 1):
        sequence.ids = torch.cat([sequence.ids, token.view(1, 1)], 1)
        if stopping_criteria(sequence.ids, None).all():
            sequence.finished = True
            return tokens[:count]
    return tokens


def _timed_round(speculation: Speculation, sequence: _Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Decode one or more tokens. Returns tokens [count], and the target's scores and logits [count, vocabulary]."""
    payoff = speculation.payoff
    room = sequence.config.max_length - sequence.ids.shape[1] - 1  # the target adds a token to the drafts
    count = min(speculation.tokens, room) if speculation.use_drafts() else 0
    start = 0.0 if payoff is None else payoff.clock()
    found = _round(speculation, sequence, count)
    if payoff is not None and count in (0, speculation.tokens):
        payoff.record(count > 0, payoff.clock() - start, len(found[0]))
    return found


def _round(speculation: Speculation, sequence: _Sequence, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """One round with ``count`` drafted tokens. See ``_timed_round``."""
    drafts, expected = _draft(speculation, sequence, count)
    ids = torch.cat([sequence.ids, drafts[None]], 1)
    speculation._set(speculation._verify)
    inputs = _lengthen(sequence, count)
    outputs = sequence.forward(ids, count + 1, inputs)
    logits = outputs.logits[0, -count - 1 :].float()
    scores = sequence.scores(ids, logits)
    tokens = accept_drafts(drafts, expected, sequence.probabilities(scores))
    sequence.cache.crop(len(tokens) - count - 1)  # 0 also shrinks sliding windows
    sequence.inputs = sequence.extend(sequence.inputs, outputs, len(tokens))
    if count:
        speculation.rounds += 1
        speculation.drafted += count
        speculation.accepted += len(tokens) - 1
    return tokens, scores, logits


def _lengthen(sequence: _Sequence, count: int) -> dict[str, Any]:
    """Arguments of forward for a sequence with ``count`` drafts."""
    return sequence.extend(sequence.inputs, {}, count) if count else sequence.inputs


def _draft(speculation: Speculation, sequence: _Sequence, count: int) -> tuple[Tensor, Tensor]:
    """Draft at the draft's bit-widths; the cache stays as it was.

    Returns:
        Tokens [count], and the distributions that they were drawn from, [count, vocabulary].
    """
    ids, inputs, distributions = sequence.ids, sequence.inputs, []
    speculation._set(speculation.draft)
    for step in range(count):
        outputs = sequence.forward(ids, 1, inputs)
        distributions.append(sequence.probabilities(sequence.scores(ids, outputs.logits[0, -1:].float())))
        ids = torch.cat([ids, torch.multinomial(distributions[-1], 1)], 1)
        inputs = sequence.extend(inputs, outputs, 1) if step + 1 < count else inputs
    if count:
        sequence.cache.crop(-count)
    return ids[0, sequence.ids.shape[1] :], torch.cat(distributions) if count else ids.new_empty(0, 0)


def accept_drafts(drafts: Tensor, draft_probabilities: Tensor, target_probabilities: Tensor) -> Tensor:
    """Tokens distributed as the target's, from drafts: the accepted ones and one more.

    Algorithm 1 of arXiv 2211.17192: a draft d is kept with probability min(1, p(d) / q(d)); the token after the kept ones is
    drawn from max(0, p - q), normalized, or from p after the last draft.

    Args:
        drafts: drafted tokens [count], drawn from ``draft_probabilities``.
        draft_probabilities: q, [count, vocabulary].
        target_probabilities: p after each prefix, [count + 1, vocabulary].

    Returns:
        Between 1 and count + 1 tokens.
    """
    count = len(drafts)
    kept = 0
    if count:
        each = torch.arange(count, device=drafts.device)
        ratio = target_probabilities[each, drafts] / draft_probabilities[each, drafts]
        kept = int((torch.rand_like(ratio) < ratio).long().cumprod(0).sum())
    rest = target_probabilities[kept]
    if kept < count:
        residual = (rest - draft_probabilities[kept]).clamp_(min=0)
        rest = residual if residual.sum() > 0 else rest  # p and q differ by rounding only
    return torch.cat([drafts[:kept], torch.multinomial(rest, 1)])


def _result(sequence: _Sequence, kept: Mapping[str, list[Tensor]]) -> Any:
    """Return value of ``generate``."""
    config = sequence.config
    if not config.return_dict_in_generate:
        return sequence.ids
    fields: dict[str, Any] = {
        "sequences": sequence.ids,
        "scores": tuple(kept["scores"]) if config.output_scores else None,
        "logits": tuple(kept["logits"]) if config.output_logits else None,
        "past_key_values": sequence.cache,
    }
    return GenerateDecoderOnlyOutput(**fields)

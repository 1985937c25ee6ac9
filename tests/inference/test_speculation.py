"""Self-speculative decoding in Transformers: tokens are those of the target's bit-widths alone, and costs are measured."""

import itertools
import logging
import math
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import SIZES, make_model
from nesting import nest
from scipy import stats
from torch import Tensor

import matquant
from matquant.errors import UserError
from matquant.inference import nested_layers, set_bits
from matquant.transformers.speculation import Payoff, accept_drafts

PROMPT = torch.tensor([[17, 101, 5, 120, 44, 9, 82, 33]])
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
KINDS = ["llama", "gemma3", "mistral", "opt", "gpt2", "mixtral"]  # gemma3 and mistral have sliding windows of 8 tokens

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def plain(model: Any, bits: Any, prefill: int | None = None, prompt: Tensor = PROMPT, **settings: Any) -> Any:
    set_bits(model, bits, prefill)
    return model.generate(prompt, **GREEDY | settings)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_target(kind):
    model = nest(make_model(kind))
    expected = plain(model, 8)
    set_bits(model, 6)
    for draft in (3, 8):
        with matquant.speculate(model, draft=draft, target=8, adaptive=False) as found:
            assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        assert found.drafted >= found.accepted >= found.drafted * (draft == 8)
        assert (found.acceptance_rate == 1) == (found.drafted == found.accepted)
    assert {layer.decode_bits for layer in nested_layers(model).values()} == {6}
    assert torch.equal(model.generate(PROMPT, **GREEDY), plain(model, 6))


def test_some_drafts_are_accepted_and_some_rejected():
    """Else the equality of tokens would show nothing."""
    model = nest(make_model("llama"))
    set_bits(model, 8)
    with matquant.speculate(model, draft=3, adaptive=False) as found:
        model.generate(PROMPT, **GREEDY | {"max_new_tokens": 40})
    assert 0 < found.acceptance_rate < 1


@pytest.mark.parametrize("tokens", [1, 3, 7])
def test_prompts_are_read_at_their_own_bits(tokens):
    """The bit-width of prefill stays, and verification has the bit-width of decoding."""
    model = nest(make_model("llama"))
    expected = plain(model, 4, prefill=8)
    set_bits(model, 4, 8)
    with matquant.speculate(model, draft=2, tokens=tokens, adaptive=False) as found:
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
    assert found.rounds > 0
    layers = nested_layers(model).values()
    assert {(layer.decode_bits, layer.prefill_bits) for layer in layers} == {(4, 8)}


def test_allocations_of_draft_and_target():
    model = nest(make_model("llama"))
    mixed = {name: 3 + index % 3 for index, name in enumerate(nested_layers(model))}
    expected = plain(model, mixed)
    set_bits(model, 8)
    with matquant.speculate(model, draft=dict.fromkeys(list(mixed)[::2], 2), target=mixed, adaptive=False):
        assert torch.equal(model.generate(PROMPT, **GREEDY), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"min_new_tokens": 9, "eos_token_id": list(range(0, 128, 3))},
        {"stopping_criteria": tf.StoppingCriteriaList([lambda ids, _: ids[:, -1] % 7 == 3])},
    ],
    ids=["repetition", "n-grams", "one token", "two tokens", "ends of text", "own criterion"],
)
def test_processors_and_ends(settings):
    model = nest(make_model("llama"))
    expected = plain(model, 8, **settings)
    with matquant.speculate(model, draft=4, adaptive=False):
        assert torch.equal(model.generate(PROMPT, **GREEDY | settings), expected)


def test_left_padding_and_a_continued_cache():
    model = nest(make_model("llama"))
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPT], 1), torch.tensor([[0] * 3 + [1] * 8])
    expected = plain(model, 8, prompt=padded, attention_mask=mask)
    with matquant.speculate(model, adaptive=False):
        assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY), expected)
        first = model.generate(PROMPT, **GREEDY | {"max_new_tokens": 8}, return_dict_in_generate=True)
        both = model.generate(first.sequences, **GREEDY | {"max_new_tokens": 16}, past_key_values=first.past_key_values)
    assert torch.equal(both, plain(model, 8))


def test_scores_logits_and_a_streamer():
    class Streamer:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.tokens += tokens.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model, streamer = nest(make_model("llama")), Streamer()
    wanted: dict[str, Any] = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected = plain(model, 8, repetition_penalty=1.3, **wanted)
    with matquant.speculate(model, adaptive=False):
        found = model.generate(PROMPT, **GREEDY, **wanted, repetition_penalty=1.3, streamer=streamer)
    assert streamer.tokens == found.sequences[0].tolist() == expected.sequences[0].tolist()
    assert streamer.ended
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.cat(found[name]), torch.cat(expected[name]), rtol=1e-4, atol=1e-5)


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Probability of counts at least as unlikely under a distribution; rare outcomes are joined."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    found = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = wanted > 0
    assert found[~keep].sum() == 0  # impossible outcomes did not occur
    return float(stats.chisquare(found[keep], wanted[keep] * found.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize(
    ("p", "q"), [((0.7, 0.2, 0.1, 0), (0.1, 0.2, 0.3, 0.4)), ((0.25, 0.25, 0.5, 0), (0.5, 0, 0.5, 0))]
)
def test_accepted_tokens_have_the_distribution_of_the_target(p, q):
    """Both tokens of a round with one draft, against the product of the target's distributions."""
    torch.manual_seed(0)
    first, second = torch.tensor(p), torch.tensor(q).flip(0)
    draft = torch.tensor(q)
    counts, alone = torch.zeros(4, 4), torch.zeros(4)
    for _ in range(6000):
        drafts = torch.multinomial(draft, 1)
        tokens = accept_drafts(drafts, draft[None], torch.stack([first, second]))
        if len(tokens) == 1:
            alone[tokens[0]] += 1
        else:
            counts[tokens[0], tokens[1]] += 1
    assert p_value(counts.sum(1) + alone, first) > 1e-4
    assert p_value(counts.sum(0), second) > 1e-4
    overlap = float(torch.minimum(first, draft).sum())
    assert abs(float(counts.sum()) / 6000 - overlap) < 4 * math.sqrt(overlap * (1 - overlap) / 6000)


def test_equal_distributions_accept_every_draft():
    p = torch.tensor([0.3, 0.7])
    for _ in range(200):
        assert len(accept_drafts(torch.multinomial(p, 3, replacement=True), p.expand(3, 2), p.expand(4, 2))) == 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": 0, "temperature": 0.7, "repetition_penalty": 1.5}])
def test_sampled_texts_have_the_distribution_of_the_target(settings):
    """All texts of three tokens from a vocabulary of four, against the target's probabilities of them."""
    torch.manual_seed(1)
    config = tf.LlamaConfig(**SIZES | {"vocab_size": 4, "hidden_size": 32, "num_hidden_layers": 1})
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model = nest(model)
    prompt, length = torch.tensor([[1, 3, 2]]), 3
    texts = torch.tensor(list(itertools.product(range(4), repeat=length)))
    exact = text_probabilities(model, prompt, texts, 8, settings)
    assert p_value(exact * 600, text_probabilities(model, prompt, texts, 2, settings)) < 1e-6  # the draft's differ
    set_bits(model, 8)
    counts = torch.zeros(len(texts))
    sampling = GREEDY | {"do_sample": True, "max_new_tokens": length} | settings
    with matquant.speculate(model, draft=2, tokens=2, adaptive=False) as found:
        for _ in range(600):
            text = model.generate(prompt, **sampling)[0, prompt.shape[1] :]
            counts[(texts == text).all(1).nonzero()[0, 0]] += 1
    assert p_value(counts, exact) > 1e-4
    assert 0.1 < found.acceptance_rate < 0.95


@torch.no_grad()
def text_probabilities(model: Any, prompt: Tensor, texts: Tensor, bits: int, settings: dict[str, Any]) -> Tensor:
    """Probability of each text [texts, length] after the prompt, computed without a cache."""
    set_bits(model, bits)
    processors = tf.LogitsProcessorList()
    if "repetition_penalty" in settings:
        processors.append(tf.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    if "temperature" in settings:
        processors.append(tf.TemperatureLogitsWarper(settings["temperature"]))
    ids = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    logits, start = model(ids).logits.float(), prompt.shape[1]
    result = torch.ones(len(texts))
    for i in range(texts.shape[1]):
        scores = processors(ids[:, : start + i], logits[:, start + i - 1])
        result *= scores.softmax(-1).gather(1, texts[:, i : i + 1])[:, 0]
    return result


class Clock:
    """Clock whose next interval is set by the test."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("seconds", "kept", "off"), [(2.0, 3, False), (2.0, 2, True), (1.1, 1, True), (0.9, 1, False)])
def test_payoff_compares_measured_costs(seconds, kept, off, caplog):
    """A round with drafts takes ``seconds`` for ``kept`` tokens; one without takes a second for one token."""
    payoff, drafted = Payoff(Clock()), 0
    payoff.record(False, 100.0, 1)  # the first of each kind does not count
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            drafts = payoff.use_drafts()
            drafted += drafts
            payoff.record(drafts, (100.0 if drafted == 1 else seconds) if drafts else 1.0, kept if drafts else 1)
    assert payoff.off == off
    assert (drafted < 12) == off
    assert ("off from here on" in caplog.text) == off


def test_payoff_follows_a_text_that_becomes_hard():
    payoff = Payoff(Clock())
    for _ in range(30):
        payoff.record(payoff.use_drafts(), 2.0 if payoff.use_drafts() else 1.0, 4 if payoff.use_drafts() else 1)
    assert not payoff.off
    for _ in range(30):
        payoff.record(payoff.use_drafts(), 2.0 if payoff.use_drafts() else 1.0, 1)
    assert payoff.off


def test_costs_are_measured_while_generating(caplog):
    model, clock = nest(make_model("llama")), Clock()
    expected = plain(model, 8)
    for layer in nested_layers(model).values():  # a call takes the same time at every bit-width
        layer.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 1))
    for draft in (2, 8):
        set_bits(model, 8)
        with matquant.speculate(model, draft=draft) as found, caplog.at_level(logging.WARNING):
            found.payoff = Payoff(clock)
            for _ in range(4):
                caplog.clear()
                assert torch.equal(model.generate(PROMPT, **GREEDY), expected)
        assert found.payoff.off  # drafts at the target's cost never pay, whatever is accepted
        assert found.rounds < 24


def test_a_batch_decodes_without_drafts(caplog):
    model, prompts = nest(make_model("llama")), torch.cat([PROMPT, PROMPT.flip(1)])
    expected = plain(model, 8, prompt=prompts)
    with matquant.speculate(model) as found, caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(prompts, **GREEDY), expected)
    assert math.isnan(found.acceptance_rate)
    assert "off for this batch of 2 sequences" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "greedy decoding and sampling with a decoder; found beam_search"),
        ({"cache_implementation": "static"}, "does not support: StaticLayer. Use a model"),
        ({"use_cache": False}, "does not support: use_cache=False"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "no hidden states"),
        ({"custom_generate": print}, "a decoding loop of its own"),
    ],
)
def test_unsupported_requests_raise_and_restore_the_bits(settings, message):
    model = nest(make_model("llama"))
    set_bits(model, 7)
    with pytest.raises(UserError, match=message), matquant.speculate(model, target=6):
        model.generate(PROMPT, **GREEDY | settings)
    assert {layer.decode_bits for layer in nested_layers(model).values()} == {7}
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft": 9}, "whole number in 2..8; found 9"),
        ({"target": 1}, "whole number in 2..8; found 1"),
        ({"draft": {"nowhere": 2}}, "no nested layers of this model: nowhere"),
        ({"tokens": 0}, "whole number from 1; found 0"),
    ],
)
def test_wrong_arguments_raise(arguments, message):
    with pytest.raises(UserError, match=message):
        matquant.speculate(nest(make_model("llama")), **arguments)


def test_model_without_nested_layers_and_nested_blocks_raise():
    with pytest.raises(UserError, match="no nested layers"):
        matquant.speculate(make_model("llama"))
    model = nest(make_model("llama"))
    with matquant.speculate(model), pytest.raises(UserError, match="already replaced"), matquant.speculate(model):
        pass

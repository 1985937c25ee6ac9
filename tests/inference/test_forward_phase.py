"""Phase of a model's forward pass: all nested layers read the bit-width of prefill, or all that of decoding.

The reference is the same model with one bit-width, set by hand before each call.
"""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import make_model
from nesting import nest
from torch import Tensor, nn
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig
from weights import rounded_weight

from matquant.errors import UserError
from matquant.inference import NestedLinear, nested_layers, set_bits

DECODE, PREFILL = 2, 8
PROMPTS = torch.tensor(
    [[17, 101, 5, 120, 44, 9, 82, 33], [3, 3, 90, 41, 7, 66, 12, 1], [99, 2, 57, 57, 8, 30, 111, 64]]
)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
# Flatten to [tokens, hidden]: fc1 and fc2 of OPT; shared experts of Qwen2-MoE and DeepSeek; all routed experts.
KINDS = ["llama", "opt", "gpt2", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models() -> Callable[[str], tuple[Any, Any]]:
    """Function from an architecture to a model with two bit-widths, and the same model for one bit-width at a time."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(kind: str) -> tuple[Any, Any]:
        if kind not in made:
            model = nest(make_model(kind))
            made[kind] = model, copy.deepcopy(model)
        set_bits(made[kind][0], DECODE, prefill=PREFILL)
        return made[kind]

    return get


@torch.no_grad()
def at(model: Any, bits: int, *args: Any, **kwargs: Any) -> Any:
    """Outputs of one call of a model with one bit-width."""
    set_bits(model, bits)
    return model(*args, **kwargs)


@torch.no_grad()
def generate_by_hand(reference: Any, prompts: Tensor, steps: int = GREEDY["max_new_tokens"]) -> tuple[Tensor, Tensor]:
    """Greedy tokens [sequences, steps] and their logits, of a loop that sets the width for each call."""
    tokens, logits, step_input, cache, bits = [], [], prompts, DynamicCache(config=reference.config), PREFILL
    for _ in range(steps):
        out = at(reference, bits, step_input, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1])
        step_input, bits = logits[-1].argmax(-1, keepdim=True), DECODE
        tokens.append(step_input)
    return torch.cat(tokens, 1), torch.stack(logits, 1)


def generated(model: Any, prompts: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Greedy tokens [sequences, steps] of ``generate``, and their logits."""
    out = model.generate(prompts, **GREEDY | settings, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, prompts.shape[1] :], torch.stack(out.logits, 1)


def assert_same_generation(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert divergence(found[1], expected[1]) < 1e-6


def divergence(found: Tensor, expected: Tensor) -> float:
    """KL(expected || found) of logits [sequences, tokens, vocabulary], the largest of all tokens."""
    p, q = (logits.double().log_softmax(-1) for logits in (expected, found))
    return (p.exp() * (p - q)).sum(-1).max().item()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decoding_of_a_batch_equals_that_of_its_sequences(models, kind):
    model, reference = models(kind)
    batch = model(PROMPTS, use_cache=True)
    tokens = batch.logits[:, -1:].argmax(-1)
    decoded = model(tokens, past_key_values=batch.past_key_values).logits
    for i in range(len(PROMPTS)):
        alone = model(PROMPTS[i : i + 1], use_cache=True)
        one = model(tokens[i : i + 1], past_key_values=alone.past_key_values).logits
        assert divergence(decoded[i : i + 1], one) < 1e-6
    prompt = at(reference, PREFILL, PROMPTS, use_cache=True)
    assert divergence(batch.logits, prompt.logits) < 1e-6
    assert divergence(decoded, at(reference, DECODE, tokens, past_key_values=prompt.past_key_values).logits) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_a_loop_that_sets_one_width_per_call(models, kind):
    model, reference = models(kind)
    expected = generate_by_hand(reference, PROMPTS)
    assert_same_generation(generated(model, PROMPTS), expected)
    set_bits(model, DECODE)
    assert (
        divergence(generated(model, PROMPTS)[1], expected[1]) > 1e-5
    )  # the test could not fail if all widths were alike


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
@torch.no_grad()
def test_expert_with_one_prompt_token_reads_the_width_of_prefill(models, kind):
    model, reference = models(kind)
    counts: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: counts.append(len(args[0])))
        for name, layer in nested_layers(model).items()
        if name.endswith("down_proj") and ".experts." in name
    ]
    for prompt in torch.randint(2, 128, (100, 1, 6), generator=torch.Generator().manual_seed(0)):
        counts.clear()
        logits = model(prompt).logits
        if 1 in counts:
            break
    for hook in hooks:
        hook.remove()
    assert 1 in counts
    assert divergence(logits, at(reference, PREFILL, prompt).logits) < 1e-6


@pytest.mark.parametrize("kind", ["llama", "opt"])
@torch.no_grad()
def test_padded_prompts_in_one_batch(models, kind):
    model, reference = models(kind)
    prompts, mask = PROMPTS.clone(), torch.ones_like(PROMPTS)
    prompts[1, :5] = mask[1, :5] = 0
    tokens, logits = generated(model, prompts, attention_mask=mask)
    assert_same_generation((tokens[1:2], logits[1:2]), generate_by_hand(reference, PROMPTS[1:2, 5:]))


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "static", "disable_compile": True}, {"prefill_chunk_size": 4}, {"prefill_chunk_size": 3}],
    ids=str,
)
def test_caches_and_prompts_in_chunks(models, kind, settings):
    model, reference = models(kind)
    assert_same_generation(generated(model, PROMPTS, **settings), generate_by_hand(reference, PROMPTS))


@pytest.mark.slow
def test_static_cache_with_compiled_decoding(models):
    model, reference = models("opt")
    compilation = CompileConfig(fullgraph=True, backend="eager")
    compilation._compile_all_devices = True  # generate compiles on GPUs only
    found = generated(copy.deepcopy(model), PROMPTS, cache_implementation="static", compile_config=compilation)
    assert_same_generation(found, generate_by_hand(reference, PROMPTS))


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_assisted_generation_verifies_candidates_at_the_width_of_decoding(models, kind):
    model, reference = models(kind)
    prompt = PROMPTS[:1]  # no token repeats, so that the first call has no candidates
    with recorded_bits(model) as calls:
        found = generated(model, prompt, prompt_lookup_num_tokens=3, max_new_tokens=16)
    assert calls[0] == (prompt.shape[1], PREFILL)
    assert {bits for _, bits in calls[1:]} == {DECODE}
    assert max(tokens for tokens, _ in calls[1:]) > 1
    assert_same_generation(found, generate_by_hand(reference, prompt, steps=16))


def test_prompt_with_candidates_reads_the_width_of_prefill(models):
    model, _ = models("opt")
    prompt = PROMPTS[:1].repeat(1, 2)
    with recorded_bits(model) as calls:
        generated(model, prompt, prompt_lookup_num_tokens=3, max_new_tokens=2)
    assert calls[0] == (prompt.shape[1] + 3, PREFILL)


@contextlib.contextmanager
def recorded_bits(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Number of tokens and bit-width of each call of the model."""
    calls: list[tuple[int, int]] = []
    layer = next(iter(nested_layers(model).values()))

    def record(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((kwargs["input_ids"].shape[1], layer.phase_bits()))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    yield calls
    hook.remove()


def test_beams_decode(models):
    model, _ = models("opt")
    with recorded_bits(model) as calls:
        model.generate(PROMPTS[:1], num_beams=3, **GREEDY)
    assert calls == [(8, PREFILL)] + [(1, DECODE)] * (GREEDY["max_new_tokens"] - 1)


def test_sequences_that_are_joined_in_one_row(models):
    """Row with the new tokens of all sequences, and the largest number of one sequence."""
    model, _ = models("llama")
    with recorded_bits(model) as calls:
        for tokens, longest in ((3, 1), (3, 2), (1, 1)):
            model(input_ids=PROMPTS[:1, :tokens], use_cache=False, max_length_q=longest)
    assert calls == [(3, DECODE), (3, PREFILL), (1, DECODE)]


@pytest.mark.slow
def test_continuous_batching(models):
    model, reference = models("llama")
    model = copy.deepcopy(model)
    settings = {
        "generation_config": GenerationConfig(**GREEDY | {"eos_token_id": -1}),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, block_size=32, max_batch_tokens=64),
    }
    with recorded_bits(model) as calls:
        found = model.generate_batch(inputs=PROMPTS.tolist(), progress_bar=False, **settings)
    assert calls == [(PROMPTS.numel(), PREFILL)] + [(len(PROMPTS), DECODE)] * (GREEDY["max_new_tokens"] - 1)
    assert [one.generated_tokens for one in found.values()] == generate_by_hand(reference, PROMPTS)[0].tolist()


@torch.no_grad()
def test_embeddings_and_positional_arguments(models):
    model, reference = models("llama")
    embeddings = model.get_input_embeddings()(PROMPTS)
    for bits, length in ((PREFILL, 8), (DECODE, 1)):
        expected = at(reference, bits, PROMPTS[:, :length]).logits
        assert torch.equal(model(inputs_embeds=embeddings[:, :length]).logits, expected)
        assert torch.equal(model(PROMPTS[:, :length], None).logits, expected)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@torch.no_grad()
def test_part_of_a_model_called_on_its_own(models, kind):
    model, reference = models(kind)
    for bits, tokens in ((PREFILL, PROMPTS), (DECODE, PROMPTS[:, :1])):
        set_bits(reference, bits)
        found = model.model(tokens).last_hidden_state
        assert torch.equal(found, reference.model(tokens).last_hidden_state)


def test_layer_outside_of_its_model_raises_if_the_phase_matters(models):
    model, _ = models("llama")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    model(PROMPTS)  # leaves no phase behind
    with pytest.raises(
        UserError, match="8 bits for prefill and 2 bits for decoding was called outside of the forward pass"
    ):
        layer(x)
    assert not torch.equal(layer(x, bits=2), layer(x, bits=8))
    layer.bits = 3
    assert torch.equal(layer(x), layer(x, bits=3))


def test_failed_forward_leaves_no_phase_behind(models):
    model, _ = models("llama")
    with pytest.raises(IndexError):
        model(PROMPTS + 10_000)
    with pytest.raises(UserError, match="outside of the forward pass"):
        model.model.layers[0].mlp.up_proj(torch.randn(3, 64))


@pytest.mark.parametrize("module", [nn.Sequential, nn.ModuleList])
def test_prefill_bits_without_a_model_raise_and_change_nothing(module):
    layer = NestedLinear.from_planes(rounded_weight(torch.randn(64, 64)))
    with pytest.raises(UserError, match=f"no module of {module.__name__} around 0 takes input_ids"):
        set_bits(module([layer]) if module is nn.ModuleList else module(layer), 2, prefill=8)
    assert (layer.decode_bits, layer.prefill_bits) == (8, 8)


@torch.no_grad()
def test_threads_have_their_own_phase(models):
    """One thread reads prompts while another decodes with the same model."""
    model, reference = models("opt")
    inputs = {PREFILL: PROMPTS, DECODE: PROMPTS[:, :1]}
    expected = {bits: at(reference, bits, tokens, use_cache=False).logits for bits, tokens in inputs.items()}
    wrong: list[float] = []

    def run(bits: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                found = model(inputs[bits], use_cache=False).logits
            wrong.extend(filter(lambda kl: kl > 1e-6, [divergence(found, expected[bits])]))

    threads = [threading.Thread(target=run, args=(bits,)) for bits in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "kind"), [("module", "llama"), ("call", "opt"), ("forward", "llama"), ("around", "opt")]
)
@torch.no_grad()
def test_compiled_model_follows_the_phase(models, compiled, kind):
    """``fullgraph``: hooks are part of the graph, or run before it."""
    model, reference = models(kind)
    model = copy.deepcopy(model)
    options: dict[str, Any] = {"fullgraph": True, "backend": "eager"}
    call = model
    if compiled == "module":
        call = torch.compile(model, **options)
    elif compiled == "call":
        call = torch.compile(model.__call__, **options)
    elif compiled == "forward":
        model.forward = torch.compile(model.forward, **options)
    else:
        call = torch.compile(lambda ids, use_cache: model(ids, use_cache=use_cache), **options)
    for bits, tokens in ((PREFILL, PROMPTS), (DECODE, PROMPTS[:, :1]), (PREFILL, PROMPTS)):
        expected = at(reference, bits, tokens, use_cache=False).logits
        assert divergence(call(tokens, use_cache=False).logits, expected) < 1e-6
    assert next(iter(nested_layers(model).values())).phase.is_decoding is None


@pytest.mark.slow
@torch.no_grad()
def test_compiled_experts_follow_the_phase_after_graph_breaks(models):
    model, reference = models("mixtral")
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    for bits, tokens in ((PREFILL, PROMPTS), (DECODE, PROMPTS[:, :1])):
        expected = at(reference, bits, tokens, use_cache=False).logits
        assert divergence(compiled(tokens, use_cache=False).logits, expected) < 1e-6

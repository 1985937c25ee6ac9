"""vLLM engine on a CPU with the plugin. ``make test-vllm`` runs it in an environment of its own."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from server import Server
from shared import ROOT, TINY

import matquant  # noqa: F401 - makes the format known to Transformers
from matquant.formats import matgptq
from matquant.formats.parent import Parent
from matquant.store.artifact import read_artifact

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]

BITS = (2, 3, 4, 8)
MIXED = {
    "q_proj": 2,
    "k_proj": 8,
    "v_proj": 4,
    "gate_proj": 3,
    "up_proj": 6,
    "gate_up_proj": 3,
}  # bits by projection; others 5
PROMPTS = [[5, 9, 100, 7], [1000, 3], [17] * 9]
TOKENS = 16
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS = {
    "qwen3": lambda: tf.Qwen3Config(**SIZES),
    "qwen3, short groups": lambda: tf.Qwen3Config(**SIZES | {"hidden_size": 200, "intermediate_size": 144}),
    "mixtral": lambda: tf.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


class Packed:
    """Model, its parent, and the folder packed from it."""

    def __init__(self, source: Path, folder: Path, parent: Path) -> None:
        self.source, self.folder = source, folder
        self.parent = Parent(read_artifact(parent))
        self.names = [name for index in range(len(self.parent.blocks)) for name in self.parent.block(index)]
        self.mixed = {name: MIXED.get(name.rpartition(".")[2], 5) for name in self.names}

    def greedy(self, bits: int | dict[str, int], tokens: int = TOKENS) -> list[list[int]]:
        """Tokens that stock Transformers generates with the dequantized weights of a slice."""
        model = tf.AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        for index in range(len(self.parent.blocks)):
            for name, weight in self.parent.block(index).items():
                dense = weight.dequantize(bits if isinstance(bits, int) else bits[name])
                owner, _, last = name.rpartition(".")
                if owner.rpartition(".")[2].isdecimal():  # an expert: one matrix of a stack
                    stack, _, expert = owner.rpartition(".")
                    getattr(model.get_submodule(stack), last).data[int(expert)].copy_(dense)
                else:
                    model.get_submodule(name).weight.data.copy_(dense)
        return generate(model, tokens)


def read(folder: Path, **bits: int) -> Any:
    """Packed model in Transformers."""
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **bits)


def generate(model: Any, tokens: int = TOKENS) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        found.append(out[0, len(prompt) :].tolist())
    return found


def run_py(*overrides: str, folder: Path) -> dict[str, Any]:
    """Run the command line and return its results."""
    where = [f"hydra.run.dir={folder}/run", f"store.path={folder}/store", "tracking=none", "stages=[quantize,pack]"]
    subprocess.run([sys.executable, ROOT / "run.py", *where, *overrides], check=True, cwd=folder)
    return json.loads((folder / "run" / "results.json").read_text())


def packed(source: Path, folder: Path, *overrides: str) -> Packed:
    small = ("calibration.sequences=4", "calibration.sequence_length=64", "method.cd_passes=0", "method.block_size=64")
    target = folder / "packed"
    results = run_py(
        f"model.path={source}",
        "method.group_size=64",
        *small,
        "pack=nested",
        f"pack.path={target}",
        *overrides,
        folder=folder,
    )
    return Packed(source, target, Path(results["parent"]["path"]))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Packed:
    return packed(TINY, tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def random_model(request, tmp_path) -> Packed:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MODELS[request.param]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(tmp_path / "source")
    tf.AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "source")
    return packed(tmp_path / "source", tmp_path)


def run_engine(folder: Path, tmp_path: Path, steps: list[Any], **engine: Any) -> list[list[list[int]]]:
    """Tokens that one vLLM engine generates at each step."""
    return report(run_engine_process(folder, tmp_path, steps, **engine), "TOKENS")


def report(output: str, kind: str) -> Any:
    """Content of the line that ``engine.py`` printed after a word."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"{kind} ")]
    return json.loads(line.removeprefix(f"{kind} "))


def run_engine_process(folder: Path, tmp_path: Path, steps: list[Any], tokens: int = TOKENS, **engine: Any) -> str:
    """Output of ``engine.py``."""
    job = {"model": str(folder), "prompts": PROMPTS, "tokens": tokens, "steps": steps}
    (tmp_path / "job.json").write_text(json.dumps(job | {"engine": {"dtype": "float32"} | engine}))
    command = [sys.executable, Path(__file__).with_name("engine.py"), tmp_path / "job.json"]
    done = subprocess.run(command, text=True, capture_output=True)
    assert "TOKENS " in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def assert_tokens_at_all_bits(model: Packed, tmp_path: Path, **engine: Any) -> None:
    choices = [*BITS, model.mixed]
    found = run_engine(model.folder, tmp_path, [[bits] for bits in choices], **engine)
    expected = [model.greedy(bits) for bits in choices]
    assert found == expected
    assert len({str(tokens) for tokens in expected}) == len(choices)  # the test could not fail if all were equal


def test_compiled_model(tiny, tmp_path):
    """Compiled once, then read at all bit-widths, and with different bit-widths for prefill and decoding."""
    choices: list[Any] = [[bits] for bits in (*BITS, tiny.mixed)]
    *found, both = run_engine(tiny.folder, tmp_path, [*choices, [2, 8]])
    assert found == [tiny.greedy(bits) for bits in (*BITS, tiny.mixed)]
    assert both == generate(read(tiny.folder, bits=2, prefill_bits=8))


def test_a_low_slice_drafts_for_a_high_one(tiny, tmp_path):
    """The tokens are those of the target's bit-widths, also when each request names its own; planes are in memory once."""
    draft = {"method": "draft_model", "model": str(tiny.folder), "num_speculative_tokens": 3}
    output = run_engine_process(
        tiny.folder,
        tmp_path,
        [[8], [4], {"bits": [8, 2, 4]}],
        enforce_eager=True,
        speculative_config=draft,
        additional_config={"matquant": {"draft_bits": 2}},
        scheduler_cls="matquant.vllm.scheduler.WidthScheduler",
        disable_log_stats=False,
    )
    eight, two, four = tiny.greedy(8), tiny.greedy(2), tiny.greedy(4)
    assert report(output, "TOKENS") == [eight, four, [eight[0], two[1], four[2]]]
    drafts = report(output, "DRAFTS")
    assert drafts["drafted"] > drafts["accepted"] > 0
    assert drafts["readers"] == drafts["owners"] == len(tiny.names)
    blocks = len(tiny.names) // 7
    assert drafts["storages"] == 4 * blocks  # q, k and v have one, gate and up too
    assert drafts["fused"] == 2 * 2 * blocks  # in both models
    assert drafts["draft_bits"] == 2


def test_drafting_stops_where_it_costs_more(tiny, tmp_path):
    """Drafts on, off and on again, by costs that the test sets. The tokens are those of plain decoding all the time."""
    draft = {"method": "draft_model", "model": str(tiny.folder), "num_speculative_tokens": 3}
    cheap, dear = [0.5, 1.0], [50.0, 1.0]
    output = run_engine_process(
        tiny.folder,
        tmp_path,
        [{"costs": costs} for costs in (cheap, dear, cheap)],
        tokens=40,
        enforce_eager=True,
        hf_overrides={"bits": 8},
        speculative_config=draft,
        additional_config={"matquant": {"draft_bits": 3}},
        scheduler_cls="matquant.vllm.scheduler.WidthScheduler",
        disable_log_stats=False,
    )
    assert report(output, "TOKENS") == [tiny.greedy(8, 40)] * 3
    found = [json.loads(line.removeprefix("COSTS ")) for line in output.splitlines() if line.startswith("COSTS ")]
    decisions = [[r["drafts"] for r in state["ranges"] if r["requests"] == [3, 4]] for state, _, _ in found]
    assert decisions == [[True], [False], [True]]
    assert [state["changes"] for state, _, _ in found] == [0, 1, 0]
    for (_, draft_calls, target_calls), has_drafts in zip(found, (True, False, True), strict=True):
        assert (draft_calls > target_calls) == has_drafts  # three calls for each step with drafts, and none without


@pytest.mark.parametrize("random_model", ["qwen3", "qwen3, short groups"], indirect=True)
def test_tensor_parallel_shards_inside_tiles_and_groups(random_model, tmp_path):
    """On two ranks the 192 columns of down_proj make shards of 96, which are no multiple of tiles or of groups of 64.

    With short groups, its 144 columns make shards of 72, and the other layers have rows of 200 columns.
    """
    assert_tokens_at_all_bits(
        random_model, tmp_path, enforce_eager=True, tensor_parallel_size=2, distributed_executor_backend="mp"
    )


@pytest.mark.parametrize("random_model", ["mixtral"], indirect=True)
def test_mixture_of_experts(random_model, tmp_path):
    assert_tokens_at_all_bits(random_model, tmp_path, enforce_eager=True)
    (both,) = run_engine(random_model.folder, tmp_path, [[2, 8]], enforce_eager=True)
    assert both == generate(read(random_model.folder, bits=2, prefill_bits=8))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_fewer_planes(tiny, tmp_path, dtype):
    """Only three planes are kept, at the bit-width of the command line."""
    overrides = {"bits": 3, "max_bits": 3}
    (found,) = run_engine(tiny.folder, tmp_path, [None], enforce_eager=True, dtype=dtype, hf_overrides=overrides)
    pairs = [(a, b) for x, y in zip(found, tiny.greedy(3), strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(a == b for a, b in pairs) > 0.6 * len(pairs)  # rounded activations may change the arg max


def test_published_checkpoint(tmp_path):
    model = packed(TINY, tmp_path, "pack=matgptq_v1", "method=matgptq_v1", "method.group_size=64", "pack.bits=4")
    config = json.loads((model.folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == matgptq.QUANT_METHOD
    found = run_engine(model.folder, tmp_path, [None, [2]], enforce_eager=True)
    assert found == [model.greedy(4), model.greedy(2)]


def test_damaged_checkpoint_raises(tiny, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in tiny.folder.iterdir():
        content = bytearray(file.read_bytes())
        if file.name.startswith("model-00002"):
            content[-1] ^= 1
        (folder / file.name).write_bytes(content)
    with pytest.raises(AssertionError, match="model-00002.*Copy or download the checkpoint again"):
        run_engine(folder, tmp_path, [None], enforce_eager=True)


def assert_dummy_values_serve(model: Packed, tmp_path: Path) -> None:
    """Serve the config and the tokenizer alone, without a weight file."""
    folder = tmp_path / "no_weights"
    shutil.copytree(model.folder, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    found = run_engine(folder, tmp_path, [None, [2], [8], [2]], enforce_eager=True, load_format="dummy")
    assert all(len(tokens) == TOKENS for step in found for tokens in step)
    assert (found[0], found[1]) == (found[2], found[3])
    with pytest.raises(AssertionError, match="cannot be read: No such file.*Copy or download"):
        run_engine(folder, tmp_path, [None], enforce_eager=True)


def test_dummy_values_without_weight_files(tiny, tmp_path):
    assert_dummy_values_serve(tiny, tmp_path)


@pytest.mark.parametrize("random_model", ["mixtral"], indirect=True)
def test_dummy_values_of_experts(random_model, tmp_path):
    assert_dummy_values_serve(random_model, tmp_path)


def test_server_changes_its_bits_between_requests(tiny, tmp_path):
    with Server(tiny.folder, tmp_path / "log", "--hf-overrides", '{"bits": 8}') as server:
        assert [server.complete(prompt, max_tokens=TOKENS) for prompt in PROMPTS] == tiny.greedy(8)
        status, answer = server.request("/v1/matquant/bits", {"bits": 2})
        assert status == 200
        assert answer["bits"] == dict.fromkeys(tiny.names, 2)
        assert [server.complete(prompt, max_tokens=TOKENS) for prompt in PROMPTS] == tiny.greedy(
            2
        )  # the prefix cache of 8 bits was dropped
        assert server.request("/v1/matquant/bits", {"bits": tiny.mixed})[0] == 200
        assert [server.complete(prompt, max_tokens=TOKENS) for prompt in PROMPTS] == tiny.greedy(tiny.mixed)
        status, answer = server.request("/v1/matquant/bits", {"bits": 9})
        assert status == 400
        assert "a bit-width must be a whole number in 2..8; found 9" in answer
        assert server.request("/v1/matquant/bits", {"bits": 8}, key="wrong")[0] == 401
        assert server.request("/v1/matquant/bits")[1]["bits"] == tiny.mixed

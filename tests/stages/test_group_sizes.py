"""Jobs on models whose input features the group size does not divide: the last group of a row is shorter."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from architectures import make_model, save
from safetensors.torch import load_file
from shared import SMALL

pytestmark = pytest.mark.slow

SIZES = {"hidden_size": 72, "intermediate_size": 200}
SHAPES = {
    "q_proj": (64, 72),
    "k_proj": (32, 72),
    "v_proj": (32, 72),
    "o_proj": (72, 64),
    "gate_proj": (200, 72),
    "up_proj": (200, 72),
    "down_proj": (72, 200),
}
ROUNDED = ("method=rtn", "method.per_bit_models=false")


@pytest.fixture(scope="module")
def odd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_model("llama", torch.float16, vocab_size=2048, max_position_embeddings=256, **SIZES)
    return save(model, tmp_path_factory.mktemp("odd") / "model")


@pytest.fixture
def job(matquant: Any, tmp_path: Path, odd_model: Path) -> Any:
    def run(*overrides: str) -> dict[str, Any]:
        status, _, err = matquant(f"model.path={odd_model}", *SMALL, *overrides)
        assert status == 0, err
        return json.loads((tmp_path / "run" / "results.json").read_text())

    return run


def layer_bytes(name: str, planes: int, group_size: int, zero_points: bool = False) -> int:
    """Bytes of one layer: planes, 16-bit scales and 8-bit zero points of ceil(in / group size) groups in each row."""
    rows, columns = SHAPES[name.rpartition(".")[2]]
    groups = 1 if group_size == -1 else math.ceil(columns / group_size)
    return math.ceil(rows * columns * planes / 8) + rows * groups * (2 + zero_points)


def bytes_read(planes: int, group_size: int, down_proj: int, zero_points: bool = False) -> int:
    """Bytes of both blocks, where ``down_proj`` may have a group size of its own."""
    sizes = {name: down_proj if name == "down_proj" else group_size for name in SHAPES}
    return 2 * sum(layer_bytes(name, planes, size, zero_points) for name, size in sizes.items())


@pytest.mark.parametrize(
    ("overrides", "group_size", "down_proj"),
    [
        ([], 128, 128),
        (["method.group_size=-1"], -1, -1),
        (["method.group_size=64", "method.act_order=true", "method.symmetric=false"], 64, 64),
        (["++method.overrides={*.down_proj:{group_size:32}}", "transform=rotation"], 128, 32),
        (["method.group_size=32", *ROUNDED], 32, 32),
        (["method=matgptq_v1"], 128, 128),
    ],
)
def test_every_group_size_fits_every_layer(job: Any, overrides: list[str], group_size: int, down_proj: int) -> None:
    results = job("bits=[2,8]", *overrides)
    low, high = results["slices"]
    assert low["kl"]["stdlib"] > high["kl"]["stdlib"] >= 0
    zero_points = "method.symmetric=false" in overrides
    more = results["config"]["method"]["slicing"] == "round"  # its slices read one plane more, at most all
    assert low["bytes"] == bytes_read(2 + more, group_size, down_proj, zero_points)
    assert high["bytes"] == bytes_read(8, group_size, down_proj, zero_points)
    assert all(row["error"].get("8", 0) < 0.01 for row in results["layers"])


def test_a_short_last_group_is_searched_packed_and_read(job: Any, tmp_path: Path) -> None:
    from packing import read
    from transformers import AutoTokenizer

    budget = bytes_read(4, 128, 128)
    results = job(
        *ROUNDED,
        "bits=[2,8]",
        "search=sensitivity",
        "search.sequences=4",
        "search.sequence_length=32",
        "search.bits=[2,3,4,8]",
        f"search.budget_gb={budget / 1e9:.9f}",
        "stages=[quantize,pack,generate]",
        "pack=nested",
        "prompt='def f('",
        "max_new_tokens=4",
        "runtime.device=cpu",
    )
    (found,) = (entry for entry in results["slices"] if entry["bits"] == "allocation")
    allocation = yaml.safe_load((tmp_path / "run" / "allocation.yaml").read_text())
    of_layers = [layer_bytes(name, min(bits + 1, 8), 128) for name, bits in allocation["bits"].items()]  # round slices
    assert found["bytes"] == allocation["bytes"] == sum(of_layers) <= budget
    packed = tmp_path / "run" / "packed"
    model, tokenizer = read(packed), AutoTokenizer.from_pretrained(packed)
    prompt = tokenizer("def f(", return_tensors="pt")
    for row in results["generate"]["slices"]:
        model.set_bits(int(row["name"]) if row["name"].isdecimal() else tmp_path / "run" / "allocation.yaml")
        tokens = model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0]
        assert row["text"] == tokenizer.decode(tokens[prompt.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["pack=compressed_tensors"],
            "groups of 128 leave a shorter last group in the 200 input features of model.layers.0",
        ),
        (
            ["pack=compressed_tensors", "method.group_size=32"],
            "in the 72 input features of model.layers.0.self_attn.q_proj",
        ),
        (["pack=matgptq_v1", "method=matgptq_v1"], "Set method.group_size (and method.overrides) to one of -1"),
        (["pack=gptq"], "multiples of 32; model.layers.0.self_attn.q_proj is [64, 72]"),
    ],
)
def test_stock_formats_refuse_a_short_last_group_before_any_work(
    matquant: Any, odd_model: Path, tmp_path: Path, overrides: list[str], sentence: str
) -> None:
    status, _, err = matquant(f"model.path={odd_model}", *SMALL, "bits=4", "stages=[quantize,pack]", *overrides)
    assert status == 2
    assert sentence in err
    assert "Traceback" not in err
    assert not (tmp_path / "store" / "parent").exists()


def test_one_scale_per_row_is_what_stock_formats_take(job: Any, tmp_path: Path) -> None:
    results = job("bits=4", "stages=[quantize,pack]", "pack=compressed_tensors", "method.group_size=-1")
    assert results["pack"]["exact"]
    tensors = load_file(tmp_path / "run" / "packed" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (72, 1)
    config = json.loads((tmp_path / "run" / "packed" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["strategy"] == "channel"

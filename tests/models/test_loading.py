"""Loading of checkpoints from folders and the hub, and the messages for checkpoints that cannot be used."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import make_model, save
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from matquant.errors import UserError
from matquant.models import checkpoint_files, loading
from matquant.models.blocks import BlockModel
from matquant.models.config import ModelConfig, check
from matquant.models.loading import load_model, open_model
from matquant.models.stock_comparison import check_against_stock
from matquant.paths import resource_root

TINY = resource_root() / "experiments" / "models" / "tiny"


def config(**settings: Any) -> ModelConfig:
    return ModelConfig(**{k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in two shards, untied and bfloat16, with the tokenizer of the tiny model."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=2048, max_position_embeddings=64)).bfloat16()
    model.save_pretrained(folder, max_shard_size="150KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit_json(file: Path, change: Callable[[dict], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def shard_with(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / checkpoint_files.INDEX).read_text())["weight_map"][tensor]


def rewrite(folder: Path, tensor: str, change: Callable[[dict], Any]) -> None:
    shard = shard_with(folder, tensor)
    tensors = {name: value.clone() for name, value in load_file(shard).items()}
    change(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


# Accepted checkpoints


def test_the_shipped_model_loads(capfd: pytest.CaptureFixture) -> None:
    found = load_model(config(path=TINY, label="tiny"))
    assert (found.label, found.dtype, found.warnings, found.context_length) == ("tiny", torch.float16, [], 512)
    assert {p.dtype for p in found.model.parameters()} == {torch.float16}
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())
    assert not found.model.config.use_cache
    assert found.tokenizer.eos_token_id == 0
    assert found.compute_dtype("cpu") == torch.float32
    assert found.compute_dtype("cuda") == torch.float16
    assert capfd.readouterr() == ("", "")


def test_shards_keep_their_dtype_and_give_the_same_logits(folder: Path) -> None:
    found = load_model(config(path=folder))
    assert (found.label, found.dtype, found.warnings) == ("model", torch.bfloat16, [])
    ids = torch.arange(8)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(ids).logits
    assert torch.equal(found.model(ids).logits, expected)


def test_a_dtype_of_the_config_is_used(folder: Path) -> None:
    found = load_model(config(path=folder, dtype="float32"))
    assert (found.dtype, found.model.dtype, found.fingerprint["dtype"]) == (torch.float32, torch.float32, "float32")


def test_the_stored_dtype_wins_over_the_checkpoints_config(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(dtype="float32"))
    found = load_model(config(path=folder))
    assert (found.dtype, found.model.dtype) == (torch.bfloat16, torch.bfloat16)
    assert "torch.float32, but the weights are stored as torch.bfloat16" in found.warnings[0]


def test_the_fingerprint_depends_on_the_content_only(folder: Path, original: Path) -> None:
    one, two = load_model(config(path=folder)).fingerprint, load_model(config(path=original)).fingerprint
    assert one == two == json.loads(json.dumps(one))
    rewrite(folder, "lm_head.weight", lambda t: t["lm_head.weight"].add_(1))
    assert load_model(config(path=folder)).fingerprint != one


def test_unused_weights_are_a_warning(folder: Path) -> None:
    rewrite(folder, "lm_head.weight", lambda t: t.update(extra=torch.zeros(2)))
    (warning,) = load_model(config(path=folder)).warnings
    assert "not used by LlamaForCausalLM: extra" in warning


@pytest.mark.parametrize(
    ("rename", "shown"),
    [
        (lambda name: f"module.{name}", "module.lm_head.weight"),
        (lambda name: f"_orig_mod.{name}", "_orig_mod.lm_head.weight"),
        (lambda name: f"_orig_mod.module.{name}", "_orig_mod.module.lm_head.weight"),
        (lambda name: f"module._forward_module.{name}", "module._forward_module.lm_head.weight"),
        (lambda name: name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."), "lm_head.weight"),
        (
            lambda name: "_fsdp_wrapped_module." + name.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
            "_fsdp_wrapped_module.lm_head.weight",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_names_of_wrapped_models_are_mapped_with_a_warning(kind: str, rename: Any, shown: str, tmp_path: Path) -> None:
    folder = save(make_model(kind), tmp_path / "model")
    ids = torch.arange(8)[None]
    expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    tensors = load_file(folder / "model.safetensors")
    save_file({rename(name): t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    found = load_model(config(path=folder))
    (warning,) = found.warnings
    assert f"names that a wrapper of the model made, such as {shown}" in warning
    assert torch.equal(found.model(ids).logits, expected)
    assert check_against_stock(found, BlockModel(found.model))


def test_a_wrapper_s_name_within_a_name_or_beside_others_is_no_wrapper(folder: Path) -> None:
    rewrite(
        folder, "lm_head.weight", lambda t: t.update({"module.extra": torch.zeros(2), "a_orig_mod.b": torch.zeros(2)})
    )
    (warning,) = load_model(config(path=folder)).warnings
    assert "not used by LlamaForCausalLM: a_orig_mod.b, module.extra" in warning


def test_transformers_logging_is_restored(folder: Path) -> None:
    before = loading.transformers_logging.get_verbosity(), loading.transformers_logging.is_progress_bar_enabled()
    load_model(config(path=folder))
    assert before == (
        loading.transformers_logging.get_verbosity(),
        loading.transformers_logging.is_progress_bar_enabled(),
    )


# Refused checkpoints


@pytest.mark.parametrize("settings", [{}, {"name": "some/model", "path": "folder"}])
def test_a_config_needs_a_name_or_a_path(settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"model\.name.*model\.path"):
        check(config(**settings))
    check(config(name="some/model"))


def refuse(message: str, **settings: Any) -> None:
    """Assert that loading raises a UserError with this message."""
    with pytest.raises(UserError, match=message):
        load_model(config(**settings))


def test_a_path_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    refuse("it does not exist", path=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    refuse("it is a file", path=tmp_path / "file")
    refuse("has no config.json", path=tmp_path)


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    refuse("config.json is no valid JSON", path=folder)


def drop_weights(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / checkpoint_files.INDEX):
        file.unlink()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"pickles only .*save_pretrained\(FOLDER\)"),
        ("consolidated.safetensors", "the only names that transformers reads"),
        ("notes.txt", "holds no weights"),
    ],
)
def test_a_checkpoint_without_safetensors_is_refused(folder: Path, name: str, message: str) -> None:
    drop_weights(folder)
    (folder / name).write_bytes(b"")
    refuse(message, path=folder)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "..\\other.safetensors", "a.bin"])
def test_an_index_with_names_outside_of_the_folder_is_refused(folder: Path, name: str) -> None:
    edit_json(folder / checkpoint_files.INDEX, lambda c: c["weight_map"].update({"lm_head.weight": name}))
    refuse("no safetensors file inside the folder", path=folder)


def test_an_empty_index_is_refused(folder: Path) -> None:
    (folder / checkpoint_files.INDEX).write_text("{}")
    refuse("names no weights", path=folder)


def test_a_missing_or_truncated_shard_is_refused(folder: Path) -> None:
    shard = shard_with(folder, "lm_head.weight")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refuse(f"{shard.name} is damaged", path=folder)
    shard.unlink()
    refuse(f"is not complete: .* missing: {shard.name}", path=folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    rewrite(folder, "lm_head.weight", lambda t: t.pop("lm_head.weight"))
    refuse("lacks 1 weights that its architecture needs: lm_head.weight", path=folder)


def test_a_tied_head_need_not_be_stored(folder: Path) -> None:
    rewrite(folder, "lm_head.weight", lambda t: t.pop("lm_head.weight"))
    edit_json(folder / "config.json", lambda c: c.update(tie_word_embeddings=True))
    model = load_model(config(path=folder)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_of_a_wrong_shape_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(intermediate_size=64))
    refuse(r"do not fit its config.json: .*down_proj.weight is \[32, 48\], needs \[32, 64\]", path=folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({name: t.to(torch.int8) for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    refuse("stored as I8", path=folder)


def test_a_checkpoint_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refuse("has no tokenizer", path=folder)
    (folder / "tokenizer.json").write_text("{}")
    refuse("The tokenizer in .* cannot be loaded", path=folder)


def test_a_quantized_checkpoint_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    refuse(r"quantized already \(quant_method gptq\)", path=folder)


@pytest.mark.parametrize("part", [None, "text_config"])
def test_a_quantized_text_model_is_refused_and_null_is_not(part: str | None, tmp_path: Path) -> None:
    folder = save(make_model("gemma3"), tmp_path / "model")

    def declare(content: dict, value: Any) -> None:
        (content if part is None else content[part])["quantization_config"] = value

    edit_json(folder / "config.json", lambda c: declare(c, None))
    assert load_model(config(path=folder)).warnings == []
    edit_json(folder / "config.json", lambda c: declare(c, {"quant_method": "awq"}))
    refuse(r"quantized already \(quant_method awq\)", path=folder)


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    small = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=16)
    BertForMaskedLM(small).save_pretrained(folder)
    refuse("not a causal language model: its architecture is BertForMaskedLM", path=folder)


@pytest.mark.parametrize("kind", ["mllama_text_model", "siglip_text_model"])
def test_a_type_that_transformers_loads_as_no_language_model_is_refused(folder: Path, kind: str) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type=kind))
    refuse(f"does not load the model type '{kind}' of .*, although its architecture is LlamaForCausalLM", path=folder)


def test_an_unknown_model_type_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(model_type="llama99"))
    refuse("does not know the model type 'llama99'", path=folder)
    edit_json(folder / "config.json", lambda c: c.update(auto_map={"AutoModelForCausalLM": "modeling.Model"}))
    refuse("set model.trust_remote_code=true", path=folder)


def test_code_of_a_checkpoint_runs_only_if_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    (folder / "own_code.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    remote = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    edit_json(folder / "config.json", lambda c: c.update(model_type="own", auto_map=remote, architectures=["OwnModel"]))
    refuse("needs Python code.*trust_remote_code=true", path=folder)
    assert not ran.exists()
    found = load_model(config(path=folder, trust_remote_code=True))
    assert type(found.model).__name__ == "OwnModel"
    assert "own_code.py" in found.fingerprint["files"]


# The hub


def hub_error(kind: type, status: int) -> Exception:
    return kind("Client error", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: hub_error(GatedRepoError, 403), "some/model is gated on the hub.*hf auth login.*model.path"),
        (lambda: hub_error(RepositoryNotFoundError, 404), "no model 'some/model'.*model.path"),
        (lambda: hub_error(RevisionNotFoundError, 404), "has no revision 'v1'"),
        (lambda: LocalEntryNotFoundError("offline.\nmore"), "could not be reached: offline. .*model.path"),
        (lambda: RuntimeError("no proxy"), "could not be reached: no proxy"),
    ],
)
def test_errors_of_the_hub_become_messages(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], message: str
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr(checkpoint_files, "snapshot_download", fail)
    refuse(message, name="some/model", revision="v1")


def test_an_invalid_hub_name_is_refused() -> None:
    refuse("no model 'not a name'", name="not a name")


def test_the_hubs_cache_is_read_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache holds snapshots of links to blobs whose names are hashes of their content."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--some--model"
    snapshot = cache / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    (cache / "blobs").mkdir()
    for file in folder.iterdir():
        blob = cache / "blobs" / f"etag-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = load_model(config(name="some/model"))
    assert found.label == "model"
    assert found.fingerprint["commit"] == commit
    assert found.fingerprint["files"]["config.json"] == "etag-config.json"
    refuse("hub could not be reached", name="other/model")


def test_pickles_on_the_hub_are_refused_before_they_are_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop_weights(folder)
    downloaded: list[str] = []

    def snapshot(_: str, allow_patterns: list[str], **__: Any) -> str:
        downloaded.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr(checkpoint_files, "snapshot_download", snapshot)
    monkeypatch.setattr(checkpoint_files, "_hub_files", lambda _: ["config.json", "pytorch_model.bin"])
    refuse("some/model on the hub holds its weights as pickles only", name="some/model")
    assert not any(pattern.endswith(checkpoint_files.PICKLES) for pattern in downloaded)
    for name in (
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.json",
        "LICENSE.txt",
        "tokenizer.json",
    ):
        assert any(fnmatch(name, pattern) for pattern in downloaded), name


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("some/model-1b", "model-1b"),
        ("some/model.v2/", "model.v2"),
        ("hub/models--owner--model-7b/snapshots/0123abcd", "model-7b"),
    ],
)
def test_a_model_is_named_after_its_folder(path: str, label: str, original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / path)
    assert open_model(config(path=f"{tmp_path}/{path}")).label == label
    assert open_model(config(path=tmp_path / path, label="mine")).label == "mine"


def test_a_folder_is_named_although_its_path_is_relative(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(original, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert open_model(config(path=".")).label == "here"

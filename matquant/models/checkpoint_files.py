"""Files of a checkpoint: local folder or download from the hub, checks before any weights are read, and fingerprint."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from matquant import machine
from matquant.errors import UserError, shorten
from matquant.formats.shard_index import INDEX, index_names, read_json
from matquant.models.config import ModelConfig
from matquant.store import fingerprint_files

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files that can hold a tokenizer. One of them is enough; the files of ``TOKENIZER_SETTINGS`` alone are not.
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "vocab.model",
    "tekken.json",
)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
# Patterns of the settings of a multimodal model's processors: preprocessor_config.json, video_preprocessor_config.json ...
PROCESSORS = ("*processor_config.json", "*extractor_config.json", "audio_tokenizer_config.json")
# Patterns of everything beside config and weights that a packed checkpoint keeps.
SMALL_FILES = (
    *TOKENIZERS,
    *TOKENIZER_SETTINGS,
    *PROCESSORS,
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "chat_templates/*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)

_HASHING_THREADS = 8
MAX_NAMES = 5  # names of tensors or files in one message


def local_folder(model: ModelConfig) -> Path:
    """Folder of ``model.path``. Raises UserError if it is no folder with a config.json."""
    folder = Path(str(model.path)).expanduser()
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "it does not exist"
        raise UserError(f"model.path={folder} is not a folder: {found}. Give the folder of a Hugging Face checkpoint.")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"The folder {folder} has no config.json, so it is not a Hugging Face checkpoint. Correct model.path."
        )
    return folder


def hub_snapshot(model: ModelConfig) -> Path:
    """Download the needed files of ``model.name`` into the hub's cache, weights last; return the snapshot's folder.

    Raises:
        UserError: the repository cannot be reached or read, or holds no model that can be loaded.
    """
    small = ["config.json", INDEX, *SMALL_FILES]
    if model.trust_remote_code:
        small.append("*.py")
    folder = _snapshot(model, model.revision, small)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{model.name} on the hub has no config.json, so it is not a Hugging Face checkpoint. Correct model.name."
        )
    read_config(folder, model.trust_remote_code)  # check before gigabytes are downloaded
    names = index_names(folder) if (folder / INDEX).is_file() else [WEIGHTS]
    # Pinned to the commit, so that a push in between cannot mix two versions.
    folder = _snapshot(model, folder.name, [*small, *names])
    if names == [WEIGHTS] and not (folder / WEIGHTS).is_file():
        _refuse_weights(f"{model.name} on the hub", _hub_files(model))
    return folder


def _snapshot(model: ModelConfig, revision: str | None, patterns: Sequence[str]) -> Path:
    name = str(model.name)
    instead = "Or set model.path to a local folder."
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated on the hub. Accept its terms on its page, then log in with `hf auth login`. {instead}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} on the hub has no revision {revision!r}. Correct model.revision.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"The hub has no model {name!r}, or it is private and you are not logged in (`hf auth login`). "
            f"Correct model.name. {instead}"
        ) from error
    except Exception as error:  # not cached, no network, a proxy: the client raises its HTTP library's errors too
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name} is not complete in the hub's cache, and the hub could not be reached: {reason}. "
            f"Try again with a network connection, without HF_HUB_OFFLINE. {instead}"
        ) from error


def _hub_files(model: ModelConfig) -> list[str]:
    """File names of the repository; none on any error, since they only add detail to an error message."""
    try:
        return HfApi().list_repo_files(str(model.name), revision=model.revision)
    except Exception:
        return []


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """Config of a causal language model in its original precision.

    Raises:
        UserError: the model is quantized, of an unknown type, not a causal language model, or needs code that is not
            trusted.
    """
    raw = read_json(folder / "config.json")
    if (quantization := _quantization_config(raw)) is not None:
        method = quantization.get("quant_method", "unknown")
        raise UserError(
            f"The checkpoint in {folder} is quantized already (quant_method {method}). "
            "Give the checkpoint of the model in its original precision."
        )
    kind, remote = raw.get("model_type"), raw.get("auto_map") or {}
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if remote:
            raise UserError(
                f"The model in {folder} needs Python code that comes with its checkpoint. If you trust that code, "
                "set model.trust_remote_code=true."
            )
        raise UserError(
            f"The installed transformers does not know the model type {kind!r} of {folder}. Try a newer version: "
            "pip install --upgrade transformers."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and remote code raise anything
        raise UserError(f"The config.json in {folder} cannot be read by transformers: {error}") from error
    _check_causal(folder, raw, config, "AutoModelForCausalLM" in remote and trust_remote_code)
    return config


def _quantization_config(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """``quantization_config`` of a model or of its text model; None if there is none, or if it is null."""
    parts = [raw, *(raw[name] for name in ("text_config", "llm_config") if isinstance(raw.get(name), dict))]
    return next((one for part in parts if (one := part.get("quantization_config")) is not None), None)


def _check_causal(folder: Path, raw: dict[str, Any], config: Any, remote: bool) -> None:
    """Raise UserError for an architecture that is not a causal language model."""
    known = {
        n
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for n in ([names] if isinstance(names, str) else names)
    }
    architectures = raw.get("architectures") or []
    if remote:
        return
    if architectures and not any(name in known for name in architectures):
        raise _not_causal(folder, ", ".join(architectures))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = raw.get("model_type")
        if not architectures:
            raise _not_causal(folder, kind)
        raise UserError(
            f"AutoModelForCausalLM of the installed transformers does not load the model type {kind!r} of {folder}, although "
            f"its architecture is {', '.join(architectures)}. Try a newer version: pip install --upgrade transformers."
        )


def _not_causal(folder: Path, architecture: Any) -> UserError:
    return UserError(
        f"The model in {folder} is not a causal language model: its architecture is {architecture}. "
        "Give a model that predicts the next token, such as LlamaForCausalLM."
    )


def weight_files(folder: Path) -> list[str]:
    """Names of the model's safetensors files. Raises UserError if one is missing."""
    if (folder / INDEX).is_file():
        names = index_names(folder)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"The checkpoint in {folder} is not complete: of {len(names)} weight files in {INDEX}, "
                f"{len(missing)} are missing: {shorten(missing, MAX_NAMES)}. Copy or download it again."
            )
        return names
    if not (folder / WEIGHTS).is_file():
        _refuse_weights(str(folder), sorted(file.name for file in folder.iterdir()))
    return [WEIGHTS]


def _refuse_weights(where: str, files: Sequence[str]) -> NoReturn:
    """Raise UserError for a checkpoint without safetensors."""
    if any(file.endswith(".safetensors") for file in files):
        raise UserError(
            f"{where} has neither {WEIGHTS} nor {INDEX}, the only names that transformers reads. Rename the files."
        )
    if any(file.endswith(PICKLES) for file in files):
        raise UserError(
            f"{where} holds its weights as pickles only (*.bin, *.pt), and opening a pickle can run code. If you "
            "trust them, convert them: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER), then the "
            "tokenizer in the same way with AutoTokenizer, and set model.path=FOLDER."
        )
    raise UserError(f"{where} holds no weights: it has neither {WEIGHTS} nor {INDEX}. Copy or download it again.")


def fingerprint(model: ModelConfig, folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """JSON-able identity of a checkpoint: SHA-256 of config, weights, tokenizer and trusted code."""
    names = ["config.json", *files, *(n for n in (*TOKENIZERS, *TOKENIZER_SETTINGS) if (folder / n).is_file())]
    if model.trust_remote_code:
        names += sorted(file.name for file in folder.glob("*.py"))
    hub = model.path is None

    def hash_of(name: str) -> str:
        # A link in the hub's cache points to a blob whose name is its hash: gigabytes need not be hashed again.
        path = folder / name
        return path.resolve().name if hub and path.is_symlink() else fingerprint_files(folder, [name])[name]

    with ThreadPoolExecutor(min(_HASHING_THREADS, machine.cores())) as pool:
        hashes = dict(zip(sorted(names), pool.map(hash_of, sorted(names)), strict=True))
    source = {"source": "hub", "name": model.name, "commit": folder.name} if hub else {"source": "folder"}
    return source | {"files": hashes}

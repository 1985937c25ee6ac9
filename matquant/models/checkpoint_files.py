"""The files of a checkpoint: found in a folder or fetched from the hub, looked at before any is opened, and fingerprinted."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from matquant import machine
from matquant.config import ModelConfig
from matquant.errors import UserError
from matquant.formats.shard_index import INDEX, index_names, read_json

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files that can hold a tokenizer; one of them is enough. The settings alone are not.
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

_READERS = 8  # files that are hashed side by side
_NAMED = 5  # names of tensors or files in one sentence


def local_folder(model: ModelConfig) -> Path:
    folder = Path(str(model.path)).expanduser()
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "it does not exist"
        raise UserError(f"model.path={folder} is no folder: {found}. Give the folder of a Hugging Face checkpoint.")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"The folder {folder} has no config.json, so it is no Hugging Face checkpoint. Is it the right one?"
        )
    return folder


def from_hub(model: ModelConfig) -> Path:
    """The snapshot in the hub's cache; only files that are needed are fetched, and weights after everything else."""
    small = ["config.json", "generation_config.json", INDEX, *TOKENIZERS, *TOKENIZER_SETTINGS, "chat_template.jinja"]
    if model.trust_remote_code:
        small.append("*.py")
    folder = _snapshot(model, model.revision, small)
    if not (folder / "config.json").is_file():
        raise UserError(f"{model.name} on the hub has no config.json, so it is no checkpoint of Transformers.")
    read_config(folder, model.trust_remote_code)  # refuse before gigabytes are fetched
    names = index_names(folder) if (folder / INDEX).is_file() else [WEIGHTS]
    # By commit, so that a push in between cannot mix two versions.
    folder = _snapshot(model, folder.name, [*small, *names])
    if names == [WEIGHTS] and not (folder / WEIGHTS).is_file():
        _refuse_weights(f"{model.name} on the hub", _hub_files(model))
    return folder


def _snapshot(model: ModelConfig, revision: str | None, patterns: Sequence[str]) -> Path:
    name = str(model.name)
    instead = "Or give a local folder with model.path."
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated on the hub. Accept its terms on its page there, then log in with `hf auth login`. "
            f"{instead}"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} on the hub has no revision {revision!r}. Correct model.revision.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"There is no model {name!r} on the hub, or it is private and you are not logged in (`hf auth login`). "
            f"Correct model.name. {instead}"
        ) from error
    except Exception as error:  # not cached, no network, a proxy: the client raises its HTTP library's errors too
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{name} is not (or not completely) in the hub's cache, and the hub could not be reached: {reason}. "
            f"Try again with a network, without HF_HUB_OFFLINE. {instead}"
        ) from error


def _hub_files(model: ModelConfig) -> list[str]:
    try:
        return HfApi().list_repo_files(str(model.name), revision=model.revision)
    except Exception:  # only to say more in a sentence that is raised anyway
        return []


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    raw = read_json(folder / "config.json")
    if "quantization_config" in raw:
        method = (raw["quantization_config"] or {}).get("quant_method", "unknown")
        raise UserError(
            f"The checkpoint in {folder} is quantized already (quant_method {method}). "
            "Give the model in its original precision."
        )
    kind, remote = raw.get("model_type"), raw.get("auto_map") or {}
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if remote:
            raise UserError(
                f"The model in {folder} needs code of its own, that this program would run. If you trust it, "
                "set model.trust_remote_code=true."
            )
        raise UserError(
            f"The installed transformers does not know the model type {kind!r} of {folder}. A newer one may: "
            "pip install --upgrade transformers."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and remote code raise anything
        raise UserError(f"The config.json in {folder} cannot be read by transformers: {error}") from error
    _check_causal(folder, raw, config, "AutoModelForCausalLM" in remote and trust_remote_code)
    return config


def _check_causal(folder: Path, raw: dict[str, Any], config: Any, remote: bool) -> None:
    known = {
        n
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for n in ([names] if isinstance(names, str) else names)
    }
    architectures = raw.get("architectures") or []
    fits = not architectures or any(name in known for name in architectures)
    if not remote and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not fits):
        found = ", ".join(architectures) or raw.get("model_type")
        raise UserError(
            f"The model in {folder} is no causal language model: its architecture is {found}. "
            "Give one that predicts the next token, such as LlamaForCausalLM."
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors that the model is made of, all of which exist."""
    if (folder / INDEX).is_file():
        names = index_names(folder)
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise UserError(
                f"The checkpoint in {folder} is not complete: of {len(names)} weight files that {INDEX} names, these "
                f"are missing: {some(missing)}. Copy or download it again."
            )
        return names
    if not (folder / WEIGHTS).is_file():
        _refuse_weights(str(folder), sorted(file.name for file in folder.iterdir()))
    return [WEIGHTS]


def _refuse_weights(where: str, files: Sequence[str]) -> NoReturn:
    if any(file.endswith(".safetensors") for file in files):
        raise UserError(f"{where} has neither {WEIGHTS} nor {INDEX}; transformers finds weights under no other name.")
    if any(file.endswith(PICKLES) for file in files):
        raise UserError(
            f"{where} holds its weights as pickles only (*.bin, *.pt), which can run code when they are opened. If you "
            "trust them, convert them: AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(FOLDER), then the "
            "tokenizer the same way with AutoTokenizer, and give model.path=FOLDER."
        )
    raise UserError(f"{where} holds no weights: there is neither {WEIGHTS} nor {INDEX}.")


def fingerprint(model: ModelConfig, folder: Path, files: Sequence[str]) -> dict[str, Any]:
    names = ["config.json", *files, *(n for n in (*TOKENIZERS, *TOKENIZER_SETTINGS) if (folder / n).is_file())]
    if model.trust_remote_code:
        names += sorted(file.name for file in folder.glob("*.py"))
    paths = [folder / name for name in sorted(names)]
    hub = model.path is None

    def content(path: Path) -> str:
        # The hub's cache names a blob by its content already (where it can link): gigabytes need not be hashed again.
        return path.resolve().name if hub and path.is_symlink() else _sha256(path)

    with ThreadPoolExecutor(min(_READERS, machine.cores())) as pool:
        contents = dict(zip(sorted(names), pool.map(content, paths), strict=True))
    source = {"source": "hub", "name": model.name, "commit": folder.name} if hub else {"source": "folder"}
    return source | {"files": contents}


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"The file {file} cannot be read: {error.strerror or error}.") from error


def some(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")

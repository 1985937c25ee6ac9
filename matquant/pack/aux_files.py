"""Files beside the weights: the config, and unchanged copies of the small files of the original checkpoint."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matquant.formats.parent import TRANSFORM_KEY
from matquant.models.checkpoint_files import SMALL_FILES
from matquant.pack.pack_input import PackInput
from matquant.store.files import translate_os_errors
from matquant.store.json_files import pretty_json

_CODE = "*.py"


def copy(original: Path, folder: Path) -> None:
    """Copy the small files of a checkpoint: tokenizer, processors, generation config, chat templates and licences.

    Code is copied if the config of the model, its tokenizer or a processor names some.

    Raises:
        UserError: a file cannot be read, or the disk is full.
    """
    files = [file for pattern in SMALL_FILES for file in original.glob(pattern) if file.is_file()]
    if any(_names_code(file) for file in (original / "config.json", *files)):
        files += original.glob(_CODE)
    for file in files:
        place = folder / file.relative_to(original)
        with translate_os_errors(file):
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)


def _names_code(file: Path) -> bool:
    """Return True if a JSON file has an entry ``auto_map``, which names Python code beside it."""
    if not file.name.endswith("config.json"):
        return False
    with translate_os_errors(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    return isinstance(content, dict) and bool(content.get("auto_map"))


def write_config(
    source: PackInput, folder: Path, quantization_config: Mapping[str, Any], entries: Mapping[str, Any]
) -> None:
    """Write ``config.json``: the original's with ``quantization_config``, these entries, and the dtype that is stored.

    A head that was tied to the embeddings and is quantized now is no longer tied.
    """
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config |= {"dtype": str(source.loaded.dtype).removeprefix("torch."), **entries}
    if source.untied_head:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    if source.parent.transform is not None:
        config[TRANSFORM_KEY] = source.parent.transform
    config["quantization_config"] = dict(quantization_config)
    with translate_os_errors(folder / "config.json"):
        (folder / "config.json").write_bytes(pretty_json(config))

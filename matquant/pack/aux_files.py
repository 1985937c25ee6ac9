"""Files beside the weights: the config, and unchanged copies of the small files of the original checkpoint."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matquant.formats.parent import TRANSFORM_KEY
from matquant.models.checkpoint_files import TOKENIZER_SETTINGS, TOKENIZERS
from matquant.pack.pack_input import PackInput
from matquant.store.files import translate_os_errors
from matquant.store.json_files import pretty_json

_COPIED = (*TOKENIZERS, *TOKENIZER_SETTINGS, "generation_config.json", "chat_template.jinja", "chat_template.json")
_PATTERNS = ("LICENSE*", "NOTICE*", "USE_POLICY*", "chat_templates/*.jinja", "additional_chat_templates/*.jinja")


def copy(original: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, chat templates and licences; and code, where the model's config names some.

    Raises:
        UserError: a file cannot be read, or the disk is full.
    """
    raw = json.loads((original / "config.json").read_text(encoding="utf-8"))
    patterns = (*_PATTERNS, "*.py") if raw.get("auto_map") else _PATTERNS
    files = [original / name for name in _COPIED] + [f for pattern in patterns for f in original.glob(pattern)]
    for file in files:
        if file.is_file():
            place = folder / file.relative_to(original)
            with translate_os_errors(file):
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place)


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

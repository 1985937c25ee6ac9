"""Small files beside the weights of a packed checkpoint."""

import json
from pathlib import Path

import pytest
from architectures import make_model, save
from packing import Opened

from matquant.pack import aux_files

KEPT = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "feature_extractor_config.json",
    "chat_template.json",
    "chat_templates/tools.jinja",
    "LICENSE.txt",
)
LEFT = ("optimizer.pt", "trainer_state.json", "README.md", "model-00001-of-00002.safetensors", "image.png", "code.py")


def original(folder: Path) -> Path:
    for name in (*KEPT, *LEFT, "config.json"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("{}")
    return folder


def test_processors_templates_and_licences_are_copied_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    aux_files.copy(original(tmp_path / "model"), tmp_path / "packed")
    copied = {str(file.relative_to(tmp_path / "packed")) for file in (tmp_path / "packed").rglob("*") if file.is_file()}
    assert copied == set(KEPT)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_is_copied_where_some_config_names_it(name: str, tmp_path: Path) -> None:
    folder = original(tmp_path / "model")
    (folder / name).write_text(json.dumps({"auto_map": {"AutoProcessor": "code.Processor"}}))
    (tmp_path / "packed").mkdir()
    aux_files.copy(folder, tmp_path / "packed")
    assert (tmp_path / "packed" / "code.py").is_file()


def test_the_processor_of_a_packed_multimodal_model_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

    folder = save(make_model("gemma3"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name in ("image_token", "boi_token", "eoi_token"):
        setattr(tokenizer, name, "<img>")
        setattr(tokenizer, f"{name}_id", 5)
    Gemma3Processor(Gemma3ImageProcessor(), tokenizer, image_seq_length=4).save_pretrained(folder)
    packed = Opened(folder, tmp_path / "store").pack(tmp_path / "packed")
    names = {file.name for file in folder.glob("*processor*.json")}
    assert names
    assert names == {file.name for file in packed.glob("*processor*.json")}
    assert (
        Gemma3ImageProcessor.from_pretrained(packed).to_dict() == Gemma3ImageProcessor.from_pretrained(folder).to_dict()
    )

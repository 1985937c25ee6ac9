"""Small tokenizer in the form that sentencepiece vocabularies have in the package tokenizers."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def sentencepiece_like(folder: Path, prefix: bool) -> Any:
    """Tokenizer with byte fallback, trained on a few words."""
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[Any] = [normalizers.Replace(" ", mark)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(mark), *steps] if prefix else steps)
    backend.decoder = decoders.Sequence([decoders.Replace(mark, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special[:3], initial_alphabet=[mark])
    backend.train_from_iterator(["the cat sat on the mat and the hat"] * 3, trainer)
    vocabulary = json.loads(backend.to_str())
    words = [word for word in vocabulary["model"]["vocab"] if word not in special]
    vocabulary["model"]["vocab"] = {word: index for index, word in enumerate(special + words)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.add_tokens([f"{mark}{mark}"])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)

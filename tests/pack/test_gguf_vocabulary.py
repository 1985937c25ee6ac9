"""Vocabularies in GGUF files: pre-tokenizers that llama.cpp has, and scores that give the merges of the tokenizer."""

import itertools
import json
from pathlib import Path

import gguf
import pytest
import torch
from architectures import make_model, save
from packing import Opened
from sentencepiece_like import sentencepiece_like

from matquant.errors import UserError
from matquant.pack.gguf.vocabulary import pre_tokenizer_name, vocabulary_of

CONTRACTIONS, PUNCTUATION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("pattern", "whole_words", "name"),
    [
        (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + PUNCTUATION + SPACES, True, "llama-bpe"),
        (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + PUNCTUATION + SPACES, False, "smaug-bpe"),
        (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + PUNCTUATION + SPACES, False, "qwen2"),
        (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", False, "gpt-2"),
        (r"\p{L}+|\P{L}", False, None),
    ],
)
def test_name_of_a_pre_tokenizer(pattern: str, whole_words: bool, name: str | None) -> None:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    split = Split(Regex(pattern), behavior="isolated")
    found = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    assert pre_tokenizer_name(found, whole_words) == name


def test_an_unknown_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    model = save(make_model("llama", torch.float16, vocab_size=2048), tmp_path / "model")
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, content["pre_tokenizer"]]}
    file.write_text(json.dumps(content))
    opened = Opened(model, tmp_path / "store", zero_point_offset=8.0)
    with pytest.raises(UserError, match=r"knows the pre-tokenizers gpt-2, .* cuts text in another way"):
        opened.pack(tmp_path / "out", 4, name="gguf")


@pytest.mark.parametrize("prefix", [True, False])
def test_vocabulary_with_byte_fallback(tmp_path: Path, prefix: bool) -> None:
    tokenizer = sentencepiece_like(tmp_path, prefix)
    config = make_model("llama", vocab_size=512).config
    entries = vocabulary_of(tmp_path, tokenizer, config).entries
    words = tokenizer.get_vocab()
    tokens, types = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"]
    scores = entries["tokenizer.ggml.scores"]
    assert len(tokens) == len(types) == len(scores) == 512
    assert (tokens[words["<s>"]], types[words["<s>"]]) == ("<s>", gguf.TokenType.CONTROL)
    assert types[words["<unk>"]] == gguf.TokenType.UNKNOWN
    assert types[words["<0x0A>"]] == gguf.TokenType.BYTE
    assert (tokens[len(words) - 1], types[len(words) - 1]) == ("  ", gguf.TokenType.USER_DEFINED)
    assert (tokens[-1], types[-1]) == ("[PAD511]", gguf.TokenType.UNUSED)
    assert entries["tokenizer.ggml.add_space_prefix"] == prefix
    assert entries["tokenizer.chat_template"] == "{{ messages }}"
    text = "the cat sat on that hat"
    normalized = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert by_scores(normalized, tokens, scores) == tokenizer.tokenize(text)


def by_scores(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """Pieces of llama.cpp's rule: merge the neighbours whose union has the highest score, the first at equal scores."""
    known = dict(zip(tokens, scores, strict=True))
    pieces = list(text)
    while True:
        pairs = [(known[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in known]
        if not pairs:
            return pieces
        first = -max(pairs)[1]
        pieces[first : first + 2] = ["".join(pieces[first : first + 2])]

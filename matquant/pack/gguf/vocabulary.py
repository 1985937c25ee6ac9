"""Vocabulary of a GGUF file: from the GGUF file that the model came from, else from the tokenizer of Transformers.

The names of pre-tokenizers, and the pieces that they cut, are those of llama.cpp (``src/llama-vocab.cpp``). A tokenizer gets
the name whose pieces of a text with all kinds of characters equal its own.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

from matquant.errors import UserError
from matquant.models.gguf import VOCABULARY_FILE, gguf_package

_PREFIX = "tokenizer."
_WORD = "\N{LOWER ONE EIGHTH BLOCK}"  # space in a sentencepiece vocabulary
_BYTE = {f"<0x{byte:02X}>" for byte in range(256)}
_WORST = -1e6  # score of a token that no merge makes

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}" + _REST_WITH_SLASH
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}" + _REST_WITH_SLASH
)


def _split(pattern: str) -> PreTokenizer:
    bytes_only = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(pattern), behavior="isolated"), bytes_only])


# Name, whether whole words of the vocabulary are tokens without merges, and the pre-tokenizer.
_PRE_TOKENIZERS: tuple[tuple[str, bool, PreTokenizer], ...] = (
    ("gpt-2", False, ByteLevel(add_prefix_space=False)),
    ("smollm", False, Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])),
    ("qwen2", False, _split(_QWEN2)),
    ("llama-bpe", True, _split(_LLAMA3)),
    ("smaug-bpe", False, _split(_LLAMA3)),
    ("tekken", True, _split(_TEKKEN)),
    ("gpt-4o", False, _split(_GPT4O)),
)
_PROBE = (
    "I'm, we'LL and THEY'Ve 3 33 3333 x1y2z 12,345.678!\n\n  \n\tdef f(a_b):\r\n    return {a/b: 'c'}  // done...\n"
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve CamelCaseWords ABCdef "
    "\N{CYRILLIC SMALL LETTER DE}\N{CYRILLIC SMALL LETTER A} "
    "\N{CJK UNIFIED IDEOGRAPH-4E2D}\N{CJK UNIFIED IDEOGRAPH-6587}\N{ARABIC-INDIC DIGIT FOUR}2 "
    "e\N{COMBINING ACUTE ACCENT}t \N{GRINNING FACE}\N{GRINNING FACE} \N{VULGAR FRACTION ONE HALF}   end "
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """Metadata on the vocabulary by key: value, and for arrays its elements' type.

    Attributes:
        entries: str, bool, int, or list of str, int or float.
    """

    entries: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.entries["tokenizer.ggml.tokens"])

    def write(self, writer: Any) -> None:
        """Add all entries to a ``GGUFWriter``."""
        import gguf

        kinds = {bool: gguf.GGUFValueType.BOOL, str: gguf.GGUFValueType.STRING}
        elements = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.INT32, float: gguf.GGUFValueType.FLOAT32}
        for key, value in self.entries.items():
            if isinstance(value, list):
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, elements[type(value[0])])
            else:
                writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.UINT32))


def vocabulary_of(folder: Path, tokenizer: Any, config: Any) -> Vocabulary:
    """Vocabulary of a model.

    Args:
        folder: checkpoint; one that was made from a GGUF file holds its vocabulary.
        tokenizer: of Transformers.
        config: of the model. The vocabulary has as many tokens as its embeddings have rows.

    Raises:
        UserError: GGUF has no form for the tokenizer.
    """
    if (folder / VOCABULARY_FILE).is_file():
        return Vocabulary(entries=_stored(folder / VOCABULARY_FILE))
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"pack=gguf writes tokenizers of byte pairs (BPE); {type(tokenizer).__name__} of {folder} is "
            f"{model.get('type', 'not one of the package tokenizers')}. pack=nested holds every model."
        )
    tokens, types = _tokens(tokenizer, config.vocab_size, sentencepiece=bool(model.get("byte_fallback")))
    entries: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        pieces = backend.encode("x", add_special_tokens=False).tokens
        entries |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": _scores(tokens, merges),
            "tokenizer.ggml.add_space_prefix": pieces[0].startswith(_WORD),
        }
    else:
        name = pre_tokenizer_name(backend.pre_tokenizer, whole_words=bool(model.get("ignore_merges")))
        if name is None:
            raise UserError(
                f"pack=gguf knows the pre-tokenizers {', '.join(known for known, _, _ in _PRE_TOKENIZERS)} of llama.cpp; the "
                f"tokenizer of {folder} cuts text in another way. Give the model as a GGUF file (model.path=FILE.gguf), "
                "which names its own, or use pack=nested."
            )
        entries |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        }
    return Vocabulary(entries=entries | _special_tokens(tokenizer, config) | _chat_template(tokenizer))


def pre_tokenizer_name(pre_tokenizer: Any, whole_words: bool) -> str | None:
    """Name in llama.cpp of a byte-level pre-tokenizer; None if none cuts a probe text into the same pieces.

    Args:
        whole_words: True if a word that is in the vocabulary is a token without merges (``ignore_merges``).
    """
    if pre_tokenizer is None:
        return None
    pieces = pre_tokenizer.pre_tokenize_str(_PROBE)
    for name, whole, candidate in _PRE_TOKENIZERS:
        if whole == whole_words and candidate.pre_tokenize_str(_PROBE) == pieces:
            return name
    return None


def _stored(file: Path) -> dict[str, Any]:
    """Entries of a GGUF file on the vocabulary."""
    package = gguf_package(f"{file}")
    fields = package.GGUFReader(file).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith(_PREFIX)}


def _tokens(tokenizer: Any, rows: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Tokens and their types, one for each row of the embeddings; rows without a token have a placeholder."""
    from gguf import TokenType

    vocabulary = {index: token for token, index in tokenizer.get_vocab().items() if index < rows}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(rows):
        token, kind = vocabulary.get(index, f"[PAD{index}]"), TokenType.NORMAL
        if index not in vocabulary:
            kind = TokenType.UNUSED
        elif sentencepiece and token == tokenizer.unk_token:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
            token = token.replace(_WORD, " ") if sentencepiece and not added[index].special else token
        elif sentencepiece and token in _BYTE:
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Score of each token: the earlier a merge makes it, the higher. llama.cpp merges the pair of the highest score first."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks[token]) if token in ranks else (0.0 if len(token) == 1 else _WORST) for token in tokens]


def _special_tokens(tokenizer: Any, config: Any) -> dict[str, Any]:
    """Ids of the special tokens, and whether the tokenizer adds them to a text."""
    found: dict[str, Any] = {}
    for key, name in {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep"}.items():
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is None:
            index = getattr(config, f"{name}_token_id", None)
        if isinstance(index, list):  # several ends of a text; llama.cpp finds the others by name
            index = index[0]
        if index is not None and 0 <= index < config.vocab_size:
            found[f"tokenizer.ggml.{key}_token_id"] = int(index)
    ids = tokenizer("x")["input_ids"]
    found["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    found["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    return found


def _chat_template(tokenizer: Any) -> dict[str, Any]:
    """Chat templates: the one without a name, and others by their names."""
    template = getattr(tokenizer, "chat_template", None)
    named = template if isinstance(template, Mapping) else {"default": template}
    found = {f"tokenizer.chat_template.{name}": text for name, text in named.items() if text and name != "default"}
    if named.get("default"):
        found["tokenizer.chat_template"] = named["default"]
    if len(named) > 1:
        found["tokenizer.chat_templates"] = [name for name in named if name != "default"]
    return found

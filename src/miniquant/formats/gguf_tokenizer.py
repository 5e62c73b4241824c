"""A tokenizer in a GGUF file: what tokenizer.json says, in llama.cpp's words.

- "gpt2": byte pairs on bytes. llama.cpp splits texts by a rule of its own that goes by a name (``pre``); the rules
  known here are told by the pre-tokenizer of tokenizer.json, and any other has to be named by the caller.
- "llama": byte pairs on characters with bytes for those that the vocabulary has not (SentencePiece). llama.cpp merges
  the pair of highest score first: a token's score is minus the place of the merge that makes it.
- "bert": WordPiece. A token that begins a word is marked, not one that goes on.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "gguf"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
WORD_START = "\u2581"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_REST}": "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer, but for special tokens and the chat template.

    Attributes:
        model: "gpt2", "llama" or "bert".
        pre: the name of llama.cpp's rule for splitting texts.
        tokens: by number.
        types: of the tokens.
        scores: of the tokens; None where the model has none.
        merges: whether the file has the merges.
        add_space_prefix: whether a space is put before a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: bool = False
    add_space_prefix: bool = False


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that has an object.

    Raises:
        ValueError: where it has not; the message names the file.
        OSError: where it cannot be read.
    """
    values = _read(path)
    if not isinstance(values, dict):
        raise ValueError(f"{NAME}: expected {path} to have an object, but got {type(values).__name__}")  # noqa: TRY004
    return values


def read_list(path: Path) -> list[Any]:
    """A JSON file that has a list; otherwise as :func:`read_json`."""
    values = _read(path)
    if not isinstance(values, list):
        raise ValueError(f"{NAME}: expected {path} to have a list, but got {type(values).__name__}")  # noqa: TRY004
    return values


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{NAME}: expected {path} to be a JSON file, but got: {error}") from None


def read_vocabulary(folder: Path, size: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a model folder.

    Args:
        folder: with tokenizer.json.
        size: rows of the model's embedding; tokens that the tokenizer lacks are filled in as unused.
        pre: the name of llama.cpp's rule, for a tokenizer of bytes whose rule is not known here.

    Raises:
        ValueError: for a damaged file, a tokenizer of another kind, or one with more tokens than the model.
        OSError: where tokenizer.json cannot be read.
    """
    path = folder / "tokenizer.json"
    values = read_json(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{NAME}: expected model of {path} to be an object, but got {model!r}")  # noqa: TRY004
    vocabulary, kind = model.get("vocab"), model.get("type")
    kind = "BPE" if kind is None and "merges" in model else kind
    if kind not in ("BPE", "WordPiece"):
        raise ValueError(f"{NAME}: expected type of the model of {path} to be 'BPE' or 'WordPiece', but got {kind!r}")
    added = values.get("added_tokens") or []
    tokens, types = _numbered(path, vocabulary, added, size)
    if kind == "WordPiece":
        return _word_piece(path, values, tokens, types)
    if model.get("byte_fallback"):
        return _sentence_piece(path, values, model, tokens, types)
    splitter = _split_name(values.get("pre_tokenizer"))
    if pre is None and splitter is None:
        raise ValueError(
            f"{NAME}: expected pre_tokenizer of {path} to be one that llama.cpp is known to have (those of "
            f"{', '.join(['gpt-2', 'smollm', *SPLITS.values()])}), or pre to name its rule, but got "
            f"{json.dumps(values.get('pre_tokenizer'))}"
        )
    prefix = any(part.get("add_prefix_space") is True for part in _parts(values.get("pre_tokenizer")))
    return Vocabulary("gpt2", pre or splitter or "", tokens, types, merges=True, add_space_prefix=prefix)


def _numbered(path: Path, vocabulary: object, added: object, size: int) -> tuple[list[str], list[int]]:
    """Tokens by number with their types, filled up to a size."""
    pairs: dict[int, tuple[str, int]] = {}
    if not isinstance(vocabulary, Mapping) or not isinstance(added, list):
        raise ValueError(  # noqa: TRY004  (a damaged file)
            f"{NAME}: expected vocab and added_tokens of {path} to be an object and a list, but got others"
        )
    entries: list[tuple[Any, Any, int]] = [(token, number, NORMAL) for token, number in vocabulary.items()]
    for token in added:
        if not isinstance(token, Mapping):
            raise ValueError(f"{NAME}: expected added_tokens of {path} to be objects, but got {token!r}")  # noqa: TRY004
        entries.append((token.get("content"), token.get("id"), CONTROL if token.get("special") else USER_DEFINED))
    for token, number, kind in entries:
        if not isinstance(token, str) or not isinstance(number, int) or not 0 <= number < size:
            raise ValueError(
                f"{NAME}: expected tokens of {path} to be texts with numbers below {size}, the rows of the model's "
                f"embedding, but got {token!r} with {number!r}"
            )
        pairs[number] = (token, kind)
    filled = [pairs.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _parts(step: object) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of some."""
    if not isinstance(step, Mapping):
        return []
    for key in ("pretokenizers", "normalizers"):
        if isinstance(step.get(key), list):
            return [part for inner in step[key] for part in _parts(inner)]
    return [step]


def _split_name(pre_tokenizer: object) -> str | None:
    """The name of llama.cpp's rule that splits texts as a pre-tokenizer does; None for one that is not known."""
    parts = _parts(pre_tokenizer)
    if not parts or parts[-1].get("type") != "ByteLevel":
        return None
    own_rule = parts[-1].get("use_regex", True)
    kinds = [part.get("type") for part in parts[:-1]]
    if own_rule and not kinds:
        return "gpt-2"
    if own_rule and kinds == ["Digits"] and parts[0].get("individual_digits"):
        return "smollm"
    if not own_rule and kinds == ["Split"]:
        pattern = parts[0].get("pattern")
        isolated = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
        expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        return SPLITS.get(expression) if isolated and isinstance(expression, str) else None
    return None


def _sentence_piece(
    path: Path, values: Mapping[str, Any], model: Mapping[str, Any], tokens: list[str], types: list[int]
) -> Vocabulary:
    """Byte pairs on characters."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ValueError(f"{NAME}: expected merges of {path} to be a list, but got {type(merges).__name__}")  # noqa: TRY004
    places: dict[str, int] = {}
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{NAME}: expected merges of {path} to be pairs of texts, but got {merge!r}")
        places.setdefault("".join(parts), len(places))
    scores = []
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == NORMAL and _is_byte(token):
            types[number] = BYTE
        elif token == model.get("unk_token"):
            types[number] = UNKNOWN
        elif kind == USER_DEFINED:
            tokens[number] = token.replace(WORD_START, " ")
        plain = types[number] == NORMAL
        scores.append(-float(places.get(token, len(places) + number)) if plain else 0.0)
    steps = [*_parts(values.get("normalizer")), *_parts(values.get("pre_tokenizer"))]
    prefix = any(
        step.get("type") == "Prepend"
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in steps
    )
    return Vocabulary("llama", "default", tokens, types, scores, add_space_prefix=prefix)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _word_piece(path: Path, values: Mapping[str, Any], tokens: list[str], types: list[int]) -> Vocabulary:
    """Whole words and what goes on in them; llama.cpp puts texts in lower case without accents."""
    model = values["model"]
    prefix = model.get("continuing_subword_prefix", "##")
    normalizer = values.get("normalizer")
    if not isinstance(normalizer, Mapping) or normalizer.get("lowercase") is not True:
        raise ValueError(
            f"{NAME}: expected the normalizer of {path} to put texts in lower case, as llama.cpp does for this kind, "
            f"but got {json.dumps(normalizer)}"
        )
    if not isinstance(prefix, str) or not prefix:
        raise ValueError(f"{NAME}: expected continuing_subword_prefix of {path} to be a text, but got {prefix!r}")
    for number, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == NORMAL:
            tokens[number] = token.removeprefix(prefix) if token.startswith(prefix) else WORD_START + token
    return Vocabulary("bert", "default", tokens, types)

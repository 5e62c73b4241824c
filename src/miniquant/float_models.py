"""Tokenizers and GGUF files as transformers loads them, with errors that say what is wrong; and what a model takes.

Nothing is fetched, no pickle is read, and no code of the folder runs unless that is asked for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miniquant.architecture import transformers_package
from miniquant.checkpoint import CONFIG
from miniquant.errors import foreign
from miniquant.formats.gguf_file import GGUF_FILE
from miniquant.formats.gguf_reader import read_gguf


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder without config.json; None of any other path."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return path
    inside = path / GGUF_FILE
    return inside if inside.is_file() and not (path / CONFIG).is_file() else None


def load_gguf(path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """The model of a GGUF file as floating-point numbers, in evaluation mode.

    Args:
        path: of the file.
        dtype: of the weights; None is float32.
        device: where to.

    Raises:
        OSError, ValueError: where that is no model, or one that transformers does not load whole.
        ImportError: without transformers.
    """
    transformers = transformers_package()
    read_gguf(path)  # says what is wrong with the file
    with quiet(transformers), _saying(f"load_gguf: {path}: expected a model that transformers loads"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, local_files_only=True, dtype=dtype or torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    for key, what in (("missing_keys", "to have"), ("mismatched_keys", "to have the shapes of its metadata for")):
        if names := sorted(map(str, info.get(key) or ())):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"load_gguf: {path}: expected a file {what} {', '.join(names[:3])}{more}, but got others")
    moved: nn.Module = model.to(device).eval()
    return moved


def load_tokenizer(paths: Sequence[Path], *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the first of several models that has one.

    Raises:
        ValueError: where none has; the message says why of the first.
        ImportError: without transformers.
    """
    first: Exception | None = None
    for path in paths:
        try:
            return _tokenizer(path, trust_remote_code=trust_remote_code)
        except ValueError as error:  # noqa: PERF203  (of two at most)
            first = first or error
    assert first is not None  # noqa: S101
    raise first


def _tokenizer(path: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder or a GGUF file."""
    transformers = transformers_package()
    gguf = gguf_of(path)
    if gguf is not None:
        read_gguf(gguf)
    elif not path.is_dir():
        raise FileNotFoundError(f"expected a model's folder or a GGUF file, but got {str(path)!r}, which is neither")
    folder, more = (path, {}) if gguf is None else (gguf.parent, {"gguf_file": gguf.name})
    with quiet(transformers), _saying(f"load_tokenizer: {path}: expected a tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, **more
        )


def speaks(model: nn.Module) -> bool:
    """Whether a model of transformers predicts the next token of a text."""
    can: Any = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    return bool(callable(can) and can()) and not getattr(config, "is_encoder_decoder", False)


def longest_window(model: nn.Module) -> int | None:
    """How many tokens a model of transformers takes; None where its config does not say."""
    return _of_text_config(model, "max_position_embeddings")


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens a model of transformers knows; None where its config does not say."""
    return _of_text_config(model, "vocab_size")


def _of_text_config(model: nn.Module, name: str) -> int | None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    value = getattr(text, name, None)
    return value if isinstance(value, int) and value > 0 else None


@contextmanager
def _saying(expected: str) -> Iterator[None]:
    """While entered, whatever another package raises becomes a ValueError that begins with what was expected."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of packages in Rust
            raise
        raise ValueError(f"{expected}, but got {foreign(error)}") from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """While entered, transformers prints neither bars nor advice."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

"""Models and tokenizers as transformers loads them from a folder or a GGUF file, with errors that say what is wrong.

Nothing is fetched, no pickle is read, and no code of the folder runs unless that is asked for.
"""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from miniquant.checkpoint import CONFIG, Checkpoint
from miniquant.errors import foreign
from miniquant.formats.gguf_reader import read_gguf

GGUF_FILE = "model.gguf"
# Of what configs call layers beside those that have weights: windows, for instance.
_SPARE_LAYERS = 1000


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the one in a folder without config.json; None of any other path."""
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return path
    inside = path / GGUF_FILE
    return inside if inside.is_file() and not (path / CONFIG).is_file() else None


def load_float(
    path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", trust_remote_code: bool = False
) -> nn.Module:
    """A model that is not quantized, or a GGUF file as floating-point numbers, in evaluation mode.

    Args:
        path: of a folder, or of a GGUF file.
        dtype: of the weights; None is that of the files, float32 of a GGUF file.
        device: where to.
        trust_remote_code: whether code of the folder may run.

    Raises:
        OSError, ValueError: where that is no model, or one that transformers does not load whole.
        ImportError: without transformers.
    """
    transformers = transformers_package()
    gguf = gguf_of(path)
    if gguf is not None:
        read_gguf(gguf)  # says what is wrong with the file
        kind: Any = transformers.AutoModelForCausalLM
        found = {"gguf_file": gguf.name, "dtype": dtype or torch.float32}
        folder, wanted = gguf.parent, gguf
    else:
        checkpoint = Checkpoint(path)
        check_counts(checkpoint)
        kind = _class_of(transformers, checkpoint.config, path, trust_remote_code=trust_remote_code)
        found = {"dtype": dtype or "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code}
        folder, wanted = path, path
    with quiet(transformers), _saying(f"load_float: {wanted}: expected a model that transformers loads"):
        model, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **found)
    for key, what in (("missing_keys", "to have"), ("mismatched_keys", "to have the shapes of config.json for")):
        if names := sorted(map(str, info.get(key) or ())):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"load_float: {wanted}: expected files {what} {', '.join(names[:3])}{more}, but got others"
            )
    with _saying("load_float: expected device to be one of this machine"):
        moved: nn.Module = model.to(device).eval()
    return moved


def check_counts(checkpoint: Checkpoint) -> None:
    """Refuses a config.json that asks for so many layers that building them would not end.

    Raises:
        ValueError: then.
    """
    most = _SPARE_LAYERS + len(checkpoint.tensors)  # a layer has a tensor
    left: list[Mapping[str, Any]] = [checkpoint.config]
    while left:
        for key, value in left.pop().items():
            if isinstance(value, dict):
                left.append(value)
            elif key.endswith(("layers", "n_layer", "blocks", "depth")) and isinstance(value, int) and value > most:
                raise ValueError(
                    f"check_counts: {checkpoint.folder / CONFIG}: expected {key} to be at most {most}, with "
                    f"{len(checkpoint.tensors)} tensors in the files, but got {value}"
                )


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


def _class_of(transformers: Any, config: Mapping[str, Any], path: Path, *, trust_remote_code: bool) -> Any:
    """The class that config.json names, otherwise the one for its model_type."""
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    own = config.get("auto_map")
    if isinstance(own, dict) and own:
        if not trust_remote_code:
            raise ValueError(
                f"load_float: {path / 'config.json'}: expected a model of transformers, but got one defined by code in "
                "its folder, which trust_remote_code=True would run"
            )
        names = [one for one in ("AutoModelForCausalLM", "AutoModel") if one in own]
        return getattr(transformers, names[0] if names else "AutoModel")
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
        return kind
    return transformers.AutoModel


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


def transformers_package() -> Any:
    """The package transformers.

    Raises:
        ImportError: without it.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "expected the package transformers, which builds models, to be installed: pip install 'miniquant[models]' "
            f"({error})"
        ) from error


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

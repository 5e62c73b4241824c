"""A small model with a tokenizer as a folder, for what starts from one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

from gguf_examples import byte_level, save_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 300  # of the tokenizer
# Options of the command line with which quantizing takes a second.
QUICK = ("--tokens", "512", "--sequence-length", "64", "--group-size", "16", "--preset", "fast", "--dtype", "float32")


def make_folder(folder: Path, model: Any) -> Path:
    """Saves a model of transformers, with a tokenizer on bytes."""
    folder.mkdir(exist_ok=True)
    model.save_pretrained(folder)
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    save_tokenizer(tokenizer, folder, eos_token="<|endoftext|>")  # noqa: S106
    return folder

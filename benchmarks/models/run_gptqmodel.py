"""GPTQModel's GPTQ on a whole model, in the environment of the peers.

    python benchmarks/models/run_gptqmodel.py MODEL_FOLDER BATCHES OUTPUT_FOLDER BITS GROUP_SIZE THREADS [gptaq]

BATCHES is a safetensors file with ``input_ids`` int64 [windows, tokens]. With ``gptaq`` its correction of errors of
earlier layers (arXiv:2504.02692) is on; all else is its default. The folder is written in the format GPTQ. The last
line of the output is JSON: the seconds of ``quantize`` and the version.
"""

import json
import os
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer


def without_torchvision() -> None:
    """Lets GPTQModel import its models of images without torchvision, which they alone need: it is not installed."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        module = MagicMock(name=name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        sys.modules[name] = module


def main() -> None:
    """Quantizes the model that the command line names."""
    # It asks for two threads to load models with, but on one or two CPUs its pool has only one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    without_torchvision()
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: PLC0415  (after the lines above)
    from gptqmodel.quantization.config import GPTAQConfig  # noqa: PLC0415

    folder, batches, output, bits, group_size, threads, *correction = sys.argv[1:]
    torch.set_num_threads(int(threads))
    ids = load_file(batches)["input_ids"]
    windows: Any = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids]
    config = QuantizeConfig(
        bits=int(bits),
        group_size=int(group_size),
        sym=True,
        gptaq=GPTAQConfig() if correction == ["gptaq"] else None,
    )
    model = GPTQModel.load(folder, config, device="cpu", dtype=torch.float32, backend=BACKEND.TORCH)
    start = time.perf_counter()
    model.quantize(windows, batch_size=4, tokenizer=AutoTokenizer.from_pretrained(folder))
    seconds = time.perf_counter() - start
    model.save(output)
    print(json.dumps({"seconds": seconds, "version": version("gptqmodel")}))


if __name__ == "__main__":
    main()

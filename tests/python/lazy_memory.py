"""A model of any depth made on disk, and a run over it in a process of its own whose memory is limited and measured.

    python lazy_memory.py run FOLDER LIMIT_MB PATTERN     # quantizes block by block the layers that a pattern matches
    python lazy_memory.py whole FOLDER LIMIT_MB PATTERN   # loads the whole model

LIMIT_MB is how much more private memory the process may take than it has when the run begins (RLIMIT_DATA); 0 is any.
The C library is told to give back at once what is freed. Otherwise it keeps more or less of it from run to run, and the
limit counts address space, used or not.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from miniquant.checkpoint import CheckpointWriter

if TYPE_CHECKING:
    from torch import Tensor

    from miniquant.results import FinishedLayer

VOCABULARY = 512
HEADS = 8


def make_llama(folder: Path, *, blocks: int, width: int, inner: int, max_shard_bytes: int = 5_000_000_000) -> int:
    """Writes a random Llama in float32, one tensor after the other; bytes of its weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **{f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")},
        "mlp.down_proj.weight": (width, inner),
    }
    with CheckpointWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        writer.write_json("config.json", config)

        def add(name: str, *shape: int) -> None:
            writer.add(name, torch.randn(*shape, generator=generator) * width**-0.5)

        add("model.embed_tokens.weight", VOCABULARY, width)
        for block in range(blocks):
            for name, shape in shapes.items():
                add(f"model.layers.{block}.{name}", *shape)
            for name in ("input_layernorm", "post_attention_layernorm"):
                writer.add(f"model.layers.{block}.{name}.weight", torch.ones(width))
        writer.add("model.norm.weight", torch.ones(width))
        return writer.tensor_bytes


def measured(mode: str, folder: Path, limit_mb: int = 0, pattern: str = "*") -> dict[str, Any]:
    """What the process of a run prints; "error" where it failed."""
    command = [sys.executable, __file__, mode, str(folder), str(limit_mb), pattern]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"error": done.stderr}
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


def status(key: str) -> int:
    """Bytes of memory of this process: VmRSS (now), VmHWM (the most), VmData (private, used or not)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Nowhere:
    """A store that keeps no more than names: the run's memory without a disk's time."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return False

    def load(self, *_: object) -> FinishedLayer:
        raise NotImplementedError

    def save(self, layer: FinishedLayer) -> None:
        self.names.add(layer.result.name)


def run(folder: Path, limit_mb: int, pattern: str) -> dict[str, Any]:
    """Quantizes a model block by block, by GPTQ on few tokens; peaks of memory over the start."""
    from miniquant import LayerOptions, Recipe, Rule, quantize_model  # noqa: PLC0415
    from miniquant.lazy import LazyModel  # noqa: PLC0415

    batches: list[Tensor] = [torch.randint(0, VOCABULARY, (1, 192), generator=torch.Generator().manual_seed(1))] * 2
    options = LayerOptions(bits=4, group_size=64, preset="plain", ridge=0.1)
    recipe = Recipe(replace(options, skip=True), [Rule(pattern, options)])
    store = Nowhere()
    lazy = LazyModel(folder)
    begin(limit_mb)
    before, private = status("VmRSS"), status("VmData")
    with lazy:
        result = quantize_model(lazy.model, batches, recipe, held_out=0, store=store)
    return {
        "layers": len(result.layers),
        "stored": len(store.names),
        "weights": lazy.peak_bytes,
        "largest": max(lazy.unit_bytes().values()),
        "peak": status("VmHWM") - before,
        "resident": status("VmHWM"),
        "private": status("VmData") - private,
    }


def whole(folder: Path, limit_mb: int, pattern: str) -> dict[str, Any]:
    """Loads a model with all of its weights, for comparison."""
    del pattern
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    begin(limit_mb)
    before = status("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(folder)
    total = sum(parameter.double().sum().item() for parameter in model.parameters())  # all of it in memory
    return {"sum": total, "peak": status("VmHWM") - before}


def begin(limit_mb: int) -> None:
    """Begins to measure: the most that was in memory so far is forgotten."""
    torch.set_num_threads(1)
    (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
    Path("/proc/self/clear_refs").write_text("5")
    if limit_mb:
        most = status("VmData") + limit_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    print(json.dumps({"run": run, "whole": whole}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))

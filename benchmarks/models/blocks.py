"""Measures what one block of a large model takes, and carries that to the whole model.

A model of one block has the shapes of a known one, random weights and no output embeddings. Its inputs are correlated,
as those of a language model are: the embedding has a few strong directions and weak noise. ``miniquant quantize`` reads
the folder, quantizes the block and writes it, each run in a process of its own. A plain forward pass over the same
tokens is measured beside it, and with ``--peers`` llm-compressor on the same folder and tokens. A whole model takes as
many times the seconds of a block as it has blocks: computed, not measured. Writes results/blocks.json and blocks.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from benchmarks.common.measuring import (
    RESULTS,
    SCRATCH,
    command_line,
    machine,
    versions,
    write_results,
)
from benchmarks.models.common import answer_of_peer, page, report_of_run
from scripts.smollm2 import write_folder

LENGTH = 2048  # of a window, in tokens
VOCABULARY = 1 << 15  # more than the columns of any layer
DIRECTIONS = 512  # strong ones, of falling strength
NOISE = 0.1
BITS, GROUP_SIZE = 4, 128
# The configuration of a block, and how many blocks the model has.
SHAPES: dict[str, tuple[str, dict[str, int], int]] = {
    "Llama-2-7B": (
        "LlamaConfig",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
        32,
    ),
    "Llama-3-8B": (
        "LlamaConfig",
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
        32,
    ),
    "Qwen3-30B-A3B": (
        "Qwen3MoeConfig",
        {
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
        },
        48,
    ),
}
QUICK = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
PARTS = ("forward", "hessians", "solver", "judging")


def make_folder(name: str, folder: Path, sizes: dict[str, int]) -> None:
    """Saves a model of one block in bfloat16."""
    config = getattr(transformers, SHAPES[name][0])(
        vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=LENGTH, tie_word_embeddings=False, **sizes
    )
    torch.manual_seed(0)
    auto: Any = transformers.AutoModel
    model = auto.from_config(config, dtype=torch.bfloat16)
    hidden = int(config.hidden_size)
    strengths = torch.arange(1, DIRECTIONS + 1) ** -0.5
    directions = torch.randn(DIRECTIONS, hidden)
    with torch.no_grad():
        embedded = torch.randn(VOCABULARY, DIRECTIONS) * strengths @ directions
        model.embed_tokens.weight.copy_(embedded + NOISE * torch.randn(VOCABULARY, hidden))
    model.save_pretrained(folder)


def forward_seconds(folder: Path, windows: torch.Tensor, dtype: torch.dtype) -> float:
    """One plain forward pass over all windows, one at a time, with the model in memory."""
    model: Any = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        model(input_ids=windows[:1, :64], use_cache=False)
        start = time.perf_counter()
        for window in windows.split(1):
            model(input_ids=window, use_cache=False)
        return time.perf_counter() - start


class Benchmark:
    """Folders, windows and the rows of the table."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = earlier_rows(arguments) if arguments.add else []

    def measure(self, name: str, sizes: dict[str, int]) -> None:
        """All rows of a model's block."""
        folder = self.arguments.work / name
        make_folder(name, folder, sizes)
        generator = torch.Generator().manual_seed(1)
        count = self.arguments.tokens // LENGTH
        windows = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
        tokens = self.arguments.work / "windows.safetensors"
        save_file({"input_ids": windows}, tokens)
        forward: dict[str, float] = {}
        for preset in self.arguments.presets:
            report = self._quantized(folder, tokens, preset)
            dtype = report["settings"]["dtype"]
            if dtype not in forward:
                forward[dtype] = forward_seconds(folder, windows, getattr(torch, dtype))
            self._add(name, f"miniquant, {preset}", report["seconds"], forward[dtype], report["peak_memory"], dtype)
        if self.arguments.peers is not None:
            found = self._peer(folder, tokens)
            if "float32" not in forward:
                forward["float32"] = forward_seconds(folder, windows, torch.float32)
            seconds = {"total": found["seconds"]}
            self._add(name, f"llm-compressor {found['version']}", seconds, forward["float32"], None, "float32")

    def _quantized(self, folder: Path, tokens: Path, preset: str) -> dict[str, Any]:
        """The report of a run."""
        output = self.arguments.work / "quantized"
        calibrated = ["--calibration", str(tokens), "--tokens", str(self.arguments.tokens), "--held-out", "0"]
        windows = ["--sequence-length", str(LENGTH), "--dtype", self.arguments.dtype, "--unseen", "siblings"]
        options = ["--preset", preset, "--bits", str(BITS), "--group-size", str(GROUP_SIZE), "--overwrite"]
        return report_of_run(folder, output, *calibrated, *windows, *options)

    def _peer(self, folder: Path, tokens: Path) -> dict[str, Any]:
        """What llm-compressor says of its run."""
        write_folder(self.arguments.work / "smollm2")
        for file in (self.arguments.work / "smollm2").glob("tokenizer*"):
            shutil.copy(file, folder)  # it asks for a tokenizer, and does not use it
        output = self.arguments.work / "llm-compressor"
        given = (folder.absolute(), tokens.absolute(), output.absolute(), BITS, GROUP_SIZE)
        return answer_of_peer(self.arguments.peers, "run_llm_compressor.py", self.arguments.work, *given)

    def _add(
        self, model: str, by: str, seconds: dict[str, float], forward: float, memory: int | None, dtype: str
    ) -> None:
        row = {"model": model, "by": by, "tokens": self.arguments.tokens, "dtype": dtype, "forward_pass": forward}
        self.rows.append({**row, "seconds": seconds, "peak_memory": memory, "blocks": SHAPES[model][2]})
        write(self)


def earlier_rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Those of the results that are there, but for the models that are measured again."""
    rows = json.loads((arguments.output / "blocks.json").read_text())["rows"]
    if any(row["tokens"] != arguments.tokens for row in rows):
        raise ValueError(f"--add: expected the rows in {arguments.output} to be of {arguments.tokens} tokens, too")
    return [row for row in rows if row["model"] not in arguments.models]


def line_of(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    seconds = row["seconds"]
    return [
        row["model"],
        row["by"],
        row["dtype"],
        f"{row['forward_pass']:.0f}",
        f"{seconds['total']:.0f}",
        *(f"{seconds[part]:.1f}" if part in seconds else "" for part in PARTS),
        f"{seconds['total'] / row['forward_pass'] - 1:.2f}",
        "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.1f}",
        f"{seconds['total'] * row['blocks'] / 3600:.1f}",
    ]


def write(bench: Benchmark) -> None:
    """Writes and prints the rows so far."""
    columns = ["block of", "by", "dtype", "forward pass, s", "whole run, s", *(f"{part}, s" for part in PARTS)]
    header = [*columns, "beyond the pass", "GiB at most", "whole model, h"]
    summary = (
        f"One block, {bench.arguments.tokens} tokens in windows of {LENGTH}, {BITS} bits in groups of {GROUP_SIZE}. "
        "Beyond the pass: what the whole run takes more than a plain forward pass over the same tokens, relative to "
        "that. The last column is computed: blocks times seconds."
    )
    results = {
        "command": command_line("scripts/benchmark", "blocks"),
        "machine": machine(torch.get_num_threads()),
        "versions": versions(),
        "rows": bench.rows,
    }
    text = page(summary, header, map(line_of, bench.rows), results, numbers=True)
    write_results(results, text, bench.arguments.output, "blocks")


def main() -> None:
    """Measures every block and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--presets", nargs="+", default=["fast", "best"])
    parser.add_argument("--tokens", type=int, default=32768, help="for calibration")
    parser.add_argument("--dtype", default="auto", help="in which the model runs, as of miniquant quantize")
    parser.add_argument("--peers", type=Path, help="Python of the environment of the peers; without it only ours")
    parser.add_argument("--work", type=Path, default=SCRATCH / "blocks", help="folder for models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--add", action="store_true", help="keep the rows of other models")
    parser.add_argument("--quick", action="store_true", help="a small block and few tokens; below build/")
    arguments = parser.parse_args()
    sizes = {name: SHAPES[name][1] for name in arguments.models}
    if arguments.quick:
        arguments.tokens, arguments.output = 2 * LENGTH, SCRATCH
        sizes = {"Llama-2-7B": QUICK}
    arguments.work.mkdir(parents=True, exist_ok=True)
    bench = Benchmark(arguments)
    for name, of_model in sizes.items():
        bench.measure(name, of_model)


if __name__ == "__main__":
    main()

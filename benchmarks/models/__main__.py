"""Measures what quantization costs a language model: time, bytes, and how far the model is from the float one.

SmolLM2-135M-Instruct (scripts/smollm2.py) is quantized by every scheme with the same calibration tokens, symmetric, in
groups of 64, and saved in the format compressed-tensors. Each figure is of the saved folder, as ``miniquant evaluate``
reads it. llm-compressor, GPTQModel and AutoRound quantize the same model with the same tokens, in the environment of
the peers.

The text (``--text``) is WikiText-2's validation split in its tokenized form; its first half is for calibration, its
second half for evaluation. The result is written to results/models.json and models.md; with ``--add`` the rows of other
bits and schemes that are there already stay, each with the machine that it was measured on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import string
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import miniquant
from benchmarks.common.measuring import (
    RESULTS,
    SCRATCH,
    command_line,
    machine,
    versions,
    write_results,
)
from benchmarks.models.common import (
    BY_LAYER,
    LENGTH,
    SCHEMES,
    answer_of_peer,
    float_model,
    halves_as_windows,
    page,
    readable,
    recipe_named,
    with_error,
)
from miniquant.bits import Unit, allocate, measure_units, recipe_of
from miniquant.checkpoint import Checkpoint
from scripts.smollm2 import write_folder

GROUP_SIZE = 64
# Tokens that say what a layer's bits are worth.
MEASURED_TOKENS = 8192
# The peers, the scripts that run them, and options of these.
PEERS: dict[str, tuple[str, ...]] = {
    "llm-compressor": ("run_llm_compressor.py",),
    "GPTQModel": ("run_gptqmodel.py",),
    "GPTQModel-GPTAQ": ("run_gptqmodel.py", "gptaq"),
    "AutoRound": ("run_autoround.py",),
}


def forward_seconds(model: Any, batches: tuple[dict[str, Any], ...]) -> float:
    """One plain forward pass over all batches."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            model(**batch, use_cache=False)
    return time.perf_counter() - start


class Benchmark:
    """The float model, the tokens, and the rows of the table."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work
        self.output: Path = arguments.output
        self.work.mkdir(parents=True, exist_ok=True)
        self.float_folder = self.work / "float"
        write_folder(self.float_folder)
        text = readable(arguments.text.read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(self.float_folder)
        self.calibration, self.evaluation = halves_as_windows(
            text, "", self.work, tokenizer, arguments.tokens, arguments.evaluation_tokens
        )
        self.machine = machine(torch.get_num_threads())
        self.setting: dict[str, Any] = {
            "tokens": self.calibration.tokens,
            "evaluation_tokens": self.evaluation.tokens,
        }
        self.rows = self._earlier(arguments) if arguments.add else []
        model = float_model(self.float_folder)
        self.forward = min(forward_seconds(model, self.calibration.batches) for _ in range(2))
        self.reference = miniquant.Reference(model, max_bytes=1 << 33)
        self.reference.keep(self.evaluation.batches)
        self.float_bytes = linear_bytes(self.float_folder)

    def _earlier(self, arguments: argparse.Namespace) -> list[dict[str, Any]]:
        """The rows of other bits or schemes that were measured before, on the same tokens."""
        before = json.loads((self.output / "models.json").read_text(encoding="utf-8"))
        if other := [name for name, value in self.setting.items() if before[name] != value]:
            raise ValueError(f"--add: expected the rows in {self.output} to be of the same {', '.join(other)}")

        def is_measured_anew(row: dict[str, Any]) -> bool:
            is_peer = row["scheme"] not in SCHEMES  # its name has a version
            peers = arguments.peer if arguments.peers is not None else []
            chosen = row["scheme"].partition(" ")[0] in peers if is_peer else row["scheme"] in arguments.schemes
            return chosen and row["bits"] in arguments.bits

        return [row for row in before["rows"] if not is_measured_anew(row)]

    def ours(self, name: str, bits: int) -> None:
        """Quantizes with our package; where bits are chosen by layer, `bits` is their average."""
        folder = self.work / f"{name.replace(', ', '-').replace(' ', '-')}-{bits}"
        start = time.perf_counter()
        recipe = recipe_named(name, bits=bits, group_size=GROUP_SIZE)
        if name == BY_LAYER:
            recipe = recipe_of(allocate(self._units(recipe.defaults), bits), recipe)
        done = miniquant.quantize_folder(
            self.float_folder, folder, recipe, calibration=self.calibration, dtype=torch.float32, overwrite=True
        )
        self._add(name, bits, folder, time.perf_counter() - start, done.result.seconds)

    def _units(self, options: miniquant.LayerOptions) -> list[Unit]:
        """What bits are worth to layers, on the first of the calibration tokens, in windows of their own."""
        windows = [row[None] for batch in self.calibration.batches for row in batch["input_ids"] if len(row) == LENGTH]
        batches = [{"input_ids": window} for window in windows[: MEASURED_TOKENS // LENGTH]]
        return measure_units(float_model(self.float_folder), batches, options)

    def peer(self, name: str, bits: int, python: Path) -> None:
        """Quantizes with a peer."""
        folder = self.work / f"{name}-{bits}"
        shutil.rmtree(folder, ignore_errors=True)
        batches = self.work / "batches.safetensors"
        windows = [row for batch in self.calibration.batches for row in batch["input_ids"] if len(row) == LENGTH]
        save_file({"input_ids": torch.stack(windows)}, batches)
        script, *options = PEERS[name]
        given = (self.float_folder, batches, folder, bits, GROUP_SIZE)
        answer = answer_of_peer(python, script, self.work, *given, options=options)
        self._add(f"{name} {answer['version']}", bits, folder, answer["seconds"], {})

    def _add(self, name: str, bits: int, folder: Path, seconds: float, parts: dict[str, float]) -> None:
        model = miniquant.load(folder, dtype=torch.float32)
        scores = miniquant.evaluate(model, self.evaluation.batches, reference=self.reference)
        row = {
            "scheme": name,
            "bits": bits,
            "seconds": seconds,
            "parts": parts,
            "forward_seconds": self.forward,
            "machine": self.machine,
            "bytes": linear_bytes(folder) / self.float_bytes,
            "scores": scores.to_dict(),
        }
        self.rows = sorted([*self.rows, row], key=lambda row: (-row["bits"], place_of(row["scheme"])))
        write(self)


def place_of(scheme: str) -> int:
    """Where a scheme's row stands among those of equal bits: peers, whose names have a version, come last."""
    return list(SCHEMES).index(scheme) if scheme in SCHEMES else len(SCHEMES)


def linear_bytes(folder: Path) -> int:
    """Bytes of the weights of a model's decoder layers, whatever they are stored as."""
    tensors = Checkpoint(folder).tensors
    return sum(one.nbytes for name, one in tensors.items() if ".layers." in name and "norm" not in name)


def line_of(row: dict[str, Any], letters: dict[str, str]) -> list[str]:
    """A row of the table, with a letter for the processor."""
    scores = row["scores"]
    return [
        row["scheme"],
        str(row["bits"]),
        with_error(scores, "kl_divergence", 4),
        with_error(scores, "perplexity", 2),
        with_error(scores, "same_top", 1, 100),
        f"{row['bytes']:.3f}",
        f"{row['seconds']:.0f}",
        f"{row['seconds'] / row['forward_seconds']:.1f}",
        letters[row["machine"]["cpu"]],
    ]


def write(bench: Benchmark) -> None:
    """Writes and prints the rows so far: a run takes most of an hour."""
    found = bench.rows[0]["scores"]["reference_perplexity"]
    columns = ["scheme", "bits", "KL divergence, nats", "perplexity", "same top token, %", "bytes", "seconds"]
    header = [*columns, "forward passes", "on"]
    processors = dict.fromkeys(row["machine"]["cpu"] for row in bench.rows)
    letters = dict(zip(processors, string.ascii_uppercase, strict=False))
    summary = (
        f"Float model: perplexity {found['value']:.2f} ± {found['standard_error']:.2f}. Bytes are those of the decoder "
        "layers' weights relative to float32. Forward passes are the time relative to a plain one over the "
        f"{bench.setting['tokens']} calibration tokens in the same run of the benchmark. "
        f"Processors: {', '.join(f'{letter}: {cpu}' for cpu, letter in letters.items())}; two threads."
    )
    results = {
        **bench.setting,
        "machine": bench.machine,
        "versions": versions(),
        "command": command_line("scripts/benchmark", "models"),
        "rows": [{**row, "beyond_forward": row["seconds"] / row["forward_seconds"] - 1} for row in bench.rows],
    }
    write_results(
        results,
        page(summary, header, (line_of(row, letters) for row in bench.rows), results, numbers=True),
        bench.output,
        "models",
    )


def main() -> None:
    """Measures every scheme and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's validation split, tokenized")
    parser.add_argument("--tokens", type=int, default=32768, help="for calibration")
    parser.add_argument("--evaluation-tokens", type=int, default=16384)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--peers", type=Path, help="Python of the environment of the peers; without it only ours")
    parser.add_argument("--peer", nargs="+", choices=PEERS, default=["llm-compressor"], help="which of them")
    parser.add_argument("--work", type=Path, default=SCRATCH / "models", help="folder for models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--add", action="store_true", help="keep the rows of other bits and schemes")
    parser.add_argument("--quick", action="store_true", help="few tokens, 4 bits, preset fast; below build/")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.evaluation_tokens = 2048, 2048
        arguments.bits, arguments.schemes, arguments.output = [4], ["fast"], SCRATCH
    bench = Benchmark(arguments)
    for bits in arguments.bits:
        for name in arguments.schemes:
            bench.ours(name, bits)
        for name in arguments.peer if arguments.peers is not None else []:
            bench.peer(name, bits, arguments.peers)


if __name__ == "__main__":
    main()

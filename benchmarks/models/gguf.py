"""Measures GGUF files of SmolLM2-135M-Instruct beside those of llama.cpp with an importance matrix, at equal sizes.

llama.cpp decides which type each tensor gets in Q4_0, Q4_K_M, Q3_K_M or Q2_K; ours gets the same types. Both calibrate
on the same windows of text. The columns of most of this model's matrices are no multiple of 256, so that llama.cpp
takes types of 32 columns for them; the down projections have its K types. Figures are of the files, as transformers
reads them, beside the float model. Writes results/gguf.json and gguf.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

import miniquant
from benchmarks.common.measuring import RESULTS, ROOT, SCRATCH, write_results
from benchmarks.models.common import LENGTH, beginning, float_model, halves_as_windows, page, readable, with_error
from miniquant.checkpoint import Checkpoint
from miniquant.float_models import load_gguf
from miniquant.formats.gguf_file import GGUF_FILE, plan_gguf, write_gguf
from miniquant.formats.gguf_reader import read_gguf
from miniquant.presets import Preset
from miniquant.superblocks import GRIDS
from scripts.smollm2 import write_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

TYPES = ("Q4_0", "Q4_K_M", "Q3_K_M", "Q2_K")
TOOLS = ROOT / "build" / "llama.cpp" / "build" / "bin"
EMBEDDING = "Q8_0"  # of both
# The grid with which a layer gets a type.
OPTIONS: dict[str, dict[str, Any]] = {
    "Q4_0": {"bits": 4, "group_size": 32},
    "Q4_1": {"bits": 4, "group_size": 32, "symmetric": False},
    "Q5_0": {"bits": 5, "group_size": 32},
    "Q5_1": {"bits": 5, "group_size": 32, "symmetric": False},
    "Q8_0": {"bits": 8, "group_size": 32},
    **{kind: {"superblocks": kind} for kind in GRIDS},
}
LAYERS = {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v")},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def write_float(folder: Path, path: Path) -> None:
    """A model's folder as a GGUF file in float32."""
    checkpoint = Checkpoint(folder)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}

    def no_layer(name: str) -> miniquant.QuantizedWeight:
        raise KeyError(name)

    plan = plan_gguf(checkpoint.config, shapes, {}, folder=folder, other="F32")
    write_gguf(path, plan, checkpoint.read, no_layer)


def layers_of(path: Path) -> dict[str, str]:
    """The types of the quantized layers of a file, by the layers' names in transformers."""
    found = {}
    for name, tensor in read_gguf(path).tensors.items():
        place = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if place is not None and place[2] in LAYERS:
            found[f"model.layers.{place[1]}.{LAYERS[place[2]]}"] = tensor.kind
    return found


def recipe_of(kinds: Mapping[str, str], preset: Preset) -> miniquant.Recipe:
    """The recipe that gives layers these types."""
    rules = [miniquant.Rule(name, OPTIONS[kind]) for name, kind in kinds.items()]
    return miniquant.Recipe(miniquant.LayerOptions(preset=preset), rules)


def bits_per_weight(path: Path) -> float:
    """Of the matrices of the blocks."""
    tensors = [one for name, one in read_gguf(path).tensors.items() if name.startswith("blk.") and len(one.shape) == 2]
    return 8 * sum(one.data.nbytes for one in tensors) / sum(one.shape[0] * one.shape[1] for one in tensors)


class Files:
    """The float model, its text, and llama.cpp."""

    def __init__(self, text: Path, work: Path, tools: Path, tokens: int, evaluation_tokens: int) -> None:
        self.work, self.tools = work, tools
        work.mkdir(parents=True, exist_ok=True)
        self.float_folder = work / "float"
        write_folder(self.float_folder)
        tokenizer = AutoTokenizer.from_pretrained(self.float_folder)
        whole = readable(text.read_text(encoding="utf-8"))
        counts = (tokens, evaluation_tokens)
        self.calibration, self.evaluation = halves_as_windows(whole, "gguf-", work, tokenizer, *counts)
        self.reference = miniquant.Reference(float_model(self.float_folder), max_bytes=1 << 33)
        self.reference.keep(self.evaluation.batches)
        self.float_file, self.importance = work / "float.gguf", work / "importance.gguf"
        write_float(self.float_folder, self.float_file)

    def row(self, kind: str, by: str, path: Path, seconds: float) -> dict[str, Any]:
        """The figures of a file."""
        model = load_gguf(path)
        scores = miniquant.evaluate(model, self.evaluation.batches, reference=self.reference).to_dict()
        return {
            "type": kind,
            "by": by,
            "bits_per_weight": bits_per_weight(path),
            "bytes": path.stat().st_size,
            "types": dict(Counter(layers_of(path).values())),
            "seconds": seconds,
            "scores": scores,
        }

    def measure_importance(self) -> float:
        """llama.cpp's importance matrix of the calibration windows; returns the seconds that it took."""
        chunks = self.calibration.tokens // LENGTH
        text = self.work / "gguf-calibration.txt"
        return self._tool(
            "llama-imatrix", "-m", self.float_file, "-f", text, "-c", LENGTH, "--chunks", chunks, "-o", self.importance
        )

    def theirs(self, kind: str, seconds: float) -> tuple[Path, dict[str, Any]]:
        """llama.cpp's file of a type; `seconds` that its importance matrix took."""
        path = self.work / f"llama-cpp-{kind}.gguf"
        embedding = ("--token-embedding-type", EMBEDDING.lower())
        seconds += self._tool("llama-quantize", "--imatrix", self.importance, *embedding, self.float_file, path, kind)
        return path, self.row(kind, "llama.cpp, imatrix", path, seconds)

    def ours(self, kind: str, preset: Preset, like: Path) -> dict[str, Any]:
        """Our file with the types of another."""
        folder = self.work / f"miniquant-{kind}"
        start = time.perf_counter()
        miniquant.quantize_folder(
            self.float_folder,
            folder,
            recipe_of(layers_of(like), preset),
            format="gguf",
            gguf=miniquant.GgufOptions(other=EMBEDDING),  # type: ignore[arg-type]
            calibration=self.calibration,
            dtype=torch.float32,
            overwrite=True,
        )
        return self.row(kind, f"miniquant, {preset}", folder / GGUF_FILE, time.perf_counter() - start)

    def _tool(self, name: str, *arguments: object) -> float:
        start = time.perf_counter()
        done = subprocess.run(
            [str(self.tools / name), *map(str, arguments)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}\n{done.stderr[-3000:]}")
        return time.perf_counter() - start


def markdown(results: dict[str, Any]) -> str:
    """The table."""
    header = ["type", "by", "bits per weight", "KL divergence", "perplexity", "same likeliest token, %", "seconds"]
    rows = [
        [
            row["type"],
            row["by"],
            f"{row['bits_per_weight']:.2f}",
            with_error(row["scores"], "kl_divergence", 4),
            with_error(row["scores"], "perplexity", 2),
            with_error(row["scores"], "same_top", 1, 100),
            f"{row['seconds']:.0f}",
        ]
        for row in results["rows"]
    ]
    summary = (
        f"{results['tokens']} tokens calibrate, {results['evaluation_tokens']} are evaluated; KL divergence from the "
        "float model in nats."
    )
    return page(summary, header, rows, results)


def main() -> None:
    """Measures every type by both and writes the results so far after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's validation split, tokenized")
    parser.add_argument("--tokens", type=int, default=32768, help="for calibration")
    parser.add_argument("--evaluation-tokens", type=int, default=16384)
    parser.add_argument("--types", nargs="+", choices=TYPES, default=[*TYPES])
    parser.add_argument("--presets", nargs="+", default=["fast", "best"])
    parser.add_argument("--tools", type=Path, default=TOOLS, help="folder with those of llama.cpp")
    parser.add_argument("--work", type=Path, default=SCRATCH / "models", help="folder for models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="few tokens, Q4_K_M, preset fast; below build/")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.evaluation_tokens, arguments.types = 2048, 2048, ["Q4_K_M"]
        arguments.presets, arguments.output = ["fast"], SCRATCH
    files = Files(arguments.text, arguments.work, arguments.tools, arguments.tokens, arguments.evaluation_tokens)
    results = beginning("gguf", files.calibration, files.evaluation)
    seconds = files.measure_importance()
    for kind in arguments.types:
        path, row = files.theirs(kind, seconds)
        results["rows"].append(row)
        results["rows"] += [files.ours(kind, preset, path) for preset in arguments.presets]
        write_results(results, markdown(results), arguments.output, "gguf")


if __name__ == "__main__":
    main()

"""Measures what quantization costs a text encoder, MiniLM, from its folder to a folder in our own format.

One half of a text (``--text``, WikiText-2's validation split in its tokenized form) calibrates, in windows of 128
tokens; windows of 64 tokens of the other half are embedded. An embedding is the mean of the last hidden states,
normalized. The figure is one minus the cosine between a window's embedding and that of the float model. Writes
results/encoder.json and encoder.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

import miniquant
from benchmarks.common.measuring import RESULTS, SCRATCH, write_results
from benchmarks.models.common import BY_LAYER, SCHEMES, beginning, halves, page, readable, recipe_named
from experiments.minilm.layers import model_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CALIBRATION_LENGTH, EVALUATION_LENGTH = 128, 64  # of windows, in tokens
OF_LANGUAGE_MODELS = {BY_LAYER, "fast, rotated", "best, rotated"}


def windows(text: str, tokenizer: Any, count: int, length: int) -> list[dict[str, Tensor]]:
    """The first tokens of a text in windows, each with the tokenizer's first and last token.

    Raises:
        ValueError: for a text of too few tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = length - 2
    if len(ids) < count * size:
        raise ValueError(f"expected a text of at least {count * size} tokens, but got {len(ids)}")
    parts = [ids[i * size : (i + 1) * size] for i in range(count)]
    return [{"input_ids": torch.tensor([[tokenizer.cls_token_id, *part, tokenizer.sep_token_id]])} for part in parts]


def embeddings(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Embeddings [windows, features], of length 1."""
    with torch.no_grad():
        return normalize(torch.cat([model(**batch).last_hidden_state.mean(1) for batch in batches]), dim=1)


class Benchmark:
    """The float model and both halves of the text."""

    def __init__(self, text: Path, work: Path, tokens: int, texts: int) -> None:
        self.folder = model_folder()
        self.output = work / "minilm"
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        calibration, evaluation = halves(readable(text.read_text(encoding="utf-8")))
        known = windows(calibration, tokenizer, tokens // CALIBRATION_LENGTH, CALIBRATION_LENGTH)
        fresh = windows(evaluation, tokenizer, texts, EVALUATION_LENGTH)
        self.calibration = miniquant.load_calibration(known, tokens=tokens)
        self.evaluation = miniquant.load_calibration(fresh, tokens=texts * EVALUATION_LENGTH)
        self.expected = embeddings(AutoModel.from_pretrained(self.folder).eval(), self.evaluation.batches)

    def row(self, scheme: str, bits: int, group_size: int) -> dict[str, Any]:
        """Quantizes, saves, and embeds with what was saved."""
        recipe = recipe_named(scheme, bits=bits, group_size=group_size)
        start = time.perf_counter()
        miniquant.quantize_folder(
            self.folder,
            self.output,
            recipe,
            format="miniquant",
            calibration=self.calibration,
            dtype=torch.float32,
            overwrite=True,
        )
        seconds = time.perf_counter() - start
        found = embeddings(miniquant.load(self.output, dtype=torch.float32), self.evaluation.batches)
        distances = 1 - (found * self.expected).sum(1)
        return {
            "scheme": scheme,
            "bits": bits,
            "group_size": group_size,
            "seconds": seconds,
            "distance": float(distances.mean()),
            "standard_error": float(distances.std() / len(distances) ** 0.5),
        }


def markdown(results: dict[str, Any]) -> str:
    """The table, a column for each width."""
    widths = list(dict.fromkeys(row["bits"] for row in results["rows"]))
    lines: dict[str, list[str]] = {}
    for row in results["rows"]:
        cell = f"{row['distance']:.4f} ± {row['standard_error']:.4f}"
        lines.setdefault(row["scheme"], [row["scheme"]]).append(cell)
    summary = (
        f"all-MiniLM-L6-v2, groups of {results['rows'][0]['group_size']}; {results['tokens']} tokens calibrate, "
        f"{results['evaluation_tokens'] // EVALUATION_LENGTH} windows of {EVALUATION_LENGTH} tokens are embedded. One "
        "minus the cosine to the float model's embedding."
    )
    return page(summary, ["scheme", *(f"{bits} bits" for bits in widths)], lines.values(), results, numbers=True)


def main() -> None:
    """Measures every scheme and writes the results so far after each."""
    schemes = [name for name in SCHEMES if name not in OF_LANGUAGE_MODELS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's validation split, tokenized")
    parser.add_argument("--tokens", type=int, default=16384, help="for calibration")
    parser.add_argument("--texts", type=int, default=300, help="windows to embed")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--schemes", nargs="+", choices=schemes, default=schemes)
    parser.add_argument("--work", type=Path, default=SCRATCH / "models", help="folder for models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="few tokens, 4 bits, preset fast; below build/")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.texts, arguments.output = 1024, 20, SCRATCH
        arguments.bits, arguments.schemes = [4], ["fast"]
    bench = Benchmark(arguments.text, arguments.work, arguments.tokens, arguments.texts)
    results = beginning("encoder", bench.calibration, bench.evaluation)
    for bits in arguments.bits:
        for scheme in arguments.schemes:
            results["rows"].append(bench.row(scheme, bits, arguments.group_size))
            write_results(results, markdown(results), arguments.output, "encoder")


if __name__ == "__main__":
    main()

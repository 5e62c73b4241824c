"""Measures what a quantized language model keeps on text of another kind, and what the size of groups does.

SmolLM2-135M-Instruct is quantized with text of an encyclopedia (``--text``, WikiText-2's validation split in its
tokenized form) and with docstrings of Python's standard library, and evaluated on both: a setting that gains on its own
kind of text must not lose on the other. The first half of each text calibrates, the second half evaluates. Groups of 32
and 128 are measured with the encyclopedia. Figures are of the saved folders. Writes results/texts.json and texts.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer

import miniquant
from benchmarks.common.measuring import RESULTS, SCRATCH, write_results
from benchmarks.models.common import (
    SCHEMES,
    beginning,
    docstrings,
    float_model,
    halves_as_windows,
    page,
    readable,
    recipe_named,
    with_error,
)
from scripts.smollm2 import write_folder

ENCYCLOPEDIA, DOCSTRINGS = KINDS = ("encyclopedia", "docstrings")
GROUP_SIZE = 64


class Setting(NamedTuple):
    """A row of the tables: what is done, and with which kind of text."""

    scheme: str
    bits: int
    group_size: int
    kind: str


class Texts:
    """The float model and both texts, for calibration and for evaluation."""

    def __init__(self, text: Path, work: Path, tokens: int, evaluation_tokens: int) -> None:
        self.work = work
        work.mkdir(parents=True, exist_ok=True)
        self.float_folder = work / "float"
        write_folder(self.float_folder)
        tokenizer = AutoTokenizer.from_pretrained(self.float_folder)
        whole = {ENCYCLOPEDIA: readable(text.read_text(encoding="utf-8")), DOCSTRINGS: docstrings()}
        self.calibration: dict[str, miniquant.Calibration] = {}
        self.evaluation: dict[str, miniquant.Calibration] = {}
        for kind, of_kind in whole.items():
            self.calibration[kind], self.evaluation[kind] = halves_as_windows(
                of_kind, f"{kind}-", work, tokenizer, tokens, evaluation_tokens
            )
        self.reference = miniquant.Reference(float_model(self.float_folder), max_bytes=1 << 33)
        self.reference.keep([batch for kind in KINDS for batch in self.evaluation[kind].batches])

    def row(self, setting: Setting) -> dict[str, Any]:
        """Quantizes, saves, and evaluates what was saved."""
        folder = self.work / "texts"
        recipe = recipe_named(setting.scheme, bits=setting.bits, group_size=setting.group_size)
        start = time.perf_counter()
        miniquant.quantize_folder(
            self.float_folder,
            folder,
            recipe,
            format="miniquant",  # takes groups that do not divide the columns
            calibration=self.calibration[setting.kind],
            dtype=torch.float32,
            overwrite=True,
        )
        seconds = time.perf_counter() - start
        model = miniquant.load(folder, dtype=torch.float32)
        scores = {
            kind: miniquant.evaluate(model, self.evaluation[kind].batches, reference=self.reference).to_dict()
            for kind in KINDS
        }
        return {**setting._asdict(), "seconds": seconds, "scores": scores}


def settings_of(schemes: list[str], bits: list[int], group_sizes: list[int]) -> list[Setting]:
    """Both kinds of text in groups of 64, and other groups with the encyclopedia."""
    both = [Setting(scheme, width, GROUP_SIZE, kind) for width in bits for kind in KINDS for scheme in schemes]
    others = [size for size in group_sizes if size != GROUP_SIZE]
    return both + [
        Setting(scheme, width, size, ENCYCLOPEDIA) for width in bits for size in others for scheme in schemes
    ]


def markdown(results: dict[str, Any]) -> str:
    """Both tables."""
    header = ["scheme", "bits", "group", "calibrated on", *(f"KL divergence, {kind}" for kind in KINDS)]
    rows = [
        [
            row["scheme"],
            str(row["bits"]),
            str(row["group_size"]),
            row["kind"],
            *(with_error(row["scores"][kind], "kl_divergence", 4) for kind in KINDS),
        ]
        for row in results["rows"]
    ]
    summary = (
        f"{results['tokens']} tokens calibrate, {results['evaluation_tokens']} of each kind of text are evaluated; "
        "KL divergence from the float model in nats."
    )
    return page(summary, header, rows, results)


def main() -> None:
    """Measures every setting and writes the results so far after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="WikiText-2's validation split, tokenized")
    parser.add_argument("--tokens", type=int, default=16384, help="for calibration")
    parser.add_argument("--evaluation-tokens", type=int, default=8192, help="of each kind of text")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=["plain", "fast", "best"])
    parser.add_argument("--work", type=Path, default=SCRATCH / "models", help="folder for models")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="few tokens, 4 bits, preset fast; below build/")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.tokens, arguments.evaluation_tokens, arguments.group_sizes = 2048, 2048, [64]
        arguments.bits, arguments.schemes, arguments.output = [4], ["fast"], SCRATCH
    texts = Texts(arguments.text, arguments.work, arguments.tokens, arguments.evaluation_tokens)
    results = beginning("texts", texts.calibration[ENCYCLOPEDIA], texts.evaluation[ENCYCLOPEDIA])
    for setting in settings_of(arguments.schemes, arguments.bits, arguments.group_sizes):
        results["rows"].append(texts.row(setting))
        write_results(results, markdown(results), arguments.output, "texts")


if __name__ == "__main__":
    main()

"""Compares a new run of the lab with the recorded one, and reports the differences.

    python -m experiments.26-gptq-toy.compare NEW RECORDED

On one machine results.json, loss_curve.png and README.md have the same bytes every time. With another instruction set
the normal random numbers differ in their last bit, so a few codes and the last digits of figures differ. Another
version of matplotlib draws other pixels, and the manifest has times and the commit. All these differences are reported.
The exit status is 1 if a figure of results.json differs by more than TOLERANCE, or if the setups differ.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

TOLERANCE = 0.01  # relative
RESULTS, MANIFEST = "results.json", "manifest.json"
FILES = (RESULTS, MANIFEST, "loss_curve.png", "README.md")
# Sums over the layer, which change little if one code differs. Single rows, hashes and ranks are not compared.
FIGURES = (
    *(f"{prefix}loss_{scheme}" for prefix in ("", "fresh_") for scheme in ("rtn", "gptq", "best")),
    *("loss_ratio", "best_ratio", "fresh_loss_ratio", "fresh_best_ratio", "n_grid_changes", "ridge", "ridge_added"),
)
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def without_bits(setup: Mapping[str, Any]) -> dict[str, Any]:
    """The setup without the hash of the weight, whose last bits depend on the instruction set."""
    source = {key: value for key, value in setup["weight_source"].items() if key != "sha256"}
    return {**setup, "weight_source": source}


def compared_results(new: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The differences between the figures, in words, and those that are not allowed."""
    if without_bits(new["setup"]) != without_bits(recorded["setup"]) or new["runs"].keys() != recorded["runs"].keys():
        return "another setup", ["the setups differ"]
    largest, problems = 0.0, []
    for name, run in new["runs"].items():
        for figure in FIGURES:
            ours, theirs = run[figure], recorded["runs"][name][figure]
            if ours == theirs:
                continue
            difference = math.inf if None in (ours, theirs) else abs(ours - theirs) / max(abs(ours), abs(theirs))
            largest = max(largest, difference)
            if difference > TOLERANCE:
                problems.append(f"{name}.{figure}: {ours} instead of {theirs}")
    codes = sum(
        run[f"codes_sha256_{scheme}"] != recorded["runs"][name][f"codes_sha256_{scheme}"]
        for name, run in new["runs"].items()
        for scheme in ("rtn", "gptq", "best")
    )
    total = 3 * len(new["runs"])
    return f"figures differ by at most {largest:.1e}, codes of {codes} of {total} quantized layers differ", problems


def compared_manifests(new: Mapping[str, Any], recorded: Mapping[str, Any]) -> str:
    """The fields of the manifest that differ; times and the commit may always differ."""
    fields = sorted(key for key in new.keys() | recorded.keys() if new.get(key) != recorded.get(key))
    return f"differs in {', '.join(fields)}"


def compared_pages(new: str, recorded: str) -> str:
    """Compares the words of the page, without the digits."""
    same = NUMBER.sub("#", " ".join(new.split())) == NUMBER.sub("#", " ".join(recorded.split()))
    return "the same text with other digits" if same else "another text"


def lines(new: Path, recorded: Path, problems: list[str]) -> Iterator[str]:
    """Yields a line for each file; differences that are not allowed are appended to `problems`."""
    for name in FILES:
        if (new / name).read_bytes() == (recorded / name).read_bytes():
            said = "the same bytes"
        elif name == RESULTS:
            said, wrong = compared_results(*(json.loads((folder / name).read_text()) for folder in (new, recorded)))
            problems += wrong
        elif name == MANIFEST:
            said = compared_manifests(*(json.loads((folder / name).read_text()) for folder in (new, recorded)))
        elif name.endswith(".md"):
            said = compared_pages(*((folder / name).read_text(encoding="utf-8") for folder in (new, recorded)))
        else:
            said = "other bytes"
        yield f"{name}: {said}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path, help="folder of the new run")
    parser.add_argument("recorded", type=Path, help="folder of the recorded run")
    options = parser.parse_args(arguments)
    problems: list[str] = []
    for line in lines(options.new, options.recorded, problems):
        print(line)
    for problem in problems:
        print(f"compare: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

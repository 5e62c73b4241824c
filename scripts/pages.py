"""Keeps README.md and pages of docs/ up to date: the files, the output of commands and the figures that they show.

A part of a page between `<!-- begin KIND ARGUMENT -->` and `<!-- end -->` is generated; text outside of these parts is
edited by hand:

    file PATH         the file, as a code block
    output COMMAND    the output of COMMAND, run from the root of the clone
    markdown PATH     the whole file: tables that a benchmark wrote
    table PATH        the first table of the file
    results           the table of results, from the committed results.json files
    ratios            the ratios of that table

Without --check, the pages are written. With --check nothing is written, and the exit status is 1 if a page is not up to
date. Numbers of an output may differ where they depend on the machine (times, the last digits of a sum); words may not.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/guide.md", "docs/models.md", "docs/results.md", "docs/speed.md")
BEGIN = "<!-- begin "
END = "<!-- end -->"
PART = re.compile(rf"({BEGIN}(?P<kind>\w+)(?: (?P<argument>[^\n]+?))? -->\n)(?P<body>.*?)({END})", re.DOTALL)
LANGUAGES = {".py": "python", ".cpp": "cpp", ".txt": "text"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
# The tolerance for numbers of an output; numbers in lines with seconds are not compared.
RELATIVE_TOLERANCE = 1e-2


def block(language: str, text: str) -> str:
    """A fenced code block."""
    return f"```{language}\n{text.strip(chr(10))}\n```\n"


def file_part(path: str) -> str:
    """A file as a code block."""
    return block(LANGUAGES[Path(path).suffix], (ROOT / path).read_text())


def markdown_part(path: str) -> str:
    """The whole text of a file."""
    return (ROOT / path).read_text()


def table_part(path: str) -> str:
    """The first table of a file."""
    lines = (ROOT / path).read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    return "\n".join(itertools.takewhile(lambda line: line.startswith("|"), lines[first:])) + "\n"


def output_part(command: str) -> str:
    """The output of a command, as a code block."""
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    run = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        raise RuntimeError(f"a page shows `{command}`, which ended with {run.returncode}:\n{run.stderr}")
    return block("text", run.stdout)


def results_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every run whose results are committed, with its name in the pages."""
    lab = json.loads((ROOT / "experiments/26-gptq-toy/results.json").read_text())["runs"]
    yield "the lab, normal inputs", lab["normal"]
    yield "the lab, Cauchy inputs", lab["cauchy"]
    for path in sorted((ROOT / "experiments/minilm").glob("*/results.json")):
        yield f"MiniLM, `{path.parent.name}`", json.loads(path.read_text())["runs"]["file"]


def results_part(_: str) -> str:
    """The table of results: for each run a line for the calibration inputs and one for the fresh inputs."""
    lines = [
        "| layer | inputs | loss RTN | loss GPTQ | loss best | GPTQ / RTN | best / GPTQ | codes changed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in results_rows():
        for label, inputs, prefix, changed in (
            (name, "calibration", "", f"{run['grid_change_share']:.1%}"),
            ("", "fresh", "fresh_", ""),
        ):
            losses = [f"{run[f'{prefix}loss_{scheme}']:.4g}" for scheme in ("rtn", "gptq", "best")]
            ratios = [f"**{run[f'{prefix}{ratio}']:.3f}**" for ratio in ("loss_ratio", "best_ratio")]
            lines.append(f"| {' | '.join([label, inputs, *losses, *ratios, changed])} |")
    return "\n".join(lines) + "\n"


def ratios_part(_: str) -> str:
    """The table of results with the ratios only."""
    lines = ["| layer | inputs | GPTQ / RTN | best / GPTQ |", "|---|---|---|---|"]
    for name, run in results_rows():
        for label, inputs, prefix in ((name, "calibration", ""), ("", "fresh", "fresh_")):
            ratios = [f"{run[f'{prefix}{ratio}']:.3f}" for ratio in ("loss_ratio", "best_ratio")]
            lines.append(f"| {' | '.join([label, inputs, *ratios])} |")
    return "\n".join(lines) + "\n"


MAKERS = {
    "file": file_part,
    "markdown": markdown_part,
    "output": output_part,
    "ratios": ratios_part,
    "results": results_part,
    "table": table_part,
}


def remade(part: re.Match[str]) -> str:
    """A part with its generated text."""
    return f"{part[1]}{MAKERS[part['kind']](part['argument'] or '')}{part[5]}"


def parts_of(text: str) -> list[re.Match[str]]:
    """The parts of a page, from first to last.

    Raises:
        ValueError: if a marker does not belong to exactly one part.
    """
    parts = list(PART.finditer(text))
    markers = (text.count(BEGIN), text.count(END))
    if markers != (len(parts), len(parts)):
        raise ValueError(f"{len(parts)} parts have {markers[0]} begins and {markers[1]} ends")
    return parts


def agree(old: str, new: str) -> bool:
    """Whether two outputs differ only in numbers that depend on the machine."""
    old_lines, new_lines = old.splitlines(), new.splitlines()
    timed = False
    if len(old_lines) != len(new_lines):
        return False
    for old_line, new_line in zip(old_lines, new_lines, strict=True):
        # A table's lines under "seconds" are indented.
        timed = "second" in new_line or (timed and new_line.startswith(" "))
        if re.sub(r"\s+", " ", NUMBER.sub("#", old_line)) != re.sub(r"\s+", " ", NUMBER.sub("#", new_line)):
            return False
        pairs = zip(NUMBER.findall(old_line), NUMBER.findall(new_line), strict=True)
        if not timed and not all(math.isclose(float(a), float(b), rel_tol=RELATIVE_TOLERANCE) for a, b in pairs):
            return False
    return True


def stale_parts(page: str) -> list[str]:
    """The parts of a page that are not up to date, each with the text that it should have."""
    stale = []
    for part in parts_of((ROOT / page).read_text()):
        made = remade(part)
        same = agree(part[0], made) if part["kind"] == "output" else part[0] == made
        if not same:
            stale.append(f"{page}: `{part['kind']} {part['argument'] or ''}` should read\n{made}")
    return stale


def main() -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is not up to date")
    if parser.parse_args().check:
        stale = [part for page in PAGES for part in stale_parts(page)]
        print("\n".join(stale) or f"true: {', '.join(PAGES)}")
        return 1 if stale else 0
    for page in PAGES:
        text = (ROOT / page).read_text()
        parts_of(text)
        (ROOT / page).write_text(PART.sub(remade, text))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks of models share: schemes, texts, figures with their standard errors."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

import miniquant
from benchmarks.common.measuring import command_line, machine, machine_line, versions
from benchmarks.common.tables import table
from miniquant.recipe import CORRECTION_OF_BEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LENGTH = 512  # of a window, in tokens
ALIKE = ", tokens alike"
BY_LAYER = "best, bits by layer"
UNIFORM: dict[str, Any] = {"token_weights": "uniform"}
# By name, as the table has it, in the order of its rows.
SCHEMES: dict[str, dict[str, Any]] = {
    # Rounding to nearest is what happens to a layer that saw fewer tokens than it needs.
    "RTN": {"preset": "plain", "unseen": "rtn", "min_tokens": 1 << 40},
    "plain": {"preset": "plain", **UNIFORM},
    f"fast{ALIKE}": {"preset": "fast", **UNIFORM},
    "fast": {"preset": "fast"},
    "fast, corrected": {"preset": "fast", "correction": CORRECTION_OF_BEST},
    f"best{ALIKE}": {"preset": "best", "correction": 0, **UNIFORM},
    "best, not corrected": {"preset": "best", "correction": 0},
    "best, inputs corrected": {"preset": "best", "stream_correction": 0},
    "best": {"preset": "best"},
    BY_LAYER: {"preset": "best"},
    "fast, rotated": {"preset": "fast", "rotation": True},
    "best, rotated": {"preset": "best", "rotation": True},
}


def recipe_named(scheme: str, **options: Any) -> miniquant.Recipe:
    """The recipe of a scheme, with further options for all layers."""
    stated = {**SCHEMES[scheme], **options}
    rotation = stated.pop("rotation", False)
    return miniquant.Recipe(miniquant.LayerOptions(**stated), rotation=rotation)


def readable(text: str) -> str:
    """WikiText's tokenized form as a text that people write, with "one" for unknown words."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    text = re.sub(r" ([.,;:!?)'%])", r"\1", text).replace("( ", "(").replace(" n't", "n't")
    return text.replace("<unk>", "one")


def docstrings(folder: Path | None = None) -> str:
    """Docstrings of the modules of a folder, of Python's standard library by default, in the order of their paths."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text is not None:
                    found.append(textwrap.dedent(text).strip())
    return "\n\n".join(found) + "\n"


def halves(text: str) -> tuple[str, str]:
    """A text for calibration and one for evaluation, cut at a line."""
    middle = text.index("\n", len(text) // 2)
    return text[:middle], text[middle:]


def halves_as_windows(
    text: str, stem: str, folder: Path, tokenizer: Any, tokens: int, evaluation_tokens: int
) -> tuple[miniquant.Calibration, miniquant.Calibration]:
    """Windows of a text's halves, for calibration and for evaluation; the halves stay as <stem>*.txt in the folder."""
    found = []
    names = ("calibration", "evaluation")
    for name, half, count in zip(names, halves(text), (tokens, evaluation_tokens), strict=True):
        path = folder / f"{stem}{name}.txt"
        path.write_text(half, encoding="utf-8")
        found.append(miniquant.load_calibration(path, tokenizer, tokens=count, sequence_length=LENGTH, short="pack"))
    return found[0], found[1]


def float_model(folder: Path) -> Any:
    """The model of a folder in float32, in evaluation mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def beginning(name: str, calibration: miniquant.Calibration, evaluation: miniquant.Calibration) -> dict[str, Any]:
    """The results of a part of scripts/benchmark before its first row."""
    return {
        "command": command_line("scripts/benchmark", name),
        "machine": machine(torch.get_num_threads()),
        "versions": versions(),
        "tokens": calibration.tokens,
        "evaluation_tokens": evaluation.tokens,
        "rows": [],
    }


def page(
    summary: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    results: dict[str, Any],
    *,
    numbers: bool = False,
) -> str:
    """A page of results: what they are of, the table (as of :func:`table`), the command and the machine."""
    return "\n\n".join([summary, table(header, rows, numbers=numbers), machine_line(results)]) + "\n"


def report_of_run(folder: Path, output: Path, *options: str, launcher: Sequence[str] = ()) -> dict[str, Any]:
    """The report of ``miniquant quantize`` in a process of its own, or in those that a launcher of Python starts."""
    command = [sys.executable, *launcher, "-m", "miniquant", "quantize", str(folder), str(output), *options]
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    return report


def answer_of_peer(
    python: Path, script: str, work: Path, *arguments: object, options: Sequence[str] = ()
) -> dict[str, Any]:
    """The last line, JSON, of what a script beside this one prints in the environment of the peers.

    Args:
        python: of that environment.
        script: name of the file.
        work: where it runs.
        arguments: of the script; the number of threads follows them.
        options: follow that.
    """
    given = map(str, (Path(__file__).with_name(script), *arguments, torch.get_num_threads(), *options))
    command = [str(python.absolute()), *given]
    said = subprocess.run(command, check=True, cwd=work, stdout=subprocess.PIPE, text=True).stdout
    answer: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return answer


def with_error(scores: Mapping[str, Any], name: str, digits: int, scale: float = 1) -> str:
    """A figure of :meth:`miniquant.LanguageScores.to_dict` with its standard error."""
    value, error = scores[name]["value"] * scale, scores[name]["standard_error"] * scale
    return f"{value:.{digits}f} ± {error:.{digits}f}"

"""What the documentation shows is what the code says and does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def diagram(path: str) -> list[str]:
    """The picture and the loop under it, without comment marks and indentation of the whole."""
    text = (ROOT / path).read_text()
    match = re.search(r"^\S*[ \t]*K columns\n.*?the later blocks$", text, re.DOTALL | re.MULTILINE)
    assert match, f"{path} has no diagram"
    lines = [" ".join(line.removeprefix("//").split()) for line in match[0].splitlines()]
    return [line for line in lines if line]


def test_the_diagram_stands_above_the_loop_and_in_the_documentation() -> None:
    assert len(diagram("docs/algorithm.md")) > 15
    assert diagram("docs/algorithm.md") == diagram("csrc/algorithms/gptq_reference.cpp")


def test_the_diagram_names_what_the_loop_names() -> None:
    source = (ROOT / "csrc/algorithms/gptq_reference.cpp").read_text()
    code = re.sub(r"//.*", "", source)
    names = ["B_cur", "B_cur_k_start", "B_cur_k_end", "B_cur_Err1", "Hinv_cur", "G_k_start", "G_k_end", "w_t", "err1"]
    for name in names:
        assert re.search(rf"\b{name}\b", code), f"the loop does not use {name}"
        assert any(re.search(rf"\b{name}\b", line) for line in diagram("docs/algorithm.md")), (
            f"no {name} in the diagram"
        )


@pytest.mark.slow
def test_readme_is_true() -> None:
    run = subprocess.run(
        [sys.executable, "scripts/readme.py", "--check"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr

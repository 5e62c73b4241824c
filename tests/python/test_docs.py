"""What the documentation shows is what the code says and does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts_as_modules import load

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


def test_a_part_of_readme_is_one_pair_of_markers() -> None:
    readme = load("scripts/readme.py")
    page = "<!-- begin results -->\na\n<!-- end -->\nbetween\n<!-- begin file x y.py -->\nb\n<!-- end -->\nafter\n"
    parts = [(part["kind"], part["argument"], part["body"]) for part in readme.parts_of(page)]
    assert parts == [("results", None, "a\n"), ("file", "x y.py", "b\n")]
    for broken in (
        page.replace("<!-- end -->", "", 1),
        page + "<!-- end -->\n",
        page + "<!-- begin results -->\n",
        page.replace(" -->", "-->", 1),
    ):
        with pytest.raises(ValueError, match="parts have"):
            readme.parts_of(broken)


@pytest.mark.slow
def test_readme_is_true() -> None:
    run = subprocess.run(
        [sys.executable, "scripts/readme.py", "--check"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr

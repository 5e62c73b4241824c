"""The documentation agrees with the code and its output."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts_as_modules import load

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), ROOT / "csrc/README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*/README.md")]


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


def test_a_part_of_a_page_is_one_pair_of_markers() -> None:
    pages = load("scripts/pages.py")
    page = "<!-- begin results -->\na\n<!-- end -->\nbetween\n<!-- begin file x y.py -->\nb\n<!-- end -->\nafter\n"
    parts = [(part["kind"], part["argument"], part["body"]) for part in pages.parts_of(page)]
    assert parts == [("results", None, "a\n"), ("file", "x y.py", "b\n")]
    for broken in (
        page.replace("<!-- end -->", "", 1),
        page + "<!-- end -->\n",
        page + "<!-- begin results -->\n",
        page.replace(" -->", "-->", 1),
    ):
        with pytest.raises(ValueError, match="parts have"):
            pages.parts_of(broken)


def test_readme_maps_every_folder() -> None:
    listing = subprocess.run(["git", "ls-files"], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    folders = {path.split("/")[0] for path in listing.splitlines() if "/" in path and not path.startswith(".")}
    table = (ROOT / "README.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    mapped = {path.split("/")[0] for path in re.findall(r"^\| `([^`]+/)` \|", table, re.MULTILINE)}
    assert mapped == folders


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_a_table_part_is_the_first_table_of_its_page() -> None:
    pages = load("scripts/pages.py")
    lines = pages.table_part("docs/torch.md").splitlines()
    assert lines[0] == "| torch | Python | wheel | operator tests | date |"
    assert all(line.startswith("|") for line in lines)
    assert len(lines) > 2


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in PAGES))
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page} links to {link}"


@pytest.mark.slow
def test_pages_are_true() -> None:
    run = subprocess.run(
        [sys.executable, "scripts/pages.py", "--check"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr

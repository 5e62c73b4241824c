"""The quality benchmark: its scores, its page, and a run from end to end."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

import miniquant

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["first", "second"]
ORDERED_GROUPS = "groups of ordered columns"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return importlib.import_module("benchmarks.quality.__main__")


@pytest.fixture(scope="module")
def report(quality: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.quality.report")


def layers(quality: ModuleType, plan: Any) -> dict[str, Any]:
    """Two layers of 96 x 128 with correlated inputs."""
    generator = torch.Generator().manual_seed(7)
    made = {}
    for name in NAMES:
        mix = torch.randn(128, 128, generator=generator) / 128**0.5 + torch.eye(128)
        prefixes = quality.Prefixes(128, {plan.few_tokens, plan.tokens, *plan.ridge_tokens})
        prefixes.update(torch.randn(plan.tokens, 128, generator=generator) @ mix)
        fresh = torch.randn(2000, 128, generator=generator) @ mix
        weight = torch.randn(96, 128, generator=generator) * 0.02
        made[name] = quality.Layer(weight, prefixes.after, fresh.T @ fresh / 2000)
    return made


@pytest.fixture
def plan(quality: ModuleType) -> Any:
    return quality.QUICK._replace(tokens=1500)


def test_loss_is_the_quadratic_form_with_the_ridge_on_the_diagonal(quality: ModuleType) -> None:
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
    dequantized = torch.tensor([[0.5, 2.0], [1.0, 1.0]])
    hessian = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    # Errors (0.5, 0) and (-1, -2): 0.25 * 2, and 2 + 2 * 2 + 4 * 4; the mean of the diagonal is 3.
    assert quality.loss(weight, dequantized, hessian) == pytest.approx(0.5 + 22.0)
    assert quality.loss(weight, dequantized, hessian, ridge=0.1) == pytest.approx(22.5 + 0.3 * (0.25 + 5.0))


def test_ratios_are_averaged_geometrically(report: ModuleType) -> None:
    assert report.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert report.geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)
    assert report.relative([1.0, 8.0], [4.0, 2.0]) == pytest.approx(1.0)


def test_spearman_of_known_examples(quality: ModuleType) -> None:
    # IQ and hours of television a week: the worked example of Wikipedia's article, rho = -29 / 165.
    iq = torch.tensor([106.0, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    hours = torch.tensor([7.0, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert quality.spearman(iq, hours) == pytest.approx(-29 / 165)
    assert quality.spearman(iq, iq.exp2()) == pytest.approx(1.0)
    assert quality.spearman(iq, -iq) == pytest.approx(-1.0)
    # With a tie: ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4, whose correlation is 4.5 / sqrt(4.5 * 5).
    assert quality.ranks(torch.tensor([1.0, 2, 2, 3])).tolist() == [1.0, 2.5, 2.5, 4.0]
    tied = quality.spearman(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 3, 2, 4]))
    assert tied == pytest.approx(math.sqrt(4.5 / 5))


def test_every_pair_counts_once(quality: ModuleType) -> None:
    rows = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    expected = [float(rows[i] @ rows[j]) for i in range(5) for j in range(i + 1, 5)]
    assert quality.pair_similarities(rows).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("batches", [[500], [100] * 5, [1, 31, 1, 95, 372]])
def test_prefixes_are_the_first_tokens(quality: ModuleType, batches: list[int]) -> None:
    inputs = torch.randn(500, 16)
    prefixes = quality.Prefixes(16, [128, 32, 400])
    for rows in inputs.split(batches):
        prefixes.update(rows)
    assert list(prefixes.after) == [32, 128, 400]
    for count, accumulator in prefixes.after.items():
        assert accumulator.tokens == count
        expected = inputs[:count].T @ inputs[:count] / count
        torch.testing.assert_close(accumulator.hessian(), expected, rtol=1e-5, atol=1e-5)


def test_query_key_and_value_share_inputs_and_no_others_do(quality: ModuleType) -> None:
    block = [name for name in quality.FULL.layers if name.startswith("encoder.layer.3.")]
    assert [quality.inputs_of(name) == name for name in block] == [True, False, False, True, True, True]
    assert {quality.inputs_of(name) for name in block[:3]} == {"encoder.layer.3.attention.self.query"}
    assert len(set(quality.FULL.layers)) == 36


@pytest.mark.parametrize("bits", [4, 2])
def test_schemes_are_compared_at_the_same_bits(quality: ModuleType, plan: Any, bits: int) -> None:
    layer = layers(quality, plan)["first"]
    hessian = layer.calibration[plan.tokens].hessian()
    for scheme in quality.SCHEMES:
        groups = quality.quantized(scheme, layer.weight, hessian, bits).reshape(-1, quality.GROUP_SIZE)
        levels = max(len(group.unique()) for group in groups)
        full = scheme not in (quality.RTN, quality.PLAIN, "activation order")
        assert levels <= 2**bits - (0 if full else 1), scheme
        assert levels >= 2**bits - 2, scheme


def test_losses_of_every_scheme_lie_between_best_and_rtn(quality: ModuleType, plan: Any) -> None:
    measured = quality.measure_losses(layers(quality, plan), plan.tokens, (4, 3))
    assert list(measured) == ["4", "3"]
    for schemes in measured.values():
        for i in range(len(NAMES)):
            calibration = {scheme: losses["calibration"][i] for scheme, losses in schemes.items()}
            assert max(calibration, key=lambda scheme: calibration[scheme]) == quality.RTN
            assert calibration[quality.BEST] < 0.8 * calibration[quality.PLAIN]
            held_out = {scheme: losses["held_out"][i] for scheme, losses in schemes.items()}
            assert held_out[quality.BEST] < held_out[quality.PLAIN] < held_out[quality.RTN]


def test_ridges_are_judged_on_fresh_inputs(
    quality: ModuleType, report: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = quality.measure_ridges(layers(quality, plan), plan)
    few = measured["schemes"][quality.PLAIN]["32"]
    # 32 tokens do not determine 128 inputs: the small ridge does worse than the large one.
    assert report.relative(few["ridges"]["0.01"], measured["rtn"]) > report.relative(
        few["ridges"]["1.0"], measured["rtn"]
    )

    def choose_ridge(_weight: torch.Tensor, accumulator: Any, **_options: Any) -> Any:
        return SimpleNamespace(ridge=1.0 if accumulator.tokens == 32 else 0.1)

    monkeypatch.setattr(miniquant, "choose_ridge", choose_ridge)
    by_tokens = quality.measure_ridges(layers(quality, plan), plan)["schemes"][quality.PLAIN]
    assert by_tokens["32"]["chosen_ridge"] == [1.0, 1.0]
    assert by_tokens["32"]["chosen"] == few["ridges"]["1.0"]
    assert by_tokens["512"]["chosen"] == by_tokens["512"]["ridges"]["0.1"]


class ToyEncoder:
    """One Linear layer over tokens that depend on the text alone."""

    def __init__(self) -> None:
        self.linear = torch.nn.Linear(128, 96, bias=False).requires_grad_(requires_grad=False)

    def encode(self, text: str) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(1, len(text), 128, generator=torch.Generator().manual_seed(len(text)))}

    def model(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.linear(x))


def test_embeddings_are_compared_with_the_layers_quantized_and_then_restored(quality: ModuleType, plan: Any) -> None:
    toy = ToyEncoder()
    before = toy.linear.weight.clone()
    layer = layers(quality, plan)["first"]._replace(weight=toy.linear.weight.detach())
    texts = ["x" * length for length in range(3, 23)]
    measured = quality.measure_embeddings(toy, {"first": layer}, texts, plan)
    assert torch.equal(toy.linear.weight, before)

    # RTN once more, by hand.
    for bits in (4, 2):
        nearest = quality.quantized(quality.RTN, before, torch.eye(128), bits)
        pairs = []
        for text in texts:
            tokens = toy.encode(text)["x"][0]
            pairs.append([(tokens @ weight.T).mean(dim=0) for weight in (before, nearest)])
        cosines = [float(torch.nn.functional.cosine_similarity(a, b, dim=0)) for a, b in pairs]
        figures = measured[str(bits)][quality.RTN]
        assert figures["mean_cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
        assert figures["least_cosine"] == pytest.approx(min(cosines), abs=1e-5)
    assert measured["2"][quality.RTN]["spearman"] < measured["4"][quality.RTN]["spearman"] <= 1


def test_embeddings_are_what_the_model_card_says(quality: ModuleType) -> None:
    encoder = quality.Encoder()
    texts = ["A short text.", "Another one, which is longer than the first, so that the first is padded."]
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = encoder.model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
    torch.testing.assert_close(quality.embeddings(encoder, texts), expected, rtol=1e-4, atol=1e-5)


def program(path: Path, body: str) -> Path:
    """A program that replaces the Python of the peers."""
    # A first line "#!<python>" would end at a space in its path.
    code = path.with_suffix(".py")
    code.write_text(f"import sys\n{body}\n")
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(code))} "$@"\n')
    path.chmod(0o755)
    return path


def test_peers_are_scored_from_the_weights_they_leave(quality: ModuleType, plan: Any, tmp_path: Path) -> None:
    peer = program(
        tmp_path / "python",
        "import pathlib\n"
        "from safetensors.torch import load_file, save_file\n"
        "for path in pathlib.Path(sys.argv[3]).glob('*.safetensors'):\n"
        "    tensors = load_file(path)\n"
        "    assert tensors['hessian'].shape == (128, 128)\n"
        "    save_file({'zeros': 0 * tensors['weight'], 'exact': tensors['weight']}, path.with_suffix('.peers'))\n"
        "print('a word'); print('{\"peer\": \"1.0\"}')",
    )
    made = layers(quality, plan)
    measured = quality.measure_peers(made, plan, peer)
    assert measured["versions"] == {"peer": "1.0"}
    losses = measured["losses"]["4 bits, symmetric"]
    assert losses["exact"] == {"calibration": [0.0, 0.0], "held_out": [0.0, 0.0]}
    for i, layer in enumerate(made.values()):
        expected = float(((layer.weight @ layer.fresh) * layer.weight).sum())
        assert losses["zeros"]["held_out"][i] == pytest.approx(expected, rel=1e-4)


def test_peers_that_fail_or_are_missing(
    quality: ModuleType, plan: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = program(tmp_path / "failing", "sys.exit('no such module')")
    with pytest.raises(SystemExit, match="no such module"):
        quality.measure_peers(layers(quality, plan), plan, failing)
    assert quality.measure_peers({}, plan, tmp_path / "missing") is None
    said = capsys.readouterr().err
    assert str(tmp_path / "missing") in said
    assert "benchmarks/peers/setup" in said


def example(quality: ModuleType) -> dict[str, Any]:
    """The contents of a quality.json with two layers and round numbers."""

    def losses(factor: float) -> dict[str, list[float]]:
        return {"calibration": [factor, 10 * factor], "held_out": [2 * factor, 80 * factor]}

    factors = dict(zip(quality.SCHEMES, (4.0, 1.0, 0.8, 0.75, 0.625, 0.5, 0.25, 0.45), strict=True))
    schemes = {scheme: losses(factor) for scheme, factor in factors.items()}
    ridges = {"0.01": [1.0, 8.0], "1.0": [2.0, 2.0]}
    figures = {"mean_cosine": 0.98765, "least_cosine": 0.9, "spearman": 0.87654}
    return {
        "setup": {
            "model": "a model",
            "layers": NAMES,
            "tokens": 1100,
            "few_tokens": 128,
            "fresh_tokens": 2200,
            "texts": 20,
            "group_size": 64,
            "ridge": 0.01,
            "torch": "2",
            "miniquant": "1",
            "processor": "any",
        },
        "losses": {"4": schemes, "2": copy.deepcopy(schemes)},
        "few_tokens": schemes,
        "ridges": {"rtn": [4.0, 4.0], "schemes": {quality.PLAIN: {"32": {"ridges": ridges, "chosen": [2.0, 2.0]}}}},
        "embeddings": {"4": dict.fromkeys(quality.SCHEMES, figures)},
        "peers": {
            "versions": {"peer": "3.1"},
            "losses": {
                "4 bits, symmetric": {
                    "one": losses(1.0),
                    f"two, {ORDERED_GROUPS}": {"calibration": [8.0, 2.5], "held_out": [0.5, 80.0]},
                },
                "2 bits, asymmetric": {"one": losses(0.5), f"two, {ORDERED_GROUPS}": losses(4.0)},
            },
        },
        "seconds": {
            "rows": 512,
            "columns": 512,
            "group_size": 128,
            "rounds": 3,
            "threads": 2,
            "schemes": {scheme: 0.5 / factor for scheme, factor in factors.items() if scheme != quality.RTN},
        },
    }


def rows(part: str) -> dict[str, list[str]]:
    """The cells of each row of a part's tables, by the row's first cell."""
    cells = [re.split(r" \| ", line.strip("| ")) for line in part.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in cells}


def test_page_shows_what_was_measured(quality: ModuleType, report: ModuleType) -> None:
    results = example(quality)
    parts = {name: make(results) for name, make in report.PARTS.items()}
    assert "2 Linear layers, 1,100 calibration tokens, 2,200 held-out tokens, 20 held-out texts" in parts["setup"]
    assert "peer 3.1" in parts["setup"]
    assert rows(parts["losses"])["best"] == ["0.500"] * 5 + ["2.00"]
    assert rows(parts["losses"])[quality.RTN][:5] == ["4.000"] * 5
    assert rows(parts["few_tokens"])["best"] == ["0.500", "0.500", "0.125"]
    # Ridges: sqrt(1/4 * 8/4), 2/4, the better one of each layer, sqrt(1/4 * 2/4), the chosen one, and 2/1 of its first.
    assert rows(parts["ridges"])["32"] == ["0.707", "0.500", "0.354", "0.500", "2.000"]
    assert rows(parts["best_ridges"])["32"] == ["1", "1"]
    assert rows(parts["best_ridges"])["`first`"] == ["0.01"]
    assert rows(parts["best_ridges"])["`second`"] == ["1.0"]
    assert rows(parts["embeddings"])["best"] == ["0.9877", "0.8765"]
    # Of the two peers the better one counts, layer by layer: sqrt(0.5/1 * 5/2.5) and sqrt(1/0.5 * 40/80).
    assert rows(parts["peers"])["4 bits, symmetric"] == ["0.500", "0.500", "1.000", "1.000"]
    assert rows(parts["peers"])["2 bits, asymmetric"] == ["0.500"] * 4
    assert rows(parts["peers"])[f"two, {ORDERED_GROUPS}"][0] == "0.500"


def test_page_says_what_is_missing(quality: ModuleType, report: ModuleType) -> None:
    results = example(quality)
    results["peers"] = None
    assert "not measured" in report.peers_part(results)
    assert "peer" not in report.setup_part(results)


def test_only_the_marked_parts_of_the_page_change(quality: ModuleType, report: ModuleType) -> None:
    template = (
        "before\n<!-- begin few_tokens -->\nold\n<!-- end -->\nbetween\n<!-- begin setup -->\n<!-- end -->\nafter\n"
    )
    results = example(quality)
    made = report.page(template, results)
    assert made == (
        f"before\n<!-- begin few_tokens -->\n{report.few_tokens_part(results)}<!-- end -->\n"
        f"between\n<!-- begin setup -->\n{report.setup_part(results)}<!-- end -->\nafter\n"
    )
    assert report.page(made, results) == made


def test_page_and_plot_are_those_of_the_committed_figures(report: ModuleType) -> None:
    content = report.SOURCE.read_bytes()
    template = (report.DOCS / "quality.md").read_text()
    assert set(re.findall(r"<!-- begin (\w+) -->", template)) == set(report.PARTS)
    assert report.page(template, json.loads(content)) == template
    with Image.open(report.DOCS / "quality.png") as image:
        assert image.info["Source"] == f"quality.json sha256 {hashlib.sha256(content).hexdigest()}"


def test_json_has_every_list_on_one_line(quality: ModuleType) -> None:
    results = {"a": {"b": [1.5, 2e-7, 3]}, "c": ["x y", "z"], "d": None, "e": []}
    text = quality.text_of(results)
    assert json.loads(text) == results
    assert '"b": [1.5, 2e-07, 3]' in text


@pytest.mark.nightly
def test_quick_runs_from_end_to_end(tmp_path: Path, run: Callable[..., str]) -> None:
    output = run(
        *(sys.executable, "-m", "benchmarks.quality"),
        *("--quick", "--output", tmp_path, "--peers", tmp_path / "none"),
        cwd=ROOT,
    )
    assert f"wrote {tmp_path / 'quality.json'}" in output
    results = json.loads((tmp_path / "quality.json").read_text())
    for schemes in results["losses"].values():
        assert sum(schemes["best"]["held_out"]) < sum(schemes["plain GPTQ"]["held_out"])
    cosine = {bits: schemes["best"]["mean_cosine"] for bits, schemes in results["embeddings"].items()}
    assert cosine["4"] > cosine["2"] > 0.9
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert "2 Linear layers" in (tmp_path / "quality.md").read_text()

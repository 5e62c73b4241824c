"""Bits for each layer: the knapsack is exact, and costs are what quantizing does to the model's predictions."""

from __future__ import annotations

import copy
import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import small_models
from miniquant import LayerOptions, Recipe, Rule, bits, cli, quantize_model
from model_folder import make_folder

if TYPE_CHECKING:
    from pathlib import Path

COSTS = st.dictionaries(st.sampled_from(bits.WIDTHS), st.floats(0, 10), min_size=1)
UNITS = st.lists(st.tuples(st.sampled_from([6, 9, 15, 60]), COSTS), min_size=1, max_size=5)


def units_of(drawn: list[tuple[int, dict[int, float]]]) -> list[bits.Unit]:
    return [bits.Unit((f"layer{number}",), weights, costs) for number, (weights, costs) in enumerate(drawn)]


# The knapsack


@given(UNITS, st.floats(2, 8))
def test_no_other_allocation_costs_less(drawn: list[tuple[int, dict[int, float]]], average: float) -> None:
    units = units_of(drawn)
    total = sum(unit.weights for unit in units)
    feasible = [
        sum(unit.costs[width] for unit, width in zip(units, chosen, strict=True))
        for chosen in itertools.product(*(unit.costs for unit in units))
        if sum(unit.weights * width for unit, width in zip(units, chosen, strict=True)) <= average * total + 1e-6
    ]
    if not feasible:
        with pytest.raises(ValueError, match="average of at least"):
            bits.allocate(units, average)
        return
    found = bits.allocate(units, average)
    assert found.cost == pytest.approx(min(feasible), rel=1e-12, abs=1e-300)
    assert found.average <= average + 1e-6
    assert found.cost == pytest.approx(sum(unit.costs[found.bits[unit.names[0]]] for unit in units))
    assert found.average == pytest.approx(sum(unit.weights * found.bits[unit.names[0]] for unit in units) / total)


def test_layers_of_a_unit_get_the_same_bits_and_more_room_never_costs_more() -> None:
    costs = [{width: factor * 4.0**-width for width in bits.WIDTHS} for factor in (1.0, 5.0, 0.1, 30.0)]
    units = [bits.Unit((f"{number}.q", f"{number}.k"), 64 * (number + 1), one) for number, one in enumerate(costs)]
    allocations = bits.curve(units, [2, 2.5, 3, 4, 5.5, 8])
    for one in allocations:
        assert all(one.bits[f"{number}.q"] == one.bits[f"{number}.k"] for number in range(4))
    assert [one.cost for one in allocations] == sorted((one.cost for one in allocations), reverse=True)
    assert allocations[-1].cost == bits.uniform_cost(units, 8)
    assert allocations[3].cost < bits.uniform_cost(units, 4)


def test_sizes_without_a_common_divisor_never_exceed_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [
        bits.Unit((str(number),), 10007 + 1009 * number, {width: (number + 1) * 4.0**-width for width in bits.WIDTHS})
        for number in range(12)
    ]
    exact = bits.allocate(units, 4.0)
    monkeypatch.setattr(bits, "MOST_STATES", 5000)
    found = bits.allocate(units, 4.0)
    assert exact.average <= 4.0
    assert 3.9 < found.average <= 4.0
    assert exact.cost <= found.cost < 1.1 * exact.cost


def test_averages_that_cannot_be() -> None:
    units = [bits.Unit(("a",), 10, {3: 1.0, 4: 0.5})]
    with pytest.raises(ValueError, match=r"average of at least 3 bits, but got 2\.5"):
        bits.allocate(units, 2.5)
    with pytest.raises(ValueError, match="got nan"):
        bits.allocate(units, float("nan"))
    with pytest.raises(ValueError, match="layers to choose bits for, but got none"):
        bits.allocate([], 4)


def test_a_recipe_has_the_bits_and_all_else() -> None:
    allocation = bits.Allocation({"a.0": 3, "a.1": 3, "b[0]": 5, "c": 4}, 3.5, 0.0)
    recipe = Recipe(
        LayerOptions(group_size=32, bits=8), [Rule("c", {"bits": 8, "symmetric": False}), Rule("*", {"ridge": 0.1})]
    )
    made = bits.recipe_of(allocation, recipe)
    assert {name: made.options(name).bits for name in allocation.bits} == dict(allocation.bits)
    assert not made.options("c").symmetric
    assert made.options("a.0").ridge == 0.1
    assert made.options("b[0]").ridge == 0.1
    assert made.options("a.0").group_size == 32
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made


# Costs


def language_model() -> nn.Module:
    model = small_models.decoder("Llama")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": small_models.ids(4, 32, seed)} for seed in range(count)]


def divergence(model: Any, original: Any) -> float:
    ids = small_models.ids(32, 32, 77)
    with torch.no_grad():
        ours, theirs = (one(ids).logits.log_softmax(-1) for one in (model, original))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_costs_are_the_divergence_that_quantizing_a_layer_brings() -> None:
    model = language_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = LayerOptions(group_size=16, preset="fast", ridge=bits.RIDGE)
    units = bits.measure_units(model, batches(16), options, widths=(3,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert [len(unit.names) for unit in units] == [3, 1, 2, 1] * 2
    assert sum(unit.weights for unit in units) == sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    for unit in units:
        quantized = copy.deepcopy(model)
        rules = [Rule(name, {"skip": False, "bits": 3}) for name in unit.names]
        own = LayerOptions(**{**options.to_dict(), "skip": True})
        quantize_model(quantized, batches(16), Recipe(own, rules), held_out=0)
        # Errors of tokens, and of q, k and v, are not independent, so a cost is off by a factor at most this large.
        assert 0.2 < unit.costs[3] / divergence(quantized, model) < 2, unit.names


def test_fewer_bits_cost_more_and_the_same_seed_gives_the_same() -> None:
    first, second = (bits.measure_units(language_model(), batches(4), LayerOptions(group_size=16)) for _ in range(2))
    for unit, other in zip(first, second, strict=True):
        assert unit.costs == other.costs
        values = [unit.costs[width] for width in bits.WIDTHS]
        assert values == sorted(values, reverse=True)


def test_layers_that_are_skipped_and_padding() -> None:
    padded = [small_models.padded(2, 12, seed) for seed in range(4)]
    units = bits.measure_units(
        language_model(), padded, LayerOptions(group_size=16), widths=(4,), skip=["model.layers.0.mlp.down_proj"]
    )
    assert "model.layers.0.mlp.down_proj" not in {name for unit in units for name in unit.names}
    assert all(unit.costs[4] > 0 for unit in units)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least two batches"):
        bits.measure_units(language_model(), [])
    with pytest.raises(ValueError, match="model with Linear layers, but got none"):
        bits.measure_units(nn.Embedding(3, 3), batches(2))
    with pytest.raises(TypeError, match=r"logits \[B, T, V\], but got BertModel"):
        bits.measure_units(small_models.bert().get_submodule("bert"), batches(2))


# The command


def test_command_writes_a_recipe_that_quantize_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "llama", small_models.decoder("Llama", vocab_size=300, max_position_embeddings=128))
    recipe, picture = tmp_path / "bits.json", tmp_path / "bits.png"
    arguments = ["--average", "3.5", "--group-size", "16", "--tokens", "512", "--sequence-length", "64"]
    assert cli.main(["bits", str(folder), str(recipe), *arguments, "--plot", str(picture)]) == 0
    output = capsys.readouterr().out
    made = Recipe.load(recipe)
    sizes = {"q": 32 * 32, "k": 16 * 32, "v": 16 * 32, "o": 32 * 32, "gate": 48 * 32, "up": 48 * 32, "down": 32 * 48}
    total = spent = 0
    for layer in range(2):
        for kind, size in sizes.items():
            module = "self_attn" if len(kind) == 1 else "mlp"
            total += size
            spent += size * made.options(f"model.layers.{layer}.{module}.{kind}_proj").bits
    assert 3.3 < spent / total <= 3.5
    assert f"{spent / total:.3f} bits on average" in output
    assert made.defaults.group_size == 16
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (
        cli.main(
            [
                "quantize",
                str(folder),
                str(tmp_path / "out"),
                "--recipe",
                str(recipe),
                "--tokens",
                "512",
                "--preset",
                "fast",
            ]
        )
        == 0
    )
    assert cli.main(["bits", str(folder), str(tmp_path / "bits.toml"), *arguments]) == 2
    assert cli.main(["bits", str(folder), str(recipe), "--widths", "3,9"]) == 2
    assert "numbers from 2 to 8" in capsys.readouterr().err

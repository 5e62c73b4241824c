"""quantize_model: what it does to a model, what it reports, and what it refuses."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import small_models
from miniquant import (
    HessianAccumulator,
    LayerOptions,
    Recipe,
    Rule,
    dequantize,
    gptq,
    gptq_auto,
    load_calibration,
    preset,
    quantization_loss,
    quantizer,
    rtn,
)
from miniquant.batches import _held_out_batches, _size
from miniquant.layer_hessians import _Batches, _DeviceSums
from miniquant.modules import find_sites, siblings_of
from miniquant.plan import as_recipe, plan_model
from miniquant.quantize import quantize_model
from miniquant.results import LayerResult, ModelResult, QuantizationError
from miniquant.ridge import LinAlgError, ridge_by_halves
from miniquant.token_weights import norm_weights, weigh

if TYPE_CHECKING:
    from collections.abc import Sequence

FAST = LayerOptions(preset="fast", group_size=16)


def inputs_with_structure(rows: int, columns: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=torch.Generator().manual_seed(99))
    drawn = torch.randn(rows, columns, generator=draw)
    return drawn.matmul(mix).div(columns**0.5)


class Chain(nn.Module):
    """Two Linears on one input, and one on what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(32, 24)
        self.right = nn.Linear(32, 24)
        self.last = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.left(x)) * self.right(x))  # type: ignore[no-any-return]


def chain() -> Chain:
    torch.manual_seed(3)
    return Chain().eval()


BATCHES = [inputs_with_structure(64, 32, seed) for seed in range(8)]


def accumulated(batches: Sequence[Tensor], *, halves: bool = False) -> HessianAccumulator:
    """Of inputs that are no causal sequences, with the weights that are the default."""
    accumulator = HessianAccumulator(batches[0].shape[-1], halves=halves)
    for batch in batches:
        accumulator.update(batch, token_weights=weigh(batch, None, "norm", causal=False)[0])
    return accumulator


# What it does


@pytest.mark.parametrize("ridge", ["auto", 0.05])
@pytest.mark.parametrize("name", ["plain", "best"])
def test_each_layer_is_what_the_solver_gives_on_the_inputs_it_then_has(name: Any, ridge: Any) -> None:
    """Step by step by hand, with seven batches for calibration and the last one held out."""
    model, by_hand = chain(), chain()
    options = LayerOptions(bits=3, group_size=16, preset=name, ridge=ridge, correction=0)
    seen: list[tuple[str, int, int]] = []
    result = quantize_model(
        model, BATCHES, options, held_out=0.1, progress=lambda layer, number, of: seen.append((layer.name, number, of))
    )
    assert (result.batches, result.held_out_batches, result.notes) == (7, 1, [])
    assert list(result.layers) == ["left", "right", "last"]
    assert seen == [("left", 1, 3), ("right", 2, 3), ("last", 3, 3)]
    arguments = {"bits": 3, "group_size": 16, **preset(name)}
    inputs = BATCHES
    found = None
    for layer_name, layer in result.layers.items():
        module: Any = getattr(by_hand, layer_name)
        if layer_name == "last":
            with torch.no_grad():
                inputs = [torch.tanh(by_hand.left(x)) * by_hand.right(x) for x in BATCHES]
        weight = module.weight.detach().clone()
        calibration, held_out = accumulated(inputs[:7], halves=True), accumulated(inputs[7:]).hessian()
        if ridge == "auto" and layer_name != "right":
            expected: Any = gptq_auto(weight, calibration, **arguments)
            found = expected.ridge
        else:  # the second one on the same inputs takes the ridge of the first
            expected = gptq(weight, calibration.hessian(), ridge=found or ridge, **arguments)
        assert torch.equal(layer.quantized.codes, expected.codes)
        assert torch.equal(layer.quantized.scales, expected.scales)
        assert layer.ridge == (found or ridge)
        assert (layer.method, layer.tokens, layer.held_out_tokens, layer.notes) == ("gptq", 448, 64, ())
        nearest = rtn(weight, bits=3, group_size=16, full_range=name == "best")
        for loss, quantized, hessian in (
            (layer.loss, expected, calibration.hessian()),
            (layer.rtn_loss, nearest, calibration.hessian()),
            (layer.held_out_loss, expected, held_out),
            (layer.held_out_rtn_loss, nearest, held_out),
        ):
            error = (weight - dequantize(quantized)).double()
            assert loss == pytest.approx(float((error @ hessian.double() @ error.T).trace()), rel=1e-5)
        assert layer.loss is not None
        assert layer.rtn_loss is not None
        assert layer.loss < layer.rtn_loss
        module.weight.data = dequantize(expected)
        assert torch.equal(getattr(model, layer_name).weight, module.weight)
        assert layer.seconds > 0
    assert set(result.seconds) == {"total", "forward", "hessians", "solver", "judging"}
    assert sum(result.seconds.values()) == pytest.approx(2 * result.seconds["total"])
    assert sum(layer.seconds for layer in result.layers.values()) <= result.seconds["total"]


@pytest.mark.parametrize("kind", small_models.MODELS)
def test_every_architecture_runs_whole(kind: str) -> None:
    build, batches = small_models.MODELS[kind]
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = LayerOptions(preset="fast", group_size=16, min_tokens=2)
    not_called = Rule("*.dt_proj", {"unseen": "rtn"})
    experts = Rule("*.experts.*", {"unseen": "siblings"})
    rules = [rule for rule, kinds in ((not_called, ("mamba",)), (experts, ("qwen3-moe", "mixtral"))) if kind in kinds]
    result = quantize_model(model, 3 * batches(), Recipe(options, rules), held_out=0.1)
    sites = {site.name: site for site in find_sites(model).sites}
    assert set(result.layers) == set(sites)
    better = 0
    for name, layer in result.layers.items():
        assert torch.equal(sites[name].read(), dequantize(layer.quantized)), name
        assert layer.site.parameter_name == sites[name].parameter_name
        if layer.tokens:
            assert layer.loss is not None
            assert layer.rtn_loss is not None
            better += layer.loss < layer.rtn_loss
    assert better >= 0.75 * len(sites)
    assert {one.name for one in result.left_alone} == {one.name for one in find_sites(model).left_alone}
    replaced = {site.parameter_name for site in sites.values()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in replaced), name
    with torch.no_grad():
        assert all(model(**batch).logits.isfinite().all() for batch in batches())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_in_other_dtypes(dtype: torch.dtype) -> None:
    model = chain().to(dtype)
    result = quantize_model(model, [batch.to(dtype) for batch in BATCHES], FAST, scale_dtype=torch.float32)
    assert model.left.weight.dtype == dtype
    for name, layer in result.layers.items():
        assert layer.quantized.scales.dtype == torch.float32
        assert torch.equal(getattr(model, name).weight, dequantize(layer.quantized, dtype=dtype))
        assert layer.loss is not None
        assert layer.rtn_loss is not None
        assert layer.loss < layer.rtn_loss


def test_losses_are_those_of_the_values_that_the_layer_computes_with() -> None:
    model, before = chain().bfloat16(), chain().bfloat16()
    batches = [batch.bfloat16() for batch in BATCHES]
    layer = quantize_model(model, batches, LayerOptions(bits=8, group_size=16, preset="plain")).layers["left"]
    calibration = accumulated(batches[:-1]).hessian()
    expected = quantization_loss(before.left.weight, model.left.weight, calibration).sum()
    assert layer.loss == pytest.approx(float(expected))
    assert layer.loss != pytest.approx(
        float(quantization_loss(before.left.weight, layer.quantized, accumulated(batches[:-1]).hessian()).sum()),
        rel=0.1,
    )


def test_layers_of_many_rows_are_judged_by_some_of_them() -> None:
    model = nn.Linear(32, 600)
    weight = model.weight.detach().clone()
    layer = quantize_model(model, BATCHES, FAST).layers[""]
    rows = quantization_loss(weight, layer.quantized, accumulated(BATCHES[:-1]).hessian())
    assert layer.loss == pytest.approx(
        float(rows[[row * 600 // 256 for row in range(256)]].sum()) * 600 / 256, rel=1e-5
    )
    assert layer.loss == pytest.approx(float(rows.sum()), rel=0.05)


def test_layers_on_the_same_inputs_with_another_grid_find_a_ridge_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searches: list[Any] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        searches.append(options)
        return ridge_by_halves(*arguments, **options)

    monkeypatch.setattr(quantizer, "ridge_by_halves", counted)
    model = chain()
    weight = model.right.weight.detach().clone()
    result = quantize_model(model, BATCHES, Recipe(FAST, [Rule("right", {"bits": 2})]), held_out=0)
    expected = gptq_auto(weight, accumulated(BATCHES, halves=True), bits=2, group_size=16, **preset("fast"))
    assert result.layers["right"].ridge == expected.ridge
    assert len(searches) == 3
    searches.clear()
    same = quantize_model(chain(), BATCHES, FAST, held_out=0)
    assert len(searches) == 2
    assert same.layers["right"].ridge == same.layers["left"].ridge
    assert torch.equal(result.layers["right"].quantized.codes, expected.codes)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The ridges that are searched for in the test."""
    found: list[float] = []

    def noted(*arguments: Any, **options: Any) -> Any:
        choice = ridge_by_halves(*arguments, **options)
        found.append(choice.ridge)
        return choice

    monkeypatch.setattr(quantizer, "ridge_by_halves", noted)
    return found


def test_ridges_are_carried_over_to_the_same_layer_of_later_blocks(searched: list[float]) -> None:
    model = small_models.decoder("Llama", num_hidden_layers=9)
    result = quantize_model(model, 6 * small_models.text_batches(), FAST, held_out=0)
    firsts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    expected = 0
    for first in firsts:
        ridges = [result.layers[f"model.layers.{block}.{first}"].ridge for block in range(9)]
        block = 0
        found: list[Any] = []
        while block < 9:
            found.append(ridges[block])
            assert ridges[block] in searched
            expected += 1
            block += 1
            if len(found) > 1 and max(found[-2:]) < 2 * min(found[-2:]):
                assert ridges[block : block + 3] == [found[-1]] * len(ridges[block : block + 3])
                block += 3
    assert len(searched) == expected < 9 * len(firsts)
    for layer in result.layers.values():
        others = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        kind = layer.name.rpartition(".")[2]
        if kind in others:
            assert layer.ridge == result.layers[layer.name.replace(kind, others[kind])].ridge


def test_ridges_are_carried_over_to_experts_as_their_tokens_have_it(searched: list[float]) -> None:
    model = small_models.decoder("Mixtral", num_hidden_layers=1, num_local_experts=12, num_experts_per_tok=2)
    options = LayerOptions(preset="fast", group_size=16, bits=3, min_tokens=1)
    result = quantize_model(model, 12 * small_models.text_batches(), options, held_out=0)
    experts = [layer for layer in result.layers.values() if "experts" in layer.name]
    assert len(experts) == 2 * 12
    carried = [layer for layer in experts if layer.ridge not in searched]
    assert len(carried) >= 3
    assert len({layer.tokens for layer in experts}) > 3
    for one in carried:
        of_kind = [other for other in experts if other.site.columns == one.site.columns and other.ridge in searched]
        scaled = [other.ridge * (other.tokens / one.tokens) ** 0.7 for other in of_kind if other.ridge is not None]
        assert any(ridge == pytest.approx(one.ridge) for ridge in scaled)


def test_a_ridge_is_carried_three_times_once_two_agree() -> None:
    carried = quantizer._CarriedRidges()
    assert carried.take("kind", 100) is None
    carried.found("kind", 1.0, 100)
    assert carried.take("kind", 100) is None
    carried.found("kind", 1.9 * 4**-0.7, 400)
    assert carried.take("another", 100) is None
    assert [carried.take("kind", tokens) for tokens in (400, 100, 50, 400)] == [
        1.9 * 4**-0.7,
        pytest.approx(1.9),
        pytest.approx(1.9 * 2**0.7),
        None,
    ]
    carried.found("kind", 4.0 * 4**-0.7, 400)  # more than twice the last
    assert carried.take("kind", 400) is None


def test_a_carried_ridge_that_does_not_serve_is_searched_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = []

    def failing(weight: Tensor, hessian: Tensor, **options: Any) -> Any:
        if options["ridge"] == 1e-9:
            failed.append(weight.shape)
            raise LinAlgError("not positive definite")
        return gptq(weight, hessian, **options)

    monkeypatch.setattr(quantizer._CarriedRidges, "take", lambda *_: 1e-9)
    monkeypatch.setattr(quantizer, "gptq", failing)
    result = quantize_model(chain(), BATCHES, LayerOptions(preset="fast", group_size=16, bits=3), held_out=0.1)
    assert failed == [(24, 32), (8, 24)]  # not "right", which takes the ridge of "left"
    assert all(layer.ridge is not None and layer.ridge > 1e-3 for layer in result.layers.values())


def test_padding_does_not_count() -> None:
    model, other = (small_models.MODELS["llama"][0]() for _ in range(2))
    batches = 4 * small_models.text_batches()
    result = quantize_model(model, batches, FAST)
    whole = quantize_model(other, batches, FAST, masks=[None] * len(batches))
    counted = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for name in result.layers:
        assert result.layers[name].tokens + result.layers[name].held_out_tokens == counted
        assert whole.layers[name].tokens + whole.layers[name].held_out_tokens == sum(
            batch["input_ids"].numel() for batch in batches
        )


# Recipes


def test_recipes_choose_layers_and_options() -> None:
    model = chain()
    before = model.right.weight.detach().clone()
    recipe = Recipe(
        FAST, [Rule("right", {"skip": True}), Rule("last", {"bits": 2, "symmetric": False, "group_size": -1})]
    )
    result = quantize_model(model, BATCHES, recipe)
    assert list(result.layers) == ["left", "last"]
    assert torch.equal(model.right.weight, before)
    assert [(one.name, one.reason) for one in result.left_alone] == [("right.weight", "right is skipped by the recipe")]
    last = result.layers["last"]
    assert (last.quantized.bits, last.quantized.symmetric, last.quantized.group_size) == (2, False, -1)
    assert last.options == recipe.options("last")
    same = quantize_model(chain(), BATCHES, recipe.to_dict())
    assert torch.equal(same.layers["last"].quantized.codes, last.quantized.codes)
    assert as_recipe(None) == Recipe()
    assert as_recipe(FAST) == Recipe(FAST)


def test_bad_recipes_are_refused_before_the_walk() -> None:
    model = small_models.decoder("Llama")
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    batches = small_models.text_batches()
    bad: Any = 4
    for recipe, error, message in (
        (Recipe(FAST, [Rule("*.q_prj", {"bits": 8})]), ValueError, r"rule 1: .* '\*.q_prj' to match a layer"),
        (
            Recipe(FAST, [Rule("lm_head", {"bits": 8})]),
            ValueError,
            "rule 1: expected pattern 'lm_head' to match more than output embeddings without output_embeddings=True",
        ),
        (LayerOptions(skip=True), ValueError, "expected a model with layers to quantize, but the recipe skips all"),
        ({"defaults": {"bit": 4}}, ValueError, "bit"),
        (bad, TypeError, "expected recipe to be a Recipe, LayerOptions, a dict or None, but got int"),
    ):
        with pytest.raises(error, match=message):
            quantize_model(model, batches, recipe)
    with pytest.raises(ValueError, match="with layers to quantize, but it has none that is known here"):
        quantize_model(nn.Embedding(3, 4), [torch.tensor([1])])
    with pytest.raises(ValueError, match="expected calibration to have batches, but got none"):
        quantize_model(model, [], FAST)
    with pytest.raises(TypeError, match="expected calibration to be an iterable of batches, but got one dict"):
        quantize_model(model, batches[0], FAST)
    wrong: Any
    for wrong in (-0.1, 0.5, True, math.nan):
        message = f"expected held_out to be batches or a number from 0 to 0.25, but got {wrong!r}"
        with pytest.raises(ValueError, match=message):
            quantize_model(model, batches, FAST, held_out=wrong)
    with pytest.raises(TypeError, match="expected held_out to be an iterable of batches, but got one str"):
        quantize_model(model, batches, FAST, held_out="some")
    assert calls == []
    plan = plan_model(model, Recipe(FAST, [Rule("lm_head", {"skip": True})]))  # it is left alone anyway
    assert len(plan.layers) == 14


def test_output_embeddings_where_asked_for() -> None:
    model: Any = small_models.decoder("Llama", tie_word_embeddings=True)
    recipe = Recipe(FAST, [Rule("lm_head", {"bits": 8})])
    result = quantize_model(model, 4 * small_models.text_batches(), recipe, output_embeddings=True)
    assert list(result.layers)[-1] == "lm_head"
    assert result.layers["lm_head"].quantized.bits == 8
    assert torch.equal(model.model.embed_tokens.weight, dequantize(result.layers["lm_head"].quantized))


# Held out


@pytest.mark.parametrize(
    ("sizes", "part", "count"),
    [
        ([100] * 20, 0.05, 1),
        ([100] * 20, 0.06, 2),
        ([100] * 20, 0.25, 5),
        ([100] * 20, 0, 0),
        ([100] * 4, 0.05, 1),
        ([100] * 3, 0.05, 0),
        ([100], 0.05, 0),
        ([100] * 10 + [1] * 60, 0.05, 53),
        ([1, 1, 1, 100], 0.05, 0),
        ([0, 0], 0.05, 0),
    ],
)
def test_how_many_batches_are_held_out(sizes: list[int], part: float, count: int) -> None:
    held, note = _held_out_batches(sizes, part)
    assert held == count
    assert (note is None) == (count > 0 or part == 0 or not sum(sizes))


def test_held_out_batches_that_are_given() -> None:
    of_itself = quantize_model(chain(), BATCHES, FAST, held_out=0.1)
    given = quantize_model(chain(), BATCHES[:7], FAST, held_out=iter(BATCHES[7:]))
    assert (given.batches, given.held_out_batches) == (7, 1)
    for name, layer in given.layers.items():
        assert torch.equal(layer.quantized.codes, of_itself.layers[name].quantized.codes)
        assert layer.held_out_loss == of_itself.layers[name].held_out_loss


def test_a_calibration_with_held_out_tokens() -> None:
    texts = [{"input_ids": small_models.ids(2, 16, seed)} for seed in range(12)]
    calibration = load_calibration(texts, tokens=256, sequence_length=16, held_out_tokens=64)
    result = quantize_model(small_models.decoder("Llama"), calibration, FAST)
    assert {(layer.tokens, layer.held_out_tokens) for layer in result.layers.values()} == {
        (calibration.tokens, calibration.held_out_tokens)
    }
    assert calibration.held_out_tokens >= 64
    assert result.notes == list(calibration.notes)
    without = load_calibration(texts, tokens=256, sequence_length=16)
    assert quantize_model(small_models.decoder("Llama"), without, FAST).held_out_batches == 1
    assert quantize_model(small_models.decoder("Llama"), calibration, FAST, held_out=0).held_out_batches == 0


def test_sizes_of_batches() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    assert _size({"input_ids": ids, "attention_mask": mask}) == 5
    assert _size({"pixel_values": torch.zeros(1, 3, 4, 4), "input_ids": ids}) == 10
    assert _size(ids) == _size([ids]) == _size((ids, True)) == 10
    assert _size(torch.zeros(7, 4)) == 7
    assert _size({"text": "some"}) == 1


def test_without_held_out_batches_no_layer_is_judged_and_the_result_says_so() -> None:
    result = quantize_model(chain(), BATCHES[:2], FAST)
    assert (result.batches, result.held_out_batches) == (2, 0)
    (note,) = result.notes
    assert note.startswith("no batch is held out, so no layer is judged: of 2 batches the last 1 would be 50% of the")
    assert all(layer.held_out_loss is None and layer.held_out_tokens == 0 for layer in result.layers.values())
    result = quantize_model(chain(), BATCHES, FAST, held_out=0)
    assert (result.batches, result.held_out_batches, result.notes) == (8, 0, [])


def test_a_layer_that_is_worse_on_held_out_tokens_keeps_rounding_to_nearest() -> None:
    """Calibrated on eight directions with hardly any ridge, and judged on all of them."""
    model = chain()
    weight = model.left.weight.detach().clone()
    few = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    batches = [torch.randn(64, 8) @ few for _ in range(7)] + [torch.randn(64, 32)]
    options = LayerOptions(bits=3, group_size=16, preset="plain", ridge=1e-5)
    result = quantize_model(model, batches, options, held_out=0.1)
    layer = result.layers["left"]
    nearest = rtn(weight, bits=3, group_size=16)
    assert (layer.method, layer.ridge) == ("rtn", None)
    assert torch.equal(layer.quantized.codes, nearest.codes)
    assert torch.equal(model.left.weight, dequantize(nearest))
    assert layer.loss == layer.rtn_loss
    assert layer.held_out_loss == layer.held_out_rtn_loss
    (note,) = layer.notes
    match = re.fullmatch(
        r"keeps rounding to nearest: on 64 held-out tokens GPTQ loses (\S+), rounding to nearest (\S+)", note
    )
    assert match is not None
    assert float(match[1]) > float(match[2]) == pytest.approx(layer.held_out_rtn_loss, rel=1e-3)
    # The same with a ridge from the data, which keeps out of the directions that it did not see.
    auto = quantize_model(chain(), batches, LayerOptions(bits=3, group_size=16), held_out=0.1).layers["left"]
    assert auto.held_out_loss is not None
    assert auto.held_out_rtn_loss is not None
    assert auto.held_out_loss <= auto.held_out_rtn_loss


# Layers with few tokens


class Experts(nn.Module):
    """Fused experts; each token says which is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 32) / 6)
        self.down_proj = nn.Parameter(torch.randn(4, 32, 8) / 3)

    def forward(self, x: Tensor, expert_of: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in expert_of.unique().tolist():
            mine = expert_of == expert
            gate, up = functional.linear(x[mine], self.gate_up_proj[expert]).chunk(2, dim=-1)
            y[mine] = functional.linear(torch.tanh(gate) * up, self.down_proj[expert])
        return y


class Listed(nn.Module):
    """Experts as modules of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 16), "down": nn.Linear(16, 32)}) for _ in range(4)
        )

    def forward(self, x: Tensor, expert_of: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in expert_of.unique().tolist():
            mine = expert_of == expert
            module: Any = self.experts[expert]
            y[mine] = module["down"](torch.tanh(module["up"](x[mine])))
        return y


class Mixture(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.experts = kind()
        self.last = nn.Linear(32, 8)

    def forward(self, x: Tensor, expert_of: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.experts(x, expert_of))  # type: ignore[no-any-return]


def mixture(kind: type[nn.Module]) -> Mixture:
    torch.manual_seed(5)
    return Mixture(kind).eval()


# Expert 2 sees three tokens, expert 3 none.
def routed(seed: int) -> tuple[Tensor, Tensor]:
    expert_of = torch.tensor([0, 1] * 32)
    expert_of[9] = 2 if seed < 3 else 1
    return inputs_with_structure(64, 32, seed), expert_of


ROUTED = [routed(seed) for seed in range(8)]


@pytest.mark.parametrize("kind", [Experts, Listed])
def test_too_few_tokens_are_an_error_that_names_layers_and_counts(kind: type[nn.Module]) -> None:
    """All experts of a module that saw too few are named at once."""
    model = mixture(kind)
    names = [site.name for site in find_sites(model).sites]
    with pytest.raises(QuantizationError) as caught:
        quantize_model(model, ROUTED, FAST)
    assert set(caught.value.layers) == set(names[5:9])
    for name in names[5:9]:
        assert f"{name} saw {3 if name in names[5:7] else 0} of 16" in str(caught.value)
    assert list(caught.value.result.layers) == names[:5]
    of_expert_2 = Rule("*proj.2" if kind is Experts else "*.2.*", {"min_tokens": 1, "unseen": "rtn"})
    with pytest.raises(QuantizationError) as caught:
        quantize_model(mixture(kind), ROUTED, Recipe(FAST, [of_expert_2]))
    assert set(caught.value.layers) == set(names[7:9])
    assert list(caught.value.result.layers) == names[:7]


@pytest.mark.parametrize("kind", [Experts, Listed])
def test_too_few_tokens_and_rounding_to_nearest(kind: type[nn.Module]) -> None:
    model, before = mixture(kind), mixture(kind)
    result = quantize_model(model, ROUTED, Recipe(LayerOptions(preset="fast", group_size=16, unseen="rtn")))
    sites = find_sites(model).sites
    originals = find_sites(before).sites
    assert set(result.layers) == {site.name for site in sites}
    for site, original in zip(sites, originals, strict=True):
        layer = result.layers[site.name]
        few = site in sites[5:9]
        assert (layer.method == "rtn") == few
        if few:
            tokens = 3 if site in sites[5:7] else 0
            needed = 16
            assert layer.notes == (f"saw {tokens} of {needed} tokens needed, so it is rounded to nearest",)
            assert layer.tokens == tokens
            assert (layer.loss is None) == (tokens == 0)
            assert torch.equal(layer.quantized.codes, rtn(original.read(), group_size=16, full_range=True).codes)
        assert torch.equal(site.read(), dequantize(layer.quantized))


@pytest.mark.parametrize("kind", [Experts, Listed])
def test_too_few_tokens_and_those_of_the_siblings(kind: type[nn.Module]) -> None:
    """The first layers of all experts see the same inputs: those of expert 2 and 3 get the Hessian of all of these."""
    model = mixture(kind)
    original = {site.name: site.read() for site in find_sites(model).sites}
    order: list[str] = []
    result = quantize_model(
        model,
        ROUTED,
        Recipe(FAST, [Rule("experts.*", {"unseen": "siblings"})]),
        held_out=0.1,
        progress=lambda layer, *_: order.append(layer.name),
    )
    names = [site.name for site in find_sites(model).sites]
    assert order[:5] == names[:5]
    assert set(order[5:9]) == set(names[5:9])  # after their siblings, before the walk goes on
    assert order[9] == "last"
    first = result.layers["first"].quantized
    bias = model.first.bias
    with torch.no_grad():
        given = [x @ dequantize(first).T + bias for x, _ in ROUTED]
    pool = HessianAccumulator(32, halves=True)
    for expert in range(3):  # the order in which the walk comes to them
        own = HessianAccumulator(32, halves=True)
        for x, (_, of) in zip(given[:7], ROUTED[:7], strict=True):
            if (of == expert).any():
                own.update(x[of == expert], token_weights=norm_weights(x[of == expert]))
        pool.merge(own)
    for name, tokens in ((names[5], 3), (names[7], 0)):
        layer = result.layers[name]
        expected = gptq_auto(original[name], pool, group_size=16, **preset("fast"))
        assert layer.tokens == pool.tokens == 7 * 64
        assert layer.notes == (f"saw {tokens} of 16 tokens needed, so it is quantized with those of all its siblings",)
        assert layer.ridge == pytest.approx(expected.ridge)
        assert (layer.quantized.codes != expected.codes).sum() <= 2  # sums in another order
        assert layer.method == "gptq"
    assert result.layers[names[3]].notes == ()


def test_siblings_that_saw_too_little_themselves() -> None:
    batches = [(inputs_with_structure(8, 32, seed), torch.zeros(8, dtype=torch.long)) for seed in range(4)]
    recipe = Recipe(
        LayerOptions(preset="fast", min_tokens=8), [Rule("experts.*", {"unseen": "siblings", "min_tokens": 99})]
    )
    with pytest.raises(
        QuantizationError, match=r"saw 24 of 99, and its siblings, all together, 24; .*\.1 saw 0 of 99, and"
    ):
        quantize_model(mixture(Experts), batches, recipe)
    with pytest.raises(QuantizationError, match="first saw 24 of 99, and has no siblings"):
        quantize_model(mixture(Experts), batches, LayerOptions(unseen="siblings", min_tokens=99))


def test_which_layers_are_siblings() -> None:
    def family(model: nn.Module) -> dict[str, tuple[str, str] | None]:
        return {site.name: siblings_of(site) for site in find_sites(model).sites}

    fused = family(mixture(Experts))
    assert fused["experts.down_proj.1"] == fused["experts.down_proj.3"] == ("experts", "down_proj")
    assert fused["experts.gate_up_proj.1"] == ("experts", "gate_up_proj")
    assert fused["last"] is None
    listed = family(mixture(Listed))
    assert listed["experts.experts.0.up"] == listed["experts.experts.3.up"] == ("experts.experts.", ".up")
    assert set(family(small_models.decoder("Llama")).values()) == {None}


def test_a_layer_that_is_never_called_is_an_error_at_the_end() -> None:
    class Unused(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(4, 4)

    with pytest.raises(
        QuantizationError, match=r"extra saw 0 of 16 .*weight the model uses without calling it"
    ) as caught:
        quantize_model(Unused(), BATCHES, FAST)
    assert list(caught.value.result.layers) == ["left", "right", "last"]
    result = quantize_model(Unused(), BATCHES, Recipe(FAST, [Rule("extra", {"unseen": "rtn"})]))
    assert result.layers["extra"].loss is None
    assert result.layers["extra"].notes == ("saw 0 of 16 tokens needed, so it is rounded to nearest",)


def test_layers_that_are_used_more_than_once_or_too_late_say_so() -> None:
    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, way: str) -> Tensor:
            for name in way.split():
                x = getattr(self, name)(x)
            return x

    # No order is right for both ways.
    batches = [(x, "early early late" if number else "late early late") for number, x in enumerate(BATCHES)]
    result = quantize_model(Ways(), batches, FAST, held_out=0)
    assert result.layers["early"].notes == (
        "64 tokens came to it only after it was quantized, and are not in its Hessian",
        "448 tokens came to it again after it was quantized, as it is used more than once",
    )
    assert result.layers["early"].tokens == 448


# Failures


def test_a_layer_that_fails_is_named() -> None:
    model = chain()
    batches = [*BATCHES[:3], BATCHES[3].clone(), *BATCHES[4:]]
    model.right.register_forward_hook(lambda _m, args, y: y * math.inf if args[0] is batches[3] else y)
    with pytest.raises(QuantizationError, match=r"layer 'last' \[8, 24\]: batch 3: .*inputs to be finite") as caught:
        quantize_model(model, batches, FAST)
    assert caught.value.layers == ("last",)
    assert list(caught.value.result.layers) == ["left", "right"]
    assert torch.equal(model.left.weight, dequantize(caught.value.result.layers["left"].quantized))
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]
    flat = [torch.ones(64, 32)] * 8
    with pytest.raises(QuantizationError, match=r"layer 'left' \[24, 32\]: .*expected hessian to be positive definite"):
        quantize_model(chain(), flat, LayerOptions(ridge=0.0, group_size=16))


def test_what_progress_raises_ends_the_run() -> None:
    done: list[str] = []

    def progress(layer: LayerResult, number: int, of: int) -> None:
        done.append(layer.name)
        if number == 2:
            raise KeyboardInterrupt

    model = chain()
    before = model.last.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, BATCHES, FAST, progress=progress)
    assert done == ["left", "right"]
    assert torch.equal(model.last.weight, before)
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]


LENGTHS = [(1,), (1, 2, 40), (5, 3, 20, 64, 7, 200), (64, 65), (3, 2000, 5, 1500, 40, 700)]


def tokens_of_batches(lengths: tuple[int, ...], dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    """Tokens [T, 8] of each batch, and their weights, which the second one has none of."""
    batches = []
    for number, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randn(length, 8, generator=generator, dtype=torch.float64)
        batches.append((tokens.to(dtype), None if number == 1 else torch.rand(length, generator=generator)))
    return batches


def assert_same_halves(found: HessianAccumulator, expected: HessianAccumulator) -> None:
    assert [found.half_tokens(half) for half in range(2)] == [expected.half_tokens(half) for half in range(2)]
    for half in range(2):
        if expected.half_tokens(half):
            torch.testing.assert_close(found.half(half), expected.half(half))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_halves_on_a_device_are_those_of_the_accumulator(lengths: tuple[int, ...]) -> None:
    on_device = _DeviceSums(8, torch.float64, torch.device("cpu"), halves=True)
    expected = HessianAccumulator(8, torch.float64, halves=True)
    for batch, weights in tokens_of_batches(lengths, torch.float64):
        on_device.update(batch, None, weights)
        expected.update(batch, token_weights=weights)
    assert_same_halves(on_device.accumulator(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("halves", [True, False], ids=["halves", "whole"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_batches_together_are_those_of_the_accumulator(
    lengths: tuple[int, ...], halves: bool, dtype: torch.dtype
) -> None:
    found = HessianAccumulator(8, torch.float64, halves=halves)
    expected = HessianAccumulator(8, torch.float64, halves=halves)
    batches = _Batches(found)
    for number, (tokens, weights) in enumerate(tokens_of_batches(lengths, dtype)):
        mask = torch.arange(len(tokens)) % 3 > 0 if number == 2 else None
        batches.add(number, tokens, mask, weights)
        expected.update(tokens, mask=mask, token_weights=weights)
    batches.finish()
    assert (found.tokens, found.effective_tokens) == pytest.approx((expected.tokens, expected.effective_tokens))
    torch.testing.assert_close(found.hessian(), expected.hessian())
    if halves:
        assert_same_halves(found, expected)


def test_small_batches_are_added_together(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    update = HessianAccumulator.update

    def noted(self: HessianAccumulator, inputs: Tensor, **options: Any) -> None:
        added.append(len(inputs))
        update(self, inputs, **options)

    monkeypatch.setattr(HessianAccumulator, "update", noted)
    batches = _Batches(HessianAccumulator(4))
    for number in range(20):
        batches.add(number, torch.ones(128, 4, dtype=torch.bfloat16), None, None)
    batches.add(20, torch.ones(5000, 4, dtype=torch.bfloat16), None, None)
    batches.add(21, torch.ones(3, 4, dtype=torch.bfloat16), None, None)
    batches.add(22, torch.ones(5, 4), None, None)  # sums of float32 values have the bits of one batch after another
    batches.add(23, torch.ones(6, 4), None, None)
    batches.add(24, torch.ones(7, 4, dtype=torch.float16), None, None)
    batches.finish()
    assert added == [1024, 1024, 512 + 5000, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("wrong", "weight", "message"),
    [
        (math.nan, 1.0, "batch 3: .*expected inputs to be finite"),
        (1.0, -1.0, "batch 3: .*expected token_weights to be"),
        (1e38, 1.0, "batch 3: .*expected inputs whose products keep the sums finite"),
    ],
)
def test_a_bad_batch_among_small_ones_is_named(wrong: float, weight: float, message: str) -> None:
    accumulator = HessianAccumulator(4, halves=True)
    batches = _Batches(accumulator)
    with pytest.raises(ValueError, match=message):  # noqa: PT012
        for number in range(8):
            value, of_token = (wrong, weight) if number == 3 else (1.0, 1.0)
            batches.add(number, torch.full((5, 4), value, dtype=torch.bfloat16), None, torch.full((5,), of_token))
        batches.finish()


def test_small_batches_whose_sum_overflows() -> None:
    batches = _Batches(HessianAccumulator(1))
    for number in range(2):
        batches.add(number, torch.full((1, 1), 1.5e19, dtype=torch.bfloat16), None, None)
    with pytest.raises(ValueError, match=r"batch 1: .*expected inputs whose products keep the sums finite"):
        batches.finish()


def test_sums_on_a_device_are_those_of_the_accumulator() -> None:
    masks = [None, torch.arange(64) % 3 > 0, *[None] * 6]
    for halves in (False, True):
        on_device = _DeviceSums(32, torch.float32, torch.device("cpu"), halves=halves)
        expected = HessianAccumulator(32, halves=halves)
        for batch, mask in zip(BATCHES, masks, strict=True):
            on_device.update(batch, mask, norm_weights(batch))
            expected.update(batch, mask=mask, token_weights=weigh(batch, None, "norm", causal=False)[0])
        found = on_device.accumulator()
        assert found.tokens == expected.tokens
        assert found.effective_tokens == pytest.approx(expected.effective_tokens)
        torch.testing.assert_close(found.hessian(), expected.hessian())
        if halves:
            assert abs(found.half_tokens(0) - found.half_tokens(1)) <= 64
            for half in range(2):
                assert found.half_tokens(half) == expected.half_tokens(half)
                torch.testing.assert_close(found.half(half), expected.half(half))
    with pytest.raises(ValueError, match="expected inputs to be finite"):
        on_device.update(torch.full((1, 32), math.nan), None, None)
    assert isinstance(quantize_model(chain(), BATCHES, FAST), ModelResult)

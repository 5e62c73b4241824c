"""Correction of earlier layers' errors: the least squares solution, and what a run does with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_models
from miniquant import HessianAccumulator, LayerOptions, dequantize, gptq, preset, quantize_model
from miniquant.correction import Correction, Errors, ErrorSum

COLUMNS = 12


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def summed(y: Tensor, x: Tensor, stream: tuple[Tensor, Tensor] | None = None) -> Errors:
    """Errors of inputs x that are y now, and of a stream u that is v now."""
    errors = Errors(ErrorSum(y.shape[-1], y.shape[-1], torch.float64))
    errors.inputs.update(x, y, y, None, None)
    if stream is not None:
        errors.stream = ErrorSum(stream[0].shape[-1], y.shape[-1], torch.float64)
        errors.stream.update(*stream, y, None, None)
    return errors


def correction(errors: Errors, hessian: Tensor, ridge: float) -> Correction:
    return Correction(errors, hessian.clone, ridge)


# The equation


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_sums_are_weighted_means_over_tokens_that_count(weighted: bool, masked: bool) -> None:
    y, u, v = drawn(3, 7, COLUMNS), drawn(3, 7, 5, seed=1), drawn(3, 7, 5, seed=2)
    weights = torch.rand(3, 7, dtype=torch.float64) if weighted else None
    mask = torch.rand(3, 7) > 0.4 if masked else None
    errors = ErrorSum(5, COLUMNS, torch.float64)
    for row in range(3):
        of_row = (None if mask is None else mask[row], None if weights is None else weights[row])
        errors.update(u[row], v[row], y[row], *of_row)
    factors = (torch.ones(3, 7) if weights is None else weights) * (1 if mask is None else mask)
    expected = torch.einsum("bt,btm,bty->my", factors.double(), u - v, y) / factors.sum()
    torch.testing.assert_close(errors.mean(), expected)
    assert torch.equal(errors.like().mean(), torch.zeros(5, COLUMNS, dtype=torch.float64))


def test_the_corrected_weight_is_the_least_squares_solution() -> None:
    y, weight = drawn(50, COLUMNS), drawn(5, COLUMNS, seed=3)
    x = y + 0.3 * drawn(50, COLUMNS, seed=1)
    corrected = correction(summed(y, x), y.T @ y / 50, ridge=0.0).of(weight, 1.0)
    torch.testing.assert_close(corrected, torch.linalg.lstsq(y, x @ weight.T).solution.T)


def test_a_layer_that_writes_to_a_stream_brings_it_to_that_of_the_float_model() -> None:
    y, weight = drawn(50, COLUMNS), drawn(5, COLUMNS, seed=3)
    x, u = y + 0.3 * drawn(50, COLUMNS, seed=1), drawn(50, 5, seed=4)
    v = u + 0.2 * y[:, :5] + 0.1 * drawn(50, 5, seed=5)
    made = correction(summed(y, x, (u, v)), y.T @ y / 50, ridge=0.0)
    wanted = u + x @ weight.T - v
    torch.testing.assert_close(made.of(weight, 1.0, 1.0), torch.linalg.lstsq(y, wanted).solution.T)
    one, other = made.of(weight, 0.5), made.of(weight, 0.0, 0.3)
    torch.testing.assert_close(made.of(weight, 0.5, 0.3), one + other - weight)


def test_a_ridge_and_a_part_keep_the_weight_nearer_to_what_it_was() -> None:
    y, weight = drawn(50, COLUMNS), drawn(5, COLUMNS, seed=3)
    x = y + 0.3 * drawn(50, COLUMNS, seed=1)
    errors, hessian = summed(y, x), y.T @ y / 50
    ridge = 0.2
    damped = hessian + ridge * hessian.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    expected = weight + 0.5 * weight @ errors.inputs.mean() @ damped.inverse()
    torch.testing.assert_close(correction(errors, hessian, ridge).of(weight, 0.5), expected)
    assert torch.equal(correction(errors, hessian, ridge).of(weight, 0.0), weight)
    changes = [(correction(errors, hessian, one).of(weight, 1.0) - weight).norm() for one in (0.0, 0.1, 1.0, 10.0)]
    assert changes == sorted(changes, reverse=True)


def test_inputs_without_errors_leave_the_weight() -> None:
    y, weight = drawn(50, COLUMNS), drawn(5, COLUMNS, seed=3)
    assert torch.equal(correction(summed(y, y.clone()), y.T @ y / 50, 0.01).of(weight, 1.0), weight)


def test_a_hessian_without_an_inverse_leaves_the_weight() -> None:
    y, weight = drawn(3, COLUMNS), drawn(5, COLUMNS, seed=3)
    y[:, 4] = 0
    made = correction(summed(y, y + 1), y.T @ y / 3, ridge=0.0)
    assert torch.equal(made.of(weight, 1.0), weight)


def test_layers_of_any_number_of_rows_get_the_same_correction() -> None:
    """More rows than columns are multiplied with what fewer are solved for; bits do not depend on what came before."""
    y, weight = drawn(50, COLUMNS), drawn(3 * COLUMNS, COLUMNS, seed=3)
    errors, hessian = summed(y, y + 0.3 * drawn(50, COLUMNS, seed=1)), y.T @ y / 50
    made = correction(errors, hessian, ridge=0.1)
    torch.testing.assert_close(
        made.of(weight, 0.5),
        torch.cat([correction(errors, hessian, ridge=0.1).of(part, 0.5) for part in weight.split(5)]),
    )
    assert torch.equal(made.of(weight[:5], 0.5), correction(errors, hessian, ridge=0.1).of(weight[:5], 0.5))


@pytest.mark.parametrize("fails_in_float32", [False, True])
def test_sums_in_float32_are_solved_as_well_as_they_can_be(
    monkeypatch: pytest.MonkeyPatch, *, fails_in_float32: bool
) -> None:
    """In float32, and in float64 where a Hessian is positive definite only to its precision."""
    y, weight = drawn(50, COLUMNS), drawn(5, COLUMNS, seed=3).float()
    x = y + 0.3 * drawn(50, COLUMNS, seed=1)
    errors = Errors(ErrorSum(COLUMNS, COLUMNS, torch.float32))
    errors.inputs.update(x.float(), y.float(), y.float(), None, None)
    hessian = y.T @ y / 50
    exact = correction(summed(y, x), hessian, ridge=0.1).of(weight.double(), 1.0)
    factor, dtypes = torch.linalg.cholesky_ex, []

    def failing(matrix: Tensor, out: tuple[Tensor, Tensor]) -> None:
        dtypes.append(matrix.dtype)
        factor(matrix, out=out)
        if fails_in_float32 and matrix.dtype == torch.float32:
            out[1].fill_(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    corrected = correction(errors, hessian.float(), ridge=0.1).of(weight, 1.0)
    assert dtypes == ([torch.float32, torch.float64] if fails_in_float32 else [torch.float32])
    torch.testing.assert_close(corrected, exact.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_errors_of_inputs_can_be_summed_as_the_weight_hands_them_on(dtype: torch.dtype) -> None:
    """A layer with few rows sums W E; the same as W times the sum, and less to keep."""
    weight = drawn(5, COLUMNS, seed=3).to(dtype)
    y = drawn(200, COLUMNS).to(dtype)
    x = (y.double() + 0.1 * drawn(200, COLUMNS, seed=1)).to(dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    errors, usual = Errors.empty(COLUMNS, sums, 5), Errors.empty(COLUMNS, sums)
    assert [one.multiplied for one in (errors, usual)] == [True, False]
    for part in (slice(0, 130), slice(130, 200)):
        weights = torch.rand(len(y[part]), generator=torch.Generator().manual_seed(part.start))
        for one in (errors, usual):
            one.add_inputs(x[part], y[part], None, weights, lambda: weight)
    assert errors.inputs.mean().shape == (5, COLUMNS)
    expected = usual.wanted(weight.to(sums), 0.5, 0.0)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5 if sums == torch.float32 else 1e-14
    for rows in (slice(None), torch.tensor([0, 3])):
        found = errors.wanted(weight.to(sums), 0.5, 0.0, rows)
        assert (found - expected[rows]).norm() <= tolerance * expected[rows].norm()
    usual.multiply(weight.to(sums))
    assert usual.multiplied
    torch.testing.assert_close(usual.wanted(weight.to(sums), 0.5, 0.0), expected)
    with pytest.raises(ValueError, match="products are finite"):
        errors.add_inputs(torch.full_like(x, torch.inf), y, None, None, lambda: weight)
    assert not Errors.empty(COLUMNS, sums, 6).multiplied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_other_dtypes(dtype: torch.dtype) -> None:
    y = drawn(200, COLUMNS).to(dtype)
    x = (y.double() + 0.1 * drawn(200, COLUMNS, seed=1)).to(dtype)
    weights = torch.full((200,), 1e-6)  # as those of tokens with large norms
    errors = ErrorSum(COLUMNS, COLUMNS, torch.float32)
    errors.update(x, y, y, None, weights)
    expected = summed(y.double(), x.double()).inputs.mean()
    assert (errors.mean() - expected).norm() < 0.01 * expected.norm()


def test_bad_inputs_are_refused() -> None:
    errors = ErrorSum(COLUMNS, COLUMNS, torch.float32)
    y = torch.ones(3, COLUMNS)
    with pytest.raises(ValueError, match=r"float model gives to have shape \[3, 12\], but got shape \[4, 12\]"):
        errors.update(torch.ones(4, COLUMNS), y, y, None, None)
    with pytest.raises(ValueError, match="products are finite"):
        errors.update(torch.full((3, COLUMNS), float("inf")), y, y, None, None)
    with pytest.raises(ValueError, match="products are finite"):
        errors.update(torch.full((3, COLUMNS), float("inf")).bfloat16(), y.bfloat16(), y.bfloat16(), None, None)
    assert errors.mean().eq(0).all()


# In a run


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48, bias=False)
        self.second = nn.Linear(48, 32, bias=False)
        self.third = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.relu(self.first(x)))))  # type: ignore[no-any-return]


def chain() -> Chain:
    torch.manual_seed(3)
    return Chain().eval()


def batches(count: int, rows: int = 64) -> list[Tensor]:
    mix = drawn(32, 32, seed=9) / 32**0.5
    return [(drawn(rows, 32, seed=seed) @ mix).float() for seed in range(count)]


@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_each_layer_approaches_the_weight_that_makes_up_for_the_layers_before(part: float) -> None:
    """Step by step by hand: the inputs of a float model and of the one that is quantized so far."""
    model, original, by_hand = chain(), chain(), chain()
    options: Any = {"bits": 3, "group_size": 16, "ridge": 0.05, "token_weights": "uniform", "preset": "plain"}
    result = quantize_model(model, batches(8), LayerOptions(**options, correction=part), held_out=0)
    x = y = torch.cat(batches(8))
    for name, function in (("first", torch.relu), ("second", torch.tanh), ("third", None)):
        weight = getattr(original, name).weight.detach()
        hessian = HessianAccumulator(weight.shape[1])
        hessian.update(y)
        exactly = hessian.hessian().double()
        target = correction(summed(y.double(), x.double()), exactly, 0.05).of(weight, part)
        expected = gptq(target, hessian.hessian(), bits=3, group_size=16, ridge=0.05, **preset("plain"))
        layer = result.layers[name]
        differ = layer.quantized.codes.ne(expected.codes).sum()
        assert differ <= 0.002 * weight.numel(), name  # sums of batches round otherwise than one of all tokens
        getattr(by_hand, name).weight.data = dequantize(layer.quantized)
        error = (target - dequantize(layer.quantized)).double()
        measured = float((error @ hessian.hessian().double() @ error.T).trace())
        assert layer.loss == pytest.approx(measured, rel=1e-3)
        if function is not None:
            with torch.no_grad():
                x, y = function(getattr(original, name)(x)), function(getattr(by_hand, name)(y))
    assert result.notes == []


class Stream(nn.Module):
    """Blocks h + second(tanh(first(h)))."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first = nn.Linear(32, width, bias=False)
            self.second = nn.Linear(width, 32, bias=False)

        def inner(self, h: Tensor) -> Tensor:
            return torch.tanh(self.first(h))

        def forward(self, h: Tensor) -> Tensor:
            return h + self.second(self.inner(h))  # type: ignore[no-any-return]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Stream.Block(width) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h)
        return h


def stream(width: int = 48) -> Stream:
    torch.manual_seed(4)
    return Stream(width).eval()


@pytest.mark.parametrize("width", [48, 80])  # with more than twice as many columns as rows W E is summed
@pytest.mark.parametrize("scheme", ["uniform", "norm"])
def test_layers_that_write_to_a_stream_make_up_for_its_errors(scheme: Any, width: int) -> None:
    """Step by step by hand; weights by norm are those of the stream."""
    model, original, by_hand = stream(width), stream(width), stream(width)
    options: Any = {"bits": 3, "group_size": 16, "ridge": 0.05, "token_weights": scheme, "preset": "plain"}
    part, stream_part = 0.5, 0.25
    given = LayerOptions(**options, correction=part, stream_correction=stream_part)
    result = quantize_model(model, batches(8), given, held_out=0)
    u = v = torch.cat(batches(8))

    def quantized(name: str, weight: Tensor, x: Tensor, y: Tensor, of_stream: tuple[Tensor, Tensor] | None) -> Tensor:
        norms = y if of_stream is None else of_stream[1]
        roots = torch.ones(len(y)) if scheme == "uniform" else 1 / norms.norm(dim=1)  # weights' roots: y and all errors
        hessian = HessianAccumulator(weight.shape[1], torch.float64)
        hessian.update(roots[:, None].double() * y.double())
        mean = roots.double().square().mean()
        weighted = [roots[:, None].double() * one.double() for one in (y, x, *(of_stream or ()))]
        errors = summed(weighted[0], weighted[1], (weighted[2], weighted[3]) if of_stream else None)
        # E and H are both relative to the mean weight, which the sums by hand are not
        target = correction(errors, hessian.hessian(), 0.05).of(weight, part, stream_part)
        expected = gptq(
            target, (hessian.hessian() / mean).float(), bits=3, group_size=16, ridge=0.05, **preset("plain")
        )
        layer = result.layers[name]
        differ = layer.quantized.codes.ne(expected.codes).sum()
        assert differ <= 0.004 * weight.numel(), name  # sums of batches round otherwise than one of all tokens
        return dequantize(layer.quantized)

    pairs: Any = zip(by_hand.blocks, original.blocks, strict=True)
    for number, (block, exact) in enumerate(pairs):
        with torch.no_grad():
            name = f"blocks.{number}"
            block.first.weight.data = quantized(f"{name}.first", exact.first.weight.detach(), u, v, None)
            x, y = exact.inner(u), block.inner(v)
            block.second.weight.data = quantized(f"{name}.second", exact.second.weight.detach(), x, y, (u, v))
            u, v = exact(u), block(v)
    assert result.notes == []


def divergence(model: nn.Module, original: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = (one(ids).logits.log_softmax(-1) for one in (model, original))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_brings_a_model_nearer_to_the_float_model(kind: str) -> None:
    build = small_models.MODELS[kind][0]
    given = [{"input_ids": small_models.ids(4, 16, seed)} for seed in range(24)]
    fresh = small_models.ids(64, 16, 99)
    distances = []
    for part in (0.0, 0.5):
        model = build()
        quantize_model(model, copy.deepcopy(given), LayerOptions(bits=3, group_size=16, preset="fast", correction=part))
        distances.append(divergence(model, build(), fresh))
    assert distances[1] < 0.9 * distances[0]


def test_a_stream_without_its_errors_is_nearer_to_the_float_model() -> None:
    def distance(stream_part: float) -> float:
        model, original = stream(), stream()
        options = LayerOptions(bits=2, group_size=16, preset="fast", correction=0.5, stream_correction=stream_part)
        quantize_model(model, batches(16), options)
        with torch.no_grad():
            fresh = torch.cat(batches(32)[24:])
            return float((model(fresh) - original(fresh)).norm())

    assert distance(0.3) < 0.97 * distance(0.0)


def test_a_correction_that_loses_on_held_out_tokens_is_not_made() -> None:
    """Few tokens and no ridge: what they ask for is no help to others."""
    options: Any = {"bits": 3, "group_size": 16, "ridge": 1e-6, "token_weights": "uniform", "preset": "plain"}
    given, held_out = batches(1, rows=49), batches(5)[1:]
    with_it, without = chain(), chain()
    result = quantize_model(with_it, given, LayerOptions(**options, correction=1.0), held_out=held_out)
    other = quantize_model(without, given, LayerOptions(**options, correction=0.0), held_out=held_out)
    note = "errors of earlier layers are not corrected: on held-out tokens that loses more than it gains"
    assert note in result.layers["second"].notes
    assert torch.equal(result.layers["second"].quantized.codes, other.layers["second"].quantized.codes)


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral"])
def test_from_the_first_expert_on_nothing_is_corrected_and_the_result_says_so(kind: str) -> None:
    build, given = small_models.MODELS[kind]
    options = LayerOptions(bits=4, group_size=16, preset="fast", correction=0.5, unseen="rtn")
    result = quantize_model(build(), given(), options, held_out=0)
    (note,) = (note for note in result.notes if "errors of earlier layers" in note)
    first = next(name for name in result.layers if ".experts." in name)
    assert f"before layer {first!r} only" in note


def test_options() -> None:
    assert LayerOptions(correction=1).correction == 1.0
    assert [LayerOptions(preset=name).corrected_part for name in ("plain", "fast", "best")] == [0.0, 0.0, 0.5]
    assert [LayerOptions(preset=name, correction=0.2).corrected_part for name in ("plain", "best")] == [0.2, 0.2]
    assert LayerOptions(stream_correction=1).stream_correction == 1.0
    assert [LayerOptions(preset=name).corrected_stream for name in ("plain", "fast", "best")] == [0.0, 0.0, 0.4]
    assert LayerOptions(correction=0).corrected_stream == 0.0
    assert LayerOptions(correction=0, stream_correction=0.4).corrected_stream == 0.4
    assert [LayerOptions(preset=name, stream_correction=0.2).corrected_stream for name in ("plain", "best")] == [
        0.2
    ] * 2
    for bad in (-0.1, 1.5, True, "all"):
        with pytest.raises(ValueError, match="correction to be"):
            LayerOptions(correction=bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="stream_correction to be"):
            LayerOptions(stream_correction=bad)  # type: ignore[arg-type]

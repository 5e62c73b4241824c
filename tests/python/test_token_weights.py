"""How much each token counts: the weights, which layers they are for, and what they do to a quantized model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_models
from miniquant import HessianAccumulator, LayerOptions, choose_ridge, gptq_auto, preset, quantize_model
from miniquant.modules import find_sites
from miniquant.token_weights import (
    GRADIENT,
    SCHEMES,
    TOKENS_AT_ONCE,
    causal_sites,
    norm_weights,
    position_weights,
    weigh,
)

INPUTS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
# Padding on the right of the first sequence, on the left of the second.
MASK = torch.tensor([[True, True, True, False, False], [False, True, True, True, True]])


def test_norm_weights_make_every_token_as_long() -> None:
    weights = norm_weights(INPUTS)
    assert weights.shape == (2, 5)
    scaled = INPUTS * weights.sqrt().unsqueeze(-1)
    torch.testing.assert_close(scaled.square().sum(-1), torch.ones(2, 5, dtype=torch.float64))
    for factor in (2.0**100, 2.0**-100):  # squares leave the range of float32
        torch.testing.assert_close(norm_weights(INPUTS * factor) * factor**2, weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_many_tokens_of_16_bits(dtype: torch.dtype) -> None:
    """They are converted some at a time."""
    inputs = torch.randn(TOKENS_AT_ONCE + 3, 2, 8, dtype=dtype).transpose(0, 1)
    expected = torch.linalg.vector_norm(inputs.double(), dim=-1) ** -2
    torch.testing.assert_close(norm_weights(inputs), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norm_weights_are_finite_and_positive_whatever_the_inputs(dtype: torch.dtype) -> None:
    for factor in (0.0, 1e-30, 1.0, 1e30):
        inputs = INPUTS.to(dtype) * factor
        inputs[0, 0] = 0
        weights = norm_weights(inputs)
        assert weights.isfinite().all(), factor
        assert (weights > 0).all(), factor
    weights = norm_weights(torch.cat([INPUTS.to(dtype), torch.zeros(1, 5, 8, dtype=dtype)]))
    assert weights[2].max() <= 1e4 * (1 / INPUTS.square().sum(-1)).max()
    assert (norm_weights(torch.full((3, 8), torch.nan, dtype=dtype)) == 1).all()
    assert norm_weights(torch.zeros(0, 8, dtype=dtype)).shape == (0,)


def test_first_token_of_a_sequence_counts_a_quarter_of_those_after_it() -> None:
    assert position_weights(INPUTS, None).tolist() == [[2, 1, 1, 1, 1]] * 2
    assert position_weights(INPUTS, MASK).tolist() == [[1.5, 1, 1, 1, 1], [1, 1.75, 1, 1, 1]]
    assert position_weights(INPUTS, torch.zeros(2, 5, dtype=torch.bool)).tolist() == [[1] * 5] * 2
    assert position_weights(INPUTS[:, :1], None).tolist() == [[1], [1]]


def test_schemes_are_products_and_the_position_makes_no_sample_smaller() -> None:
    norm, position = norm_weights(INPUTS), position_weights(INPUTS, MASK)
    expected: dict[str, tuple[Tensor | None, Tensor | None]] = {
        "uniform": (None, None),
        "norm": (norm, norm),
        "position": (position, None),
        "norm+position": (norm * position, norm),
        "gradient": (norm * position, norm),  # of a layer without gradients
    }
    assert set(expected) == set(SCHEMES)
    for scheme in SCHEMES:
        for found, wanted in zip(weigh(INPUTS, MASK, scheme, causal=True), expected[scheme], strict=True):
            assert (found is None and wanted is None) or torch.equal(found, wanted)  # type: ignore[arg-type]
        base = None if scheme in ("uniform", "position") else norm
        for inputs, causal in ((INPUTS, False), (INPUTS.flatten(0, 1), True)):
            weights, sampled = weigh(inputs, None, scheme, causal=causal)
            assert weights is sampled
            assert weights is None if base is None else torch.equal(weights, base.view(inputs.shape[:-1]))  # type: ignore[arg-type]


def test_gradients_are_averaged_with_norm_and_position() -> None:
    gradients = torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
    gradients[1, 2] = 0
    others, norm = weigh(INPUTS, MASK, "norm+position", causal=True)
    weights, sampled = weigh(INPUTS, MASK, GRADIENT, causal=True, gradients=gradients)
    assert others is not None
    assert norm is not None
    torch.testing.assert_close(weights, (others * gradients).sqrt())
    assert sampled is not None
    assert torch.equal(sampled, norm)
    halved, _ = weigh(INPUTS.bfloat16(), MASK, GRADIENT, causal=True, gradients=gradients)
    assert halved is not None
    assert halved[1, 2] == 0
    assert (torch.frexp(halved[halved > 0]).mantissa == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bit_inputs_are_the_nearest_powers_of_two(dtype: torch.dtype) -> None:
    inputs = INPUTS.to(dtype)
    for weights, exact in zip(
        weigh(inputs, MASK, "norm+position", causal=True),
        (norm_weights(inputs) * position_weights(inputs, MASK), norm_weights(inputs)),
        strict=True,
    ):
        assert weights is not None
        assert (torch.frexp(weights).mantissa == 0.5).all()
        # each factor is off by at most the square root of 2
        assert (weights / exact).log2().abs().max() <= 1
        assert torch.equal(inputs * weights.unsqueeze(-1).to(dtype), (inputs * weights.unsqueeze(-1)).to(dtype))


CAUSAL = {
    "llama": True,
    "qwen2": True,
    "gpt2": True,
    "opt": True,
    "gemma3": True,
    "phi3": True,
    "bert": False,
    "mamba": False,
}


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_layers_are_found_by_the_attention_around_them(kind: str) -> None:
    build, _ = small_models.MODELS[kind]
    model = build()
    sites = list(find_sites(model).sites)
    blocks = [site for site in sites if any(part.isdigit() for part in site.name.split("."))]
    assert blocks
    found = causal_sites(model, sites)
    assert {id(site) in found for site in blocks} == {CAUSAL[kind]}


@pytest.mark.parametrize(("kind", "cross"), [("whisper", "encoder_attn"), ("t5", "EncDecAttention")])
def test_of_a_decoder_with_cross_attention_what_the_encoder_gives_is_not_causal(kind: str, cross: str) -> None:
    build, _ = small_models.MODELS[kind]
    model = build()
    sites = list(find_sites(model).sites)
    found = causal_sites(model, sites)
    for site in sites:
        parts = site.name.split(".")
        if any(part.isdigit() for part in parts):
            assert (id(site) in found) == ("decoder" in parts and cross not in parts), site.name


def test_experts_are_not_in_the_order_of_a_text() -> None:
    build, _ = small_models.MODELS["mixtral"]
    model = build()
    sites = list(find_sites(model).sites)
    found = causal_sites(model, sites)
    assert {id(site) in found for site in sites if "experts" in site.name} == {False}
    assert {id(site) in found for site in sites if "self_attn" in site.name} == {True}


class Causal(nn.Module):
    """A Linear after what says of itself that it is causal."""

    def __init__(self) -> None:
        super().__init__()
        self.is_causal = True
        self.layer = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != GRADIENT])
def test_a_layer_is_quantized_with_the_weights_of_its_scheme(scheme: Any) -> None:
    torch.manual_seed(0)
    model = Causal().eval()
    batches = [torch.randn(2, 32, 32) * torch.rand(2, 32, 1) * 4 for _ in range(8)]
    weight = model.layer.weight.detach().clone()
    expected, sample = HessianAccumulator(32, halves=True), HessianAccumulator(32)
    for batch in batches:
        weights, sampled = weigh(batch, None, scheme, causal=True)
        expected.update(batch, token_weights=weights)
        sample.update(batch, token_weights=sampled)
    options = LayerOptions(bits=3, group_size=16, preset="fast", token_weights=scheme)
    layer = quantize_model(model, batches, options, held_out=0).layers["layer"]
    by_hand = gptq_auto(
        weight, expected, bits=3, group_size=16, effective_tokens=sample.effective_tokens, **preset("fast")
    )
    assert torch.equal(layer.quantized.codes, by_hand.codes)
    assert layer.ridge == by_hand.ridge
    assert layer.tokens == 8 * 64


def test_layers_on_the_same_inputs_share_a_hessian_only_with_the_same_weights() -> None:
    class Pair(Causal):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(32, 24)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.other(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Pair().eval()
    model.other.weight.data = model.layer.weight.data.clone()
    batches = [torch.randn(2, 32, 32) * torch.rand(2, 32, 1) * 4 for _ in range(8)]
    recipe = {
        "defaults": {"bits": 3, "group_size": 16, "preset": "fast", "token_weights": "uniform"},
        "rules": [{"pattern": "other", "token_weights": "norm+position"}],
    }
    layers = quantize_model(model, batches, recipe, held_out=0).layers
    assert layers["layer"].loss != pytest.approx(layers["other"].loss, rel=0.05)
    assert not torch.equal(layers["layer"].quantized.codes, layers["other"].quantized.codes)


def test_ridge_takes_the_number_of_tokens_that_it_is_told() -> None:
    generator = torch.Generator().manual_seed(1)
    accumulator = HessianAccumulator(64, halves=True)
    accumulator.update(torch.randn(96, 64, generator=generator))
    weight = torch.randn(16, 64, generator=generator)
    assert choose_ridge(weight, accumulator, effective_tokens=96) == choose_ridge(weight, accumulator)
    few, many = (choose_ridge(weight, accumulator, effective_tokens=tokens).ridges[0] for tokens in (8, 4096))
    assert few > many
    for bad in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="effective_tokens to be finite and at least 1, but got"):
            choose_ridge(weight, accumulator, effective_tokens=bad)

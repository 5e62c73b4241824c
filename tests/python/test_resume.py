"""Runs that go on from finished layers end with the same bytes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import small_models
from miniquant import LayerOptions, QuantizedWeight, Recipe, Rule, dequantize, quantize_model
from miniquant.modules import find_sites
from miniquant.quantize import FinishedLayer, LayerResult, Stopped
from test_quantize_model import BATCHES, ROUTED, Experts, Listed, chain, mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from miniquant.modules import Site

FAST = LayerOptions(preset="fast", group_size=16)


class Kept:
    """A store in memory: what a run saved, and what the next one is given."""

    def __init__(self, layers: Iterable[FinishedLayer] = ()) -> None:
        self.layers = {layer.result.name: layer for layer in layers}
        self.saved: list[str] = []

    def __contains__(self, name: object) -> bool:
        return name in self.layers

    def load(self, site: Site, options: LayerOptions) -> FinishedLayer:
        kept = self.layers[site.name]
        assert kept.result.options == options
        return replace(kept, result=replace(kept.result, site=site))

    def save(self, layer: FinishedLayer) -> None:
        assert layer.result.quantized.codes.device.type == "cpu"
        self.layers[layer.result.name] = layer
        self.saved.append(layer.result.name)


def bytes_of(quantized: QuantizedWeight) -> list[bytes]:
    return [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in quantized.tensors]


def figures(layer: LayerResult) -> dict[str, Any]:
    """All that is said of a layer, but for its tensors, and for what another run may say otherwise."""
    return {key: value for key, value in vars(layer).items() if key not in ("site", "quantized", "seconds", "restored")}


CASES: dict[str, tuple[Callable[[], nn.Module], list[Any], Recipe, float]] = {
    "shared inputs": (chain, BATCHES, Recipe(FAST, [Rule("right", {"bits": 3})]), 0.1),
    "one ridge for several": (chain, BATCHES, Recipe(FAST), 0.1),
    "siblings": (lambda: mixture(Experts), ROUTED, Recipe(FAST, [Rule("experts.*", {"unseen": "siblings"})]), 0.1),
    "listed siblings": (
        lambda: mixture(Listed),
        ROUTED,
        Recipe(FAST, [Rule("experts.*", {"unseen": "siblings"})]),
        0.1,
    ),
    "rounded": (lambda: mixture(Experts), ROUTED, Recipe(replace(FAST, unseen="rtn")), 0.1),
    "llama": (
        lambda: small_models.decoder("Llama"),
        3 * small_models.text_batches(),
        Recipe(replace(FAST, min_tokens=2)),
        0.1,
    ),
    "mixtral": (
        small_models.MODELS["mixtral"][0],
        3 * small_models.text_batches(),
        Recipe(replace(FAST, min_tokens=2), [Rule("*.experts.*", {"unseen": "siblings"})]),
        0.1,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_from_any_layer_to_the_same_bytes(case: str) -> None:
    build, batches, recipe, held_out = CASES[case]
    plain_model = build()
    plain = quantize_model(plain_model, batches, recipe, held_out=held_out)
    whole = Kept()
    result = quantize_model(build(), batches, recipe, held_out=held_out, store=whole)
    assert whole.saved == list(result.layers) == list(plain.layers)
    for layer in result.layers.values():
        assert {tensor.device.type for tensor in layer.quantized.tensors} == {"meta"}
        assert layer.quantized.codes.shape == (layer.site.rows, layer.site.columns)
        assert not layer.restored
    names = list(plain.layers)
    counts = range(len(names) + 1) if len(names) < 12 else (1, 3, 6, 9, len(names) - 1, len(names))
    for count in counts:
        kept = Kept(whole.layers[name] for name in names[:count])
        calls: list[str] = []
        model = build()
        resumed = quantize_model(
            model,
            batches,
            recipe,
            held_out=held_out,
            store=kept,
            progress=lambda layer, *_, calls=calls: calls.append(layer.name),
        )
        assert calls == list(resumed.layers) == names
        assert kept.saved == names[count:]
        assert [layer.restored for layer in resumed.layers.values()] == [place < count for place in range(len(names))]
        for name in names:
            assert bytes_of(kept.layers[name].result.quantized) == bytes_of(plain.layers[name].quantized), name
            assert figures(resumed.layers[name]) == figures(plain.layers[name])
        for (name, value), other in zip(model.state_dict().items(), plain_model.state_dict().values(), strict=True):
            assert torch.equal(value, other), name


@pytest.mark.parametrize("case", ["shared inputs", "one ridge for several", "siblings", "listed siblings"])
def test_layers_in_between_may_be_missing(case: str) -> None:
    """Files that were lost: any subset of them gives the same bytes, since every layer sees the same inputs."""
    build, batches, recipe, held_out = CASES[case]
    whole = Kept()
    quantize_model(build(), batches, recipe, held_out=held_out, store=whole)
    for lost in itertools.islice(itertools.combinations(whole.layers, 2), 0, None, 3):
        kept = Kept(layer for name, layer in whole.layers.items() if name not in lost)
        quantize_model(build(), batches, recipe, held_out=held_out, store=kept)
        assert set(kept.saved) == set(lost)
        for name, layer in whole.layers.items():
            assert bytes_of(kept.layers[name].result.quantized) == bytes_of(layer.result.quantized), (lost, name)


def test_restored_layers_take_no_hessian() -> None:
    whole = Kept()
    quantize_model(chain(), BATCHES, FAST, store=whole)
    resumed = quantize_model(chain(), BATCHES, FAST, store=Kept(whole.layers.values()))
    assert resumed.seconds["hessians"] == resumed.seconds["solver"] == resumed.seconds["judging"] == 0


def test_without_the_ridge_of_the_layer_before_the_bytes_would_differ() -> None:
    """What the test above of one ridge for several rests on."""
    recipe = Recipe(FAST)
    whole = Kept()
    quantize_model(chain(), BATCHES, recipe, held_out=0, store=whole)
    left = whole.layers["left"]
    assert left.found_ridge == left.result.ridge
    forgetful = Kept([replace(left, found_ridge=99.0)])
    quantize_model(chain(), BATCHES, recipe, held_out=0, store=forgetful)
    assert forgetful.layers["right"].result.ridge == 99.0
    assert bytes_of(forgetful.layers["right"].result.quantized) != bytes_of(whole.layers["right"].result.quantized)


def test_a_store_that_fails_ends_the_run_with_its_own_error() -> None:
    class Full(Kept):
        def save(self, layer: FinishedLayer) -> None:
            if len(self.saved) == 1:
                raise OSError(28, "No space left on device")
            super().save(layer)

    model = chain()
    before = model.last.weight.detach().clone()
    store = Full()
    with pytest.raises(OSError, match="No space left"):
        quantize_model(model, BATCHES, FAST, store=store)
    assert store.saved == ["left"]
    assert torch.equal(model.last.weight, before)
    assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]


def test_a_run_stops_at_a_layers_boundary() -> None:
    whole = Kept()
    quantize_model(chain(), BATCHES, FAST, store=whole)
    stopped_at: list[int] = []
    for calls in itertools.count():
        model, store = chain(), Kept()
        left = [calls]

        def stop(left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        stopped = None
        try:
            quantize_model(model, BATCHES, FAST, store=store, stop=stop)
        except Stopped as error:
            stopped = error
        if stopped is None:
            break
        done = list(stopped.result.layers)
        assert str(stopped) == f"quantize_model: stopped after {len(done)} of 3 layers"
        stopped_at.append(len(done))
        assert done == store.saved == list(whole.layers)[: len(done)]
        for site in find_sites(model).sites:
            if site.name in store:
                assert torch.equal(site.read(), dequantize(store.layers[site.name].result.quantized))
            else:
                assert torch.equal(site.read(), chain().state_dict()[site.parameter_name])
        assert not [hook for module in model.modules() for hook in module._forward_pre_hooks]
    # Before each of eight batches that goes on, and before each layer is solved.
    assert stopped_at == [0] * 9 + [1] * 9 + [2] * 9


def test_a_store_holds_layers_one_at_a_time() -> None:
    """The result of a run with a store holds on to no codes: nothing of them is left when the store drops them."""

    class Dropping(Kept):
        def __init__(self) -> None:
            super().__init__()
            self.bytes = 0

        def save(self, layer: FinishedLayer) -> None:
            self.bytes += layer.result.quantized.codes.numel()

    store = Dropping()
    result = quantize_model(chain(), BATCHES, FAST, store=store)
    assert store.bytes == sum(layer.site.rows * layer.site.columns for layer in result.layers.values())
    tensors: list[Tensor] = [tensor for layer in result.layers.values() for tensor in layer.quantized.tensors]
    assert all(tensor.is_meta for tensor in tensors)

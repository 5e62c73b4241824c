"""Gradients at the outputs of layers: those of the model's own predictions, with a block in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import small_models
from miniquant import LayerOptions, load_calibration, quantize_model
from miniquant.gradients import each_gradient, has_gradient, squared_gradients
from miniquant.lazy import LazyModel
from miniquant.modules import find_sites
from miniquant.results import Stopped
from miniquant.run import quantize_folder
from miniquant.token_weights import GRADIENT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def batches(count: int = 3, tokens: int = 12) -> list[dict[str, Tensor]]:
    return [{"input_ids": small_models.ids(2, tokens, seed)} for seed in range(count)]


def model_of(kind: str) -> Any:
    build, _ = small_models.MODELS[kind]
    return build().eval()


def by_hand(model: Any, given: list[dict[str, Tensor]], seed: int) -> dict[str, list[Tensor]]:
    """The same of autograd's own leaves: gradients of weights' outputs by a zero that is added to each."""
    generator = torch.Generator().manual_seed(seed)
    names = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in given:
        added: dict[str, Tensor] = {}

        def hook(name: str, added: dict[str, Tensor] = added) -> Callable[..., Tensor]:
            def add(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                added[name] = torch.zeros_like(output, requires_grad=True)
                return output + added[name]

            return add

        handles = [module.register_forward_hook(hook(name)) for name, module in names.items()]
        logits = model(**batch, use_cache=False).logits
        for handle in handles:
            handle.remove()
        shares = logits.detach().flatten(0, -2).softmax(-1)
        drawn = torch.multinomial(shares, 1, generator=generator)
        loss = -logits.flatten(0, -2).log_softmax(-1).gather(1, drawn).sum()
        gradients = torch.autograd.grad(loss, list(added.values()), allow_unused=True)
        for name, gradient in zip(added, gradients, strict=True):
            if gradient is not None:
                found[name].append(gradient.square().sum(-1))
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3", "opt"])
def test_they_are_those_of_autograd(kind: str) -> None:
    model = model_of(kind)
    given = batches()
    sites = [site for site in find_sites(model).sites if has_gradient(site)]
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    found = squared_gradients(model, given, sites, seed=3)
    expected = by_hand(model, given, 3)
    assert {site.name for site in sites} == set(found)
    for name, of_batches in found.items():
        for gradient, wanted in zip(of_batches, expected[name], strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=2e-4, atol=1e-9)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_block_that_runs_again_gives_the_same() -> None:
    model = model_of("llama")
    sites = list(find_sites(model).sites)

    def gradients(*, by_block: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def watch(site: Any, _number: int, _inputs: Tensor) -> Callable[[Tensor], None]:
            return lambda gradient: found.update({site.name: gradient})

        generator = torch.Generator().manual_seed(0)
        assert each_gradient(model, batches(1), sites, watch, generator=generator, by_block=by_block) == 24
        return found

    kept, again = gradients(by_block=False), gradients(by_block=True)
    assert set(kept) == set(again) == {site.name for site in sites}
    for name, gradient in kept.items():
        assert torch.equal(gradient, again[name]), name


def test_padding_has_no_predictions() -> None:
    model = model_of("llama")
    (batch,) = batches(1)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 5:] = 0
    sites = list(find_sites(model).sites)
    found = squared_gradients(model, [{**batch, "attention_mask": mask}], sites)
    last = found["model.layers.1.mlp.down_proj"][0]
    assert (last[0, 5:] == 0).all()
    assert (last[mask.bool()] > 0).all()
    given = squared_gradients(model, [batch], sites, masks=[mask])
    assert (given["model.layers.1.mlp.down_proj"][0][0, 5:] == 0).all()


def test_of_encoder_and_decoder_the_mask_is_the_decoders() -> None:
    model = model_of("t5")
    sites = [site for site in find_sites(model).sites if has_gradient(site)]
    name = "decoder.block.1.layer.2.DenseReluDense.wo"
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {
        "input_ids": small_models.ids(2, 12, 0),
        "attention_mask": torch.ones(2, 12, dtype=torch.long),
        "decoder_input_ids": small_models.ids(2, 6, 1),
        "decoder_attention_mask": mask,
    }
    squares = squared_gradients(model, [batch], sites)[name][0]
    assert squares.shape == (2, 6)
    assert (squares[1, 4:] == 0).all()
    assert (squares[mask.bool()] > 0).all()
    with pytest.raises(ValueError, match=r"batch 0: expected a mask of shape \[2, 6\], .* but got shape \[2, 12\]"):
        squared_gradients(model, [batch], sites, masks=[batch["attention_mask"]])


def test_a_model_without_logits_is_refused() -> None:
    model = model_of("llama").get_submodule("model")
    with pytest.raises(ValueError, match=r"'gradient': expected a language model, whose output has logits \[B, T, V\]"):
        quantize_model(model, batches(), LayerOptions(token_weights=GRADIENT, group_size=16, min_tokens=1))


def test_a_run_stops_between_batches() -> None:
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(Stopped, match="stopped after 0 of"):
        quantize_model(
            model_of("llama"),
            batches(5),
            LayerOptions(token_weights=GRADIENT, group_size=16, min_tokens=1),
            stop=stop,
        )
    assert len(asked) == 3


def test_layers_are_weighed_by_their_own_gradients_and_experts_are_not() -> None:
    options = LayerOptions(token_weights=GRADIENT, group_size=16, preset="plain", min_tokens=1)
    result = quantize_model(model_of("llama"), batches(8), options)
    assert result.seconds["gradients"] > 0
    assert sum(result.seconds[part] for part in result.seconds if part != "total") == pytest.approx(
        result.seconds["total"]
    )
    assert not [note for note in result.notes if "gradient" in note]
    losses = {name: layer.loss for name, layer in result.layers.items()}
    alike = quantize_model(model_of("llama"), batches(8), LayerOptions(group_size=16, preset="plain", min_tokens=1))
    assert all(losses[name] != layer.loss for name, layer in alike.layers.items())
    mixed = quantize_model(
        model_of("mixtral"),
        batches(8),
        LayerOptions(
            token_weights=GRADIENT,
            group_size=16,
            preset="plain",
            min_tokens=1,
            unseen="rtn",
        ),
    )
    (note,) = [note for note in mixed.notes if "gradient" in note]
    assert "experts" in note


def test_a_folder_gives_what_the_model_in_memory_gives(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    model = model_of("llama")
    model.save_pretrained(folder)
    options = LayerOptions(token_weights=GRADIENT, group_size=16, preset="plain", min_tokens=1)
    calibration = load_calibration(batches(8), tokens=10**6)
    runs = {}
    for lazy in (True, False):
        done = quantize_folder(
            folder,
            tmp_path / f"out-{lazy}",
            options,
            format="miniquant",
            calibration=calibration,
            dtype=torch.float32,
            lazy=lazy,
        )
        runs[lazy] = {name: layer.loss for name, layer in done.result.layers.items()}
    assert runs[True] == runs[False]
    in_memory = quantize_model(model, calibration, options)
    assert runs[True] == {name: layer.loss for name, layer in in_memory.layers.items()}


def test_no_more_than_a_block_is_in_memory(tmp_path: Path) -> None:
    model: Any = small_models.decoder("Llama", num_hidden_layers=4)
    model.save_pretrained(tmp_path)
    with LazyModel(tmp_path) as lazy:
        sites = list(find_sites(lazy.model).sites)
        assert set(squared_gradients(lazy.model, batches(2), sites)) == {site.name for site in sites}
    assert lazy.peak_bytes == max(lazy.unit_bytes().values()) < sum(lazy.unit_bytes().values())

"""Turned models predict what they did, in memory and from a folder, and what cannot be turned is refused."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import small_models
from miniquant import LayerOptions, Recipe, Rule, quantize_folder, quantize_model, rotate_model
from miniquant.checkpoint import Checkpoint
from miniquant.float_models import load_gguf
from miniquant.lazy import LazyModel
from miniquant.loading import load
from miniquant.rotated import RotatedCheckpoint, check_predictions
from miniquant.rotation import Orthogonal, find_rotation
from model_folder import VOCABULARY, make_folder

if TYPE_CHECKING:
    from pathlib import Path

# Heads of 6 and a stream of 24: sizes that are no powers of two. Values of 3 heads for 6 of queries.
SHAPE: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "tie_word_embeddings": False,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {}),
    "qwen2, biases of q, k and v": ("Qwen2", {"head_dim": 4}),
    "qwen3, norms of q and k": ("Qwen3", {}),
    "granite, multipliers": ("Granite", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0}),
    "qwen3, experts": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
    ),
    "qwen2, shared experts": (
        "Qwen2Moe",
        {
            "head_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}


def made(kind: str) -> Any:
    name, more = KINDS[kind]
    model = small_models.decoder(name, **{**SHAPE, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that predictions depend on every layer
    return model


def predictions(model: nn.Module) -> Tensor:
    ids = small_models.ids(3, 11, seed=5)
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits.double().log_softmax(-1)
    return found


def kept(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


# The matrix


@pytest.mark.parametrize("size", [1, 2, 3, 6, 8, 24, 64, 128, 576, 4096 + 64])
def test_the_matrix_is_orthonormal(size: int) -> None:
    matrix = Orthogonal(size).of_rows(torch.eye(size))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [8, 24, 576])
def test_an_outlier_is_spread_over_all_values(size: int) -> None:
    outlier = torch.zeros(1, size)
    outlier[0, size // 3] = 1
    turned = Orthogonal(size).of_rows(outlier).abs().max().item()
    assert turned <= (2 / size) ** 0.5 + 1e-12  # of the cosine transform; 1 / sqrt(n) of a Hadamard matrix


def test_a_matrix_is_the_same_each_time_and_another_for_each_size() -> None:
    values = torch.randn(5, 48, generator=small_models.generator(), dtype=torch.float64)
    assert torch.equal(Orthogonal(48).of_rows(values), Orthogonal(48).of_rows(values))
    assert not torch.allclose(Orthogonal(16).of_rows(values.view(-1, 16)).view(5, 48), Orthogonal(48).of_rows(values))


# Models in memory


@pytest.mark.parametrize("kind", KINDS)
def test_a_turned_model_predicts_what_it_did(kind: str) -> None:
    model = made(kind)
    before, weights = predictions(model), {name: one.clone() for name, one in model.state_dict().items()}
    rotate_model(model)
    torch.testing.assert_close(predictions(model), before, rtol=0, atol=1e-4)
    for name, weight in model.state_dict().items():
        if name in find_rotation(model).turns:
            assert not torch.allclose(weight, weights[name]), name


def test_tied_output_embeddings_become_a_matrix_of_their_own(tmp_path: Path) -> None:
    model = made("llama, tied")
    before = predictions(model)
    rotate_model(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    saved = load(kept(model, tmp_path))
    torch.testing.assert_close(predictions(saved), before, rtol=0, atol=1e-4)


def test_a_model_in_bfloat16_is_turned_with_one_rounding() -> None:
    model = made("llama").bfloat16()
    exact = copy.deepcopy(model).double()
    rotate_model(model)
    rotate_model(exact)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, exact.state_dict()[name].float().bfloat16()), name


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (lambda: small_models.decoder("Gemma"), "another norm"),
        (lambda: small_models.decoder("Gemma2"), "whose part is not known here"),
        (lambda: small_models.decoder("Olmo2"), "it has no parameter"),
        (small_models.gpt2, "it has no parameter"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "it has no blocks"),
    ],
    ids=["gemma", "gemma2", "olmo2", "gpt2", "no language model"],
)
def test_a_model_that_cannot_be_turned_is_refused_and_kept(model: Any, what: str) -> None:
    refused = model()
    before = copy.deepcopy(refused.state_dict())
    with pytest.raises(ValueError, match=f"rotation: expected a language model with blocks as .*{what}"):
        rotate_model(refused)
    for name, value in refused.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_recipe_turns_a_model_before_it_is_quantized() -> None:
    recipe = Recipe(LayerOptions(bits=8, group_size=8, preset="fast", min_tokens=1), rotation=True)
    model, turned = made("llama"), made("llama")
    rotate_model(turned)
    quantize_model(model, small_models.text_batches(), recipe, held_out=0.0)
    name = "model.layers.1.mlp.down_proj"
    near, far = turned.get_submodule(name).weight, made("llama").get_submodule(name).weight
    weight = model.get_submodule(name).weight
    assert (weight - near).norm() < 0.02 * near.norm()
    assert (weight - far).norm() > far.norm()


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"calibration": []}, ValueError),
        ({"calibration": torch.ones(2, 3)}, TypeError),
        ({"held_out": 0.9}, ValueError),
        ({"masks": [None]}, ValueError),
        ({"rules": (Rule("nowhere", {"bits": 3}),)}, ValueError),
    ],
)
def test_a_bad_argument_leaves_a_model_as_it_is(bad: dict[str, Any], error: Any) -> None:
    model = small_models.decoder("Llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe(LayerOptions(group_size=16), rules=bad.pop("rules", ()), rotation=True)
    arguments = {"calibration": iter(small_models.text_batches()), **bad}
    with pytest.raises(error):
        quantize_model(model, arguments.pop("calibration"), recipe, **arguments)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# Folders


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_read_as_if_it_had_been_saved_turned(tmp_path: Path, kind: str) -> None:
    model = made(kind)
    checkpoint = RotatedCheckpoint(kept(model, tmp_path))
    rotate_model(model)
    with LazyModel(checkpoint) as lazy:
        torch.testing.assert_close(predictions(lazy.model), predictions(model), rtol=0, atol=1e-6)
    assert checkpoint.nbytes == Checkpoint(tmp_path).nbytes
    for name, value in model.state_dict().items():
        if name in checkpoint.tensors:  # files have experts one by one
            assert torch.equal(checkpoint.read(name), value), name


def test_weights_of_a_folder_are_not_rounded_to_its_dtype(tmp_path: Path) -> None:
    checkpoint = RotatedCheckpoint(kept(made("llama").bfloat16(), tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    assert checkpoint.tensors[name].dtype == torch.bfloat16
    assert checkpoint.read_dtype(name) == torch.float32
    assert checkpoint.read(name).dtype == torch.float32
    assert not torch.equal(checkpoint.read(name), checkpoint.read(name).bfloat16().float())


def test_predictions_of_another_model_are_told_apart(tmp_path: Path) -> None:
    folder = kept(made("llama"), tmp_path / "one")
    other = made("llama")
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    ids = small_models.ids(1, 40, seed=1)
    check_predictions(folder, RotatedCheckpoint(folder), ids, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"expected the turned model to predict what the model does, but got a div"):
        check_predictions(folder, RotatedCheckpoint(kept(other, tmp_path / "two")), ids, torch.device("cpu"))


def folder_of(tmp_path: Path, *, tied: bool, dtype: torch.dtype = torch.bfloat16) -> Path:
    shape = {**SHAPE, "hidden_size": 96, "intermediate_size": 96, "head_dim": 16, "vocab_size": VOCABULARY}
    model = small_models.decoder("Llama", **{**shape, "tie_word_embeddings": tied})
    return make_folder(tmp_path / "model", model.to(dtype))


RECIPE = Recipe(LayerOptions(bits=8, group_size=8, preset="fast"), rotation=True)
QUICK: dict[str, Any] = {"tokens": 512, "sequence_length": 64, "dtype": torch.float32}


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "miniquant"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_folder_loads_as_the_turned_model(tmp_path: Path, form: Any, tied: bool) -> None:
    folder = folder_of(tmp_path, tied=tied)
    done = quantize_folder(folder, tmp_path / "out", RECIPE, format=form, **QUICK)
    said = [note for note in done.notes if note.startswith("rotation: lm_head.weight, which is tied to")]
    assert len(said) == tied
    found, original = load(tmp_path / "out"), load(folder, dtype=torch.float32)
    torch.testing.assert_close(predictions(found.float()), predictions(original), rtol=0, atol=0.05)
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(tensors["model.norm.weight"], torch.ones(96, dtype=torch.bfloat16))
    assert tensors["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_has_the_turned_model(tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("gguf")
    folder = folder_of(tmp_path, tied=tied)
    recipe = Recipe(LayerOptions(bits=8, group_size=32, preset="fast"), rotation=True)
    quantize_folder(folder, tmp_path / "out", recipe, format="gguf", **QUICK)
    found, original = load_gguf(tmp_path / "out" / "model.gguf"), load(folder, dtype=torch.float32)
    torch.testing.assert_close(predictions(found), predictions(original), rtol=0, atol=0.05)


def test_lazy_and_whole_models_give_the_same_bytes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tied=True)
    for name, lazy in (("lazy", True), ("whole", False)):
        quantize_folder(folder, tmp_path / name, RECIPE, lazy=lazy, report=False, **QUICK)
    one, other = (tmp_path / name / "model.safetensors" for name in ("lazy", "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_output_embeddings_that_were_tied_can_be_quantized(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tied=True)
    result = quantize_folder(folder, tmp_path / "out", RECIPE, output_embeddings=True, **QUICK)
    assert "lm_head" in result.result.layers
    assert not any(note.startswith("rotation") for note in result.notes)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight_packed" in tensors


def test_a_run_with_a_rotation_is_another_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, tied=False)
    with pytest.raises(RuntimeError, match="stopped"):
        quantize_folder(folder, tmp_path / "out", RECIPE, stop=lambda: True, **QUICK)
    with pytest.raises(ValueError, match="rotation"):
        quantize_folder(folder, tmp_path / "out", Recipe(RECIPE.defaults), resume=True, **QUICK)
    quantize_folder(folder, tmp_path / "out", RECIPE, resume=True, **QUICK)

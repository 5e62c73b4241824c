"""Quantized folders come back as models: of every architecture and format, without float weights, or with an error."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import miniquant
from small_models import MODELS, decoder, qwen3_moe

transformers = pytest.importorskip("transformers")

from gguf_examples import small  # noqa: E402  (needs transformers)
from miniquant.checkpoint import CONFIG  # noqa: E402
from miniquant.linear import QuantizedConvolution, QuantizedExperts, QuantizedLinear  # noqa: E402
from miniquant.loading import contents_of, load  # noqa: E402
from miniquant.modules import find_sites  # noqa: E402
from quantized_folders import OPTIONS, Quantized, edited, quantized_folder  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

# Of outputs in float32, relative to the largest: sums may be in another order.
ROUNDING = 2e-6


def outputs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        result = model(**batch)
    found: Tensor = result.logits if "logits" in result else result[0]
    return found


def distance(model: nn.Module, reference: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The largest difference of outputs, relative to the largest output."""
    pairs = [(outputs(model, batch).float(), outputs(reference, batch).float()) for batch in batches]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def llama(path: Path, form: str = "miniquant", **more: Any) -> Quantized:
    return quantized_folder(decoder("Llama"), path, form, **more)


# Values


@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, batches = MODELS[kind]
    made = quantized_folder(make(), tmp_path)
    model = load(made.folder)
    assert type(model).__name__ == made.kind
    assert distance(model, made.reference(), batches()) <= ROUNDING
    assert [record.message for record in caplog.records if record.name.startswith("miniquant")] == []
    # No weight that could be quantized is a float one, and every layer of the folder is in the model.
    assert [site.name for site in find_sites(model).sites] == []
    held = sum(layer.in_features * layer.out_features for layer in quantized_modules(model).values())
    assert held == sum(layer.codes.numel() for layer in made.layers.values())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert not any(module.training for module in model.modules())


GRIDS: list[tuple[str, Mapping[str, Any]]] = [
    ("compressed-tensors", {"bits": 4, "group_size": 16}),
    ("compressed-tensors", {"bits": 3, "group_size": -1, "symmetric": False}),
    ("gptq", {"bits": 4, "group_size": 32}),
    ("gptq", {"bits": 8, "group_size": 16}),
    ("gptq_v2", {"bits": 4, "group_size": 16, "symmetric": False}),
    ("gptq_v2", {"bits": 2, "group_size": 8}),
    ("miniquant", {"bits": 5, "group_size": 24, "full_range": True}),
]


@pytest.mark.parametrize(("form", "grid"), GRIDS, ids=str)
def test_every_format(form: str, grid: Mapping[str, Any], tmp_path: Path) -> None:
    made = quantized_folder(
        decoder("Llama", intermediate_size=64), tmp_path, form, lambda _: grid, max_shard_bytes=20_000
    )
    assert len(list(made.folder.glob("model-*.safetensors"))) > 1
    model = load(made.folder)
    layers = quantized_modules(model)
    assert layers.keys() == made.layers.keys()
    for name, layer in layers.items():
        stored = made.layers[name]
        assert torch.equal(layer.quantized().codes, stored.codes)
        assert torch.equal(layer.quantized().scales, stored.scales)
        assert torch.equal(layer.quantized().zero_points, stored.zero_points)
    assert distance(model, made.reference(), MODELS["llama"][1]()) <= ROUNDING


def test_as_transformers_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    made = llama(tmp_path, "compressed-tensors", options=lambda _: {"bits": 4, "group_size": 16})
    model = transformers.AutoModelForCausalLM.from_pretrained(made.folder)
    assert distance(load(made.folder), model, MODELS["llama"][1]()) <= ROUNDING


def mixed(name: str) -> Mapping[str, Any] | None:
    """Different grids, and layers that are left alone."""
    if "layers.0" in name and name.endswith("down_proj"):
        return None
    return {"bits": 8 if name.endswith("up_proj") else 4, "group_size": 16, "symmetric": name.endswith("q_proj")}


def test_layers_of_several_grids(tmp_path: Path) -> None:
    made = llama(tmp_path, options=mixed)
    model = load(made.folder)
    layers = quantized_modules(model)
    assert (layers["model.layers.1.mlp.up_proj"].bits, layers["model.layers.1.mlp.down_proj"].bits) == (8, 4)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert distance(model, made.reference(), MODELS["llama"][1]()) <= ROUNDING


def test_dtypes(tmp_path: Path) -> None:
    made = llama(tmp_path, options=lambda _: {"bits": 4, "group_size": 32})
    batches = MODELS["llama"][1]()
    for dtype, bound in ((torch.float64, ROUNDING), (torch.bfloat16, 0.03), (torch.float16, 0.004)):
        model = load(made.folder, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.dtype == dtype
        assert outputs(model, batches[0]).dtype == dtype
        assert distance(model, made.reference(), batches) <= bound
    assert all(layer.scales.dtype == torch.float32 for layer in quantized_modules(model).values())
    assert load(made.folder).dtype == torch.float32  # what the config says


def test_tied_embeddings(tmp_path: Path) -> None:
    made = quantized_folder(decoder("Llama", tie_word_embeddings=True), tmp_path)
    model = load(made.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert distance(model, made.reference(), MODELS["llama"][1]()) <= ROUNDING


def test_output_embeddings(tmp_path: Path) -> None:
    """A quantized head beside the embedding, as it is written."""
    made = llama(tmp_path)
    head = miniquant.rtn(made.reference().lm_head.weight.detach(), bits=4, group_size=16)

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["tie_word_embeddings"] = False
        del tensors["lm_head.weight"]
        tensors |= miniquant.formats.Native().tensors("lm_head", head)
        entry = dict(next(iter(config["quantization_config"]["layers"].values())), shape=[96, 32])
        config["quantization_config"]["layers"]["lm_head"] = entry

    edited(made.folder, change)
    model = load(made.folder)
    reference = made.reference()
    reference.lm_head.weight.data = miniquant.dequantize(head)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert distance(model, reference, MODELS["llama"][1]()) <= ROUNDING


def test_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    made = llama(tmp_path)
    model = load(made.float_folder)
    assert quantized_modules(model) == {}
    assert distance(model, made.reference(), MODELS["llama"][1]()) == 0


# Experts and other modules


@pytest.mark.parametrize("kind", ["qwen3-moe", "mixtral", "gpt-oss"])
def test_fused_experts(kind: str, tmp_path: Path) -> None:
    made = quantized_folder(MODELS[kind][0](), tmp_path)
    model = load(made.folder)
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(experts) == 4  # two in each of two blocks
    for name, module in made.reference().named_modules():
        for attribute in ("gate_up_proj", "down_proj"):
            parameter = module._parameters.get(attribute)
            if parameter is not None and parameter.dim() == 3:
                stand_in = model.get_submodule(name).get_submodule(attribute)
                assert stand_in.shape == parameter.shape
                for expert in range(len(parameter)):
                    assert torch.equal(stand_in[expert].dequantized(), parameter[expert])
    bfloat16 = load(made.folder, dtype=torch.bfloat16)
    assert distance(bfloat16, made.reference(torch.bfloat16), MODELS[kind][1]()) <= 0.1


@pytest.mark.parametrize(
    "choice",
    [
        lambda name: None if ".experts.2." in name else OPTIONS,
        lambda name: {"bits": 8 if ".1." in name else 4, "group_size": 16},
    ],
    ids=["not all", "of several grids"],
)
def test_experts_that_are_no_codes(
    choice: Callable[[str], Mapping[str, Any] | None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Experts are one parameter: where they cannot all be codes of one kind they are floats, and a warning says so."""
    made = quantized_folder(qwen3_moe(), tmp_path, options=choice)
    model = load(made.folder)
    assert distance(model, made.reference(), MODELS["qwen3-moe"][1]()) <= ROUNDING
    said = [record.message for record in caplog.records]
    not_all = [message for message in said if "model.layers.0.mlp.experts.gate_up_proj is dequantized" in message]
    assert len(not_all) == (choice("x.experts.2.up_proj") is None)


def test_some_of_the_experts_that_are_stored_fused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = quantized_folder(
        MODELS["gpt-oss"][0](), tmp_path, options=lambda name: None if name.endswith(".3") else OPTIONS
    )
    model = load(made.folder)
    assert distance(model, made.reference(), MODELS["gpt-oss"][1]()) <= ROUNDING
    assert sum("is dequantized" in record.message for record in caplog.records) == 4


def test_conversions_of_other_modules(tmp_path: Path) -> None:
    """Models look at what the modules had that are replaced."""
    made = quantized_folder(MODELS["whisper"][0](), tmp_path)
    convolution = load(made.folder).model.encoder.conv2
    reference = made.reference().model.encoder.conv2
    assert isinstance(convolution, QuantizedConvolution)
    for name in ("stride", "kernel_size", "padding", "in_channels", "out_channels"):
        assert getattr(convolution, name) == getattr(reference, name)
    assert torch.equal(convolution.weight, reference.weight)
    inputs = torch.randn(2, 32, 20)
    assert torch.allclose(convolution(inputs), reference(inputs), rtol=1e-5, atol=1e-6)
    assert torch.equal(copy.deepcopy(convolution)(inputs), convolution(inputs))
    assert convolution.to(torch.bfloat16)(inputs.bfloat16()).dtype == torch.bfloat16


# A model like others


def test_generates(tmp_path: Path) -> None:
    made = llama(tmp_path)
    config = transformers.GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=0, do_sample=False)
    config.save_pretrained(made.folder)
    model, reference = load(made.folder), made.reference()
    assert model.generation_config.max_new_tokens == 7
    prompt = torch.tensor([[1, 5, 9, 11]])
    expected = reference.generate(prompt, generation_config=config)
    assert torch.equal(model.generate(prompt), expected)
    assert load(made.folder, dtype=torch.bfloat16).generate(prompt).shape[1] > prompt.shape[1]


def test_compiled_and_exported(tmp_path: Path) -> None:
    torch.compiler.reset()
    made = llama(tmp_path, options=lambda _: {"bits": 4, "group_size": 32})
    ids = MODELS["llama"][1]()[0]["input_ids"]
    for dtype, bound in ((torch.float32, ROUNDING), (torch.bfloat16, 0.03)):
        model = load(made.folder, dtype=dtype)
        plain = outputs(model, {"input_ids": ids})
        compiled = torch.compile(model, backend="aot_eager")
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        exported: Any = program.module()
        for run in (compiled, exported):
            with torch.no_grad():
                logits = run(input_ids=ids, use_cache=False).logits
            assert float((logits - plain).float().abs().max() / plain.float().abs().max()) <= bound


def test_saved_once_more(tmp_path: Path) -> None:
    for kind, form in (("llama", "gptq"), ("gpt2", "miniquant"), ("qwen3-moe", "miniquant"), ("mixtral", "miniquant")):
        made = quantized_folder(MODELS[kind][0](), tmp_path / kind, form)
        model = load(made.folder)
        model.save_pretrained(tmp_path / kind / "again")
        again = load(tmp_path / kind / "again")
        assert contents_of(tmp_path / kind / "again").format == "miniquant"
        assert len(quantized_modules(again)) == len(quantized_modules(model))
        assert distance(again, model, MODELS[kind][1]()) == 0


def test_copies_and_states(tmp_path: Path) -> None:
    model = load(llama(tmp_path).folder)
    batches = MODELS["llama"][1]()
    assert distance(copy.deepcopy(model), model, batches) == 0
    other = copy.deepcopy(model)
    for layer in quantized_modules(other).values():
        layer.scales.zero_()
    other.load_state_dict(model.state_dict())
    assert distance(other, model, batches) == 0


def test_minilm(tmp_path: Path) -> None:
    folder = importlib.import_module("experiments.minilm.layers").model_folder()
    model = transformers.AutoModel.from_pretrained(folder)
    made = quantized_folder(model, tmp_path, "compressed-tensors", lambda _: {"bits": 4, "group_size": 64})
    assert len(made.layers) >= 36
    quantized = load(made.folder)
    ids = torch.randint(1000, 20000, (2, 24))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    assert distance(quantized, made.reference(), batches) <= 2e-5  # six blocks, each with two norms
    fast = load(made.folder, dtype=torch.bfloat16)
    assert all(layer.kernel for layer in quantized_modules(fast).values())
    assert distance(fast, made.reference(torch.bfloat16), batches) <= 0.05
    contents = contents_of(made.folder)
    assert contents.bits_per_weight == pytest.approx(4.5, abs=0.1)  # scales are float32


# Memory

PEAK = """
import gc, resource, sys, torch, transformers, miniquant
from miniquant.loading import load
load(sys.argv[1])  # what libraries take once
gc.collect()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak is the present from here on

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

before = status("VmRSS")
model = load(sys.argv[2])
held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
print(status("VmHWM") - before, held)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_float_weights_are_never_in_memory(tmp_path: Path, run: Callable[..., str]) -> None:
    tiny = llama(tmp_path / "tiny", "compressed-tensors")
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    large = decoder("Llama", **sizes, head_dim=64, num_key_value_heads=8)
    made = quantized_folder(large, tmp_path, "compressed-tensors", lambda _: {"bits": 4, "group_size": 64})
    weights = sum(layer.codes.numel() for layer in made.layers.values())
    del large
    peak, held = map(int, run(sys.executable, "-c", PEAK, tiny.folder, made.folder).split())
    largest = 512 * 1536
    # As the module says: what it has in the end, of one layer what is stored and 6 bytes for each weight, and what the
    # allocator keeps.
    assert peak <= held + 7 * largest + 40e6
    assert peak < 0.45 * 4 * weights


# Folders that are none


def config_with(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config.update(changes)

    return change


def quantization(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config["quantization_config"].update(changes)

    return change


def without(name: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def tensor(name: str, made: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = made(tensors[name].clone())

    return change


def renamed(before: str, after: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith(f"{before}."):
                tensors[name.replace(before, after)] = tensors.pop(name)
        layers = config["quantization_config"]["layers"]
        layers[after] = layers.pop(before)

    return change


def several(
    *changes: Callable[[dict[str, Any], dict[str, Tensor]], None],
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for one in changes:
            one(config, tensors)

    return change


def bad_scale(values: Tensor) -> Tensor:
    values[0, 0] = torch.nan
    return values


Q = "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[str, Callable[[dict[str, Any], dict[str, Tensor]], None], str]] = {
    "another method": ("miniquant", quantization(quant_method="awq"), "expected quant_method of quantization_config"),
    "no object": ("miniquant", config_with(quantization_config=[4]), "expected quantization_config to be an object"),
    "another version": ("miniquant", quantization(version=2), "expected version of quantization_config to be 1"),
    "no layers": ("miniquant", quantization(layers={}), "expected quantized layers, as quantization_config"),
    "codes missing": (
        "miniquant",
        without(f"{Q}.codes"),
        f"expected a tensor '{Q}.codes' of layer '{Q}', but got none",
    ),
    "scales missing": ("miniquant", without(f"{Q}.scales"), f"expected a tensor '{Q}.scales'"),
    "codes cut off": (
        "miniquant",
        tensor(f"{Q}.codes", lambda t: t[:-1]),
        f"expected tensor '{Q}.codes' to have shape",
    ),
    "codes of int32": (
        "miniquant",
        tensor(f"{Q}.codes", lambda t: t.int()),
        f"expected tensor '{Q}.codes' to be uint8",
    ),
    "scales not finite": (
        "miniquant",
        tensor(f"{Q}.scales", bad_scale),
        f"expected scales of layer '{Q}' to be finite",
    ),
    "codes out of range": (
        "miniquant",
        tensor(f"{Q}.codes", lambda t: torch.full_like(t, 0x88)),
        rf"expected codes of layer '{Q}' to be in \[-7, 7\] for 4 bits, but got -8",
    ),
    "a layer of no module": (
        "miniquant",
        renamed(Q, "model.layers.0.self_attn.w_proj"),
        "expected LlamaForCausalLM to have a place for layer 'model.layers.0.self_attn.w_proj'",
    ),
    "a layer too far": (
        "miniquant",
        renamed(Q, "model.layers.7.self_attn.q_proj"),
        "expected LlamaForCausalLM to have a place for layer 'model.layers.7.self_attn.q_proj'",
    ),
    "a layer in a norm's place": (
        "miniquant",
        several(renamed(Q, "model.norm"), without("model.norm.weight")),
        r"expected layer 'model.norm' to have shape \[32\], as config.json says",
    ),
    "a float weight beside": (
        "miniquant",
        lambda _, tensors: tensors.update({f"{Q}.weight": torch.ones(32, 32)}),
        f"expected one weight of layer '{Q}', but got a tensor '{Q}.weight' beside",
    ),
    "another size": (
        "miniquant",
        config_with(num_attention_heads=8),
        rf"expected layer '{Q}' to have shape \[64, 32\]",
    ),
    "no norm": ("miniquant", without("model.norm.weight"), "among them model.norm.weight"),
    "a norm of another size": (
        "miniquant",
        tensor("model.norm.weight", lambda t: t[1:]),
        r"expected tensor 'model.norm.weight' to become model.norm.weight with shape \[32\], but got shape \[31\]",
    ),
    "one more block": ("miniquant", config_with(num_hidden_layers=3), "expected tensors for all parameters"),
    "no class": ("miniquant", config_with(architectures=["LamaForCausalLM"]), "expected an architecture"),
    "a class that is no model": ("miniquant", config_with(architectures=["LlamaConfig"]), "expected an architecture"),
    "a class by a number": (
        "miniquant",
        config_with(architectures=[3]),
        "expected architectures to be a list of names",
    ),
    "code of the folder": (
        "miniquant",
        config_with(architectures=["Own"], auto_map={"AutoModelForCausalLM": "own.Own"}),
        "which is code of the folder",
    ),
    "an unknown type": (
        "miniquant",
        config_with(model_type="lama"),
        "expected a configuration that transformers reads",
    ),
    "sizes that are texts": ("miniquant", config_with(hidden_size="many"), "expected a configuration"),
    "packed codes missing": ("compressed-tensors", without(f"{Q}.weight_packed"), "among them"),
    "a shape that lies": (
        "compressed-tensors",
        tensor(f"{Q}.weight_shape", lambda t: t * 2),
        f"expected tensor '{Q}.weight_packed' to have shape",
    ),
    "no target": ("compressed-tensors", quantization(config_groups={}), "expected a target of quantization_config"),
    "another layout": ("compressed-tensors", quantization(format="marlin-24"), "'pack-quantized'"),
    "columns in another order": (
        "gptq",
        tensor(f"{Q}.g_idx", lambda t: t.flip(0)),
        "expected tensor .* to be the groups of columns in their order",
    ),
    "zero points of version 2": ("gptq", tensor(f"{Q}.qzeros", lambda t: t + 0x11111111), "is the label 'gptq' true"),
    "bits by a text": ("gptq", quantization(bits="4"), "expected bits of quantization_config to be 2, 3, 4 or 8"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage: str, tmp_path: Path) -> None:
    form, change, message = DAMAGES[damage]
    made = llama(tmp_path, form)
    edited(made.folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(made.folder)
    assert str(made.folder) in str(caught.value)


def test_no_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected folder to be that of a model"):
        load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"expected a file config\.json"):
        load(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(NotADirectoryError, match=r"expected a model's folder, but got the file .*model\.gguf"):
        load(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=r"expected dtype to be a floating-point one or None, but got torch\.int8"):
        load(tmp_path, dtype=torch.int8)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"max_new_tokens": "many", "num_beams": []}', b"\xff"])
def test_damaged_generation_config(content: bytes, tmp_path: Path) -> None:
    made = llama(tmp_path)
    (made.folder / "generation_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load(made.folder)


def test_code_and_pickles_are_let_be(tmp_path: Path) -> None:
    made = llama(tmp_path)
    edited(made.folder, config_with(auto_map={"AutoModelForCausalLM": "own.LlamaForCausalLM"}))
    (made.folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (made.folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    load(made.folder)
    assert not (tmp_path / "ran").exists()


def test_tensors_without_a_place_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = llama(tmp_path)
    edited(made.folder, lambda _, tensors: tensors.update({"model.more.weight": torch.ones(2)}))
    with caplog.at_level(logging.WARNING):
        load(made.folder)
    assert any("LlamaForCausalLM has no place for model.more.weight" in record.message for record in caplog.records)


# What a folder or file holds


@pytest.mark.parametrize("form", ["miniquant", "compressed-tensors", "gptq", "gptq_v2"])
def test_contents_of_folders(form: str, tmp_path: Path) -> None:
    made = llama(tmp_path, form)
    report = {"layers": [{"name": Q, "loss": 1.5, "rtn_loss": 2, "held_out_loss": None, "held_out_rtn_loss": 3.0}]}
    (made.folder / "report.json").write_text(json.dumps(report))
    contents = contents_of(made.folder)
    assert (contents.format, contents.architecture, contents.notes) == (form, "LlamaForCausalLM", ())
    assert [layer.name for layer in contents.layers] == sorted(made.layers, key=list(made.layers).index) or {
        layer.name for layer in contents.layers
    } == set(made.layers)
    layer = next(layer for layer in contents.layers if layer.name == Q)
    assert (layer.shape, layer.kind, layer.bits, layer.group_size, layer.symmetric) == ((32, 32), "int4", 4, 16, True)
    assert (layer.loss, layer.rtn_loss, layer.held_out_loss, layer.held_out_rtn_loss) == (1.5, 2.0, None, 3.0)
    scales = 4 if form in ("miniquant", "compressed-tensors") else 2
    more = {"miniquant": 0, "compressed-tensors": 16, "gptq": 2 * 16 + 32 * 4, "gptq_v2": 2 * 16 + 32 * 4}[form]
    assert layer.nbytes == 32 * 32 // 2 + 32 * 2 * scales + more
    assert contents.weights == sum(layer.codes.numel() for layer in made.layers.values())
    assert {tensor.name for tensor in contents.others} >= {"model.embed_tokens.weight", "model.norm.weight"}
    files = sum(path.stat().st_size for path in made.folder.glob("*.safetensors"))
    assert 0 <= files - contents.layer_bytes - contents.other_bytes < 16384  # headers
    assert json.loads(json.dumps(contents.to_dict()))["layers"][0]["name"] == contents.layers[0].name


@pytest.mark.parametrize(
    "report", ["[]", "{", '{"layers": 3}', '{"layers": [{"name": "x", "loss": "low"}]}', '{"layers": [1]}']
)
def test_a_damaged_report_is_noted(report: str, tmp_path: Path) -> None:
    made = llama(tmp_path)
    (made.folder / "report.json").write_text(report)
    (note,) = contents_of(made.folder).notes
    assert "report.json" in note
    assert "expected" in note


def test_contents_of_a_model_that_is_not_quantized(tmp_path: Path) -> None:
    made = llama(tmp_path)
    contents = contents_of(made.float_folder)
    assert (contents.format, contents.layers, contents.bits_per_weight) == (None, (), None)
    assert sum(tensor.nbytes for tensor in contents.others) == contents.other_bytes > 0
    assert {tensor.dtype for tensor in contents.others} == {"float32"}


def test_contents_of_gguf_files(tmp_path: Path) -> None:
    made = small("llama", bits=4, group_size=32)
    made.write(tmp_path / "model.gguf")
    for path in (tmp_path / "model.gguf", tmp_path):
        contents = contents_of(path)
        assert (contents.format, contents.architecture) == ("gguf", "llama")
        assert len(contents.layers) == len(made.layers)
        layer = next(layer for layer in contents.layers if layer.name == "blk.0.attn_q.weight")
        assert (layer.kind, layer.bits, layer.group_size, layer.symmetric) == ("Q4_0", 4, 32, True)
        assert contents.bits_per_weight == 4.5
        assert "token_embd.weight" in {tensor.name for tensor in contents.others}


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(40), b"\x80\x04K\x01." * 9, b"GGML" + bytes(60)])
def test_contents_of_files_that_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .*model\.gguf to"):
        contents_of(tmp_path / "model.gguf")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        contents_of(tmp_path / "none.gguf")
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(NotADirectoryError, match="give the folder it is in"):
        contents_of(tmp_path / "x.safetensors")


def test_contents_of_damaged_folders(tmp_path: Path) -> None:
    made = llama(tmp_path)
    edited(made.folder, without(f"{Q}.codes"))
    with pytest.raises(ValueError, match=f"expected a tensor '{Q}.codes' of layer '{Q}'"):
        contents_of(made.folder)
    (made.folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        contents_of(made.folder)

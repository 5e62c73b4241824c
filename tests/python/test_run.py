"""quantize_folder and convert_folder: what they write is what readers of each format load, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import gguf_examples
import small_models
from format_layers import as_read, same
from miniquant import Calibration, LayerOptions, QuantizedWeight, Recipe, Rule, dequantize, quantize_model, rtn
from miniquant.calibration import load_calibration
from miniquant.checkpoint import Checkpoint
from miniquant.convert import convert_folder
from miniquant.formats import FORMATS, LayerGrid, Native
from miniquant.formats.gguf_file import GGUF_FILE
from miniquant.formats.gguf_reader import read_gguf
from miniquant.loading import contents_of
from miniquant.modules import find_sites
from miniquant.output import GgufOptions, names_by_expert
from miniquant.report import check_report, read_report
from miniquant.run import fast_dtype, plan_folder, quantize_folder
from quantized_folders import stored_layers
from test_formats_gptq import published_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

OPTIONS = LayerOptions(preset="fast", group_size=16, min_tokens=2)
RTN = LayerOptions(preset="fast", group_size=16, unseen="rtn", min_tokens=10**6)  # no solver: what is quick to make


def calibration_of(batches: Sequence[Any]) -> Calibration:
    return load_calibration([dict(batch) for batch in batches], tokens=10**6)


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A small random model as transformers saves it, with a file of a tokenizer's beside it."""
    model: Any = small_models.MODELS[kind][0]().to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"note": "any"}\n')
    return folder


def loaded(folder: Path, **options: Any) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return getattr(transformers, config["architectures"][0]).from_pretrained(folder, **options).eval()


def in_memory(folder: Path, kind: str, recipe: Any, scale_dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """The same by quantize_model, on the model that transformers loads: the model, and its layers."""
    model = loaded(folder)
    batches = calibration_of(3 * small_models.MODELS[kind][1]())
    return model, quantize_model(model, batches, recipe, scale_dtype=scale_dtype, **options).layers


def run(folder: Path, output: Path, kind: str, recipe: Any = OPTIONS, **options: Any) -> Any:
    given: dict[str, Any] = {
        "calibration": calibration_of(3 * small_models.MODELS[kind][1]()),
        "dtype": torch.float32,
        "report": False,
        **options,
    }
    return quantize_folder(folder, output, recipe, **given)


def logits(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        output = model(**small_models.MODELS[kind][1]()[0])
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


# What readers load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ["alike", "mixed"])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_transformers_loads_a_compressed_tensors_folder(
    kind: str, recipe: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """The model that transformers and compressed-tensors make of the folder gives the logits of our own."""
    rules = [Rule("*.1.*", {"bits": 8}), Rule("*_proj", {"group_size": -1})] if kind == "llama" else []
    rules = rules or [Rule("*.1.*", {"bits": 8}), Rule("*.query", {"group_size": -1})]
    chosen = Recipe(OPTIONS, rules if recipe == "mixed" else [])
    folder = save(kind, tmp_path / "float", dtype)
    result = run(folder, tmp_path / "out", kind, chosen, dtype=dtype)
    own, layers = in_memory(folder, kind, chosen, dtype)
    assert list(result.result.layers) == list(layers)
    stored = stored_layers(tmp_path / "out")
    for name, layer in layers.items():
        assert same(stored[name], as_read(weight_of(layer.quantized))), name
    ours = loaded(tmp_path / "out")
    assert {name for name, module in ours.named_modules() if hasattr(module, "quantization_scheme")} == set(layers)
    assert torch.equal(logits(ours, kind), logits(own, kind))


@pytest.mark.parametrize("kind", ["llava", "qwen3", "gemma3", "phi3", "whisper"])
def test_transformers_loads_other_architectures(kind: str, tmp_path: Path) -> None:
    """Two grids, so layers are found by name; transformers names those of Llava otherwise than its files do."""
    recipe = Recipe(RTN, [Rule("*.1.*", {"bits": 8})])
    folder = save(kind, tmp_path / "float")
    result = run(folder, tmp_path / "out", kind, recipe)
    own: Any = loaded(folder)
    sites = {site.name: site for site in find_sites(own).sites}
    for layer in result.result.layers.values():
        options = layer.options
        nearest = rtn(sites[layer.name].read(), bits=options.bits, group_size=16, full_range=True)
        sites[layer.name].write(dequantize(nearest))
    ours = loaded(tmp_path / "out")
    quantized = {name for name, module in ours.named_modules() if hasattr(module, "quantization_scheme")}
    assert quantized == set(result.result.layers)
    assert set(sites) - quantized == {name for name in sites if "conv" in name or "patch_embedding" in name}
    assert torch.equal(logits(ours, kind), logits(own, kind))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_loads_a_t5_dequantized(tmp_path: Path) -> None:
    """Its code looks at the weights of Linears, which packed ones have not."""
    folder = save("t5", tmp_path / "float")
    run(folder, tmp_path / "out", "t5", RTN)
    own, _ = in_memory(folder, "t5", RTN, torch.float32)
    ours = loaded(tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    assert torch.equal(logits(ours, "t5"), logits(own, "t5"))


def weight_of(quantized: QuantizedWeight) -> QuantizedWeight:
    """Without the loss of each row."""
    grid = (quantized.bits, quantized.group_size, quantized.symmetric, quantized.full_range)
    return QuantizedWeight(quantized.codes, quantized.scales, quantized.zero_points, *grid)


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_an_independent_reader_gets_the_weights_of_a_gptq_folder(form: Any, symmetric: bool, tmp_path: Path) -> None:
    if form == "gptq" and not symmetric:
        pytest.skip("version 1 has no place for the lowest zero point")
    options = LayerOptions(bits=4, group_size=16, symmetric=symmetric, preset="fast", min_tokens=2)
    folder = save("llama", tmp_path / "float")
    run(folder, tmp_path / "out", "llama", options, format=form)
    _, layers = in_memory(folder, "llama", options, torch.float16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    for name, layer in layers.items():
        expected = dequantize(layer.quantized, dtype=torch.float32).numpy()
        np.testing.assert_array_equal(published_weight(name, tensors, config), expected)


def gguf_model(folder: Path, kind: str = "llama", **config: Any) -> Path:
    """A small model with a tokenizer that GGUF files can have."""
    model_class, config_class, given = gguf_examples.MODELS[kind]
    small = gguf_examples.build(model_class, config_class, {**given, "vocab_size": 300, **config})
    small.model.save_pretrained(folder)
    tokenizer = gguf_examples.byte_level(gguf_examples.PLAIN)
    gguf_examples.save_tokenizer(tokenizer, folder, **gguf_examples.GPT2_TOKENS)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_package_gguf_gets_the_weights_of_a_gguf_file(kind: str, tmp_path: Path) -> None:
    folder = gguf_model(tmp_path / "float", kind)
    options = LayerOptions(preset="fast", group_size=32)
    calibration = load_calibration(
        [{"input_ids": small_models.ids(2, 24, seed, below=290)} for seed in range(6)], tokens=10**6
    )
    given: dict[str, Any] = {"calibration": calibration, "dtype": torch.float32, "report": False}
    result = quantize_folder(folder, tmp_path / "out", options, format="gguf", gguf=GgufOptions(other="F32"), **given)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {GGUF_FILE}
    assert result.bytes_after == (tmp_path / "out" / GGUF_FILE).stat().st_size
    own = loaded(folder)
    layers = quantize_model(own, calibration, options, scale_dtype=torch.float16).layers
    read = loaded_gguf(tmp_path / "out")
    state = own.state_dict()
    assert set(read.state_dict()) == set(state)
    for name, value in read.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    reader = gguf.GGUFReader(tmp_path / "out" / GGUF_FILE)
    (down,) = (tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    name = "model.layers.1.mlp.down_proj" if kind == "llama" else "transformer.h.1.mlp.c_proj"
    np.testing.assert_array_equal(
        gguf.quants.dequantize(down.data, down.tensor_type), dequantize(layers[name].quantized, dtype=torch.float32)
    )


def test_superblocks_go_into_a_gguf_file(tmp_path: Path) -> None:
    folder = gguf_model(tmp_path / "float", hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    recipe = Recipe(
        LayerOptions(superblocks="Q4_K"),
        [
            Rule("*.down_proj", {"superblocks": "Q2_K"}),
            Rule("*.v_proj", {"bits": 8, "group_size": 32}),
            Rule("*.o_proj", {"superblocks": "Q3_K"}),
        ],
    )
    calibration = load_calibration(
        [{"input_ids": small_models.ids(2, 48, seed, below=290)} for seed in range(6)], tokens=10**6
    )
    given: dict[str, Any] = {"calibration": calibration, "dtype": torch.float32}
    with pytest.raises(ValueError, match=r"q_proj' \(and 3 more\) to have one level of scales, but got Q4_K"):
        quantize_folder(folder, tmp_path / "other", recipe, **given)
    assert not (tmp_path / "other").exists()
    result = quantize_folder(folder, tmp_path / "out", recipe, format="gguf", **given)
    own = loaded(folder)
    layers = quantize_model(own, calibration, recipe, scale_dtype=torch.float16).layers
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / GGUF_FILE).tensors}
    kinds = {"attn_q": "Q4_K", "attn_v": "Q8_0", "attn_output": "Q3_K", "ffn_down": "Q2_K", "ffn_up": "Q4_K"}
    assert {name: tensors[f"blk.0.{name}.weight"].tensor_type.name for name in kinds} == kinds
    read = loaded_gguf(tmp_path / "out").state_dict()
    for name, layer in layers.items():
        assert torch.equal(read[f"{name}.weight"], dequantize(layer.quantized, dtype=torch.float32)), name
        assert layer.method == "gptq"
        assert layer.loss is not None
        assert layer.rtn_loss is not None
        if layer.options.superblocks is not None:  # the weights have 4 bits already
            assert layer.loss < layer.rtn_loss, name
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    check_report("report", report)
    said = {layer["name"].rpartition(".")[2]: layer["superblocks"] for layer in report["layers"]}
    assert (said["q_proj"], said["v_proj"], said["down_proj"]) == ("Q4_K", None, "Q2_K")
    blocks = sum(tensor.n_bytes for name, tensor in tensors.items() if name.startswith("blk") and "norm" not in name)
    assert sum(layer["bytes_after"] for layer in report["layers"]) == blocks
    assert result.bytes_after == (tmp_path / "out" / GGUF_FILE).stat().st_size
    kinds_of = {layer.name: layer.kind for layer in contents_of(tmp_path / "out").layers}
    assert kinds_of["blk.0.ffn_down.weight"] == "Q2_K"


def loaded_gguf(folder: Path) -> Any:
    """The float model that transformers makes of a GGUF file."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "whisper", "mamba", "gpt-oss"])
def test_our_own_format_holds_every_layer(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "float")
    options = LayerOptions(preset="fast", group_size=16, min_tokens=2, unseen="rtn")
    result = run(folder, tmp_path / "out", kind, options, format="miniquant")
    _, layers = in_memory(folder, kind, options, torch.float32)
    stored = stored_layers(tmp_path / "out")
    assert set(stored) == set(layers) == set(result.result.layers)
    for name, layer in layers.items():
        assert same(stored[name], layer.quantized) or layer.method == "rtn", name
        assert same(weight_of(stored[name]), weight_of(layer.quantized)), name
    said = Native().options(Checkpoint(tmp_path / "out").config["quantization_config"])
    assert all(entry["preset"] == "fast" for entry in said.values())


def test_everything_else_of_the_folder_is_kept(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "float")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"weights once more")
    (folder / "code.py").write_text("raise SystemExit")
    result = run(folder, tmp_path / "out", "llama", RTN, max_shard_bytes=20_000)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {name for name in written if name.endswith(".safetensors")}
    assert len(shards) > 1
    expected = {"config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"}
    assert written - shards == expected | {"model.safetensors.index.json"}
    for name in expected - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert all(file.stat().st_size <= 20_000 for file in after.files)
    copied = set(before.tensors) & set(after.tensors)
    assert copied == {name for name in before.tensors if name.removesuffix(".weight") not in result.result.layers}
    for name in copied:
        assert torch.equal(before.read(name), after.read(name))
    config = dict(after.config)
    del config["quantization_config"]
    assert config == before.config
    assert result.bytes_before == sum(tensor.nbytes for tensor in before.tensors.values())
    assert result.bytes_after == sum(tensor.nbytes for tensor in after.tensors.values())
    assert logits(loaded(tmp_path / "out"), "llama").isfinite().all()


@pytest.mark.parametrize("form", [*FORMATS, "gguf"])
def test_bytes_of_layers_are_known_before(form: Any, tmp_path: Path) -> None:
    """What room on the disk is asked for: that of the tensors, but for the loss of each row of RTN."""
    folder = gguf_model(tmp_path / "float")
    options = LayerOptions(preset="fast", group_size=32, min_tokens=2)
    calibration = load_calibration([{"input_ids": small_models.ids(2, 24, 0, below=290)}] * 3, tokens=10**6)
    result = quantize_folder(
        folder,
        tmp_path / "out",
        options,
        format=form,
        calibration=calibration,
        dtype=torch.float32,
        held_out=0,
        report=False,
    )
    if form == "gguf":
        tensors = read_gguf(tmp_path / "out" / GGUF_FILE).tensors.values()
        assert sum(len(tensor.data) for tensor in tensors if tensor.kind == "Q4_0") == sum(
            layer.site.rows * layer.site.columns * 18 // 32 for layer in result.result.layers.values()
        )
        return
    checkpoint = Checkpoint(tmp_path / "out")
    target = FORMATS[form]()
    grids = {name: LayerGrid.of(quantized) for name, quantized in stored_layers(tmp_path / "out").items()}
    copied = sum(t.nbytes for name, t in checkpoint.tensors.items() if name in Checkpoint(folder).tensors)
    assert result.bytes_after == copied + sum(target.nbytes(name, grid) for name, grid in grids.items())


# Experts


@pytest.mark.parametrize(("kind", "up"), [("mixtral", ("w1", "w3", "w2")), ("qwen3-moe", ("gate", "up", "down"))])
@pytest.mark.parametrize("form", ["compressed-tensors", "gptq", "miniquant"])
def test_experts_are_written_as_the_source_has_them(kind: str, up: Sequence[str], form: Any, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "float")
    names = [name if name.startswith("w") else f"{name}_proj" for name in up]
    where = "block_sparse_moe" if kind == "mixtral" else "mlp"
    assert f"model.layers.0.{where}.experts.0.{names[0]}.weight" in Checkpoint(folder).tensors
    options = LayerOptions(preset="fast", group_size=16, min_tokens=2, unseen="siblings")
    recipe = Recipe(options, [Rule("*.experts.*", {}), Rule("*", {"unseen": "error"})])
    run(folder, tmp_path / "out", kind, recipe, format=form)
    _, layers = in_memory(folder, kind, recipe, torch.float16 if form == "gptq" else torch.float32)
    stored = stored_layers(tmp_path / "out")
    experts = 4 if kind == "mixtral" else 6
    for block in range(2):
        for expert in range(experts):
            whole = layers[f"model.layers.{block}.mlp.experts.gate_up_proj.{expert}"].quantized
            down = layers[f"model.layers.{block}.mlp.experts.down_proj.{expert}"].quantized
            got = [stored[f"model.layers.{block}.{where}.experts.{expert}.{name}"] for name in names]
            joined = torch.cat([dequantize(got[0]), dequantize(got[1])])
            assert torch.equal(joined, dequantize(whole))
            assert torch.equal(torch.cat([got[0].codes, got[1].codes]), whole.codes)
            assert torch.equal(dequantize(got[2]), dequantize(down))
    config = Checkpoint(tmp_path / "out").config["quantization_config"]
    if form == "compressed-tensors":
        assert {"lm_head", "model.layers.0.mlp.gate"} <= set(config["ignore"])
        assert set(Checkpoint(tmp_path / "out").tensors) >= {
            f"model.layers.1.{where}.experts.{expert}.{name}.weight_packed"
            for expert in range(experts)
            for name in names
        }


def test_some_experts_may_stay_as_they_are(tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "float")
    recipe = Recipe(RTN, [Rule("*.experts.*.2", {"skip": True})])
    run(folder, tmp_path / "out", "mixtral", recipe)
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "out")
    for name in ("w1", "w2", "w3"):
        base = f"model.layers.0.block_sparse_moe.experts.2.{name}"
        assert torch.equal(after.read(f"{base}.weight"), before.read(f"{base}.weight"))
        assert base in after.config["quantization_config"]["ignore"]
        assert f"{base.replace('.2.', '.1.')}.weight_packed" in after.tensors


def test_experts_that_are_stored_fused(tmp_path: Path) -> None:
    folder = save("gpt-oss", tmp_path / "float")
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    assert Checkpoint(folder).tensors[fused].shape[0] == 4
    result = run(folder, tmp_path / "out", "gpt-oss", RTN)
    assert not any("experts" in name for name in result.result.layers)
    reasons = {one.name: one.reason for one in result.result.left_alone}
    assert reasons[fused] == (
        f"the format compressed-tensors cannot hold {fused}.0, which is stored in one tensor with all experts, "
        f"'{fused}', while it holds one for each expert only"
    )
    assert fused in Checkpoint(tmp_path / "out").tensors
    recipe = Recipe(RTN, [Rule("*.experts.*", {"bits": 3})])
    with pytest.raises(ValueError, match=r"rule 1: expected pattern '\*\.experts\.\*' to match layers that the format"):
        run(folder, tmp_path / "other", "gpt-oss", recipe)
    recipe = Recipe(RTN, [Rule("*.gate_up_proj.1", {"skip": True})])
    run(folder, tmp_path / "own", "gpt-oss", recipe, format="miniquant")
    own = Checkpoint(tmp_path / "own")
    assert fused in own.tensors  # expert 1 is there only
    assert f"{fused}.1.codes" not in own.tensors
    assert f"{fused}.0.codes" in own.tensors
    assert "model.layers.0.mlp.experts.down_proj" not in own.tensors


@pytest.mark.parametrize(
    ("names", "experts", "expected"),
    [
        (["l.3.e.0.w", "l.3.e.1.w"], 2, {0: ["l.3.e.0.w"], 1: ["l.3.e.1.w"]}),
        (["e.1.u", "e.0.u", "e.0.g", "e.1.g"], 2, {0: ["e.0.u", "e.0.g"], 1: ["e.1.u", "e.1.g"]}),
        (["e.0.u", "e.0.g"], 1, {0: ["e.0.u", "e.0.g"]}),
        ([f"e.{number}.w" for number in range(11)], 11, {number: [f"e.{number}.w"] for number in range(11)}),
        (["e.0.w", "e.2.w"], 2, None),
        (["e.0.w", "e.1.w", "e.1.v"], 2, None),
        (["0.e.0.w", "1.e.1.w"], 2, None),
        (["e.w", "e.0.w"], 2, None),
        (["e.u", "e.g"], 2, None),
    ],
)
def test_which_tensors_are_an_experts(names: list[str], experts: int, expected: dict[int, list[str]] | None) -> None:
    assert names_by_expert(names, experts) == expected


# Layers that a format cannot hold


def test_layers_that_are_no_linear(tmp_path: Path) -> None:
    gpt2 = save("gpt2", tmp_path / "gpt2")
    with pytest.raises(
        ValueError, match=r"expected a model with layers that the format compressed-tensors can hold.*Conv1D"
    ):
        run(gpt2, tmp_path / "out", "gpt2")
    whisper = save("whisper", tmp_path / "whisper")
    result = run(whisper, tmp_path / "out", "whisper", RTN)
    assert not any("conv" in name for name in result.result.layers)
    reasons = [one.reason for one in result.result.left_alone if "conv" in one.name]
    assert reasons == [
        f"the format compressed-tensors cannot hold model.encoder.conv{number}, which is a Conv1d, while it holds "
        "torch.nn.Linear only"
        for number in (1, 2)
    ]
    for pattern, refused in (("*.conv1", True), ("*.encoder.*", False)):
        recipe = Recipe(RTN, [Rule(pattern, {"bits": 8})])
        if refused:
            with pytest.raises(ValueError, match=r"rule 1: .*but got 'model.encoder.conv1', which is a Conv1d"):
                run(whisper, tmp_path / "other", "whisper", recipe)
        else:
            run(whisper, tmp_path / "other", "whisper", recipe)
    assert not (tmp_path / "other.partial").exists()


def test_tied_output_embeddings(tmp_path: Path) -> None:
    folder = tmp_path / "float"
    model: Any = small_models.decoder("Llama", tie_word_embeddings=True)
    model.save_pretrained(folder)
    assert "lm_head.weight" not in Checkpoint(folder).tensors
    run(folder, tmp_path / "plain", "llama", RTN)
    assert "lm_head" in Checkpoint(tmp_path / "plain").config["quantization_config"]["ignore"]
    assert Checkpoint(tmp_path / "plain").config["tie_word_embeddings"] is True
    recipe = Recipe(OPTIONS, [Rule("lm_head", {"bits": 8})])
    run(folder, tmp_path / "out", "llama", recipe, output_embeddings=True)
    own, layers = in_memory(folder, "llama", recipe, torch.float32, output_embeddings=True)
    out = Checkpoint(tmp_path / "out")
    assert out.config["tie_word_embeddings"] is False
    values = dequantize(layers["lm_head"].quantized)
    assert torch.equal(out.read("model.embed_tokens.weight"), values)
    assert torch.equal(dequantize(stored_layers(tmp_path / "out")["lm_head"]), values)
    assert torch.equal(logits(loaded(tmp_path / "out"), "llama"), logits(own, "llama"))
    twice = load_file(folder / "model.safetensors")  # a folder may have the one matrix under both names
    save_file(
        {**twice, "lm_head.weight": twice["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    run(folder, tmp_path / "again", "llama", recipe, output_embeddings=True)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


# How it runs


def test_texts_are_read_with_the_folders_tokenizer(tmp_path: Path) -> None:
    folder = gguf_model(tmp_path / "float")
    options = LayerOptions(preset="fast", group_size=32)
    result = quantize_folder(
        folder, tmp_path / "out", options, tokens=700, sequence_length=64, held_out=0.1, report=False
    )
    layer = result.result.layers["model.layers.0.self_attn.q_proj"]
    assert 700 <= layer.tokens < 764
    assert 70 <= layer.held_out_tokens < 134
    (tmp_path / "text.txt").write_text("A text of one's own. " * 50)
    result = quantize_folder(
        folder,
        tmp_path / "own",
        options,
        calibration=tmp_path / "text.txt",
        tokens=128,
        sequence_length=4096,
        held_out=0,
        report=False,
    )
    assert "windows have 128 tokens, as many as the model takes, instead of 4096" in result.result.notes
    assert result.result.layers["model.layers.0.self_attn.q_proj"].tokens == 128
    assert result.result.held_out_batches == 0
    shutil.move(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    shutil.move(folder / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    with pytest.raises(ValueError, match="expected a tokenizer for calibration with texts"):
        quantize_folder(folder, tmp_path / "third", options, tokens=64)


def test_weights_are_quantized_as_they_are_stored(tmp_path: Path) -> None:
    """The model runs in bfloat16, but codes are those of the float32 weight."""
    folder = save("mixtral", tmp_path / "float")
    result = run(folder, tmp_path / "out", "mixtral", RTN, dtype=torch.bfloat16, format="miniquant")
    assert result.dtype == torch.bfloat16
    before = Checkpoint(folder)
    coarse = 0
    for name, quantized in stored_layers(tmp_path / "out").items():
        weight = before.read(f"{name}.weight")
        expected = rtn(weight, group_size=16, full_range=quantized.full_range)
        assert same(weight_of(quantized), expected), name
        coarse += not torch.equal(
            rtn(weight.bfloat16(), group_size=16, full_range=True).scales.float(), expected.scales
        )
    assert coarse


def test_the_dtype_is_what_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: 0.7}
    monkeypatch.setattr("miniquant.run._seconds_of_product", lambda dtype, _: seconds[dtype])
    assert fast_dtype(torch.device("cpu")) == torch.bfloat16
    seconds[torch.bfloat16] = 0.9
    assert fast_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.undo()
    assert fast_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


# What is refused


def test_a_report_lies_beside_the_model(tmp_path: Path) -> None:
    folder = save("whisper", tmp_path / "float")
    recipe = Recipe(OPTIONS, [Rule("*.0.*", {"bits": 8})])
    result = run(folder, tmp_path / "out", "whisper", recipe, report=True)
    report = read_report(tmp_path / "out")
    assert report["model"] == "out"
    assert report["settings"]["source"] == "float"
    assert report["format"] == "compressed-tensors"
    assert report["bytes"] == {"before": result.bytes_before, "after": result.bytes_after}
    assert [layer["name"] for layer in report["layers"]] == list(result.result.layers)
    assert {layer["bits"] for layer in report["layers"]} == {4, 8}
    assert set(result.notes) <= set(report["notes"])
    assert {one["name"] for one in report["left_alone"]} >= {"model.encoder.conv1.weight", "proj_out.weight"}
    assert report["settings"]["dtype"] == "float32"
    assert 10**8 < report["peak_memory"] < 10**11
    assert "<title>out: miniquant report</title>" in (tmp_path / "out" / "report.html").read_text()
    before = {path.name for path in (tmp_path / "out").iterdir()}
    run(folder, tmp_path / "out", "whisper", RTN, overwrite=True)
    assert before - {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.html"}


def test_bad_arguments_are_refused_before_the_first_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("llama", tmp_path / "float")
    quantized = tmp_path / "quantized"
    run(folder, quantized, "llama", RTN)
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious.txt").write_text("text")
    monkeypatch.setattr("miniquant.run.quantize_planned", lambda *_, **__: pytest.fail("it went on"))
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model_dir": tmp_path / "none"}, FileNotFoundError, "none"),
        (
            {"model_dir": quantized},
            ValueError,
            "expected a model that is not quantized, but got quantization_config of",
        ),
        ({"output_dir": full}, FileExistsError, "expected folder to be new or empty"),
        ({"output_dir": full, "overwrite": True}, FileExistsError, "to overwrite to be a model's"),
        ({"output_dir": quantized}, FileExistsError, "expected folder to be new or empty"),
        ({"output_dir": folder, "overwrite": True}, ValueError, "expected an output apart from the model"),
        ({"output_dir": folder / "inside"}, ValueError, "expected an output apart from the model"),
        ({"format": "awq"}, ValueError, "layer_format: expected name to be one of .* but got 'awq'"),
        ({"gguf": GgufOptions()}, ValueError, "expected gguf with the format gguf only"),
        ({"dtype": torch.int8}, ValueError, "expected dtype to be float32 or .* but got torch.int8"),
        ({"device": "abacus"}, ValueError, "expected device to be one that torch has here, but got 'abacus'"),
        ({"device": "meta"}, ValueError, "expected device to be one that torch has here, but got 'meta'"),
        ({"held_out": 0.5}, ValueError, "expected held_out to be batches or a number from 0 to 0.25, but got 0.5"),
        ({"recipe": {"defaults": {"bit": 4}}}, ValueError, "bit"),
        (
            {"recipe": Recipe(RTN, [Rule("*.q_prj", {"bits": 8})])},
            ValueError,
            r"rule 1: .* '\*.q_prj' to match a layer",
        ),
        (
            {"recipe": LayerOptions(group_size=24)},
            ValueError,
            r"group_size of layer 'model.layers.0.self_attn.q_proj' \(and 11 more\) to divide its 32 columns",
        ),
        ({"recipe": LayerOptions(bits=5, group_size=16), "format": "gptq"}, ValueError, "bits of layer .* but got 5"),
        ({"format": "gguf", "recipe": LayerOptions(group_size=32)}, ValueError, "multiple of 32, but got 48"),
        ({"calibration": tmp_path / "none.txt"}, ValueError, "expected a tokenizer for calibration with texts"),
        ({"calibration": tmp_path / "none.npy"}, FileNotFoundError, "none.npy"),
    ]
    for changes, error, message in bad:
        given: dict[str, Any] = {
            "model_dir": folder,
            "output_dir": tmp_path / "out",
            "recipe": RTN,
            "calibration": calibration_of(small_models.text_batches()),
            **changes,
        }
        with pytest.raises(error, match=message):
            quantize_folder(**given)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()
    assert (full / "precious.txt").read_text() == "text"


def test_a_disk_without_room_is_refused_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("llama", tmp_path / "float")
    usage = namedtuple("usage", "total used free")  # noqa: PYI024  (as shutil has it)
    monkeypatch.setattr("miniquant.run.shutil.disk_usage", lambda _: usage(10**6, 0, 10**4))
    with pytest.raises(
        OSError, match=r"expected 0\.00 GB of free space, .* for finished layers until the end, but got"
    ):
        run(folder, tmp_path / "out", "llama")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


def test_a_folder_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "float")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years of work")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(FileExistsError, match=r"out\.partial to be free for finished layers, but got thesis\.txt"):
            run(folder, tmp_path / "out", "llama", RTN, **options)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "new.partial").write_text("a file")
    with pytest.raises(NotADirectoryError, match="but got a file"):
        run(folder, tmp_path / "new", "llama", RTN)


def test_what_would_be_done_is_told_without_a_trace(tmp_path: Path) -> None:
    folder = save("whisper", tmp_path / "float")
    calibration = calibration_of(small_models.whisper_batches())
    plan = plan_folder(folder, tmp_path / "out", RTN, calibration=calibration, dtype=torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    assert sum(parameter.device.type != "meta" for parameter in plan.source.model.parameters()) == 0
    result = plan.run()
    assert [site.name for site, _ in plan.planned.plan.layers if site.name not in result.result.layers] == []
    assert (plan.bytes_before, plan.bytes_after) == (result.bytes_before, result.bytes_after)
    assert result.result.left_alone == plan.planned.plan.left_alone


def test_an_output_is_replaced_where_that_is_said(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "float")
    run(folder, tmp_path / "out", "llama", RTN)
    (tmp_path / "out" / "old.txt").write_text("old")
    run(folder, tmp_path / "out", "llama", Recipe(RTN, [Rule("*.0.*", {"bits": 8})]), overwrite=True)
    assert {quantized.bits for quantized in stored_layers(tmp_path / "out").values()} == {4, 8}
    assert not (tmp_path / "out" / "old.txt").exists()


# From one format to another


@pytest.fixture(scope="module")
def quantized_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small float16 model in each format, with the same codes: float16 scales are held by all of them."""
    tmp_path = tmp_path_factory.mktemp("formats")
    folder = gguf_model(tmp_path / "float")
    model: Any = loaded(folder).half()
    model.config.dtype = torch.float16
    model.save_pretrained(folder)
    options = LayerOptions(preset="fast", group_size=32, unseen="rtn", min_tokens=10**6)
    calibration = load_calibration([{"input_ids": small_models.ids(2, 24, 0, below=290)}] * 3, tokens=10**6)

    def of(form: str) -> Path:
        output = tmp_path / form
        if not output.exists():
            given: dict[str, Any] = {
                "format": form,
                "calibration": calibration,
                "dtype": torch.float32,
                "report": False,
            }
            quantize_folder(folder, output, options, **given)
        return output

    return of


@pytest.mark.parametrize("after", [*FORMATS, "gguf"])
@pytest.mark.parametrize("before", FORMATS)
def test_every_weight_keeps_its_value(
    before: str, after: Any, quantized_folders: Callable[[str], Path], tmp_path: Path
) -> None:
    source = quantized_folders(before)
    done = convert_folder(source, tmp_path / "out", after)
    expected = stored_layers(source)
    assert (done.before, done.after, done.layers) == (before, after, len(expected))
    if after == "gguf":
        direct = read_gguf(quantized_folders("gguf") / GGUF_FILE).tensors
        read = read_gguf(tmp_path / "out" / GGUF_FILE).tensors
        assert set(read) == set(direct)
        assert {name: tensor.kind for name, tensor in read.items()} == {n: tensor.kind for n, tensor in direct.items()}
        for name, tensor in read.items():
            assert torch.equal(tensor.values(), direct[name].values()), name
        return
    found = stored_layers(tmp_path / "out")
    assert set(found) == set(expected)
    for name, quantized in found.items():
        assert torch.equal(quantized.codes, expected[name].codes)
        assert torch.equal(quantized.scales, expected[name].scales)
        assert torch.equal(quantized.zero_points, expected[name].zero_points)
    source_checkpoint, out = Checkpoint(source), Checkpoint(tmp_path / "out")
    for name in set(source_checkpoint.tensors) & set(out.tensors):
        if not any(name.startswith(f"{layer}.") for layer in expected):
            assert torch.equal(source_checkpoint.read(name), out.read(name))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    convert_folder(tmp_path / "out", tmp_path / "back", before)  # type: ignore[arg-type]  # one of the formats
    back = stored_layers(tmp_path / "back")
    assert all(torch.equal(back[name].codes, expected[name].codes) for name in expected)
    if after == "compressed-tensors":  # transformers reads it as the one that was quantized to it
        tokens = torch.arange(24)[None] * 5 % 96
        with torch.no_grad():
            ours = loaded(tmp_path / "out", dtype=torch.float32)(tokens).logits
            direct = loaded(quantized_folders("compressed-tensors"), dtype=torch.float32)(tokens).logits
        assert torch.equal(ours, direct)


def test_the_report_is_taken_along(tmp_path: Path) -> None:
    folder = gguf_model(tmp_path / "float")
    calibration = load_calibration([{"input_ids": small_models.ids(2, 24, 0, below=290)}] * 3, tokens=10**6)
    options = LayerOptions(preset="plain", group_size=32, min_tokens=1)
    quantize_folder(folder, tmp_path / "out", options, format="gptq", calibration=calibration, dtype=torch.float32)
    for form in ("compressed-tensors", "gguf"):
        done = convert_folder(tmp_path / "out", tmp_path / form, form)
        assert not [note for note in done.notes if "report" in note]
        before, after = read_report(tmp_path / "out"), read_report(tmp_path / form)
        assert after["layers"] == before["layers"]
        assert (after["model"], after["format"], after["bytes"]["after"]) == (form, form, done.bytes_after)
        assert (tmp_path / form / "report.html").is_file()
    assert contents_of(tmp_path / "compressed-tensors").layers[0].loss is not None
    (tmp_path / "out" / "report.json").write_text("{}")
    done = convert_folder(tmp_path / "out", tmp_path / "gguf", "gguf", overwrite=True)
    assert "the report is not taken along: read_report" in done.notes[-1]
    assert not (tmp_path / "gguf" / "report.json").exists()


def test_what_would_change_is_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "float")
    run(folder, tmp_path / "float32", "llama", RTN, format="miniquant")
    with pytest.raises(
        ValueError, match=r"with_scale_dtype: expected scales of layer 'model.layers.0.* that float16 holds"
    ):
        convert_folder(tmp_path / "float32", tmp_path / "out", "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "float32"]
    model: Any = loaded(folder)
    model.model.layers[1].self_attn.o_proj.weight.data.abs_()  # so 0 is the lowest value of its groups
    model.save_pretrained(tmp_path / "positive")
    asymmetric = replace(RTN, symmetric=False)
    run(tmp_path / "positive", tmp_path / "asymmetric", "llama", asymmetric, format="gptq_v2")
    with pytest.raises(ValueError, match="which version 1 of the format cannot hold"):
        convert_folder(tmp_path / "asymmetric", tmp_path / "out", "gptq")
    run(save("gpt2", tmp_path / "gpt2"), tmp_path / "conv1d", "gpt2", RTN, format="miniquant")
    with pytest.raises(ValueError, match=r"which are torch.nn.Linear, but got 'transformer\.h\.0.*, which is a Conv1D"):
        convert_folder(tmp_path / "conv1d", tmp_path / "out", "compressed-tensors")
    with pytest.raises(ValueError, match="expected quantization_config, but got none"):
        convert_folder(folder, tmp_path / "out", "gptq")
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / GGUF_FILE).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="a GGUF file is not converted back"):
        convert_folder(tmp_path / "file", tmp_path / "out", "miniquant")
    with pytest.raises(ValueError, match="expected an output apart from the model"):
        convert_folder(tmp_path / "float32", tmp_path / "float32", "miniquant", overwrite=True)
    with pytest.raises(FileExistsError):
        convert_folder(tmp_path / "float32", tmp_path / "gpt2", "miniquant")
    assert not (tmp_path / "out").exists()


def test_gpt2_goes_from_our_own_format_to_gguf(tmp_path: Path) -> None:
    """Its weights are stored as [K, N]."""
    folder = gguf_model(tmp_path / "float", "gpt2")
    options = LayerOptions(preset="fast", group_size=32, unseen="rtn", min_tokens=10**6)
    calibration = load_calibration([{"input_ids": small_models.ids(2, 24, 0, below=290)}] * 3, tokens=10**6)
    given: dict[str, Any] = {"calibration": calibration, "dtype": torch.float32, "report": False}
    quantize_folder(folder, tmp_path / "own", options, format="miniquant", **given)
    quantize_folder(folder, tmp_path / "direct", options, format="gguf", gguf=GgufOptions(other="F32"), **given)
    convert_folder(tmp_path / "own", tmp_path / "out", "gguf")
    found, expected = (read_gguf(tmp_path / name / GGUF_FILE).tensors for name in ("out", "direct"))
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert (tensor.kind, tensor.shape) == (expected[name].kind, expected[name].shape)
        assert torch.equal(tensor.values(), expected[name].values()), name


def test_headers_say_what_transformers_asks_for(tmp_path: Path) -> None:
    folder = save("llama", tmp_path / "float")
    run(folder, tmp_path / "out", "llama", RTN)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}

"""A model in memory block by block computes, and is quantized to, what the same model does in memory as a whole."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lazy_memory
from miniquant import LayerOptions, LayerResult, dequantize, quantize_model
from miniquant.architecture import build_model, find_sources, parameters_on_meta
from miniquant.checkpoint import Checkpoint
from miniquant.lazy import LazyModel
from miniquant.modules import find_sites
from miniquant.walk import Walk
from small_models import MODELS, VOCABULARY, decoder, gpt2, text_batches

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()


def saved(path: Path, model: nn.Module, **options: Any) -> Path:
    model.save_pretrained(path, **options)  # type: ignore[operator]
    return path


def loaded(path: Path, model: nn.Module, dtype: torch.dtype | None = None) -> Any:
    """The same model as transformers loads it, all of it."""
    return type(model).from_pretrained(path, dtype=dtype or "auto").eval()  # type: ignore[attr-defined]


def outputs(model: Any, batch: dict[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    if dtype is not None:
        batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        return [value for value in model(**batch).to_tuple() if isinstance(value, Tensor)]


def assert_equal_outputs(lazy: LazyModel, whole: Any, batches: list[dict[str, Tensor]]) -> None:
    for batch in batches:
        found, expected = outputs(lazy.model, batch, whole.dtype), outputs(whole, batch, whole.dtype)
        assert len(found) == len(expected) > 0
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def edited(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A folder whose tensors are changed."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def with_config(path: Path, **values: Any) -> Path:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return path


# The same outputs


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    """Of every architecture, and no more weights are in memory than the largest block or other module has."""
    make, batches = MODELS[name]
    model = make()
    whole = loaded(saved(tmp_path, model), model)
    lazy = LazyModel(tmp_path)
    assert not lazy.unused
    with lazy:
        expected = dict(whole.named_buffers())
        assert {key: value.dtype for key, value in lazy.model.named_buffers()} == {
            key: value.dtype for key, value in expected.items()
        }
        assert all(torch.equal(value, expected[key]) for key, value in lazy.model.named_buffers())
        assert_equal_outputs(lazy, whole, batches())
        assert 0 < lazy.loaded_bytes <= lazy.peak_bytes
    assert lazy.peak_bytes == max(lazy.unit_bytes().values()) < sum(lazy.unit_bytes().values())
    assert lazy.loaded_bytes == 0
    assert all(parameter.device.type == "meta" for parameter in lazy.model.parameters())


@pytest.mark.parametrize("name", ["gemma3", "mamba", "qwen3-moe", "t5"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_other_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """T5 keeps a layer in float32 where the others are float16."""
    make, batches = MODELS[name]
    model = make()
    whole = loaded(saved(tmp_path, model), model, dtype)
    with LazyModel(tmp_path, dtype) as lazy:
        assert {key: value.dtype for key, value in lazy.model.named_parameters()} == {
            key: value.dtype for key, value in whole.named_parameters()
        }
        assert_equal_outputs(lazy, whole, batches())


def test_a_checkpoint_in_shards_and_in_another_dtype(tmp_path: Path) -> None:
    model = decoder("Llama").to(torch.bfloat16)
    whole = loaded(saved(tmp_path, model, max_shard_size="20KB"), model)
    assert whole.dtype == torch.bfloat16
    with LazyModel(tmp_path) as lazy:
        assert len(lazy.checkpoint.files) > 2
        assert lazy.model.dtype == torch.bfloat16
        assert_equal_outputs(lazy, whole, text_batches())


def test_no_architecture_is_automodel(tmp_path: Path) -> None:
    saved(tmp_path, decoder("Llama"))
    with_config(tmp_path, architectures=...)
    whole = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with LazyModel(tmp_path) as lazy:
        assert type(lazy.model).__name__ == "LlamaModel"
        assert lazy.unused == ("lm_head.weight",)
        assert_equal_outputs(lazy, whole, text_batches())


def test_a_head_on_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    """Names of a checkpoint without the base model's prefix."""
    model = gpt2()
    saved(tmp_path, model.transformer)  # type: ignore[arg-type]
    with_config(tmp_path, architectures=["GPT2LMHeadModel"])
    with LazyModel(tmp_path) as lazy:
        assert lazy.source_names("transformer.h.0.mlp.c_fc.weight") == ("h.0.mlp.c_fc.weight",)
        assert_equal_outputs(lazy, model, text_batches())


def test_fused_experts_are_made_from_a_tensor_of_each(tmp_path: Path) -> None:
    model = MODELS["qwen3-moe"][0]()
    saved(tmp_path, model)
    lazy = LazyModel(tmp_path)
    experts = "model.layers.1.mlp.experts"
    names = [f"{experts}.{expert}.{kind}_proj.weight" for kind in ("gate", "up") for expert in range(6)]
    assert set(names) <= set(lazy.checkpoint.tensors)
    assert sorted(lazy.source_names(f"{experts}.gate_up_proj")) == sorted(names)
    assert len(lazy.source_names(f"{experts}.down_proj")) == 6
    assert lazy.source_names("model.norm.weight") == ("model.norm.weight",)
    with pytest.raises(KeyError, match=r"expected the name of a parameter, but got 'model\.norm'"):
        lazy.source_names("model.norm")


# Tied weights


def test_tied_weights_are_one_memory(tmp_path: Path) -> None:
    whole: Any = gpt2()
    saved(tmp_path, whole)
    lazy = LazyModel(tmp_path)
    head, embedding = lazy.model.lm_head, lazy.model.transformer.wte
    assert head.weight is embedding.weight
    with lazy:
        weight = head.weight  # looked up, so it is read
        assert weight is embedding.weight
        assert torch.equal(weight, whole.lm_head.weight)
        assert lazy.loaded_bytes == weight.nbytes
        assert lazy.source_names("lm_head.weight") == lazy.source_names("transformer.wte.weight")
    assert head.weight is embedding.weight
    assert head.weight.device.type == "meta"


def test_tied_by_the_config_but_stored_with_two_values(tmp_path: Path) -> None:
    """As in transformers, what is stored counts; where both are equal they are tied."""
    whole = gpt2()
    saved(tmp_path, whole)

    def both(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    edited(tmp_path, both)
    lazy = LazyModel(tmp_path)
    assert lazy.model.lm_head.weight is lazy.model.transformer.wte.weight

    def halved(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] *= 0.5

    edited(tmp_path, halved)
    with LazyModel(tmp_path) as other:
        assert other.model.lm_head.weight is not other.model.transformer.wte.weight
        assert_equal_outputs(other, loaded(tmp_path, whole), text_batches())


def test_quantizing_a_tied_head_writes_both(tmp_path: Path) -> None:
    model = gpt2()
    saved(tmp_path, model)
    options = LayerOptions(bits=4, group_size=16, ridge=0.1, unseen="rtn")
    expected = quantize_model(model, text_batches(), options, held_out=0, output_embeddings=True)
    with LazyModel(tmp_path) as lazy:
        result = quantize_model(lazy.model, text_batches(), options, held_out=0, output_embeddings=True)
    assert_same_layers(result.layers, expected.layers)
    assert "lm_head" in result.layers


# Quantizing


def assert_same_layers(found: dict[str, LayerResult], expected: dict[str, LayerResult]) -> None:
    assert list(found) == list(expected)
    for name, layer in expected.items():
        assert torch.equal(found[name].quantized.codes, layer.quantized.codes), name
        assert torch.equal(found[name].quantized.scales, layer.quantized.scales), name
        assert (found[name].tokens, found[name].method, found[name].notes) == (layer.tokens, layer.method, layer.notes)


class Keeping:
    """Finished layers by parameter, and what a model in parts is told of them."""

    def __init__(self) -> None:
        self.layers: dict[str, list[LayerResult]] = {}
        self.restored: list[str] = []

    def progress(self, layer: LayerResult, number: int, of: int) -> None:
        self.layers.setdefault(layer.site.parameter_name, []).append(layer)

    def restore(self, name: str) -> None:
        for layer in self.layers.get(name, ()):
            self.restored.append(layer.name)
            layer.site.write(dequantize(layer.quantized, dtype=layer.site.dtype))


@pytest.mark.parametrize("name", ["bert", "gemma3", "gpt2", "llama", "llava", "mamba", "mixtral", "qwen3-moe", "t5"])
def test_codes_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    """A walk reads every block once; experts that saw too few tokens of their own are read again."""
    make, batches = MODELS[name]
    model = make()
    whole = loaded(saved(tmp_path, model), model)
    unseen = "siblings" if name in ("mixtral", "qwen3-moe") else "rtn"
    # With some weights, what Mamba's forward pass gives differs in the last bit between the two; the correction is made
    # of differences, and shows it.
    correction = 0.0 if name == "mamba" else None
    options = LayerOptions(bits=4, group_size=16, ridge=0.1, unseen=unseen, correction=correction)  # type: ignore[arg-type]
    expected = quantize_model(whole, batches(), options, held_out=0)
    keeping, read = Keeping(), ReadNames()
    with LazyModel(tmp_path) as lazy:
        lazy.restore = keeping.restore
        read.watch(lazy)
        result = quantize_model(lazy.model, batches(), options, held_out=0, progress=keeping.progress)
    assert_same_layers(result.layers, expected.layers)
    assert all(parameter.device.type == "meta" for parameter in lazy.model.parameters())
    if name == "qwen3-moe":
        few = [layer.name for layer in result.layers.values() if any("its siblings" in note for note in layer.notes)]
        assert few
        assert keeping.restored
    elif name != "llava":  # whose batches without an image are in the text model meanwhile
        assert lazy.peak_bytes == max(lazy.unit_bytes().values())
        assert not keeping.restored
        if name not in ("mamba", "t5"):  # one uses a weight without calling its module, one embeds two texts
            assert max(read.counts().values()) == 1


class ReadNames:
    """Counts how often tensors are read from the files."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def watch(self, lazy: LazyModel) -> None:
        original = lazy.checkpoint.read

        def read(name: str) -> Tensor:
            self.names.append(name)
            return original(name)

        lazy.checkpoint.read = read  # type: ignore[method-assign]

    def counts(self) -> dict[str, int]:
        return {name: self.names.count(name) for name in self.names}


def test_batches_leave_a_block_before_the_next_is_read(tmp_path: Path) -> None:
    """At every site only the block that it is in has memory, however many batches there are."""
    saved(tmp_path, decoder("Llama", num_hidden_layers=4))
    blocks = set()
    with LazyModel(tmp_path) as lazy, Walk(lazy.model, text_batches(), find_sites(lazy.model).sites) as walk:
        for visit in walk:
            here = [name for name, value in lazy.model.named_parameters() if value.device.type != "meta"]
            block = ".".join(visit.site.name.split(".")[:3])
            blocks.add(block)
            assert len(here) == 9
            assert all(name.startswith(f"{block}.") for name in here)
    assert len(blocks) == 4


def test_planning_reads_no_weight(tmp_path: Path) -> None:
    saved(tmp_path, MODELS["qwen3-moe"][0]())
    lazy, read = LazyModel(tmp_path), ReadNames()
    with lazy:
        read.watch(lazy)
        found = find_sites(lazy.model, output_embeddings=True)
        assert {site.dtype for site in found.sites} == {torch.float32}
        assert sum(site.rows * site.columns for site in found.sites) > 10_000
        with Walk(lazy.model, [], found.sites):
            assert lazy.loaded_bytes == 0
    assert read.names == []


def test_a_parameter_that_was_written_to_is_restored(tmp_path: Path) -> None:
    saved(tmp_path, decoder("Llama"))
    batch = text_batches()[0]
    with LazyModel(tmp_path) as lazy:
        site = next(site for site in find_sites(lazy.model).sites if site.name == "model.layers.0.mlp.down_proj")
        before = outputs(lazy.model, batch)
        values = torch.round(site.read())  # the second block was read last
        assert lazy.loaded_bytes == values.nbytes
        site.write(values)
        outputs_need_restore = pytest.raises(
            RuntimeError, match=r"expected restore to be set, but got None: parameter 'm"
        )
        with outputs_need_restore:
            outputs(lazy.model, batch)
        lazy.restore = lambda name: site.write(values) if name == site.parameter_name else None
        first = outputs(lazy.model, batch)
        assert not torch.equal(first[0], before[0])
        assert torch.equal(outputs(lazy.model, batch)[0], first[0])
        assert torch.equal(site.read(), values)
    whole = loaded(tmp_path, decoder("Llama"))
    whole.model.layers[0].mlp.down_proj.weight.data.copy_(values)
    assert torch.equal(outputs(whole, batch)[0], first[0])


def test_a_weight_used_without_its_module_being_called(tmp_path: Path) -> None:
    saved(tmp_path, decoder("Llama"))
    whole = loaded(tmp_path, decoder("Llama"))
    with LazyModel(tmp_path) as lazy:
        hidden = torch.ones(2, 32)
        found = nn.functional.linear(hidden, lazy.model.model.layers[1].mlp.gate_proj.weight)
        assert torch.equal(found, nn.functional.linear(hidden, whole.model.layers[1].mlp.gate_proj.weight))
        assert lazy.loaded_bytes == 48 * 32 * 4
        assert lazy.model.get_input_embeddings().weight.shape == (VOCABULARY, 32)
        assert lazy.loaded_bytes == VOCABULARY * 32 * 4


def test_leaving_puts_the_model_back(tmp_path: Path) -> None:
    """Also after an error in the middle, and the model can be entered again."""
    saved(tmp_path, decoder("Llama"))
    lazy = LazyModel(tmp_path)
    kinds = [type(module) for module in lazy.model.modules()]

    def failing() -> None:
        with lazy:
            assert lazy.model.device == torch.device("cpu")
            lazy.model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
            outputs(lazy.model, text_batches()[0])

    with pytest.raises(ZeroDivisionError):
        failing()
    lazy.model.model.layers[1].mlp.down_proj._forward_pre_hooks.clear()
    assert [type(module) for module in lazy.model.modules()] == kinds
    assert all(type(module._parameters) is dict for module in lazy.model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in lazy.model.modules())
    assert lazy.loaded_bytes == 0
    with lazy:
        outputs(lazy.model, text_batches()[0])
        with pytest.raises(RuntimeError, match="expected to be entered once at a time"):
            lazy.__enter__()
    assert lazy.peak_bytes == max(lazy.unit_bytes().values())


def test_a_walk_that_is_left_early_holds_nothing(tmp_path: Path) -> None:
    """Batches that are ended inside a block are in no block any more."""
    saved(tmp_path, decoder("Llama"))
    with LazyModel(tmp_path) as lazy:
        with Walk(lazy.model, text_batches(), find_sites(lazy.model).sites) as walk:
            next(walk)
        outputs(lazy.model, text_batches()[0])
        assert lazy.peak_bytes == max(lazy.unit_bytes().values())


# Without weights


def test_parameters_on_meta_and_buffers_in_memory() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.ones(3), requires_grad=False)
            self.second = self.first
            self.linear = nn.Linear(2, 2)
            self.alias = self.linear
            self.register_buffer("table", torch.arange(3))

    with parameters_on_meta():
        module = Module()
    assert all(parameter.device.type == "meta" for parameter in module.parameters())
    assert module.first is module.second
    assert torch.equal(module.table, torch.arange(3))  # type: ignore[arg-type]
    assert Module().first.device.type == "cpu"


def test_sources_cover_what_a_model_saves(tmp_path: Path) -> None:
    """Every tensor of the files is a source of something, and nothing is read to find that out."""
    for name, (make, _) in MODELS.items():
        checkpoint = Checkpoint(saved(tmp_path / name, make()))
        checkpoint.read = None  # type: ignore[method-assign, assignment]
        model = build_model(checkpoint)
        sources = find_sources(model, checkpoint)
        used = {source for conversion in sources.conversions.values() for source in conversion.sources}
        assert used == set(checkpoint.tensors), name
        parameters = {id(value): value for value in model.parameters()}
        total = sum(value.numel() * value.element_size() for value in parameters.values())
        assert total == sum({one: one.nbytes for one in sources.conversions.values()}.values()), name


# Folders that are refused


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    with_config(saved(tmp_path, decoder("Llama")), quantization_config={"quant_method": "gptq"})
    with pytest.raises(ValueError, match=r"expected a model that is not quantized, but got one with a .* of 'gptq'"):
        LazyModel(tmp_path)


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{name}.old": tensors.pop(name)})


def replaced(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD_TENSORS: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "a tensor is missing": (
        "llama",
        without(DOWN),
        rf"expected tensors for all parameters of LlamaForCausalLM, among them {DOWN}, but got '{DOWN}.old' for",
    ),
    "another shape": (
        "llama",
        replaced(DOWN, torch.ones(3, 48)),
        rf"expected tensor '{DOWN}' to become {DOWN} with shape \[32, 48\], but got shape \[3, 48\]",
    ),
    "integers": (
        "llama",
        replaced(DOWN, torch.ones(32, 48, dtype=torch.int8)),
        rf"to become {DOWN}, a parameter of floating point, but got int8 \(a checkpoint that is quantized already\?\)",
    ),
    "an expert is missing": (
        "qwen3-moe",
        lambda tensors: tensors.update(x=tensors.pop("model.layers.0.mlp.experts.5.gate_proj.weight")),
        r"expected 11 tensors from .* to become model\.layers\.0\.mlp\.experts\.gate_up_proj by transformers' rules",
    ),
    "an expert of another shape": (
        "qwen3-moe",
        replaced("model.layers.0.mlp.experts.5.down_proj.weight", torch.ones(3, 3)),
        r"expected 6 tensors from .* to become model\.layers\.0\.mlp\.experts\.down_proj by transformers' rules",
    ),
}


@pytest.mark.parametrize("what", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    name, change, message = BAD_TENSORS[what]
    edited(saved(tmp_path, MODELS[name][0]()), change)
    with pytest.raises(ValueError, match=message) as raised:
        LazyModel(tmp_path)
    assert str(tmp_path) in str(raised.value)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown model type": (
        {"model_type": "no-such-model"},
        "expected a configuration that transformers reads, but got",
    ),
    "no model type": ({"model_type": ...}, "expected a configuration that transformers reads, but got"),
    "an unknown architecture": (
        {"architectures": ["NoSuchModel"]},
        r"an architecture that transformers \S+ knows, but got",
    ),
    "an architecture that is no model": ({"architectures": ["AutoTokenizer"]}, "knows, but got 'AutoTokenizer'"),
    "an architecture that is no text": (
        {"architectures": [3]},
        r"expected architectures to be a list of names, but got",
    ),
    "architectures that are no list": ({"architectures": "LlamaModel"}, "expected architectures to be a list of names"),
    "a size that is text": ({"hidden_size": "large"}, "expected a configuration that"),
    "a negative size": ({"intermediate_size": -3}, "expected a configuration that"),
    "a size beyond any memory": ({"vocab_size": 10**15}, "expected a configuration that LlamaForCausalLM can be built"),
    "more blocks than tensors": (
        {"num_hidden_layers": 10**9},
        "expected num_hidden_layers to be at most 21, as many as there are tensors, but got 1000000000",
    ),
    "more blocks in a part": (
        {"text_config": {"encoder_layers": 22}},
        "expected encoder_layers to be at most 21, as many as there are tensors, but got 22",
    ),
    "another number of blocks": ({"num_hidden_layers": 3}, "expected tensors for all parameters of LlamaForCausalLM"),
    "another size": ({"intermediate_size": 40}, r"with shape \[32, 40\], but got shape \[32, 48\]"),
}


@pytest.mark.parametrize("what", BAD_CONFIGS)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    values, message = BAD_CONFIGS[what]
    with_config(saved(tmp_path, decoder("Llama")), **values)
    with pytest.raises(ValueError, match=message) as raised:
        LazyModel(tmp_path)
    assert str(tmp_path) in str(raised.value)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).parent.joinpath("ran").write_text("x")
Path({marker!r}).write_text("x")
class OurConfig(LlamaConfig):
    model_type = "ours"
class OurModel(LlamaForCausalLM):
    config_class = OurConfig
"""


def test_code_of_the_folder_runs_only_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("Llama")
    folder = saved(tmp_path / "model", model)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    marker = tmp_path / "ran"
    (folder / "ours.py").write_text(CODE.format(marker=str(marker)))
    maps = {"AutoConfig": "ours.OurConfig", "AutoModelForCausalLM": "ours.OurModel"}
    with_config(folder, model_type="ours", architectures=["OurModel"], auto_map=maps)
    with pytest.raises(ValueError, match="expected a configuration that transformers reads, but got"):
        LazyModel(folder)
    with_config(folder, model_type="llama", auto_map={"AutoModelForCausalLM": "ours.OurModel"})
    with pytest.raises(
        ValueError, match=r"but got OurModel, which is code of the folder \(trust_remote_code=True runs"
    ):
        LazyModel(folder)
    assert not marker.exists()
    with_config(folder, model_type="ours", auto_map=maps)
    with LazyModel(folder, trust_remote_code=True) as lazy:
        assert type(lazy.model).__name__ == "OurModel"
        assert_equal_outputs(lazy, model, text_batches())
    assert marker.exists()


# Memory of a process


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Blocks of 5 MB: a process that quantizes 24 of them takes at most 5% more than one that quantizes 6."""
    sizes = {
        blocks: lazy_memory.make_llama(tmp_path / str(blocks), blocks=blocks, width=320, inner=896)
        for blocks in (6, 24)
    }
    few, many = (lazy_memory.measured("run", tmp_path / str(blocks)) for blocks in sizes)
    for blocks, found in zip(sizes, (few, many), strict=True):
        assert "error" not in found, found
        assert found["layers"] == found["stored"] == 7 * blocks
        assert found["weights"] == found["largest"]
    added = sizes[24] - sizes[6]
    assert added > 80 * 10**6
    assert many["resident"] <= 1.05 * few["resident"]
    assert many["peak"] - few["peak"] <= 0.15 * added
    whole = lazy_memory.measured("whole", tmp_path / "24")
    assert whole["peak"] >= sizes[24]  # what is measured sees weights


@pytest.mark.nightly
def test_a_model_of_3_gib_runs_in_a_fraction(tmp_path: Path) -> None:
    """64 blocks of 51 MB, in 256 MB of private memory more than the process begins with (RLIMIT_DATA).

    Every block is read and run, and one layer of each is quantized: all of them would take an hour. The same limit ends
    a process that loads the model.
    """
    size = lazy_memory.make_llama(tmp_path / "model", blocks=64, width=1024, inner=2816)
    assert size >= 3 * 2**30
    found = lazy_memory.measured("run", tmp_path / "model", 256, "*.o_proj")
    assert "error" not in found, found
    assert found["layers"] == found["stored"] == 64
    assert found["weights"] == found["largest"] < 52 * 10**6
    assert found["peak"] < 3 * found["weights"]
    assert "error" in lazy_memory.measured("whole", tmp_path / "model", 256)

"""GGUF files: what the package gguf and transformers read, and how they compare with a file that others wrote."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import miniquant
from format_layers import random_layer
from gguf_examples import (
    BERT_TOKENS,
    DECODER,
    GPT2_TOKENS,
    LLAMA_TOKENS,
    MODELS,
    PLAIN,
    PRE_TOKENIZERS,
    TEXTS,
    Small,
    byte_level,
    save_tokenizer,
    sentence_piece,
    small,
    word_piece,
)
from miniquant.formats import LayerGrid
from miniquant.formats.gguf_file import plan_gguf, write_gguf
from miniquant.formats.gguf_tokenizer import read_vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


READ_BY_TRANSFORMERS = ("llama", "llama tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


def values_of(tensor: Any) -> np.ndarray[Any, Any]:
    """What the package gguf reads."""
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def halves_to_pairs(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """The rows of each head: first half and second half alternate."""
    out = np.empty_like(weight)
    width = len(weight) // heads
    for head in range(heads):
        rows = weight[head * width : (head + 1) * width]
        out[head * width : (head + 1) * width : 2] = rows[: width // 2]
        out[head * width + 1 : (head + 1) * width : 2] = rows[width // 2 :]
    return out


@pytest.mark.parametrize("kind", MODELS)
def test_every_tensor_has_the_models_values(kind: str, tmp_path: Path) -> None:
    made = small(kind)
    reader = made.write(tmp_path / "model.gguf")
    architecture = reader.fields["general.architecture"].contents()
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, 7)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = made.model.config
    tied = config.to_dict().get("tie_word_embeddings")
    for name, parameter in made.state.items():
        place = names.get_name(name, (".weight", ".bias")) or ""
        if "pooler" in name or (name == "lm_head.weight" and tied) or name.endswith("position_ids"):
            assert place not in tensors
            continue
        tensor = tensors.pop(place)
        expected = parameter.numpy()
        if architecture == "llama" and ".attn_q." in place:
            expected = halves_to_pairs(expected, config.num_attention_heads)
        if architecture == "llama" and ".attn_k." in place:
            expected = halves_to_pairs(expected, config.num_key_value_heads)
        if kind.startswith("gemma") and "norm" in place:
            expected = expected + np.float32(1)
        if kind == "gpt2" and name.removesuffix(".weight") in made.layers:
            expected = expected.T
        assert np.array_equal(values_of(tensor), expected), name
        quantized = name.endswith(".weight") and name.removesuffix(".weight") in made.layers
        assert tensor.tensor_type.name == ("Q4_0" if quantized else "F32")
    assert not tensors


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_gives_equal_logits(kind: str, tmp_path: Path) -> None:
    made = small(kind)
    made.write(tmp_path / "model.gguf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(24)[None] * 5 % 96
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, made.model(tokens).logits)


@pytest.mark.parametrize(
    ("quantization", "name"),
    [
        ({"bits": 2}, "Q4_0"),
        ({"bits": 4, "group_size": 64}, "Q4_0"),
        ({"bits": 4, "symmetric": False, "full_range": False}, "Q4_1"),
        ({"bits": 5}, "Q5_0"),
        ({"bits": 5, "symmetric": False, "full_range": False}, "Q5_1"),
        ({"bits": 8, "group_size": -1}, "Q8_0"),
    ],
)
def test_every_type_of_block_in_a_file(quantization: dict[str, Any], name: str, tmp_path: Path) -> None:
    made = small("llama", **quantization)
    reader = made.write(tmp_path / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{name}"]
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    assert tensor.tensor_type.name == name
    expected = made.state["model.layers.1.mlp.down_proj.weight"].numpy()
    scales = made.layers["model.layers.1.mlp.down_proj"].scales.float().max().item()
    bound = scales * (31 if name == "Q5_1" else 15) / 2**11 if name.endswith("_1") else 0
    assert np.abs(values_of(tensor) - expected).max() <= bound


def test_exact_minima_in_a_file(tmp_path: Path) -> None:
    made = small("llama", bits=4, symmetric=False, full_range=False)
    assert len(made.plan().warnings) == len(made.layers)
    assert made.plan(exact=True).warnings == ()
    reader = made.write(tmp_path / "model.gguf", exact=True)
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    assert tensor.tensor_type.name == "Q5_0"
    assert np.array_equal(values_of(tensor), made.state["model.layers.1.mlp.down_proj.weight"].numpy())


@pytest.mark.parametrize("other", ["F32", "F16", "BF16", "Q8_0"])
def test_other_matrices(other: str, tmp_path: Path) -> None:
    made = small("llama")
    tensors = {tensor.name: tensor for tensor in made.write(tmp_path / "model.gguf", other=other).tensors}
    embedding = made.state["model.embed_tokens.weight"]
    assert tensors["token_embd.weight"].tensor_type.name == other
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    bound = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}[other] * embedding.abs().max().item()
    assert np.abs(values_of(tensors["token_embd.weight"]) - embedding.numpy()).max() <= bound
    expected = {
        "F16": embedding.half().float(),
        "BF16": embedding.bfloat16().float(),
        "F32": embedding,
        "Q8_0": torch.from_numpy(
            gguf.dequantize(
                gguf.quantize(embedding.numpy(), gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            )
        ),
    }[other]
    assert np.array_equal(values_of(tensors["token_embd.weight"]), expected.numpy())


def test_a_head_that_is_quantized(tmp_path: Path) -> None:
    made = small("llama")
    head = miniquant.rtn(made.model.lm_head.weight.detach(), group_size=32, scale_dtype=torch.float16)
    made = Small(made.model, {**made.layers, "lm_head": head})
    tensor = next(t for t in made.write(tmp_path / "model.gguf").tensors if t.name == "output.weight")
    assert tensor.tensor_type.name == "Q4_0"
    assert np.array_equal(values_of(tensor), miniquant.dequantize(head, dtype=torch.float32).numpy())


def shapes_of(config: Any) -> dict[str, tuple[int, ...]]:
    """The parameters of a causal model of which there is only a config."""
    model_class: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = model_class.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# Metadata, beside a file that llama.cpp's own converter wrote.


@pytest.fixture(scope="module")
def smollm() -> Path:
    """SmolLM2-135M-Instruct in a GGUF file."""
    path: Path = importlib.import_module("scripts.smollm2").gguf_file()
    return path


@pytest.mark.nightly
def test_metadata_and_tensors_are_those_of_llama_cpps_converter(smollm: Path) -> None:
    reader = gguf.GGUFReader(smollm)
    config = AutoConfig.from_pretrained(smollm.parent, gguf_file=smollm.name)
    plan = plan_gguf(config.to_dict(), shapes_of(config), {}, name=reader.fields["general.name"].contents())
    theirs = {key: field.contents() for key, field in reader.fields.items()}
    ours = plan.metadata
    for key, value in theirs.items():
        if key.startswith("llama.") or key in ("general.type", "general.size_label", "general.quantization_version"):
            assert ours[key] == pytest.approx(value), key
    assert {t.placement.name: list(t.shape) for t in plan.tensors} == {
        tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors
    }


@pytest.mark.nightly
def test_vocabulary_is_that_of_llama_cpps_converter(smollm: Path, tmp_path: Path) -> None:
    importlib.import_module("scripts.smollm2").load_tokenizer().save_pretrained(tmp_path)
    made = small("llama")
    made.model.resize_token_embeddings(49152)
    fields = made.write(tmp_path / "model.gguf", folder=tmp_path).fields
    theirs = gguf.GGUFReader(smollm).fields
    compared = [key for key in theirs if key.startswith("tokenizer.")]
    assert len(compared) >= 12
    for key in compared:
        assert fields[key].contents() == theirs[key].contents(), key
        assert fields[key].types == theirs[key].types, key


# Tokenizers.


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_how_texts_are_split_has_a_name(name: str, tmp_path: Path) -> None:
    save_tokenizer(byte_level(PRE_TOKENIZERS[name]), tmp_path)
    vocabulary = read_vocabulary(tmp_path, 300)
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_space_prefix) == ("gpt2", name, False)
    assert vocabulary.types[:3] == [3, 3, 1]


def test_a_way_to_split_that_is_not_known_is_named_by_the_caller(tmp_path: Path) -> None:
    other = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), PLAIN])
    save_tokenizer(byte_level(other), tmp_path)
    with pytest.raises(
        ValueError, match=r"gguf: expected pre_tokenizer of .* to be one that llama.cpp is known to have"
    ):
        read_vocabulary(tmp_path, 300)
    assert read_vocabulary(tmp_path, 300, pre="tekken").pre == "tekken"


def test_gpt2_with_its_tokenizer_in_transformers(tmp_path: Path) -> None:
    made = small("gpt2")
    fast = save_tokenizer(byte_level(PLAIN), tmp_path, **GPT2_TOKENS)
    made.write(tmp_path / "model.gguf", folder=tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(24)[None] * 5 % 96
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, made.model(tokens).logits)
    (tmp_path / "tokenizer.json").unlink()
    read: Any = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    for text in TEXTS:
        assert read(text, add_special_tokens=False).input_ids == fast(text).input_ids


def merged_by_score(text: str, tokens: list[str], scores: list[float]) -> list[str]:
    """What llama.cpp does: merge the pair of neighbours whose text has the highest score, the leftmost first."""
    known = dict(zip(tokens, scores, strict=True))
    pieces = list(text)
    while True:
        pairs = [(-known[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in known]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.parametrize("prefix", [True, False])
def test_scores_merge_as_the_tokenizer_does(prefix: bool, tmp_path: Path) -> None:
    tokenizer = sentence_piece(prefix=prefix)
    size = tokenizer.get_vocab_size() + 5
    save_tokenizer(tokenizer, tmp_path, **LLAMA_TOKENS)
    vocabulary = read_vocabulary(tmp_path, size)
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_space_prefix) == ("llama", "default", prefix)
    assert vocabulary.types[:5] == [2, 3, 3, 6, 6]
    assert vocabulary.tokens[-1] == f"[PAD{size - 1}]"
    assert vocabulary.types[-5:] == [5] * 5
    assert vocabulary.scores is not None
    for text in ["It's a number of the trained words", "1234567 in café", "isn't it? Yes 3.14"]:
        shown = ("\u2581" if prefix else "") + text.replace(" ", "\u2581")
        pieces = merged_by_score(shown, vocabulary.tokens, vocabulary.scores)
        assert pieces == tokenizer.encode(text, add_special_tokens=False).tokens


def test_llama_with_its_tokenizer_in_transformers(tmp_path: Path) -> None:
    made = small("llama")
    tokenizer = sentence_piece()
    fast = save_tokenizer(tokenizer, tmp_path, **LLAMA_TOKENS)
    (tmp_path / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    made.model.resize_token_embeddings(tokenizer.get_vocab_size())
    fields = made.write(tmp_path / "model.gguf", folder=tmp_path).fields
    assert fields["tokenizer.chat_template"].contents().startswith("{% for message")
    assert fields["tokenizer.ggml.bos_token_id"].contents() == 1
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    (tmp_path / "tokenizer.json").unlink()
    read: Any = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    for text in ["It's a number of the trained words", "1234567 in café", "isn't it? Yes 3.14"]:
        assert read(text, add_special_tokens=False).input_ids == fast(text, add_special_tokens=False).input_ids


def test_bert_with_its_tokenizer_and_pooling(tmp_path: Path) -> None:
    made = small("bert")
    tokenizer = word_piece()
    save_tokenizer(tokenizer, tmp_path, **BERT_TOKENS)
    module = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "other"}, module]))
    (tmp_path / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    fields = made.write(tmp_path / "model.gguf", folder=tmp_path).fields
    assert fields["tokenizer.ggml.model"].contents() == "bert"
    assert fields["bert.pooling_type"].contents() == gguf.PoolingType.MEAN
    assert fields["bert.attention.causal"].contents() is False
    assert fields["tokenizer.ggml.token_type_count"].contents() == 2
    assert fields["tokenizer.ggml.seperator_token_id"].contents() == 3
    ours = fields["tokenizer.ggml.tokens"].contents()
    for number in range(96):
        token = tokenizer.id_to_token(number) or ""
        wanted = token if number < 5 else token[2:] if token.startswith("##") else "\u2581" + token
        assert ours[number] == wanted
    module["path"] = "../other"
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    with pytest.raises(ValueError, match=r"expected paths of .*modules.json to stay in its folder, but got '../other'"):
        made.plan(folder=tmp_path)


TOKENIZER_JSON = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {"type": "ByteLevel"}}
BROKEN_TOKENIZERS: list[tuple[object, str]] = [
    ("{", "to be a JSON file, but got"),
    ("[]", "to have an object, but got list"),
    ("[" * 100000, "to be a JSON file, but got"),
    ({"model": 3}, "expected model of"),
    ({"model": {"type": "Unigram", "vocab": []}}, "to be 'BPE' or 'WordPiece', but got 'Unigram'"),
    ({**TOKENIZER_JSON, "model": {"type": "BPE", "vocab": ["a"]}}, "expected vocab and added_tokens of"),
    ({**TOKENIZER_JSON, "added_tokens": ["a"]}, "expected added_tokens of"),
    ({**TOKENIZER_JSON, "added_tokens": [{"id": 1}]}, "but got None with 1"),
    ({**TOKENIZER_JSON, "added_tokens": [{"id": 99, "content": "b"}]}, "numbers below 3, the rows of the model's"),
    ({**TOKENIZER_JSON, "model": {"type": "BPE", "vocab": {"a": "0"}}}, "but got 'a' with '0'"),
    ({**TOKENIZER_JSON, "model": {"type": "BPE", "vocab": {"a": 3}}}, "but got 'a' with 3"),
    ({**TOKENIZER_JSON, "pre_tokenizer": None}, "or pre to name its rule, but got null"),
    ({"model": {"type": "BPE", "vocab": {}, "byte_fallback": True}}, "expected merges of"),
    ({"model": {"type": "BPE", "vocab": {}, "byte_fallback": True, "merges": ["a b c"]}}, "but got 'a b c'"),
    ({"model": {"type": "BPE", "vocab": {}, "byte_fallback": True, "merges": [[1, 2]]}}, "but got [1, 2]"),
    ({"model": {"type": "WordPiece", "vocab": {}}}, "to put texts in lower case, as llama.cpp does"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN_TOKENIZERS, ids=lambda value: str(value)[:40])
def test_damaged_tokenizers(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        read_vocabulary(tmp_path, 3)
    assert str(caught.value).startswith("gguf: expected ")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_damaged_companions_of_a_tokenizer(tmp_path: Path) -> None:
    made = small("gpt2")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        made.plan(folder=tmp_path)
    save_tokenizer(byte_level(PLAIN), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1")
    with pytest.raises(ValueError, match=r"gguf: expected .*tokenizer_config.json to be a JSON file, but got"):
        made.plan(folder=tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "post_processor": [3]}))
    with pytest.raises(ValueError, match=r"gguf: expected tokenizer.json and tokenizer_config.json of .* but got:"):
        made.plan(folder=tmp_path)


# Rotary embeddings.


def test_frequencies_of_llama_3_are_those_of_transformers() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    options = {**DECODER, "head_dim": 64, "max_position_embeddings": 131072, "rope_parameters": scaling}
    config = transformers.LlamaConfig(**options)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    old = {**config.to_dict(), "rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": scaling}
    for values in (config.to_dict(), old):
        plan = plan_gguf(values, shapes_of(config), {})
        (tensor,) = (tensor for tensor in plan.tensors if tensor.placement.name == "rope_freqs.weight")
        assert torch.allclose(plain / torch.tensor(tensor.values).double(), frequencies.double(), rtol=1e-6)
        assert min(tensor.values) == 1.0
        assert max(tensor.values) == 32.0
        assert plan.metadata["llama.rope.freq_base"] == 500000.0


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0},
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "yarn_beta_fast": 16.0},
        ),
        ({"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.5}, {"attn_factor": 1.5}),
    ],
)
def test_scaled_rotary_embeddings(scaling: dict[str, Any], expected: dict[str, Any]) -> None:
    config = transformers.Qwen2Config(**DECODER, rope_parameters={**scaling, "rope_theta": 1e6})
    metadata = plan_gguf(config.to_dict(), shapes_of(config), {}).metadata
    assert {key: metadata.get(f"qwen2.rope.scaling.{key}") for key in expected} == expected
    assert metadata["qwen2.rope.freq_base"] == 1e6


def test_long_contexts_of_phi3() -> None:
    scaling = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "rope_theta": 1e4}
    options = {**DECODER, "vocab_size": 96, "max_position_embeddings": 4096}
    config = transformers.Phi3Config(
        **options, original_max_position_embeddings=128, rope_parameters=scaling, sliding_window=256
    )
    plan = plan_gguf(config.to_dict(), shapes_of(config), {})
    assert plan.metadata["phi3.rope.scaling.original_context_length"] == 128
    assert plan.metadata["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + np.log(32) / np.log(128)) ** 0.5)
    assert plan.metadata["phi3.attention.sliding_window"] == 256
    (caution,) = plan.warnings
    assert "sliding_window of config.json is 256, but llama.cpp attends to everything for 'phi3'" in caution
    further = {t.placement.name: t.values for t in plan.tensors if not t.parameter}
    assert further == {"rope_factors_long.weight": (2.0,) * 8, "rope_factors_short.weight": (1.0,) * 8}


# What is refused.


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a config."""
    return lambda config: config.update(changes)


BROKEN_CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mixtral"}, "model_type of config.json to be one of llama, mistral,"),
    ("llama", {"model_type": None}, "model_type of config.json to be a text, but got None"),
    ("llama", {"model_type": 3}, "model_type of config.json to be a text, but got 3"),
    ("llama", {"hidden_act": "relu"}, "hidden_act of config.json to be 'silu' or 'swish', which is what llama.cpp"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads of config.json to be a positive integer, but got 0"),
    ("llama", {"num_attention_heads": "4"}, "num_attention_heads of config.json to be a positive integer, but got '4'"),
    ("llama", {"num_attention_heads": 3}, "to be a multiple of twice the heads, 6, but got 64"),
    ("llama", {"num_attention_heads": 8}, "tensor 'blk.0.attn_q.weight' to have shape [128, 64], as config.json has"),
    ("llama", {"head_dim": 32}, "tensor 'blk.0.attn_q.weight' to have shape [128, 64], as config.json has it, but got"),
    (
        "llama",
        {"hidden_size": 128},
        "tensor 'token_embd.weight' to have shape [96, 128], as config.json has it, but got",
    ),
    (
        "llama",
        {"intermediate_size": 95},
        "tensor 'blk.0.ffn_gate.weight' to have shape [95, 64], as config.json has it",
    ),
    ("llama", {"num_hidden_layers": 10**9}, "parameters of 1000000000 blocks, as config.json has it, but got 21 param"),
    ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers of config.json to be a positive integer, but got 1000"),
    ("qwen3", {"head_dim": 64}, "tensor 'blk.0.attn_q.weight' to have shape [256, 64], as config.json has it, but got"),
    ("phi3", {"num_key_value_heads": 4}, "tensor 'blk.0.attn_qkv.weight' to have shape [192, 64], as config.json has"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps of config.json to be a positive number, but got None"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps of config.json to be a positive number, but got nan"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps of config.json to be a positive number, but got 1000"),
    ("llama", {"rope_parameters": {"rope_theta": 0}}, "rope_theta of config.json to be a positive number, but got 0"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings of config.json to be true or false, but got 'no'"),
    ("llama", {"num_hidden_layers": 3}, "for the tensor 'blk.2.attn_norm.weight' of the architecture 'llama' with 3"),
    ("llama", {"num_hidden_layers": 1}, "which has no place in its files"),
    ("llama", {"vocab_size": 97}, "vocab_size of config.json to be 96, the rows of the embedding, but got 97"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2}},
        "rope_type of config.json to be 'default' or",
    ),
    ("llama", {"rope_parameters": [1]}, "config.json to be an object, but got [1]"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "original_max_position_embeddings of config"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window of config.json to be False or None"),
    (
        "gemma2",
        {"query_pre_attn_scalar": 100},
        "query_pre_attn_scalar of config.json to be 256, which is what llama.cpp",
    ),
    (
        "gemma3",
        {"layer_types": ["full_attention"] * 7},
        "layer_types of config.json to be full_attention in every layer",
    ),
    ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping of config.json to be None"),
    ("gpt2", {"activation_function": "relu"}, "activation_function of config.json to be 'gelu_new' or"),
    ("bert", {"hidden_act": "relu"}, "hidden_act of config.json to be 'gelu'"),
    ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type of config.json to be 'absolute'"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}},
        "long_factor of config.json to be 8 numbers, but got [1.0]",
    ),
]


@pytest.mark.parametrize(
    ("kind", "changes", "message"), BROKEN_CONFIGS, ids=[text[:45] for _, _, text in BROKEN_CONFIGS]
)
def test_configs_that_do_not_become_a_file(kind: str, changes: dict[str, Any], message: str) -> None:
    model_class, config_class, options = MODELS[kind]
    config = getattr(transformers, config_class)(**options)
    with torch.device("meta"):
        model: Any = getattr(transformers, model_class)(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        plan_gguf({**config.to_dict(), **changes}, shapes, {})
    assert str(caught.value).startswith("gguf: expected ")
    assert message in str(caught.value)


@pytest.mark.parametrize(("window", "cautions"), [(None, 0), (128, 0), (64, 1)])
def test_a_window_that_llama_cpp_does_not_have(window: int | None, cautions: int) -> None:
    config = transformers.MistralConfig(**DECODER, sliding_window=window)
    assert len(plan_gguf(config.to_dict(), shapes_of(config), {}).warnings) == cautions


def without(name: str) -> Callable[[dict[str, Any]], object]:
    """Parameters without one."""
    return lambda shapes: shapes.pop(name)


BROKEN_PARAMETERS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (without("model.norm.weight"), "a parameter for the tensor 'output_norm.weight' of the architecture 'llama'"),
    (without("model.layers.1.mlp.up_proj.weight"), "a parameter for the tensor 'blk.1.ffn_up.weight' of the arch"),
    (lambda shapes: shapes.update({"model.extra.weight": (4, 4)}), "but got 'model.extra.weight', which has no place"),
    (lambda shapes: shapes.update({"model.norm.scale": (4,)}), "but got 'model.norm.scale', which has no place"),
    (lambda shapes: shapes.update({"model.norm.weight": (2, 2, 2)}), "one or two dimensions, but got [2, 2, 2]"),
    (
        lambda shapes: shapes.update({"model.layers.0.mlp.up_proj.weight": (96, 32)}),
        "the shape of its parameter, [96, 32]",
    ),
    (
        lambda shapes: shapes.update({"transformer.wte.weight": (96, 64)}),
        "one parameter for the tensor 'token_embd.weight'",
    ),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_PARAMETERS, ids=[text[:45] for _, text in BROKEN_PARAMETERS])
def test_parameters_that_do_not_fit(change: Callable[[dict[str, Any]], object], message: str) -> None:
    made = small("llama")
    shapes: dict[str, Any] = {name: tuple(tensor.shape) for name, tensor in made.state.items()}
    grids = {name: LayerGrid.of(layer) for name, layer in made.layers.items()}
    change(shapes)
    with pytest.raises(ValueError, match=f"^gguf: expected .*{re.escape(message)}"):
        plan_gguf(made.model.config.to_dict(), shapes, grids)


def test_biases_where_the_architecture_has_none() -> None:
    config = transformers.Qwen3Config(**DECODER, attention_bias=True)
    with pytest.raises(ValueError, match=r"but got 'model.layers.0.self_attn.q_proj.bias', which has no place"):
        plan_gguf(config.to_dict(), shapes_of(config), {})


def test_layers_that_blocks_do_not_hold() -> None:
    made = small("llama", group_size=16)
    with pytest.raises(ValueError, match=r"gguf: expected group_size of layer 'model.layers.0.self_attn.q_proj' to be"):
        made.plan()
    with pytest.raises(ValueError, match=r"gguf: expected other to be one of F32, F16, BF16, Q8_0, but got 'Q4_K'"):
        made.plan(other="Q4_K")


def widened(layer: miniquant.QuantizedWeight) -> miniquant.QuantizedWeight:
    """A layer with scales of another dtype."""
    return replace(layer, scales=layer.scales.float())


def bad_layer(name: str, layers: Mapping[str, Any]) -> Any:
    """A layer with another shape."""
    return random_layer(32, 64) if name.endswith("1.mlp.down_proj") else layers[name]


def test_weights_that_are_not_as_planned_leave_no_file(tmp_path: Path) -> None:
    made = small("llama")
    path, plan = tmp_path / "model.gguf", made.plan(other="F16")
    path.write_text("old")
    state = {**made.state, "model.norm.weight": torch.ones(3)}
    with pytest.raises(
        ValueError, match=r"parameter 'model.norm.weight' to have shape \[64\] as planned and a floating"
    ):
        write_gguf(path, plan, state.__getitem__, made.layers.__getitem__)
    with pytest.raises(
        ValueError, match=r"layer 'model.layers.1.mlp.down_proj' to be Q4_0 of shape \[64, 96\] as plan"
    ):
        write_gguf(path, plan, made.state.__getitem__, lambda name: bad_layer(name, made.layers))
    state = {**made.state, "model.embed_tokens.weight": torch.full((96, 64), 1e6)}
    with pytest.raises(
        ValueError, match=r"values of 'model.embed_tokens.weight' to be at most 65504 for F16, but got 1e"
    ):
        write_gguf(path, plan, state.__getitem__, made.layers.__getitem__)
    with pytest.raises(ValueError, match="to be float16, but got float32"):
        write_gguf(path, plan, made.state.__getitem__, lambda name: widened(made.layers[name]))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_gguf(path, plan, made.state.__getitem__, made.layers.__getitem__)
    assert path.read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [path]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    made = small("qwen2")
    for name in ("a.gguf", "b.gguf"):
        made.write(tmp_path / name, name="model")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Tensors are asked for one by one, in the file's order, and not kept."""
    made = small("llama")
    plan, asked = made.plan(), []

    def load(name: str) -> Any:
        asked.append(name)
        return made.layers[name] if name in made.layers else made.state[name]

    write_gguf(tmp_path / "model.gguf", plan, load, load)
    assert asked == [tensor.layer or tensor.parameter for tensor in plan.tensors]

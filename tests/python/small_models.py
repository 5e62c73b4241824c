"""Small random models of many architectures, with batches: for what must hold on any model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

transformers = pytest.importorskip("transformers")

VOCABULARY = 96
LENGTHS = (9, 5, 12)  # of batches


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(rows: int, length: int, seed: int, below: int = VOCABULARY) -> Tensor:
    return torch.randint(3, below, (rows, length), generator=generator(seed))


def padded(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Right padding in every row but the first."""
    mask = (
        torch.arange(length) < torch.tensor([length, *(max(2, length - 1 - row) for row in range(rows - 1))])[:, None]
    )
    return {"input_ids": ids(rows, length, seed).masked_fill(~mask, 0), "attention_mask": mask.long()}


def text_batches() -> list[dict[str, Tensor]]:
    return [padded(2, length, seed) for seed, length in enumerate(LENGTHS)]


def built(kind: str, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():  # initial values of 0 and 1 hide mistakes
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    return model.eval()


def decoder(kind: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **more,
        }
    )
    return built(f"{kind}ForCausalLM", config)


def qwen3_moe() -> nn.Module:
    return decoder("Qwen3Moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return built("GPT2LMHeadModel", config)


def opt() -> nn.Module:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=24,
        pad_token_id=0,
    )
    return built("OPTForCausalLM", config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return built("BertForMaskedLM", config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return built("T5ForConditionalGeneration", config)


def t5_batches() -> list[dict[str, Tensor]]:
    """The decoder's texts are as long as the encoder's, so shapes do not tell which mask is whose."""
    batches = []
    for seed, batch in enumerate(text_batches()):
        length = batch["input_ids"].shape[1]
        mask = torch.arange(length) < torch.tensor([length - 2, length])[:, None]
        decoder_ids = ids(2, length, 10 + seed).masked_fill(~mask, 0)
        batches.append({**batch, "decoder_input_ids": decoder_ids, "decoder_attention_mask": mask.long()})
    return batches


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return built("WhisperForConditionalGeneration", config)


def whisper_batches() -> list[dict[str, Tensor]]:
    return [
        {
            "input_features": torch.randn(2, 8, 32, generator=generator(seed)),
            "decoder_input_ids": ids(2, length, seed),
        }
        for seed, length in enumerate(LENGTHS)
    ]


IMAGE_TOKEN = 90


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
    )
    return built("LlavaForConditionalGeneration", config)


def llava_batches() -> list[dict[str, Tensor]]:
    """Two batches with an image in each row (four patches), and one of text alone."""
    batches = []
    for seed, length in enumerate(LENGTHS):
        tokens = ids(2, length, seed, below=IMAGE_TOKEN)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if seed != 1:
            tokens[:, 1:5] = IMAGE_TOKEN
            batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator(seed))
        batches.append(batch)
    return batches


def mamba() -> nn.Module:
    config = transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=8, pad_token_id=0
    )
    return built("MambaForCausalLM", config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[dict[str, Tensor]]]]] = {
    "llama": (lambda: decoder("Llama"), text_batches),
    "qwen2": (lambda: decoder("Qwen2"), text_batches),
    "qwen3": (lambda: decoder("Qwen3"), text_batches),
    "qwen3-moe": (qwen3_moe, text_batches),
    "mixtral": (lambda: decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), text_batches),
    "gpt-oss": (lambda: decoder("GptOss", num_local_experts=4, num_experts_per_tok=2), text_batches),
    "gemma3": (lambda: decoder("Gemma3", sliding_window=4), text_batches),
    "phi3": (lambda: decoder("Phi3"), text_batches),
    "gpt2": (gpt2, text_batches),
    "opt": (opt, text_batches),
    "bert": (bert, text_batches),
    "t5": (t5, t5_batches),
    "whisper": (whisper, whisper_batches),
    "llava": (llava, llava_batches),
    "mamba": (mamba, text_batches),
}

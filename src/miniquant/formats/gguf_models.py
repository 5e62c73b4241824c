"""The architectures that GGUF files are written of: metadata from a Hugging Face config, and where each tensor goes.

What llama.cpp computes follows from the architecture's name and the metadata alone, so a config that asks for anything
else (another activation, another position embedding) is refused.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from miniquant.formats.base import is_integer

Metadata = dict[str, Any]  # bool, int (uint32), float (float32), str or a list of one of them
NAME = "gguf"
# Buffers that old checkpoints have among their weights.
BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|embeddings\.position_ids)"


class ModelConfig:
    """A model's config.json, whose values are checked as they are taken.

    Raises:
        ValueError: where it is no object.
    """

    def __init__(self, values: object) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{NAME}: expected config.json to be an object, but got {values!r}")  # noqa: TRY004
        self.values = values

    def _take(self, names: tuple[str, ...], requirement: str, accepts: Callable[[Any], bool], default: Any) -> Any:
        for name in names:
            value = self.values.get(name)
            if value is not None:
                if not accepts(value):
                    raise ValueError(f"{NAME}: expected {name} of config.json to be {requirement}, but got {value!r}")
                return value
        if default is None:
            raise ValueError(f"{NAME}: expected {names[0]} of config.json to be {requirement}, but got None")
        return default

    def integer(self, *names: str, default: int | None = None) -> int:
        """A positive integer, of 32 bits as the file has it: the first of some names that the config has."""
        return int(
            self._take(names, "a positive integer", lambda value: is_integer(value) and 0 < value < 1 << 32, default)
        )

    def number(self, *names: str, default: float | None = None) -> float:
        """A positive number: the first of some names that the config has."""
        return float(self._take(names, "a positive number", lambda value: _is_number(value) and value > 0, default))

    def text(self, *names: str, default: str | None = None) -> str:
        """A text: the first of some names that the config has."""
        return str(self._take(names, "a text", lambda value: isinstance(value, str), default))

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        return bool(self._take((name,), "true or false", lambda value: isinstance(value, bool), default))

    def require(self, name: str, accepted: Iterable[Any]) -> None:
        """Raises where a value is none of those that the architecture computes; a missing one is the first of them."""
        accepted = tuple(accepted)
        value = self.values.get(name, accepted[0])
        if value not in accepted:
            allowed = " or ".join(map(repr, dict.fromkeys(accepted)))
            raise ValueError(
                f"{NAME}: expected {name} of config.json to be {allowed}, which is what llama.cpp computes for "
                f"{self.values.get('model_type')!r}, but got {value!r}"
            )

    def rope(self, part: str = "") -> "ModelConfig":
        """The parameters of the rotary embedding: rope_parameters of transformers 5, or what older ones had."""
        parameters = self.values.get("rope_parameters")
        if isinstance(parameters, Mapping) and part and isinstance(parameters.get(part), Mapping):
            parameters = parameters[part]
        if parameters is None:
            scaling = self.values.get("rope_scaling")
            parameters = {**ModelConfig(scaling).values} if scaling is not None else {}
        values = {**ModelConfig(parameters).values}
        values.setdefault("rope_theta", self.values.get("rope_theta"))
        values.setdefault("rope_type", values.get("type"))
        return ModelConfig({key: value for key, value in values.items() if value is not None})

    @property
    def head_dim(self) -> int:
        """Columns per head."""
        heads = self.integer("num_attention_heads")
        return self.integer("head_dim", default=max(self.integer("hidden_size") // heads, 1))


@dataclass(frozen=True)
class Architecture:
    """How a model type becomes a GGUF file.

    Attributes:
        name: of the architecture, as llama.cpp has it.
        metadata: from a config to the keys below the architecture's name.
        block: tensors that every block has, without "blk.<i>." and ".weight".
        outside: tensors outside of blocks that there have to be.
        biases: whether linear layers may have one.
        further: tensors in one dimension, that follow from the config.
        permuted: whether rows of query and key go from halves to pairs, in which llama.cpp rotates them.
        norm_plus_one: whether norms multiply by 1 + weight, and GGUF stores the sum.
        transposed: endings of the modules whose weight is [K, N].
        left_out: expression of parameters that have no place in the file.
        prefixes: of names, which the tensors' map does not know.
        cautions: what llama.cpp computes otherwise than the model.
        tied: whether the file never has an output matrix of its own.
    """

    name: str
    metadata: Callable[[ModelConfig], Metadata]
    block: tuple[str, ...]
    outside: tuple[str, ...] = ("token_embd", "output_norm")
    biases: bool = False
    further: Callable[[ModelConfig], dict[str, list[float]]] = field(default=lambda _: {})
    permuted: bool = False
    norm_plus_one: bool = False
    transposed: tuple[str, ...] = ()
    left_out: str = ""
    prefixes: tuple[str, ...] = ()
    cautions: Callable[[ModelConfig], list[str]] = field(default=lambda _: [])
    tied: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a parameter goes, and what is done to it on the way.

    Attributes:
        name: in the file.
        heads: the number of heads whose rows go from halves to pairs; 0 leaves them.
        plus_one: whether 1 is added.
        transposed: whether the parameter is [K, N].
    """

    name: str
    heads: int = 0
    plus_one: bool = False
    transposed: bool = False


def architecture_of(config: ModelConfig) -> Architecture:
    """The architecture of a config's model_type.

    Raises:
        ValueError: for one that is not written.
    """
    model_type = config.text("model_type")
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"{NAME}: expected model_type of config.json to be one of {', '.join(ARCHITECTURES)}, "
            f"but got {model_type!r}"
        )
    return ARCHITECTURES[model_type]


def blocks_of(config: ModelConfig) -> int:
    """The number of blocks."""
    return config.integer("num_hidden_layers", "n_layer")


def placements(
    architecture: Architecture, config: ModelConfig, parameters: Iterable[str], known: Callable[[str], str | None]
) -> dict[str, Placement]:
    """Where each parameter goes; those that have no place in the file are left out.

    Args:
        architecture: of the model.
        config: of the model.
        parameters: names in the Hugging Face checkpoint.
        known: the name in the file of a module, or None.

    Raises:
        ValueError: for a parameter that the architecture has not, and where one is missing.
    """
    tied = architecture.tied or config.flag("tie_word_embeddings", default=architecture.name in ("gpt2", "gemma3"))
    out: dict[str, Placement] = {}
    for parameter in parameters:
        module, _, kind = parameter.rpartition(".")
        if re.fullmatch(BUFFERS, parameter) or (
            architecture.left_out and re.fullmatch(architecture.left_out, parameter)
        ):
            continue
        if tied and module == "lm_head":
            continue
        shown = next((module.removeprefix(p) for p in architecture.prefixes if module.startswith(p)), module)
        place = known(shown)
        is_norm = place is not None and "norm" in place
        if place is None or kind not in ("weight", "bias") or (kind == "bias" and not architecture.biases):
            raise ValueError(
                f"{NAME}: expected parameters of the architecture {architecture.name!r}, but got {parameter!r}, "
                "which has no place in its files"
            )
        heads = 0
        if architecture.permuted and place.endswith((".attn_q", ".attn_k")):
            heads = config.integer("num_attention_heads")
            if place.endswith(".attn_k"):
                heads = config.integer("num_key_value_heads", default=heads)
        transposed = kind == "weight" and module.endswith(architecture.transposed) if architecture.transposed else False
        out[parameter] = Placement(f"{place}.{kind}", heads, architecture.norm_plus_one and is_norm, transposed)
    _check_complete(architecture, config, [placement.name for placement in out.values()])
    return out


def _check_complete(architecture: Architecture, config: ModelConfig, names: list[str]) -> None:
    """Raises where a tensor is missing that llama.cpp asks for, or one comes twice."""
    have = set(names)
    if len(have) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{NAME}: expected one parameter for the tensor {twice!r}, but got several")
    blocks = blocks_of(config)
    wanted = [f"{name}.weight" for name in architecture.outside]
    wanted += [f"blk.{block}.{name}.weight" for block in range(blocks) for name in architecture.block]
    for name in wanted:
        if name not in have:
            raise ValueError(
                f"{NAME}: expected a parameter for the tensor {name!r} of the architecture {architecture.name!r} with "
                f"{blocks} blocks, but got none"
            )
    for name in names:
        number = re.match(r"blk\.(\d+)\.", name)
        if number is not None and int(number[1]) >= blocks:
            raise ValueError(f"{NAME}: expected blocks 0 to {blocks - 1} of config.json, but got {name!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30  # no nan, no inf


def _common(config: ModelConfig) -> Metadata:
    """What every decoder with an RMS norm and rotary embeddings has."""
    heads = config.integer("num_attention_heads")
    return {
        "block_count": blocks_of(config),
        "context_length": config.integer("max_position_embeddings"),
        "embedding_length": config.integer("hidden_size"),
        "feed_forward_length": config.integer("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": config.integer("num_key_value_heads", default=heads),
        "attention.layer_norm_rms_epsilon": config.number("rms_norm_eps"),
        "vocab_size": config.integer("vocab_size"),
    }


def _key_length(config: ModelConfig) -> Metadata:
    return {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}


def _rope(config: ModelConfig, *kinds: str, part: str = "", default_theta: float | None = 10000.0) -> Metadata:
    """The rotary embedding: of the plain kind, or one of `kinds`."""
    rope = config.rope(part)
    out: Metadata = {"rope.freq_base": rope.number("rope_theta", default=default_theta)}
    kind = rope.text("rope_type", default="default")
    kind = "longrope" if kind == "su" else kind
    if kind not in ("default", *kinds):
        allowed = " or ".join(("'default'", *map(repr, kinds)))
        raise ValueError(f"{NAME}: expected rope_type of config.json to be {allowed}, but got {kind!r}")
    if kind == "linear":
        out |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.number("factor")}
    elif kind == "yarn":
        out |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.number("factor"),
            "rope.scaling.original_context_length": rope.integer(
                "original_max_position_embeddings", default=config.integer("max_position_embeddings")
            ),
        }
        for name in ("beta_fast", "beta_slow"):
            if rope.values.get(name) is not None:
                out[f"rope.scaling.yarn_{name}"] = rope.number(name)
        if rope.values.get("attention_factor") is not None:  # llama.cpp multiplies it by what is the default here
            default = 0.1 * math.log(max(rope.number("factor"), 1.0)) + 1
            out["rope.scaling.attn_factor"] = rope.number("attention_factor") / default
    elif kind == "longrope":
        longest = config.integer("max_position_embeddings")
        own = config.values.get("original_max_position_embeddings") is not None
        shortest = (config if own else rope).integer("original_max_position_embeddings")
        ratio = longest / shortest
        factor = math.sqrt(1 + math.log(ratio) / math.log(shortest)) if ratio > 1 and shortest > 1 else 1.0
        out |= {
            "rope.scaling.original_context_length": shortest,
            "rope.scaling.attn_factor": rope.number("attention_factor", default=factor),
        }
    return out


def _llama3_frequencies(config: ModelConfig) -> dict[str, list[float]]:
    """What each frequency is divided by, for the rope_type "llama3"."""
    rope = config.rope()
    if rope.values.get("rope_type") != "llama3":
        return {}
    factor, original = rope.number("factor"), rope.integer("original_max_position_embeddings")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    theta, width = rope.number("rope_theta", default=10000.0), config.head_dim
    divisors = []
    for index in range(0, width, 2):
        turns = original / (2 * math.pi * theta ** (index / width))  # in the original context
        if turns >= high:
            divisors.append(1.0)
        elif turns <= low:
            divisors.append(factor)
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs": divisors}


def _llama(config: ModelConfig) -> Metadata:
    config.require("hidden_act", ("silu", "swish"))
    head_dim = config.head_dim
    own = (
        _key_length(config) if head_dim * config.integer("num_attention_heads") != config.integer("hidden_size") else {}
    )
    return {**_common(config), **own, "rope.dimension_count": head_dim, **_rope(config, "linear", "yarn", "llama3")}


def _qwen2(config: ModelConfig) -> Metadata:
    config.require("hidden_act", ("silu", "swish"))
    config.require("use_sliding_window", (False, None))
    return {**_common(config), **_rope(config, "linear", "yarn")}


def _qwen3(config: ModelConfig) -> Metadata:
    return {**_qwen2(config), **_key_length(config)}


def _gemma(config: ModelConfig) -> Metadata:
    config.require("hidden_act", ("gelu_pytorch_tanh", "gelu", None))
    config.require("hidden_activation", ("gelu_pytorch_tanh", None))
    return {**_common(config), **_key_length(config), **_rope(config)}


def _query_scale(config: ModelConfig, large: int) -> None:
    """Raises for a scale of the queries other than that of the heads, or of the model of `large` blocks."""
    heads = config.integer("num_attention_heads")
    own = config.head_dim if blocks_of(config) != large else config.integer("hidden_size") / heads
    scale = config.number("query_pre_attn_scalar", default=own)
    if scale != own:
        raise ValueError(
            f"{NAME}: expected query_pre_attn_scalar of config.json to be {own:g}, which is what llama.cpp computes, "
            f"but got {scale:g}"
        )


def _check_pattern(config: ModelConfig, period: int) -> None:
    """Raises where not exactly every layer that llama.cpp lets attend to all tokens does so."""
    kinds = config.values.get("layer_types")
    expected = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(blocks_of(config))]
    if kinds is not None and kinds != expected:
        raise ValueError(
            f"{NAME}: expected layer_types of config.json to be full_attention in every layer whose number is a "
            f"multiple of {period}, which is what llama.cpp computes, but got {kinds!r}"
        )


def _gemma2(config: ModelConfig) -> Metadata:
    config.require("hidden_activation", ("gelu_pytorch_tanh",))
    _query_scale(config, 46)
    _check_pattern(config, 2)
    return {
        **_common(config),
        **_key_length(config),
        **_rope(config),
        "attn_logit_softcapping": config.number("attn_logit_softcapping", default=50.0),
        "final_logit_softcapping": config.number("final_logit_softcapping", default=30.0),
        "attention.sliding_window": config.integer("sliding_window"),
    }


def _gemma3(config: ModelConfig) -> Metadata:
    config.require("hidden_activation", ("gelu_pytorch_tanh",))
    config.require("attn_logit_softcapping", (None,))
    _query_scale(config, 62)
    _check_pattern(config, 6)
    local = config.number(
        "rope_local_base_freq", default=config.rope("sliding_attention").number("rope_theta", default=1e4)
    )
    out = {
        **_common(config),
        **_key_length(config),
        **_rope(config, "linear", part="full_attention", default_theta=1e6),
        "rope.freq_base_swa": local,
        "attention.sliding_window": config.integer("sliding_window"),
    }
    if config.values.get("final_logit_softcapping") is not None:
        out["final_logit_softcapping"] = config.number("final_logit_softcapping")
    return out


def _phi3(config: ModelConfig) -> Metadata:
    config.require("hidden_act", ("silu", "swish"))
    partial = config.rope().number("partial_rotary_factor", default=config.number("partial_rotary_factor", default=1.0))
    out = {
        **_common(config),
        "rope.dimension_count": int(config.head_dim * partial),
        **_rope(config, "longrope"),
        "attention.sliding_window": config.integer("sliding_window", default=0) if _has_window(config) else 0,
    }
    out.setdefault(
        "rope.scaling.original_context_length",
        config.integer("original_max_position_embeddings", default=config.integer("max_position_embeddings")),
    )
    return out


def _no_window(config: ModelConfig) -> list[str]:
    """A window that llama.cpp does not have for the architecture."""
    if not _has_window(config):
        return []
    window, kind = config.integer("sliding_window"), config.text("model_type")
    caution = (
        f"{NAME}: sliding_window of config.json is {window}, but llama.cpp attends to everything for {kind!r}: in "
        f"texts of more than {window} tokens the model's outputs differ"
    )
    return [caution]


def _has_window(config: ModelConfig) -> bool:
    """Whether a layer does not attend to everything."""
    window = config.values.get("sliding_window")
    return window is not None and config.integer("sliding_window") < config.integer("max_position_embeddings")


def _phi3_factors(config: ModelConfig) -> dict[str, list[float]]:
    """What each frequency is divided by, in short and in long contexts."""
    rope = config.rope()
    out = {}
    if rope.values.get("rope_type") in ("longrope", "su"):
        width = _phi3(config)["rope.dimension_count"]
        for name in ("long", "short"):
            factors = rope.values.get(f"{name}_factor")
            if not isinstance(factors, list) or len(factors) != width // 2 or not all(map(_is_number, factors)):
                raise ValueError(
                    f"{NAME}: expected {name}_factor of config.json to be {width // 2} numbers, but got {factors!r}"
                )
            out[f"rope_factors_{name}"] = [float(factor) for factor in factors]
    return out


def _gpt2(config: ModelConfig) -> Metadata:
    config.require("activation_function", ("gelu_new", "gelu_pytorch_tanh"))
    config.require("scale_attn_weights", (True,))
    config.require("scale_attn_by_inverse_layer_idx", (False,))
    config.require("add_cross_attention", (False,))
    width = config.integer("n_embd", "hidden_size")
    return {
        "block_count": blocks_of(config),
        "context_length": config.integer("n_ctx", "n_positions", "max_position_embeddings"),
        "embedding_length": width,
        "feed_forward_length": config.integer("n_inner", default=4 * width),
        "attention.head_count": config.integer("n_head", "num_attention_heads"),
        "attention.layer_norm_epsilon": config.number("layer_norm_epsilon"),
    }


def _bert(config: ModelConfig) -> Metadata:
    config.require("hidden_act", ("gelu",))
    config.require("position_embedding_type", ("absolute",))
    config.require("is_decoder", (False,))
    return {
        "block_count": blocks_of(config),
        "context_length": config.integer("max_position_embeddings"),
        "embedding_length": config.integer("hidden_size"),
        "feed_forward_length": config.integer("intermediate_size"),
        "attention.head_count": config.integer("num_attention_heads"),
        "attention.layer_norm_epsilon": config.number("layer_norm_eps"),
        "attention.causal": False,
    }


_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_GATED = ("attn_norm", *_ATTENTION, "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_POST = ("post_attention_norm", "post_ffw_norm")
_QK_NORMS = ("attn_q_norm", "attn_k_norm")
_LLAMA = Architecture(
    "llama", _llama, _GATED, biases=True, permuted=True, further=_llama3_frequencies, cautions=_no_window
)
_GEMMA3 = Architecture("gemma3", _gemma3, (*_GATED, *_POST, *_QK_NORMS), norm_plus_one=True)

ARCHITECTURES: Mapping[str, Architecture] = {  # by model_type
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _qwen2, _GATED, biases=True),
    "qwen3": Architecture("qwen3", _qwen3, (*_GATED, *_QK_NORMS)),
    "gemma": Architecture("gemma", _gemma, _GATED, norm_plus_one=True, tied=True),
    "gemma2": Architecture("gemma2", _gemma2, (*_GATED, *_POST), norm_plus_one=True, tied=True),
    "gemma3_text": _GEMMA3,
    "phi3": Architecture(
        "phi3",
        _phi3,
        ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
        further=_phi3_factors,
        cautions=_no_window,
    ),
    "gpt2": Architecture(
        "gpt2",
        _gpt2,
        ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"),
        ("token_embd", "position_embd", "output_norm"),
        biases=True,
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    ),
    "bert": Architecture(
        "bert",
        _bert,
        (*_ATTENTION, "attn_output_norm", "ffn_up", "ffn_down", "layer_output_norm"),
        ("token_embd", "token_types", "position_embd", "token_embd_norm"),
        biases=True,
        left_out=r"(.*\.)?(pooler\.dense\.(weight|bias)|cls\.(predictions|seq_relationship)\..*)",
        prefixes=("bert.",),
        tied=True,
    ),
}

"""GGUF files for llama.cpp, written from a Hugging Face model whose layers are quantized.

:func:`plan_gguf` looks at names, shapes, config and tokenizer before any weight is there, and refuses what cannot
become a file; :func:`write_gguf` then takes one tensor after the other, so that the model is never in memory.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from miniquant.formats.base import LayerGrid, checked_grid
from miniquant.formats.gguf_blocks import COLUMNS, NAME, TYPES, Gguf, gguf_package
from miniquant.formats.gguf_models import (
    Metadata,
    ModelConfig,
    Placement,
    architecture_of,
    blocks_of,
    placements,
)
from miniquant.formats.gguf_tokenizer import Vocabulary, read_json, read_list, read_vocabulary
from miniquant.grid import QuantizedWeight
from miniquant.layer_file import dtype_names, replacing

GGUF_FILE = "model.gguf"  # in a folder that is written
OtherType = Literal["F32", "F16", "BF16", "Q8_0"]
_FILE_TYPES = {"F32": "ALL_F32", **{name: f"MOSTLY_{name}" for name in ("F16", "BF16", *TYPES)}}
_FILE_TYPES |= {name: f"MOSTLY_{name}_S" for name in ("Q3_K", "Q4_K", "Q5_K")}
_ALWAYS_F32 = ("position_embd.weight", "token_types.weight")
_POOLING = {"mean_tokens": "MEAN", "cls_token": "CLS", "lasttoken": "LAST"}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file.

    Attributes:
        parameter: where it comes from; "" for one that follows from the config.
        placement: its name, and what is done to it.
        shape: of its values.
        kind: "F32", "F16", "BF16" or the name of a block type.
        layer: the quantized layer that it is, or "".
        values: of one that follows from the config.
    """

    parameter: str
    placement: Placement
    shape: tuple[int, ...]
    kind: str
    layer: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class GgufPlan:
    """A GGUF file before its weights are there; made by :func:`plan_gguf`.

    Attributes:
        architecture: as llama.cpp has it.
        metadata: what the file says of the model, but for the tokenizer.
        vocabulary: the tokenizer's; None where the file has none.
        special: its special tokens and chat template, as the package gguf reads them.
        tensors: of the file, in its order.
        warnings: what llama.cpp computes otherwise than the model.
        exact: as given.
    """

    architecture: str
    metadata: Metadata
    vocabulary: Vocabulary | None
    special: Any
    tensors: tuple[_Tensor, ...]
    warnings: tuple[str, ...]
    exact: bool


def plan_gguf(
    config: Mapping[str, Any],
    parameters: Mapping[str, Sequence[int]],
    layers: Mapping[str, LayerGrid],
    *,
    folder: str | os.PathLike[str] | None = None,
    name: str | None = None,
    other: OtherType = "F16",
    exact: bool = False,
    pre: str | None = None,
) -> GgufPlan:
    """What the GGUF file of a model will have; everything is checked that can be without its weights.

    Args:
        config: the model's config.json.
        parameters: the name and shape of every parameter, of quantized layers ``<layer>.weight`` among them, as the
            model's own checkpoint has them.
        layers: the quantized layers.
        folder: with the tokenizer's files (and modules.json of sentence-transformers); None writes no tokenizer.
        name: of the model; None is the folder's name.
        other: the type of the other matrices; vectors are always float32.
        exact: as of :class:`miniquant.formats.Gguf`.
        pre: llama.cpp's name for how the tokenizer splits texts, where it is not known here.

    Raises:
        ValueError: for a layer that GGUF does not hold, a model or tokenizer that is not written, and what does not fit
            together.
        ImportError: without the package gguf.
    """
    package = gguf_package()
    if other not in get_args(OtherType):
        raise ValueError(f"{NAME}: expected other to be one of {', '.join(get_args(OtherType))}, but got {other!r}")
    model = ModelConfig(config)
    architecture = architecture_of(model)
    keys = {f"{architecture.name}.{key}": value for key, value in architecture.metadata(model).items()}
    if blocks_of(model) > len(parameters):  # before a map is made of so many
        raise ValueError(
            f"{NAME}: expected parameters of {blocks_of(model)} blocks, as config.json has it, but got "
            f"{len(parameters)} parameters"
        )
    number = next(key for key, value in package.MODEL_ARCH_NAMES.items() if value == architecture.name)
    known = package.get_tensor_name_map(number, blocks_of(model))
    places = placements(architecture, model, parameters, known.get_name)
    form, warnings = Gguf(exact=exact), architecture.cautions(model)
    unknown = [layer for layer in layers if f"{layer}.weight" not in parameters]
    if unknown:
        raise ValueError(f"{NAME}: expected layers to be among the parameters, but got {unknown[0]!r}")
    tensors = []
    for parameter, placement in places.items():
        layer = parameter.removesuffix(".weight")
        shape = tuple(parameters[parameter])
        shape = shape[::-1] if placement.transposed else shape
        if layer in layers and parameter.endswith(".weight"):
            grid = layers[layer]
            warnings += form.check(layer, grid)
            if shape != (grid.rows, grid.columns):
                raise ValueError(
                    f"{NAME}: expected layer {layer!r} to have the shape of its parameter, {list(shape)}, but got "
                    f"{[grid.rows, grid.columns]}"
                )
            kind = form.type_of(layer, grid).name
        else:
            layer, kind = "", _other_kind(placement.name, shape, other)
        if placement.heads and shape[0] % (2 * placement.heads):
            raise ValueError(
                f"{NAME}: expected rows of {parameter!r} to be a multiple of twice the heads, {2 * placement.heads}, "
                f"but got {shape[0]}"
            )
        tensors.append(_Tensor(parameter, placement, shape, kind, layer))
    _check_shapes(architecture.name, keys, {tensor.placement.name: tensor.shape for tensor in tensors})
    for further, values in architecture.further(model).items():
        tensors.append(_Tensor("", Placement(f"{further}.weight"), (len(values),), "F32", values=tuple(values)))
    rows = next(tensor.shape[0] for tensor in tensors if tensor.placement.name == "token_embd.weight")
    if rows != model.integer("vocab_size"):
        raise ValueError(
            f"{NAME}: expected vocab_size of config.json to be {rows}, the rows of the embedding, but got "
            f"{model.integer('vocab_size')}"
        )
    vocabulary = special = None
    label = name or ""
    if folder is not None:
        where = Path(folder)
        label = label or where.resolve().name
        vocabulary = read_vocabulary(where, rows, pre)
        special = _special_tokens(package, where, vocabulary)
        if architecture.name == "bert":
            keys |= _pooling(package, where)
            types = next(tensor.shape[0] for tensor in tensors if tensor.placement.name == "token_types.weight")
            keys["tokenizer.ggml.token_type_count"] = types
    metadata = _general(package, tensors, label, other) | keys
    return GgufPlan(architecture.name, metadata, vocabulary, special, tuple(tensors), tuple(warnings), exact)


def write_gguf(
    path: str | os.PathLike[str],
    plan: GgufPlan,
    load_parameter: Callable[[str], Tensor],
    load_layer: Callable[[str], QuantizedWeight],
) -> None:
    """Writes a GGUF file, which appears whole or not at all; one tensor is in memory at a time.

    Args:
        path: of the file; one that exists is replaced.
        plan: of :func:`plan_gguf`.
        load_parameter: gives a parameter that is not quantized, by its name.
        load_layer: gives a quantized layer, [N, K] whatever its module keeps, by its name.

    Raises:
        ValueError, TypeError: where a weight is not what was planned.
        OSError: where the file cannot be written.
    """
    package = gguf_package()
    with replacing(Path(path)) as new:
        writer = package.GGUFWriter(new, plan.architecture)
        try:
            for key, value in plan.metadata.items():
                _add(writer, key, value)
            if plan.vocabulary is not None:
                _add_vocabulary(writer, plan.vocabulary, plan.special)
            for tensor in plan.tensors:
                _add_info(package, writer, tensor)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in plan.tensors:
                if tensor.layer:
                    writer.write_tensor_data(_layer(plan, tensor, load_layer))
                else:
                    writer.write_tensor_data(_converted(package, tensor, _parameter(tensor, load_parameter)))
        finally:
            writer.close()


def _check_shapes(architecture: str, keys: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises where the metadata, from config.json, and the parameters disagree: llama.cpp would not load the file."""
    width, heads = keys[f"{architecture}.embedding_length"], keys[f"{architecture}.attention.head_count"]
    own = keys.get(f"{architecture}.attention.key_length", width // heads)
    kv = keys.get(f"{architecture}.attention.head_count_kv", heads) * own
    hidden = keys[f"{architecture}.feed_forward_length"]
    expected = {
        "attn_q": (heads * own, width),
        "attn_k": (kv, width),
        "attn_v": (kv, width),
        "attn_qkv": (heads * own + 2 * kv, width),
        "attn_output": (width, heads * own),
        "ffn_gate": (hidden, width),
        "ffn_up": (2 * hidden if architecture == "phi3" else hidden, width),  # Phi-3's has the gate, too
        "ffn_down": (width, hidden),
    }
    for name, shape in shapes.items():
        part = name.split(".")[-2]
        wanted = expected.get(part) if name.endswith(".weight") else None
        if part == "token_embd":
            wanted = (shape[0], width)
        if wanted is not None and shape != wanted:
            raise ValueError(
                f"{NAME}: expected the parameter of tensor {name!r} to have shape {list(wanted)}, as config.json "
                f"has it, but got {list(shape)}"
            )


def _other_kind(name: str, shape: tuple[int, ...], other: OtherType) -> str:
    """The type of a tensor that is not quantized here."""
    if len(shape) not in (1, 2):
        raise ValueError(
            f"{NAME}: expected parameters to have one or two dimensions, but got {list(shape)} for {name!r}"
        )
    if len(shape) == 1 or name in _ALWAYS_F32:
        return "F32"
    return "F16" if other == "Q8_0" and shape[1] % COLUMNS else other


def _general(package: Any, tensors: Sequence[_Tensor], name: str, other: OtherType) -> Metadata:
    """What the file says of itself."""
    kinds = [tensor.kind for tensor in tensors if tensor.layer] or [other]
    common = max(dict.fromkeys(kinds), key=kinds.count)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return {
        "general.type": "model",
        **({"general.name": name} if name else {}),
        "general.size_label": package.utility.size_label(weights, weights, 0, 0),
        "general.quantized_by": f"miniquant {torch.ops.miniquant.version()}",
        "general.file_type": int(package.LlamaFileType[_FILE_TYPES[common]]),
        "general.quantization_version": int(package.GGML_QUANT_VERSION),
    }


def _pooling(package: Any, folder: Path) -> Metadata:
    """How a sentence-transformers folder makes one vector of those of the tokens."""
    modules = folder / "modules.json"
    if not modules.is_file():
        return {}
    for module in read_list(modules):
        if not isinstance(module, dict) or not str(module.get("type")).endswith(".Pooling"):
            continue
        path = (folder / str(module.get("path"))).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ValueError(
                f"{NAME}: expected paths of {modules} to stay in its folder, but got {module.get('path')!r}"
            )
        options = read_json(path / "config.json")
        chosen = [kind for key, kind in _POOLING.items() if options.get(f"pooling_mode_{key}") is True]
        if len(chosen) != 1:
            raise ValueError(
                f"{NAME}: expected one pooling mode of {path / 'config.json'} to be true, of mean_tokens, cls_token "
                f"and lasttoken, but got {len(chosen)}"
            )
        return {"bert.pooling_type": int(package.PoolingType[chosen[0]])}
    return {}


def _special_tokens(package: Any, folder: Path, vocabulary: Vocabulary) -> Any:
    """The special tokens, merges and chat template of a folder, as the package gguf reads them."""
    for file in ("tokenizer_config.json", "config.json"):
        if (folder / file).is_file():
            read_json(folder / file)
    try:
        special = package.SpecialVocab(
            folder,
            load_merges=vocabulary.merges,
            special_token_types=("bos", "eos", "unk", "sep", "pad", "mask"),  # of BERT's the first is bos, too
            n_vocab=len(vocabulary.tokens),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{NAME}: expected tokenizer.json and tokenizer_config.json of {folder} to be those of a tokenizer, "
            f"but got: {error!r}"
        ) from error
    if vocabulary.model != "bert":  # what is not said llama.cpp takes from the kind of tokenizer
        special.add_special_token.setdefault("bos", False)
        special.add_special_token.setdefault("eos", False)
    return special


def _add(writer: Any, key: str, value: object) -> None:
    """One entry of the metadata, by its Python type."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary, special: Any) -> None:
    """The tokenizer."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.model != "bert":
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    special.add_to_gguf(writer, quiet=True)


def _add_info(package: Any, writer: Any, tensor: _Tensor) -> None:
    """A tensor's name, shape and type."""
    kind = package.GGMLQuantizationType[tensor.kind]
    values = math.prod(tensor.shape)
    if tensor.kind in ("F32", "F16"):
        dtype = np.dtype(np.float32 if tensor.kind == "F32" else np.float16)
        writer.add_tensor_info(tensor.placement.name, tensor.shape, dtype, values * dtype.itemsize)
        return
    shape = package.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.placement.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)


def _pairs_of_halves(rows: int, heads: int) -> Tensor:
    """Where rows come from when each head's two halves become pairs, the rows 0 and d / 2 of a head first."""
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _layer(plan: GgufPlan, tensor: _Tensor, load_layer: Callable[[str], QuantizedWeight]) -> "np.ndarray[Any, Any]":
    """The blocks of a quantized layer."""
    quantized = load_layer(tensor.layer)
    form = Gguf(exact=plan.exact)
    grid = checked_grid(NAME, tensor.layer, quantized)
    kind = form.type_of(tensor.layer, grid)
    if ((grid.rows, grid.columns), kind.name) != (tensor.shape, tensor.kind):
        raise ValueError(
            f"{NAME}: expected layer {tensor.layer!r} to be {tensor.kind} of shape {list(tensor.shape)} as planned, "
            f"but got {kind.name} of shape {[grid.rows, grid.columns]}"
        )
    if tensor.placement.heads:
        order = _pairs_of_halves(grid.rows, tensor.placement.heads)
        quantized = quantized.map(lambda of_rows: of_rows[order])
    blocks, _ = form.blocks(tensor.layer, quantized)
    return blocks.numpy()


def _parameter(tensor: _Tensor, load_parameter: Callable[[str], Tensor]) -> Tensor:
    """The values of a tensor that is not quantized here, float32."""
    if not tensor.parameter:
        return torch.tensor(tensor.values, dtype=torch.float32)
    name, place = tensor.parameter, tensor.placement
    values = load_parameter(name).detach()
    shape = tensor.shape[::-1] if place.transposed else tensor.shape
    if tuple(values.shape) != shape or not values.is_floating_point():
        raise ValueError(
            f"{NAME}: expected parameter {name!r} to have shape {list(shape)} as planned and a floating dtype, but got "
            f"{dtype_names(values.dtype)} of shape {list(values.shape)}"
        )
    values = values.float()
    if place.transposed:
        values = values.t()
    if place.heads:
        values = values[_pairs_of_halves(values.shape[0], place.heads)]
    return (values + 1 if place.plus_one else values).contiguous()


def _converted(package: Any, tensor: _Tensor, values: Tensor) -> "np.ndarray[Any, Any]":
    """Values in the type of a tensor that is not quantized here."""
    if tensor.kind == "F32":
        return values.numpy()
    if tensor.kind in ("F16", "Q8_0"):
        limit = torch.finfo(torch.float16).max * (127 if tensor.kind == "Q8_0" else 1)
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not largest <= limit:
            raise ValueError(
                f"{NAME}: expected values of {tensor.parameter!r} to be at most {limit:g} for {tensor.kind}, but got "
                f"{largest:g} (choose other='F32' or 'BF16')"
            )
    if tensor.kind == "F16":
        return values.half().numpy()
    quantized: np.ndarray[Any, Any] = package.quantize(values.numpy(), package.GGMLQuantizationType[tensor.kind])
    return quantized

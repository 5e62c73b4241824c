"""A quantized model from one format to another: every weight keeps its value, or it is refused."""

import os
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from miniquant.checkpoint import CONFIG, MAX_SHARD_BYTES, Checkpoint, CheckpointWriter
from miniquant.float_models import gguf_of
from miniquant.formats import (
    FORMATS,
    Gguf,
    LayerFormat,
    LayerGrid,
    Native,
    format_named,
    format_of,
    layer_format,
    with_scale_dtype,
)
from miniquant.formats.gguf_file import GGUF_FILE, GgufPlan, OtherType, plan_gguf, write_gguf
from miniquant.formats.gguf_models import ModelConfig, architecture_of
from miniquant.grid import QuantizedWeight
from miniquant.layer_file import SCALE_DTYPES, dtype_names
from miniquant.loading import own_tensors
from miniquant.output import (
    LINEAR,
    LINEAR_ONLY,
    Contents,
    check_apart,
    check_layers,
    check_output,
    condensed,
    write_folder,
)
from miniquant.recipe import FormatName
from miniquant.report import HTML_NAME, JSON_NAME, read_report
from miniquant.report_page import write_report


@dataclass(frozen=True)
class Converted:
    """A model that was taken from one format to another.

    Attributes:
        folder: that was written.
        before: the format of the source.
        after: the format of the output.
        layers: how many.
        bytes_before: of the source's tensors.
        bytes_after: of those that were written.
        notes: what readers of the format will not do.
    """

    folder: Path
    before: str
    after: str
    layers: int
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]


def convert_folder(
    source_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    format: FormatName,  # noqa: A002  (as of quantize_folder)
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    pre: str | None = None,
    code: bool = False,
) -> Converted:
    """Takes a quantized model from one format to another; every weight keeps its value, or it is refused.

    What only our own format has (the loss of each row, options, ``full_range``) is lost on the way to another. The
    report of the run that quantized the model is taken along, with the new format and size. In a GGUF file other
    matrices keep their dtype, and asymmetric layers of 4 and 5 bits take a wider type that holds them exactly. A GGUF
    file is no source: it has no folder's tokenizer and configuration.

    Args:
        source_dir: a folder in one of the formats, that is not a GGUF file's.
        output_dir: path of the folder to write, that does not exist or is empty. A GGUF file is ``model.gguf`` in it.
        format: of the output.
        overwrite: whether a model's folder that is there is replaced.
        max_shard_bytes: of a file of weights.
        pre: of a GGUF file: llama.cpp's name for how the tokenizer splits texts, where it is not known here.
        code: whether Python files of the source are copied.

    Raises:
        ValueError: where the source is damaged or not quantized, and where the format cannot hold a layer as it is; the
            message names it. Nothing is left of the output then.
        FileExistsError: where the output is there.
        OSError: where a file cannot be read or written.
        ImportError: without the package gguf, where it is needed.
    """
    form, source, output = layer_format(format), Path(source_dir), Path(output_dir)
    if source.is_file() or (source.is_dir() and gguf_of(source) is not None):
        raise ValueError(
            f"convert_folder: expected a folder in one of the formats {', '.join(FORMATS)}, but got {source} "
            "(a GGUF file is not converted back: quantize to the format miniquant first, and convert that)"
        )
    checkpoint = Checkpoint(source)
    check_apart("convert_folder", source, output)
    check_output(output, form, overwrite=overwrite)
    config = checkpoint.config.get("quantization_config")
    if config is None:
        raise ValueError(
            f"convert_folder: {source / CONFIG}: expected quantization_config, but got none (quantize_folder makes a "
            "quantized model of a float one)"
        )
    before = format_of(config)
    found = before.layers(config, checkpoint.values(before.value_suffixes))
    if isinstance(before, Native):
        _check_kinds(before, config, form)
    own = own_tensors(checkpoint.tensors, found)
    of_layers = frozenset(tensor for tensors in own.values() for tensor in tensors)
    model_dtype = _model_dtype(checkpoint, of_layers)
    grids = {
        name: grid if form.name == "miniquant" else replace(grid, scale_dtype=form.scale_dtype(model_dtype))
        for name, grid in found.items()
    }
    form = Gguf(exact=True) if isinstance(form, Gguf) else form
    notes = check_layers(form, grids)

    def read_layer(name: str) -> QuantizedWeight:
        tensors = {tensor: checkpoint.read(tensor) for tensor in own[name]}
        return with_scale_dtype(name, before.read(name, tensors, found[name]), grids[name].scale_dtype)

    if isinstance(form, Gguf):
        planned = _planned_gguf(checkpoint, grids, of_layers, pre)
        notes = condensed(planned.warnings, grids)
        output.mkdir(parents=True, exist_ok=True)
        write_gguf(output / GGUF_FILE, planned, checkpoint.read, read_layer)
        size = (output / GGUF_FILE).stat().st_size
    else:
        target = format_named(form.name)
        # The other formats hold nothing but Linears.
        options = before.options(config) if isinstance(before, Native) else {name: {"module": LINEAR} for name in grids}
        contents = Contents(
            checkpoint,
            grids,
            {tensors[0]: [name] for name, tensors in own.items()},
            of_layers,
            _ignored(checkpoint, config, of_layers, grids),
            options=options if target.name == "miniquant" else {},
        )
        with CheckpointWriter(output, max_shard_bytes=max_shard_bytes, overwrite=overwrite) as writer:
            write_folder(writer, target, contents, read_layer, checkpoint.read, code=code)
            size = writer.tensor_bytes
    notes += _carry_report(source, output, form.name, size)
    return Converted(output, before.name, form.name, len(grids), checkpoint.nbytes, size, tuple(notes))


def _carry_report(source: Path, output: Path, form: str, size: int) -> list[str]:
    """Puts the source's report, if any, in place of the output's; a note where it is none."""
    for name in (JSON_NAME, HTML_NAME):  # of the GGUF file that was there
        (output / name).unlink(missing_ok=True)
    if not (source / JSON_NAME).is_file():
        return []
    try:
        report = read_report(source)
    except ValueError as error:
        return [f"the report is not taken along: {error}"]
    write_report(output, {**report, "model": output.name, "format": form, "bytes": {**report["bytes"], "after": size}})
    return []


def _check_kinds(form: Native, config: Mapping[str, Any], target: LayerFormat) -> None:
    """Refuses layers that are no Linear, where the target has no place for them."""
    if target.name not in LINEAR_ONLY:
        return
    for name, options in form.options(config).items():
        kind = options.get("module")
        if kind != LINEAR:
            said = "does not say what its module is" if kind is None else f"is a {kind}"
            raise ValueError(
                f"convert_folder: expected layers that the format {target.name} can hold, which are torch.nn.Linear, "
                f"but got {name!r}, which {said} (quantize the float model again, for that format)"
            )


def _model_dtype(checkpoint: Checkpoint, own: Container[str]) -> torch.dtype:
    """The dtype of a quantized model: what its config says, or else most of its float tensors have."""
    named = {dtype_names(dtype): dtype for dtype in SCALE_DTYPES}
    said = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if said in named:
        return named[said]
    others = [tensor for tensor in checkpoint.tensors.values() if tensor.dtype in SCALE_DTYPES]
    counts = Counter(tensor.dtype for tensor in others if tensor.name not in own)
    counts = counts or Counter(tensor.dtype for tensor in others)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _ignored(
    checkpoint: Checkpoint, config: Mapping[str, Any], own: Container[str], layers: Container[str]
) -> list[str]:
    """Linears that are not quantized: what the source says, or where it has patterns only, every other matrix."""
    said = config.get("ignored", config.get("ignore"))
    if isinstance(said, list) and all(isinstance(name, str) and not name.startswith("re:") for name in said):
        return list(said)
    matrices = [
        name.removesuffix(".weight")
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(".weight") and len(tensor.shape) == 2 and name not in own
    ]
    return [name for name in dict.fromkeys((*matrices, "lm_head")) if name not in layers]


def _planned_gguf(
    checkpoint: Checkpoint, grids: Mapping[str, LayerGrid], own: Container[str], pre: str | None
) -> GgufPlan:
    """The GGUF file of a quantized folder, in which nothing is rounded."""
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    transposed = architecture_of(ModelConfig(config)).transposed
    shapes: dict[str, tuple[int, ...]] = {
        name: tensor.shape for name, tensor in checkpoint.tensors.items() if name not in own
    }
    for name, grid in grids.items():
        shape = (grid.rows, grid.columns)
        shapes[f"{name}.weight"] = shape[::-1] if transposed and name.endswith(transposed) else shape
    matrices = {
        checkpoint.tensors[name].dtype
        for name, shape in shapes.items()
        if name in checkpoint.tensors and len(shape) > 1
    }
    others: dict[torch.dtype, OtherType] = {torch.float16: "F16", torch.bfloat16: "BF16"}
    other = others.get(matrices.pop(), "F32") if len(matrices) == 1 else "F32"
    return plan_gguf(config, shapes, grids, folder=checkpoint.folder, other=other, exact=True, pre=pre)

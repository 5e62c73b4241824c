"""Quantized folders of small models, and the float models that they stand for, which transformers loads itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import miniquant
from miniquant.architecture import build_model, find_sources
from miniquant.checkpoint import CONFIG, Checkpoint, CheckpointWriter
from miniquant.formats import LayerGrid, format_named, format_of
from miniquant.modules import ConvolutionSite, ExpertSite, LinearSite, TransposedSite, find_sites

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

OPTIONS: Mapping[str, Any] = {"bits": 4, "group_size": 16}


@dataclass(frozen=True)
class Quantized:
    """A folder, and a model with the same values.

    Attributes:
        folder: that is quantized.
        float_folder: with the values of the codes.
        layers: by name in the folder.
        kind: the class of the model.
    """

    folder: Path
    float_folder: Path
    layers: Mapping[str, miniquant.QuantizedWeight]
    kind: str

    def reference(self, dtype: torch.dtype = torch.float32) -> Any:
        """The float model."""
        model = getattr(transformers, self.kind).from_pretrained(self.float_folder, dtype=dtype)
        return model.eval()


def quantized_folder(
    model: Any,
    path: Path,
    form: str = "miniquant",
    options: Callable[[str], Mapping[str, Any] | None] = lambda _: OPTIONS,
    max_shard_bytes: int = 1 << 30,
) -> Quantized:
    """Rounds the stored tensors of a model's matrices to nearest, and writes both folders.

    Args:
        model: of transformers.
        path: of a folder to write to.
        form: of the quantized folder.
        options: by the name of a layer in the folder; None leaves it as it is.
        max_shard_bytes: of a file.
    """
    model.save_pretrained(path / "before")
    checkpoint = Checkpoint(path / "before")
    meta = build_model(checkpoint)
    conversions = find_sources(meta, checkpoint).conversions
    fmt = format_named(form)
    scale_dtype = fmt.scale_dtype(next(model.parameters()).dtype)
    layers: dict[str, miniquant.QuantizedWeight] = {}
    values = {name: checkpoint.read(name) for name in checkpoint.tensors}
    replaced: dict[str, list[str]] = {}
    for site in find_sites(meta).sites:
        for source in conversions[site.parameter_name].sources if site.parameter_name in conversions else ():
            name = source.removesuffix(".weight")
            fused = isinstance(site, ExpertSite) and len(values[source].shape) == 3
            name = f"{name}.{site.expert}" if fused and isinstance(site, ExpertSite) else name
            chosen = options(name)
            if name in layers or chosen is None:
                continue
            if form != "miniquant" and (not isinstance(site, (LinearSite, ExpertSite)) or fused):
                continue
            tensor = values[source][site.expert] if fused and isinstance(site, ExpertSite) else values[source]
            turned = isinstance(site, TransposedSite) or (fused and isinstance(site, ExpertSite) and site.transposed)
            matrix = tensor.T if turned else tensor.flatten(1) if isinstance(site, ConvolutionSite) else tensor
            layers[name] = miniquant.rtn(matrix, scale_dtype=scale_dtype, **chosen)
            rounded = miniquant.dequantize(layers[name], dtype=tensor.dtype)
            tensor.copy_(rounded.T if turned else rounded.reshape(tensor.shape))
            replaced.setdefault(source, []).append(name)
    grids = {name: LayerGrid.of(layer) for name, layer in layers.items()}
    linears = [name for name, module in meta.named_modules() if isinstance(module, torch.nn.Linear)]
    ignored = [name for name in linears if name not in grids]
    config = {**checkpoint.config, "quantization_config": fmt.config(grids, ignored)}
    stored: dict[str, Tensor] = {}
    for name, tensor in values.items():
        own = replaced.get(name, [])
        fused = own[:1] not in ([], [name.removesuffix(".weight")])
        for layer in own:
            stored |= fmt.tensors(layer, layers[layer])
        if len(own) < (len(tensor) if fused else 1):
            stored[name] = tensor
    _write(path / "quantized", checkpoint, config, stored, max_shard_bytes)
    _write(path / "float", checkpoint, checkpoint.config, values, max_shard_bytes)
    return Quantized(path / "quantized", path / "float", layers, type(model).__name__)


def _write(
    folder: Path, before: Checkpoint, config: Mapping[str, Any], tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> None:
    with CheckpointWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        writer.write_json(CONFIG, config)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        for file in before.other_files():
            writer.copy(file, before.folder)


def stored_layers(folder: Path) -> dict[str, miniquant.QuantizedWeight]:
    """The layers of a folder, by its own format."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config["quantization_config"]
    form = format_of(config)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return {name: form.read(name, tensors, grid) for name, grid in form.layers(config, tensors).items()}


def edited(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Changes the config and the tensors of a folder with one file of weights."""
    checkpoint = Checkpoint(folder)
    config = json.loads(json.dumps(checkpoint.config))
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

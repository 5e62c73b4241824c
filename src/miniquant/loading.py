"""Models back from folders: ready to run, with quantized layers as codes; and what a folder or file holds.

A quantized folder stands for a float one: each quantized layer for a tensor ``<layer>.weight``, or one expert's part of
one. transformers' rules say what parameters of the model become of these names (:mod:`miniquant.architecture`).

    Linear, transformers' Conv1D              QuantizedLinear
    a convolution                             QuantizedConvolution: dequantized at every call
    fused experts, stored fused or apart      QuantizedExperts: one at a time, in the model's own loop

Memory: while a model is loaded, beside what it has in the end, the stored tensors of one layer (of one expert's, where
several become one) and at most 6 bytes for each of its weights, and up to 40 MB that the allocator keeps for a while.
"""

import itertools
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from miniquant.architecture import Conversion, build_model, find_sources, grouped, transformers_package
from miniquant.checkpoint import CONFIG, Checkpoint, StoredTensor, read_json, read_tensor
from miniquant.float_models import gguf_of
from miniquant.formats import Format, LayerGrid, Native, format_of
from miniquant.formats.gguf_blocks import COLUMNS, TYPES
from miniquant.formats.gguf_reader import GgufTensor, read_gguf
from miniquant.grid import QuantizedWeight, dequantize
from miniquant.layer_file import dtype_names
from miniquant.lazy import give_back_memory
from miniquant.linear import QuantizedConvolution, QuantizedExperts, QuantizedLinear
from miniquant.modules import ConvolutionSite, ExpertSite, Site, TransposedSite, find_sites
from miniquant.report import JSON_NAME
from miniquant.superblocks import GRIDS

GENERATION_CONFIG = "generation_config.json"
_WEIGHT = ".weight"
_SHOWN = 3  # names that a message lists
_GIVEN_BACK_AFTER = 1 << 23  # bytes of float weights

logger = logging.getLogger(__name__)


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """The model of a folder, in evaluation mode; quantized layers stay codes.

    Args:
        folder: in one of the formats "compressed-tensors", "gptq", "gptq_v2" or "miniquant"; a model that is not
            quantized is loaded as it is.
        dtype: in which the model computes; None: what config.json says. In bfloat16 few tokens at a time are fast on a
            CPU (:mod:`miniquant.linear`).
        device: where the model goes.
        trust_remote_code: whether code of the folder may run, which some architectures are defined by.

    Returns:
        A model of transformers, of the class that config.json names, with its generation config. Its parameters ask
        for no gradients. What ``save_pretrained`` writes is a folder in the format "miniquant".

    Raises:
        FileNotFoundError, NotADirectoryError: where the folder or a file is missing.
        ValueError: for a damaged folder, and for one whose layers do not fit the model; the message names file and
            layer. No code of the folder ran, and no pickle was read.
        OSError: where a file cannot be read.
        ImportError: without transformers.

    Example:
        >>> model = load("SmolLM2-135M-4bit", dtype=torch.bfloat16)
        >>> model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8)
    """
    path = Path(folder)
    if path.is_file():
        raise NotADirectoryError(
            f"load: expected a model's folder, but got the file {path} (a GGUF file is loaded by llama.cpp, or by "
            "transformers with gguf_file=)"
        )
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"load: expected dtype to be a floating-point one or None, but got {dtype!r}")
    checkpoint = QuantizedCheckpoint(path)
    with torch.no_grad():
        model: Any = build_model(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
        checkpoint.find_places(model)
        _Loader(model, checkpoint).run()
    _set_generation_config(model, path)
    if checkpoint.grids:
        # The state dict has what our own format stores, whatever the folder had.
        model.config.quantization_config = _config_of(model)
        model._weight_conversions = []  # noqa: SLF001  (transformers would take fused experts apart on saving)
    return model.eval().to(device)


class QuantizedCheckpoint(Checkpoint):
    """A quantized folder as the float one that it stands for: in the place of a layer's tensors there is its weight.

    Args:
        folder: path of the folder.

    Attributes:
        format: of the folder; None where it is not quantized.
        grids: of the quantized layers, by name.
        layers: by name of a tensor that stands for quantized layers, their names; more than one, by the expert's
            number, of experts that are stored fused.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self.layers: dict[str, dict[int, str]] = {}
        self.format, self.grids = quantized_layers(self)
        self._transposed: set[str] = set()
        self._stored_tensors = self.tensors
        self._own = own_tensors(self.tensors, self.grids)
        taken = {tensor for tensors in self._own.values() for tensor in tensors}
        for name in self.grids:
            if f"{name}{_WEIGHT}" in taken:
                raise ValueError(
                    f"load: {self.folder}: expected one weight of layer {name!r}, but got a tensor '{name}{_WEIGHT}' "
                    "beside the quantized one"
                )
        self.tensors = MappingProxyType({name: one for name, one in self.tensors.items() if name not in taken})

    def find_places(self, model: nn.Module) -> None:
        """Puts a tensor in the place of each layer (or of all that are one parameter), of the shape that it has there.

        Raises:
            ValueError: for a layer that the model has no place for, or that has another size there.
        """
        if not self.grids:
            return
        places: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
        sites = sites_by_parameter(model)
        candidates = {candidate for name in self.grids for candidate in _candidates(name)}
        groups = {
            source: group
            for group in grouped(model, candidates, places)
            if group.target in places
            for source in group.sources
        }
        stand_ins: dict[str, StoredTensor] = {}
        for name, grid in self.grids.items():
            source = next((one for one in _candidates(name) if one in groups), None)
            if source is None:
                raise ValueError(
                    f"load: {self.folder}: expected {type(model).__name__} to have a place for layer {name!r}, but it "
                    f"has none (is {CONFIG} that of another model?)"
                )
            expert = 0 if source.endswith(_WEIGHT) else int(name.rpartition(".")[2])
            shape: tuple[int, ...] = (grid.rows, grid.columns)
            if groups[source].converter is None:
                target = groups[source].target
                shape = tuple(places[target].shape)
                of_target = sites.get(target, [])
                self._check_size(name, grid, expert, of_target, shape)
                if of_target and _is_transposed(of_target[0]):
                    self._transposed.add(source)
            self.layers.setdefault(source, {})[expert] = name
            file = self._stored_tensors[self._own[name][0]].file
            stand_ins[source] = StoredTensor(source, file, places[groups[source].target].dtype, shape, 0, 0)
        for source, own in self.layers.items():
            count = stand_ins[source].shape[0]
            if not source.endswith(_WEIGHT) and len(own) < count and source not in self.tensors:
                missing = next(expert for expert in range(count) if expert not in own)
                raise ValueError(
                    f"load: {self.folder}: expected all {count} experts of {source!r}, but got none with number "
                    f"{missing}"
                )
        self.tensors = MappingProxyType({**self.tensors, **stand_ins})

    def quantized(self, layer: str) -> QuantizedWeight:
        """A layer of the files, by its name there.

        Raises:
            ValueError: where its tensors are damaged.
        """
        assert self.format is not None  # noqa: S101  (there are layers)
        tensors = {name: read_tensor(self._stored_tensors[name]) for name in self._own[layer]}
        try:
            return self.format.read(layer, tensors, self.grids[layer])
        except ValueError as error:
            raise ValueError(f"load: {self.folder}: {error}") from None

    def read(self, name: str) -> Tensor:
        """A tensor, dequantized where it is a layer's."""
        if name not in self.layers:
            return super().read(name)
        own = self.layers[name]
        shape = self.tensors[name].shape
        if name.endswith(_WEIGHT):
            return self._values(own[0], name).reshape(shape)
        whole = read_tensor(self._stored_tensors[name]) if name in self._stored_tensors else None
        experts = [self._values(own[e], name) if e in own else whole[e] for e in range(shape[0])]  # type: ignore[index]
        return torch.stack([expert.to(experts[0].dtype) for expert in experts])

    def _values(self, layer: str, source: str) -> Tensor:
        values = dequantize(self.quantized(layer), dtype=self.tensors[source].dtype)
        return values.T if source in self._transposed else values

    def _check_size(
        self, name: str, grid: LayerGrid, expert: int, sites: Sequence[Site], shape: tuple[int, ...]
    ) -> None:
        """Whether a layer is as large as the matrix whose place it takes."""
        if sites and expert >= len(sites):
            raise ValueError(
                f"load: {self.folder}: expected layer {name!r} to be of one of {len(sites)} experts, but got number "
                f"{expert}"
            )
        size = (sites[0].rows, sites[0].columns) if sites else shape
        if size != (grid.rows, grid.columns):
            raise ValueError(
                f"load: {self.folder}: expected layer {name!r} to have shape {list(size)}, as {CONFIG} says, but got "
                f"shape {[grid.rows, grid.columns]}"
            )


def quantized_layers(checkpoint: Checkpoint) -> tuple[Format | None, dict[str, LayerGrid]]:
    """The format of a folder and its quantized layers; None and no layers where it is not quantized.

    Raises:
        ValueError: for a damaged folder, or one in a format that is not known here.
    """
    config = checkpoint.config.get("quantization_config")
    if config is None:
        return None, {}
    try:
        form = format_of(config)
        grids = form.layers(config, checkpoint.values(form.value_suffixes))
    except ValueError as error:
        raise ValueError(f"load: {checkpoint.folder}: {error}") from None
    if not grids:
        raise ValueError(
            f"load: {checkpoint.folder}: expected quantized layers, as quantization_config of {CONFIG} says, but got "
            "none"
        )
    return form, grids


def own_tensors(tensors: Iterable[str], layers: Iterable[str]) -> dict[str, list[str]]:
    """The names of the tensors that each layer has in the files; a bias is none of them."""
    own: dict[str, list[str]] = {name: [] for name in layers}
    for tensor in tensors:
        owner, _, part = tensor.rpartition(".")
        if owner in own and part != "bias":
            own[owner].append(tensor)
    return own


def sites_by_parameter(model: nn.Module) -> dict[str, list[Site]]:
    """All matrices that can be quantized, by name of the parameter that has them; experts by number."""
    sites: dict[str, list[Site]] = {}
    for site in find_sites(model, output_embeddings=True).sites:
        sites.setdefault(site.parameter_name, []).append(site)
    return sites


def _candidates(layer: str) -> tuple[str, ...]:
    """Tensors whose place a layer may take: its weight, or if it has a number, that of all experts."""
    stem, _, number = layer.rpartition(".")
    return (f"{layer}{_WEIGHT}", *((stem,) if stem and number.isdecimal() else ()))


def _is_transposed(site: Site) -> bool:
    return isinstance(site, TransposedSite) or (isinstance(site, ExpertSite) and site.transposed)


class _Loader:
    """Gives a model without weights what the files have."""

    def __init__(self, model: nn.Module, checkpoint: QuantizedCheckpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        sources = find_sources(model, checkpoint)
        self._check_unused(sources.unused)
        self._conversions = dict.fromkeys(sources.conversions.values())
        self._sites = sites_by_parameter(model)
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        for prefix, module in model.named_modules():
            for attribute, parameter in module._parameters.items():  # noqa: SLF001
                if parameter is not None:
                    self._places.setdefault(id(parameter), []).append((module, attribute))
                    self._parameters[_joined(prefix, attribute)] = parameter

    def run(self) -> None:
        """Reads everything; biases and norms before the layers that take them over."""
        layers = self._checkpoint.layers
        with_layers = [one for one in self._conversions if any(source in layers for source in one.sources)]
        for conversion in self._conversions:
            if conversion not in with_layers:
                self._place(conversion.read())
        made = 0
        for conversion in with_layers:
            makers = self._makers(conversion)
            if makers is None:
                logger.warning(
                    "load: %s: what becomes %s is dequantized: its layers are of several grids, or not all quantized, "
                    "or are put together in a way that is not known here",
                    *(self._checkpoint.folder, ", ".join(conversion.targets)),
                )
                self._place(conversion.read())
            else:
                for target, make in makers.items():
                    self._replace(target, make)
                made += conversion.nbytes
                if made > _GIVEN_BACK_AFTER:
                    give_back_memory()
                    made = 0
        give_back_memory()
        left = [name for name, parameter in self._model.named_parameters() if parameter.is_meta]
        if left:
            raise ValueError(f"load: {self._checkpoint.folder}: expected a tensor for {left[0]!r}, but got none")

    def _check_unused(self, unused: Sequence[str]) -> None:
        for name in unused:
            if name in self._checkpoint.layers:
                raise ValueError(
                    f"load: {self._checkpoint.folder}: expected {type(self._model).__name__} to have a place for "
                    f"{name!r}, but it has none"
                )
        if unused:
            more = f" and {len(unused) - _SHOWN} more" if len(unused) > _SHOWN else ""
            logger.warning(
                "load: %s: %s has no place for %s%s",
                *(self._checkpoint.folder, type(self._model).__name__, ", ".join(unused[:_SHOWN]), more),
            )

    def _place(self, values: Mapping[str, Tensor]) -> None:
        """Sets parameters, with all that share them, and buffers."""
        for name, value in values.items():
            if name in self._parameters:
                parameter = nn.Parameter(value, requires_grad=False)
                for module, attribute in self._places[id(self._parameters[name])]:
                    module._parameters[attribute] = parameter  # noqa: SLF001
            else:
                path, _, attribute = name.rpartition(".")
                self._model.get_submodule(path)._buffers[attribute] = value  # noqa: SLF001

    # Quantized weights

    def _makers(self, conversion: Conversion) -> dict[str, list[Callable[[], QuantizedWeight]]] | None:
        """For each matrix of each parameter, what makes it of the files' layers; None where it stays no codes."""
        if any(target not in self._sites for target in conversion.targets):
            return None
        if conversion.plain:
            (source,) = conversion.sources
            own = self._checkpoint.layers[source]
            (target,) = conversion.targets
            if len(own) < len(self._sites[target]):
                return None
            return {target: [self._whole(own[expert]) for expert in range(len(own))]}
        if any(source not in self._checkpoint.layers for source in conversion.sources):
            return None
        return self._put_together(conversion)

    def _whole(self, layer: str) -> Callable[[], QuantizedWeight]:
        return lambda: self._checkpoint.quantized(layer)

    def _put_together(self, conversion: Conversion) -> dict[str, list[Callable[[], QuantizedWeight]]] | None:
        """Matrices whose rows are those of several layers, found out by sending numbers of rows the same way."""
        names = [self._checkpoint.layers[source][0] for source in conversion.sources]
        grids = [self._checkpoint.grids[name] for name in names]
        starts = [0]
        for grid in grids:
            starts.append(starts[-1] + grid.rows)
        rows = _converted(conversion, [torch.arange(first, end)[:, None] for first, end in itertools.pairwise(starts)])
        columns = _converted(conversion, [torch.arange(grid.columns).expand(2, -1) for grid in grids])
        if rows is None or columns is None:
            return None
        makers: dict[str, list[Callable[[], QuantizedWeight]]] = {}
        for target, numbers in rows.items():
            sites = self._sites[target]
            found, order = (
                (values.movedim(-2, -1) if _is_transposed(sites[0]) else values)
                for values in (numbers, columns[target])
            )
            site = sites[0]
            if found.shape[-2:] != (site.rows, 1) or found.numel() != len(sites) * site.rows:
                return None
            if order.shape[-1] != site.columns or not bool((order == torch.arange(site.columns)).all()):
                return None
            makers[target] = []
            for own in found.reshape(len(sites), site.rows):
                of_rows = torch.bucketize(own, torch.tensor(starts[1:]), right=True)
                used = of_rows.unique().tolist()
                if len({_kind(grids[index]) for index in used}) > 1:
                    return None
                makers[target].append(self._of_rows([names[i] for i in used], own, [starts[i] for i in used]))
        return makers

    def _of_rows(self, layers: Sequence[str], rows: Tensor, starts: Sequence[int]) -> Callable[[], QuantizedWeight]:
        """A weight of rows of some layers; `starts` says what numbers each layer's rows have."""

        def make() -> QuantizedWeight:
            parts = [self._checkpoint.quantized(layer) for layer in layers]
            numbers = torch.cat(
                [torch.arange(first, first + len(part.codes)) for first, part in zip(starts, parts, strict=True)]
            )
            index = torch.searchsorted(numbers, rows)
            codes, scales, zero_points = (torch.cat(tensors)[index] for tensors in zip(*parts, strict=True))
            kind = parts[0]
            return QuantizedWeight(
                codes, scales, zero_points, kind.bits, kind.group_size, kind.symmetric, kind.full_range
            )

        return make

    def _replace(self, target: str, makers: Sequence[Callable[[], QuantizedWeight]]) -> None:
        """Puts quantized weights in the place of a parameter."""
        site = self._sites[target][0]
        dtype = site.dtype
        if isinstance(site, ExpertSite):
            for module in site.modules:
                del module._parameters[site.attribute]  # noqa: SLF001
            experts = QuantizedExperts(
                (QuantizedLinear.from_quantized(make(), dtype=dtype) for make in makers), transposed=site.transposed
            )
            for module in site.modules:
                module.add_module(site.attribute, experts)
                config: Any = getattr(module, "config", None)
                if config is not None and "_experts_implementation_internal" in vars(config):
                    config._experts_implementation_internal = "eager"  # noqa: SLF001  (the property sets others, too)
            return
        quantized = makers[0]()
        first: QuantizedLinear | None = None
        for module in site.modules:
            bias = module._parameters.get("bias")  # noqa: SLF001
            new: nn.Module
            if isinstance(site, ConvolutionSite):
                new = QuantizedConvolution.in_place_of(module, quantized)
            elif first is None:
                new = first = QuantizedLinear.from_quantized(quantized, bias, dtype=dtype)
            else:
                new = first.twin(bias)
            new.eval()
            for parent in self._model.modules():
                for name, child in parent._modules.items():  # noqa: SLF001
                    if child is module:
                        parent._modules[name] = new  # noqa: SLF001


def _kind(grid: LayerGrid) -> tuple[Any, ...]:
    """What layers have to have in common to be rows of one."""
    return (grid.columns, grid.bits, grid.group_size, grid.symmetric, grid.full_range, grid.scale_dtype)


class _Given:
    """Has other values for the tensors of a checkpoint."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.read = values.__getitem__


def _converted(conversion: Conversion, values: Sequence[Tensor]) -> dict[str, Tensor] | None:
    """What becomes of integers where a conversion's tensors are; None where it does not take their shapes."""
    given: Any = _Given(dict(zip(conversion.sources, values, strict=True)))
    targets = dict.fromkeys(conversion.targets, torch.int64)
    try:
        return replace(conversion, checkpoint=given, targets=targets).read()
    except Exception:  # noqa: BLE001  (rules of transformers may ask for anything)
        return None


def _joined(prefix: str, attribute: str) -> str:
    return f"{prefix}.{attribute}" if prefix else attribute


def _set_generation_config(model: Any, folder: Path) -> None:
    """That of the folder, where there is one and the model generates."""
    file = folder / GENERATION_CONFIG
    can_generate = getattr(model, "can_generate", None)
    if not file.is_file() or can_generate is None or not can_generate():
        return
    read_json(file)
    try:
        model.generation_config = transformers_package().GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"load: {file}: expected a generation config, but got: {error}") from error


def _config_of(model: nn.Module) -> dict[str, Any]:
    """``quantization_config`` of what the model's state dict has."""
    grids = {
        name: LayerGrid(
            *(layer.out_features, layer.in_features, layer.bits, layer.group_size),
            *(layer.symmetric, layer.full_range, layer.scales.dtype),
        )
        for name, layer in model.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    return Native().config(grids, [name for name, module in model.named_modules() if isinstance(module, nn.Linear)])


# What a folder or file holds


@dataclass(frozen=True)
class LayerContents:
    """A quantized layer of a folder or file.

    Attributes:
        name: there.
        shape: of the weight, rows first.
        kind: a GGUF type, or "int4" and the like.
        bits: of a code; None where the type does not say.
        group_size: columns per scale, -1 is one group per row; None where the type has scales of scales.
        symmetric: which of the two grids; None where the type has another.
        scale_dtype: of the stored scales.
        nbytes: of all that is stored for it.
        loss, rtn_loss, held_out_loss, held_out_rtn_loss: of the report beside the model; None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    scale_dtype: str | None
    nbytes: int
    loss: float | None = None
    rtn_loss: float | None = None
    held_out_loss: float | None = None
    held_out_rtn_loss: float | None = None

    @property
    def weights(self) -> int:
        """How many there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorContents:
    """A tensor that is not quantized.

    Attributes:
        name: in the files.
        shape: of its values.
        dtype: of its values.
        nbytes: that are stored.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Contents:
    """What a folder or file holds.

    Attributes:
        path: of the folder or file.
        format: "compressed-tensors", "gptq", "gptq_v2", "miniquant" or "gguf"; None where it is not quantized.
        architecture: as the files name it.
        layers: that are quantized.
        others: tensors that are not.
        notes: on what could not be told.
    """

    path: Path
    format: str | None
    architecture: str | None
    layers: tuple[LayerContents, ...]
    others: tuple[TensorContents, ...]
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """How many weights the quantized layers have."""
        return sum(layer.weights for layer in self.layers)

    @property
    def layer_bytes(self) -> int:
        """Of quantized layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def other_bytes(self) -> int:
        """Of all else."""
        return sum(tensor.nbytes for tensor in self.others)

    @property
    def bits_per_weight(self) -> float | None:
        """Of quantized layers, scales and all."""
        return 8 * self.layer_bytes / self.weights if self.weights else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        return {
            "path": str(self.path),
            "format": self.format,
            "architecture": self.architecture,
            "weights": self.weights,
            "bits_per_weight": self.bits_per_weight,
            "layer_bytes": self.layer_bytes,
            "other_bytes": self.other_bytes,
            "notes": list(self.notes),
            "layers": [{**asdict(layer), "shape": list(layer.shape)} for layer in self.layers],
            "others": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.others],
        }


def contents_of(path: str | os.PathLike[str]) -> Contents:
    """What a model's folder, quantized or not, or a GGUF file holds; no weight is read.

    Args:
        path: of a folder with config.json and safetensors files, of a GGUF file, or of a folder with a ``model.gguf``.

    Raises:
        FileNotFoundError, NotADirectoryError: where there is no such file or folder.
        ValueError: for a damaged one, or one of another kind; the message names the file.
        OSError: where it cannot be read.
        ImportError: without the package gguf, for a GGUF file.
    """
    place = Path(path)
    place = gguf_of(place) or place
    if place.is_file():
        if place.suffix == ".safetensors":
            raise NotADirectoryError(
                f"contents_of: expected a model's folder or a GGUF file, but got {place} (give the folder it is in)"
            )
        return _contents_of_gguf(place)
    checkpoint = Checkpoint(place)
    form, grids = quantized_layers(checkpoint)
    own = own_tensors(checkpoint.tensors, grids)
    losses, notes = _losses(place)
    layers = tuple(
        LayerContents(
            name,
            (grid.rows, grid.columns),
            f"int{grid.bits}",
            grid.bits,
            grid.group_size,
            grid.symmetric,
            dtype_names(grid.scale_dtype),
            sum(checkpoint.tensors[tensor].nbytes for tensor in own[name]),
            **losses.get(name, {}),
        )
        for name, grid in grids.items()
    )
    taken = {tensor for tensors in own.values() for tensor in tensors}
    others = tuple(
        TensorContents(name, tensor.shape, dtype_names(tensor.dtype), tensor.nbytes)
        for name, tensor in checkpoint.tensors.items()
        if name not in taken
    )
    names = checkpoint.config.get("architectures")
    architecture = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    return Contents(place, None if form is None else form.name, architecture, layers, others, notes)


_LOSSES = ("loss", "rtn_loss", "held_out_loss", "held_out_rtn_loss")


def _losses(folder: Path) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """Losses by layer of the report in a folder; a note where there is a report that is none."""
    file = folder / JSON_NAME
    if not file.is_file():
        return {}, ()
    try:
        layers = read_json(file)["layers"]
        losses = {
            layer["name"]: {key: float(layer[key]) for key in _LOSSES if layer.get(key) is not None} for layer in layers
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, (f"{file}: expected a report with losses of layers, but got: {type(error).__name__}: {error}",)
    return losses, ()


def _contents_of_gguf(file: Path) -> Contents:
    contents = read_gguf(file)
    layers, others = [], []
    for tensor in contents.tensors.values():
        if tensor.kind in _PLAIN_TYPES:
            dtype = _PLAIN_TYPES[tensor.kind]
            others.append(TensorContents(tensor.name, tensor.shape, dtype, tensor.data.nbytes))
        else:
            layers.append(_gguf_layer(tensor))
    architecture = contents.metadata.get("general.architecture")
    notes: tuple[str, ...] = ()
    if (file.parent / JSON_NAME).is_file():
        notes = (f"{file.parent / JSON_NAME}: losses are by the names that layers had before",)
    name = architecture if isinstance(architecture, str) else None
    return Contents(file, "gguf", name, tuple(layers), tuple(others), notes)


_PLAIN_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}


def _gguf_layer(tensor: GgufTensor) -> LayerContents:
    known = TYPES.get(tensor.kind)
    bits = re.search(r"\d+", tensor.kind)
    one_level = None if tensor.kind in GRIDS else known
    return LayerContents(
        tensor.name,
        tensor.shape,
        tensor.kind,
        None if bits is None else int(bits.group()),
        None if one_level is None else COLUMNS,
        None if one_level is None else not one_level.has_minimum,
        None if one_level is None else "float16",
        tensor.data.nbytes,
    )

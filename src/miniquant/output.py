"""Quantized layers in a model's files: which tensors of the source they stand for, and the folder or file of a format.

Names
    A layer is named in the files as the source names its tensor, without ".weight"; transformers may name the module
    otherwise. Where transformers makes one parameter of several tensors (an expert's gate and up projections), each of
    these is a layer of its own: rows of a quantized weight do not depend on one another, so the split is exact. Fused
    experts that the source stores fused, too, are named by their number ("mlp.experts.down_proj.3").

What formats hold
    compressed-tensors and GPTQ describe ``torch.nn.Linear``, and each expert's matrices where the source has them
    apart. What they cannot hold (transformers' Conv1D, convolutions, experts that are stored fused) is left as it is
    and listed with the reason, unless a rule of the recipe means nothing else: then it is an error.

Output embeddings that are tied to the embedding
    GGUF stores one matrix. Other formats store the quantized one beside the embedding, which has its values, and
    config.json says that they are not tied.
"""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from miniquant.checkpoint import CONFIG, Checkpoint, CheckpointWriter, check_output_folder
from miniquant.formats import Format, Gguf, LayerFormat, LayerGrid
from miniquant.formats.gguf_file import GGUF_FILE, GgufPlan, OtherType, plan_gguf
from miniquant.grid import QuantizedWeight
from miniquant.modules import ExpertSite, LeftAlone, LinearSite, Site
from miniquant.plan import Plan
from miniquant.recipe import LayerOptions, Recipe
from miniquant.report import HTML_NAME, JSON_NAME

LINEAR = "Linear"  # what our own format says of layers that others can hold, too
LINEAR_ONLY = ("compressed-tensors", "gptq", "gptq_v2")
_GGUF_NAMES = {GGUF_FILE, JSON_NAME, HTML_NAME}
_WEIGHT = ".weight"
_MOST_PROBLEMS = 10
_MOST_JOINED = 4  # tensors whose order in a weight is looked up


class Source(Protocol):
    """A model and the folder that it comes from.

    Attributes:
        model: its weights may be on the device "meta".
        checkpoint: the folder.
    """

    model: nn.Module
    checkpoint: Checkpoint

    def source_names(self, parameter_name: str) -> tuple[str, ...]:
        """The tensors of the folder that a parameter is made from."""
        ...

    def is_plain(self, parameter_name: str) -> bool:
        """Whether a parameter is one tensor of the folder as it is, but for the dtype."""
        ...

    def read(self, parameter_name: str) -> Tensor:
        """The values of a parameter, made from these tensors."""
        ...


@dataclass(frozen=True)
class FileLayer:
    """A quantized matrix in the files: a quantized weight, or some of its rows.

    Attributes:
        name: in the files.
        source: name of the source's tensor.
        site: name of the weight in the model.
        first: of the weight's rows.
        last: behind the last of the weight's rows.
        expert: of a source that is stored fused; None of any other.
    """

    name: str
    source: str
    site: str
    first: int
    last: int
    expert: int | None = None

    def of(self, quantized: QuantizedWeight) -> QuantizedWeight:
        """This layer's rows of the weight."""
        if self.first == 0 and self.last == len(quantized.codes):
            return quantized
        return quantized.map(lambda tensor: tensor[self.first : self.last])


@dataclass(frozen=True)
class GgufOptions:
    """What a GGUF file can be told beside its layers; see :func:`miniquant.formats.gguf_file.plan_gguf`.

    Attributes:
        other: the type of the matrices that are not quantized.
        exact: whether asymmetric grids take a wider type in place of rounded minima.
        pre: llama.cpp's name for how the tokenizer splits texts, where it is not known here.
    """

    other: OtherType = "F16"
    exact: bool = False
    pre: str | None = None


@dataclass(frozen=True, eq=False)
class Contents:
    """What a folder of quantized layers has.

    Attributes:
        checkpoint: the source, of which all else comes.
        grids: of the layers, by name.
        places: by name of a tensor of the source: the layers that are written in its place.
        dropped: names of tensors of the source that are not written.
        ignored: names of Linears that are not quantized.
        aliases: grids by further names, under which readers know a layer.
        options: of layers, for the record.
        untied: whether output embeddings that the source ties to the embedding are apart.
    """

    checkpoint: Checkpoint
    grids: Mapping[str, LayerGrid]
    places: Mapping[str, Sequence[str]]
    dropped: Collection[str]
    ignored: Sequence[str] = ()
    aliases: Mapping[str, LayerGrid] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    untied: bool = False

    def config(self, form: Format) -> dict[str, Any]:
        """config.json of the folder."""
        config = copy.deepcopy(self.checkpoint.config)
        if self.untied:
            parts = (config, *(value for value in config.values() if isinstance(value, dict)))
            for part in (config, *(part for part in parts if "tie_word_embeddings" in part)):
                part["tie_word_embeddings"] = False
        config["quantization_config"] = form.config({**self.grids, **self.aliases}, self.ignored, self.options)
        return config

    def nbytes(self, form: LayerFormat) -> int:
        """Of all tensors, about: the layers', and those that are copied."""
        tensors = self.checkpoint.tensors
        copied = sum(tensor.nbytes for name, tensor in tensors.items() if name not in self.dropped)
        return copied + sum(form.nbytes(name, grid) for name, grid in self.grids.items())


def write_folder(
    writer: CheckpointWriter,
    form: Format,
    contents: Contents,
    read_layer: Callable[[str], QuantizedWeight],
    read_tensor: Callable[[str], Tensor],
    *,
    code: bool = False,
) -> None:
    """Writes a folder; a tensor is in memory at a time.

    Args:
        writer: entered.
        form: of the layers.
        contents: of the folder.
        read_layer: gives a layer by its name.
        read_tensor: gives a tensor of the source that is copied, by its name.
        code: whether Python files of the source are copied.
    """
    writer.write_json(CONFIG, contents.config(form))
    for name, values in form.files({**contents.grids, **contents.aliases}, contents.ignored).items():
        writer.write_json(name, values)
    for name in contents.checkpoint.tensors:
        for layer in contents.places.get(name, ()):
            for tensor, stored in form.tensors(layer, read_layer(layer)).items():
                writer.add(tensor, stored)
        if name not in contents.dropped:
            writer.add(name, read_tensor(name))
    for file in contents.checkpoint.other_files(code=code):
        writer.copy(file, contents.checkpoint.folder)


@dataclass(frozen=True, eq=False)
class OutputPlan:
    """What is quantized, and what the files will have.

    Attributes:
        plan: which weights, and how.
        layers: in the files, by name.
        contents: of a folder; of a GGUF file what it is made from.
        tied: by name of a tensor of the source that is copied with other values: the weight whose values it has.
        scale_dtype: for which codes are chosen.
        gguf: of a GGUF file.
        warnings: what readers will not do.
    """

    plan: Plan
    layers: Mapping[str, FileLayer]
    contents: Contents
    tied: Mapping[str, str]
    scale_dtype: torch.dtype
    gguf: GgufPlan | None
    warnings: tuple[str, ...]


def plan_output(source: Source, plan: Plan, recipe: Recipe, form: LayerFormat, gguf: GgufOptions) -> OutputPlan:
    """What the files of a quantized model will have; everything is checked that can be before its weights are there.

    Args:
        source: the model, and its folder.
        plan: which weights are quantized, and how.
        recipe: that the plan is from.
        form: of the files.
        gguf: of a GGUF file.

    Raises:
        ValueError: for layers that the format cannot hold, each named with what can be done.
    """
    namer = _Namer(source, form.name)
    placed: dict[str, list[FileLayer]] = {}
    left_out: dict[str, str] = {}
    for site, _ in plan.layers:
        found = namer.layers_of(site)
        if isinstance(found, str):
            left_out[site.name] = found
        else:
            placed[site.name] = found
    plan = _without(plan, recipe, form.name, left_out)
    tensors = source.checkpoint.tensors
    dtypes = Counter(tensors[layer.source].dtype for layers in placed.values() for layer in layers)
    scale_dtype = form.scale_dtype(dtypes.most_common(1)[0][0])
    layers: dict[str, FileLayer] = {}
    grids: dict[str, LayerGrid] = {}
    options: dict[str, dict[str, Any]] = {}
    aliases: dict[str, LayerGrid] = {}
    for site, chosen in plan.layers:
        for layer in placed[site.name]:
            if layer.name in layers:
                raise ValueError(
                    f"quantize_folder: expected one layer for each tensor of {source.checkpoint.folder}, but got "
                    f"{layers[layer.name].site!r} and {layer.site!r} for {layer.source!r}"
                )
            grid = planned_grid(layer.last - layer.first, site.columns, chosen, scale_dtype)
            layers[layer.name], grids[layer.name] = layer, grid
            options[layer.name] = {**chosen.to_dict(), "module": _kind(site, layer)}
            if isinstance(site, LinearSite):
                aliases |= {name: grid for name in (site.name, *site.aliases) if name != layer.name}
    warnings = check_layers(form, grids)
    tied = {layer.source: layer.site for layer in layers.values() if form.name != "gguf" and namer.is_embedding(layer)}
    places: dict[str, list[str]] = {}
    for layer in layers.values():
        places.setdefault(layer.source, []).append(layer.name)
    whole = {name for name in places if namer.is_replaced(name, [layers[layer] for layer in places[name]])}
    contents = Contents(
        source.checkpoint,
        grids,
        places,
        frozenset((whole | {f"{name}{_WEIGHT}" for name in grids if f"{name}{_WEIGHT}" in tensors}) - set(tied)),
        tuple(name for name in dict.fromkeys(namer.others(plan)) if name not in grids and name not in aliases),
        {} if form.name == "miniquant" else {name: grid for name, grid in aliases.items() if name not in grids},
        options,
        untied=bool(tied),
    )
    planned = None
    if isinstance(form, Gguf):
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        planned = plan_gguf(source.checkpoint.config, shapes, grids, folder=source.checkpoint.folder, **vars(gguf))
        warnings = condensed(planned.warnings, grids)
    return OutputPlan(plan, layers, contents, tied, scale_dtype, planned, tuple(warnings))


def check_apart(caller: str, source: Path, output: Path) -> None:
    """Refuses an output that is the source, or lies in it, or has it in it."""
    one, two = source.resolve(), output.resolve()
    if one == two or one in two.parents or two in one.parents:
        raise ValueError(f"{caller}: expected an output apart from the model {source}, but got {output}")


def check_output(output: Path, form: LayerFormat, *, overwrite: bool) -> None:
    """Whether the output may be written."""
    if isinstance(form, Gguf) and overwrite and holds_a_gguf_file(output):
        return
    check_output_folder(output, overwrite=overwrite)


def holds_a_gguf_file(output: Path) -> bool:
    """Whether a folder has what is written with a GGUF file, and nothing else."""
    return output.is_dir() and {path.name for path in output.iterdir()} <= _GGUF_NAMES


def planned_grid(rows: int, columns: int, options: LayerOptions, scale_dtype: torch.dtype) -> LayerGrid:
    """The grid that a weight [rows, columns] will have."""
    dtype = scale_dtype if options.superblocks is None else torch.float32
    return LayerGrid(rows, columns, *options.grid, options.full_range, dtype, options.superblocks)


def check_layers(form: LayerFormat, grids: Mapping[str, LayerGrid]) -> list[str]:
    """Whether a format can hold layers.

    Returns:
        Warnings, one for many layers where they say the same.

    Raises:
        ValueError: where it cannot; the message has every reason, with the first of its layers.
    """
    warnings: list[str] = []
    problems: list[str] = []
    for name, grid in grids.items():
        try:
            warnings += form.check(name, grid)
        except ValueError as error:  # noqa: PERF203  (all problems at once)
            problems.append(str(error))
    if problems:
        said = condensed(problems, grids)
        more = f"\n  and {len(said) - _MOST_PROBLEMS} more" if len(said) > _MOST_PROBLEMS else ""
        raise ValueError(said[0] if len(said) == 1 else "\n  ".join(["", *said[:_MOST_PROBLEMS]]).strip() + more)
    return condensed(warnings, grids)


def condensed(messages: Iterable[str], names: Iterable[str]) -> list[str]:
    """Messages that name one layer each; those that differ in nothing else are one, with the number of the others."""
    known = set(names)
    kinds: dict[tuple[str, str], list[str]] = {}
    for message in messages:
        name = next((part for part in message.split("'")[1::2] if part in known), "")
        before, _, after = message.partition(repr(name)) if name else (message, "", "")
        kinds.setdefault((before, after), []).append(name)
    return [
        before + (repr(same[0]) if same[0] else "") + (f" (and {len(same) - 1} more)" if len(same) > 1 else "") + after
        for (before, after), same in kinds.items()
    ]


def _kind(site: Site, layer: FileLayer) -> str:
    """What kind of module a layer of the files is for."""
    is_linear = isinstance(site, LinearSite) or (isinstance(site, ExpertSite) and layer.expert is None)
    return LINEAR if is_linear else type(site.modules[0]).__name__


def stored_weight(site: Site, layers: Sequence[FileLayer], checkpoint: Checkpoint) -> Tensor:
    """A weight [N, K] as the source stores it.

    Args:
        site: the weight.
        layers: that it becomes in the files.
        checkpoint: the source.
    """
    parts = [checkpoint.read(layer.source) for layer in layers]
    if len(parts) == 1 and not (isinstance(site, ExpertSite) and layers[0].expert is None):
        return site.of_parameter(parts[0]).contiguous()
    return torch.cat(parts)


def _without(plan: Plan, recipe: Recipe, form: str, left_out: Mapping[str, str]) -> Plan:
    """A plan without layers that a format cannot hold, given with the reason."""
    if not left_out:
        return plan
    for number, rule in enumerate(recipe.rules, start=1):
        meant = [site.name for site, _ in plan.layers if recipe.rule(site.name) is rule]
        if meant and all(name in left_out for name in meant):
            raise ValueError(
                f"quantize_folder: rule {number}: expected pattern {rule.pattern!r} to match layers that the format "
                f"{form} can hold, but got {meant[0]!r}, which "
                f"{left_out[meant[0]]} (skip it, or choose the format miniquant)"
            )
    kept = tuple((site, options) for site, options in plan.layers if site.name not in left_out)
    if not kept:
        name, reason = next(iter(left_out.items()))
        raise ValueError(
            f"quantize_folder: expected a model with layers that the format {form} can hold, but got none: {name!r} "
            f"{reason}, and so on (choose the format miniquant, or gguf where llama.cpp knows the model)"
        )
    alone: dict[str, LeftAlone] = {}  # by parameter: fused experts once
    for site, _ in plan.layers:
        if site.name in left_out:
            reason = f"the format {form} cannot hold {site.name}, which {left_out[site.name]}"
            alone.setdefault(site.parameter_name, LeftAlone(site.parameter_name, tuple(site.parameter.shape), reason))
    return Plan(kept, (*plan.left_alone, *alone.values()))


class _Namer:
    """Which tensors of the source stand for a weight."""

    def __init__(self, source: Source, form: str) -> None:
        self._source = source
        self._form = form
        self._tensors = source.checkpoint.tensors
        self._by_expert: dict[str, dict[int, list[str]] | None] = {}
        self._orders: dict[tuple[str, int], tuple[int, ...] | None] = {}
        self._embeddings = {
            id(parameter)
            for module in source.model.modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            for parameter in module.parameters(recurse=False)
        }
        self._of_embedding: set[str] = set()  # names of sites

    def layers_of(self, site: Site) -> list[FileLayer] | str:
        """The layers of the files that a weight becomes, or why the format cannot hold it.

        Raises:
            ValueError: where the source has no such weight.
        """
        names = self._source.source_names(site.parameter_name)
        missing = [name for name in names if name not in self._tensors]
        if missing or not names:
            raise ValueError(
                f"quantize_folder: {self._source.checkpoint.folder}: expected a tensor for layer {site.name!r}, but "
                f"got none{f' named {missing[0]!r}' if missing else ''}"
            )
        if self._form in LINEAR_ONLY and not isinstance(site, (LinearSite, ExpertSite)):
            return f"is a {type(site.modules[0]).__name__}, while it holds torch.nn.Linear only"
        if id(site.parameter) in self._embeddings:
            self._of_embedding.add(site.name)
            if self._form != "gguf":
                return [FileLayer(site.name, names[0], site.name, 0, site.rows)]
        if len(names) > 1:
            return self._rows(site, self._names_of_expert(site, names) if isinstance(site, ExpertSite) else names)
        return self._whole(site, names[0])

    def _whole(self, site: Site, name: str) -> list[FileLayer] | str:
        """A weight that is a tensor of the source, or one expert's part of it."""
        if not self._source.is_plain(site.parameter_name):
            return self._unknown(site, [name])
        if not isinstance(site, ExpertSite):
            return [FileLayer(_base(name), name, site.name, 0, site.rows)]
        if self._form in LINEAR_ONLY:
            return f"is stored in one tensor with all experts, {name!r}, while it holds one for each expert only"
        return [FileLayer(f"{_base(name)}.{site.expert}", name, site.name, 0, site.rows, site.expert)]

    def is_embedding(self, layer: FileLayer) -> bool:
        """Whether the weight is an embedding's, too."""
        return layer.site in self._of_embedding

    def is_replaced(self, name: str, layers: Sequence[FileLayer]) -> bool:
        """Whether layers stand for all that a tensor of the source has."""
        if layers[0].expert is None:
            return True
        return len(layers) == self._tensors[name].shape[0]

    def others(self, plan: Plan) -> Iterable[str]:
        """Names, in the files and in the model, of all that is Linear and not quantized."""
        model = self._source.model
        taken = {name for site, _ in plan.layers for name in (site.name, *site.aliases)}
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        matrices = [
            one.name.removesuffix(_WEIGHT)
            for one in plan.left_alone
            if one.name.endswith(_WEIGHT) and len(one.shape) == 2 and not self._is_embedding_module(one.name)
        ]
        for name in dict.fromkeys((*linears, *matrices)):
            if name in taken:
                continue
            yield name
            for source in self._source_names_if_any(f"{name}{_WEIGHT}"):
                yield _base(source)
        quantized = {site.parameter_name for site, _ in plan.layers if isinstance(site, ExpertSite)}
        for one in plan.left_alone:
            if len(one.shape) == 3 or one.name in quantized:  # experts, of which some or all are as they were
                yield from (_base(source) for source in self._source_names_if_any(one.name) if source.endswith(_WEIGHT))

    def _is_embedding_module(self, parameter_name: str) -> bool:
        module = self._source.model.get_submodule(parameter_name.rpartition(".")[0])
        return isinstance(module, (nn.Embedding, nn.EmbeddingBag))

    def _source_names_if_any(self, parameter_name: str) -> tuple[str, ...]:
        """Those of a parameter that is no embedding's."""
        module_name, _, attribute = parameter_name.rpartition(".")
        parameter = self._source.model.get_submodule(module_name)._parameters.get(attribute)  # noqa: SLF001
        if parameter is None or id(parameter) in self._embeddings:
            return ()
        return tuple(name for name in self._source.source_names(parameter_name) if name in self._tensors)

    def _names_of_expert(self, site: ExpertSite, names: Sequence[str]) -> Sequence[str]:
        """Of the tensors that all experts are made from, those of one; none where that cannot be told."""
        if site.parameter_name not in self._by_expert:
            self._by_expert[site.parameter_name] = names_by_expert(names, len(site.parameter))
        of_expert = self._by_expert[site.parameter_name]
        return () if of_expert is None else of_expert[site.expert]

    def _rows(self, site: Site, names: Sequence[str]) -> list[FileLayer] | str:
        """A weight whose rows are those of several tensors, one after the other."""
        shapes = [self._tensors[name].shape for name in names]
        rows = [shape[0] for shape in shapes if len(shape) == 2 and shape[1] == site.columns]
        if not names or len(rows) != len(names) or sum(rows) != site.rows:
            return self._unknown(site, names)
        order = self._order(site, names)
        if order is None:
            return self._unknown(site, names)
        layers, first = [], 0
        for place in order:
            layers.append(FileLayer(_base(names[place]), names[place], site.name, first, first + rows[place]))
            first += rows[place]
        return layers

    def _order(self, site: Site, names: Sequence[str]) -> tuple[int, ...] | None:
        """In which order the rows of tensors are those of a weight: looked up in the values of the first of its kind.

        None: in no order, as where transformers interleaves them.
        """
        kind = (re.sub(r"\d+", "#", site.parameter_name), len(names))
        if kind not in self._orders:
            self._orders[kind] = None
            if len(names) <= _MOST_JOINED:
                values = self._source.read(site.parameter_name)
                values = site.of_parameter(values)
                parts = [self._source.checkpoint.read(name).to(values) for name in names]
                for order in itertools.permutations(range(len(names))):
                    if torch.equal(torch.cat([parts[place] for place in order]), values):
                        self._orders[kind] = order
                        break
        return self._orders[kind]

    def _unknown(self, site: Site, names: Sequence[str]) -> str:
        made = f"is made from {names[0]!r}" if names else f"is made from tensors of {site.parameter_name!r}"
        return f"{made} in a way that is not known here"


def names_by_expert(names: Sequence[str], experts: int) -> dict[int, list[str]] | None:
    """Names of tensors by the expert whose number they have; None where it cannot be told which number that is."""
    split = [name.split(".") for name in names]
    if len({len(parts) for parts in split}) != 1:
        return None
    numbered = [
        place
        for place, parts in enumerate(zip(*split, strict=True))
        if len(set(parts)) > 1 and all(part.isdecimal() for part in parts)
    ]
    if experts == 1 and not numbered:
        return {0: list(names)}
    if len(numbered) != 1:
        return None
    of_expert: dict[int, list[str]] = {}
    for name, parts in zip(names, split, strict=True):
        of_expert.setdefault(int(parts[numbered[0]]), []).append(name)
    if sorted(of_expert) != list(range(experts)) or len({len(own) for own in of_expert.values()}) != 1:
        return None
    return of_expert


def _base(tensor: str) -> str:
    return tensor.removesuffix(_WEIGHT)

"""A model of transformers without its weights, and what tensors of a checkpoint each of its parameters is made from.

transformers builds the model, and its rules say how tensors are renamed, joined and split on their way into it: what
comes out is what ``from_pretrained`` loads, but for the memory. Nothing is fetched, and no code of a folder runs unless
that is asked for.
"""

import copy
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from miniquant.checkpoint import Checkpoint, same_values

# Keys of a config that say how many layers there are.
_LAYERS = re.compile(r"n_layers?|(num_)?((encoder|decoder|hidden)_)?layers")
# Endings of other keys that count layers, or what configs call layers beside those that have weights, as windows.
_COUNTS = ("layers", "n_layer", "blocks", "depth")
_SPARE_LAYERS = 1000
_SHOWN = 5  # names that a message lists


def build_model(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a checkpoint's config.json, in evaluation mode: parameters on the device "meta", buffers computed.

    Args:
        checkpoint: whose config says which architecture it is; AutoModel's where it names none.
        dtype: of its parameters. None: what the config says, else that of the first floating-point tensor; a few
            parameters stay in float32 where the architecture says so.
        trust_remote_code: whether code of the folder may run, which some architectures are defined by.

    Raises:
        ImportError: without transformers.
        ValueError: for a config that transformers cannot build a model from.
    """
    transformers = transformers_package()
    where = f"build_model: {checkpoint.folder / 'config.json'}"
    _check_layers(where, checkpoint.config, len(checkpoint.tensors))
    try:
        config = transformers.AutoConfig.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ValueError(f"{where}: expected a configuration that transformers reads, but got: {error}") from error
    if checkpoint.config.get("tie_word_embeddings") is False:
        config.tie_word_embeddings = False  # of a checkpoint that is read otherwise than its file says
    kind = _class_of(where, transformers, config, checkpoint, trust_remote_code=trust_remote_code)
    dtype = dtype or getattr(config, "dtype", None) or _first_dtype(checkpoint)
    try:
        with parameters_on_meta():
            model: nn.Module = kind._from_config(config, dtype=dtype)  # noqa: SLF001  (what AutoModel calls)
    except Exception as error:
        raise ValueError(
            f"{where}: expected a configuration that {kind.__name__} can be built from, but got: {error}"
        ) from error
    plan = getattr(model, "_get_dtype_plan", None)
    for pattern, other in (plan(dtype) if callable(plan) else {}).items():
        _set_dtype(model, re.compile(pattern.replace("*", ".*")), other)
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """While entered, modules that are made have parameters on the device "meta", and buffers as ever."""
    known: Any = WeakIdKeyDictionary()  # one that is registered twice stays one

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if parameter.device.type == "meta":
            return None
        if parameter not in known:
            known[parameter] = _on_meta(parameter, parameter.dtype)
        found: nn.Parameter = known[parameter]
        return found

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # it may return one
    try:
        yield
    finally:
        handle.remove()


def _on_meta(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    meta = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="meta"), requires_grad=False)
    meta.__dict__.update(parameter.__dict__)  # marks that architectures set
    return meta


def transformers_package() -> Any:
    """The package transformers.

    Raises:
        ImportError: without it, or with one older than version 5.
    """
    try:
        importlib.import_module("transformers.core_model_loading")  # new in version 5
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            "expected the package transformers, of version 5 or newer, which knows the architectures of models, to be "
            f"installed: pip install 'miniquant[models]' ({error})"
        ) from error


def _check_layers(where: str, config: Mapping[str, Any], tensors: int) -> None:
    """Refuses more layers than there are tensors: to build them would take forever, and end in an error."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_layers(where, value, tensors)
            continue
        if not key.endswith(_COUNTS) or type(value) is not int:
            continue
        if value > tensors and _LAYERS.fullmatch(key):
            raise ValueError(
                f"{where}: expected {key} to be at most {tensors}, as many as there are tensors, but got {value}"
            )
        if value > tensors + _SPARE_LAYERS:
            raise ValueError(
                f"{where}: expected {key} to be at most {tensors + _SPARE_LAYERS}, with {tensors} tensors in the "
                f"files, but got {value}"
            )


def _class_of(where: str, transformers: Any, config: Any, checkpoint: Checkpoint, *, trust_remote_code: bool) -> Any:
    """The class of the model, by the config's first architecture."""
    names = checkpoint.config.get("architectures")
    if not names:
        try:
            return transformers.AutoModel._model_mapping[type(config)]  # noqa: SLF001  (from_config looks there)
        except KeyError:
            raise ValueError(
                f"{where}: expected architectures to name a class of transformers {transformers.__version__}, but got "
                f"none, and there is no AutoModel of {type(config).__name__}"
            ) from None
    name = names[0] if isinstance(names, list) else None
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected architectures to be a list of names, but got {names!r}")  # noqa: TRY004
    remote = checkpoint.config.get("auto_map")
    references = remote.values() if isinstance(remote, dict) else ()
    for reference in references:
        if isinstance(reference, str) and reference.rpartition(".")[2] == name:
            if trust_remote_code:
                return importlib.import_module("transformers.dynamic_module_utils").get_class_from_dynamic_module(
                    reference, str(checkpoint.folder), local_files_only=True
                )
            if not hasattr(transformers, name):
                raise ValueError(
                    f"{where}: expected an architecture that transformers knows, but got {name}, which is code of the "
                    "folder (trust_remote_code=True runs it)"
                )
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(  # noqa: TRY004  (a bad file)
            f"{where}: expected an architecture that transformers {transformers.__version__} knows, but got {name!r} "
            "(a newer transformers may know it)"
        )
    return found


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """As transformers finds it where the config says nothing."""
    return next((one.dtype for one in checkpoint.tensors.values() if one.dtype.is_floating_point), torch.float32)


def _set_dtype(model: nn.Module, pattern: re.Pattern[str], dtype: torch.dtype) -> None:
    """Gives parameters whose names match another dtype, for all modules that share them."""
    changed: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is None or not parameter.is_floating_point():
                continue
            if pattern.search(f"{prefix}.{attribute}".lstrip(".")):
                changed.setdefault(id(parameter), _on_meta(parameter, dtype))
    for module in model.modules():
        for attribute, parameter in module._parameters.items():  # noqa: SLF001
            if id(parameter) in changed:
                module._parameters[attribute] = changed[id(parameter)]  # noqa: SLF001


# From tensors to parameters


@dataclass(eq=False)
class Conversion:
    """How some tensors of a checkpoint become some parameters (or buffers) of a model: mostly one becomes one.

    Attributes:
        checkpoint: that has the tensors.
        sources: their names.
        targets: the parameters' names, with the dtype of each.
        nbytes: of the parameters.
    """

    checkpoint: Checkpoint
    sources: tuple[str, ...]
    targets: Mapping[str, torch.dtype]
    nbytes: int
    _convert: Callable[[Callable[[str], Tensor]], Mapping[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def plain(self) -> bool:
        """Whether one tensor becomes one parameter as it is, but for the dtype."""
        return self._convert is None

    def read(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The parameters' values, by name.

        Beside them, memory holds one tensor of the file where there is one, otherwise at most all of `sources`.

        Args:
            device: of the values.

        Raises:
            ValueError, OSError: where the files cannot be read.
        """
        if self._convert is None:
            values: Mapping[str, Tensor] = {name: self._source(self.sources[0]) for name in self.targets}
        else:
            values = self._convert(self._source)
        return {name: values[name].to(device, dtype) for name, dtype in self.targets.items()}

    def _source(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(next(iter(self.targets.values())))


@dataclass(frozen=True, eq=False)
class Sources:
    """Where all parameters of a model come from.

    Attributes:
        conversions: by name of a parameter, or of a buffer that the files hold.
        unused: tensors of the checkpoint that the model has no place for.
    """

    conversions: Mapping[str, Conversion]
    unused: tuple[str, ...]


def find_sources(model: nn.Module, checkpoint: Checkpoint) -> Sources:
    """Where all parameters of a model come from, by the rules of transformers; no value is read.

    Parameters that the model ties and that the files have twice, with different values, are no longer tied then.

    Args:
        model: of :func:`build_model`.
        checkpoint: that it was built from.

    Raises:
        ValueError: for a parameter that no tensor, or only one of another shape or kind, can be made to.
    """
    where = f"find_sources: {checkpoint.folder}"
    places: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    conversions: dict[str, Conversion] = {}
    unused = []
    for group in grouped(model, checkpoint.tensors, places):
        if group.target in places:
            conversions |= _conversion(where, model, checkpoint, places, group)
        else:
            unused += group.sources
    parameters: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(id(parameter), []).append(name)
    missing = [names[0] for names in parameters.values() if not any(name in conversions for name in names)]
    if missing:
        listed = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        got = f", but got {unused[0]!r} for instance, which it has no place for" if unused else ", but got none"
        raise ValueError(
            f"{where}: expected tensors for all parameters of {type(model).__name__}, among them {listed}{got}"
        )
    for names in parameters.values():
        _untie(model, checkpoint, {name: conversions[name] for name in names if name in conversions})
    return Sources(conversions, tuple(unused))


@dataclass
class Group:
    """Tensors that become the same parameters: the first of these, and transformers' converter where there is one."""

    target: str
    sources: list[str] = field(default_factory=list)
    converter: Any = None
    patterns: list[str] = field(default_factory=list)  # of the converter, for each source


def grouped(model: nn.Module, tensors: Iterable[str], places: Mapping[str, Tensor]) -> list[Group]:
    """Tensors by what they become, a group for each first parameter.

    This is the first half of ``transformers.core_model_loading.convert_and_load_state_dict_in_model``.

    Args:
        model: of :func:`build_model`.
        tensors: names.
        places: the model's parameters and buffers by name; what no rule leads to one of them is a group of a name that
            is none.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    groups: dict[str, Group] = {}
    rules = importlib.import_module("transformers.core_model_loading")
    mapping = importlib.import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    renamings = [rule for rule in mapping if isinstance(rule, rules.WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, rules.WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for name in sorted(tensors, key=rules.dot_natural_key):
        target, pattern = rules.rename_source_key(name, renamings, converters, prefix, places)
        if target not in places and name in places:
            target, pattern = rules.rename_source_key(name, [], [], prefix, places)
        group = groups.setdefault(target, Group(target))
        group.sources.append(name)
        if pattern is not None:
            group.converter = of_pattern[pattern]
            group.patterns.append(pattern)
    return list(groups.values())


def _conversion(
    where: str, model: nn.Module, checkpoint: Checkpoint, places: Mapping[str, Tensor], group: Group
) -> dict[str, Conversion]:
    """What a group of tensors becomes, tried on tensors without values; by name of each parameter."""
    made = f"{where}: expected {_named(group.sources)} to become {group.target}"
    if group.converter is None and len(group.sources) > 1:
        raise ValueError(f"{made}, but got several tensors for one parameter")
    convert = None if group.converter is None else _converting(model, group)
    for name in group.sources:
        dtype = checkpoint.tensors[name].dtype
        if places[group.target].is_floating_point() and dtype not in _FLOATING:
            raise ValueError(
                f"{made}, a parameter of floating point, but got {str(dtype).removeprefix('torch.')} (a checkpoint "
                "that is quantized already?)"
            )
    meta = {name: torch.empty(checkpoint.tensors[name].shape, device="meta") for name in group.sources}
    try:
        values = {group.target: meta[group.sources[0]]} if convert is None else convert(meta.__getitem__)
    except Exception as error:
        raise ValueError(f"{made} by transformers' rules, but got: {type(error).__name__}: {error}") from error
    for name, value in values.items():
        if name not in places:
            raise ValueError(f"{made}, but got {name}, which the model has no place for")
        if value.shape != places[name].shape:
            raise ValueError(
                f"{made} with shape {list(places[name].shape)}, but got shape {list(value.shape)} for {name}"
            )
    nbytes = sum(places[name].numel() * places[name].element_size() for name in values)
    targets = {name: places[name].dtype for name in values}
    return dict.fromkeys(values, Conversion(checkpoint, tuple(group.sources), targets, nbytes, convert))


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _named(names: list[str]) -> str:
    return f"tensor {names[0]!r}" if len(names) == 1 else f"{len(names)} tensors from {names[0]!r} to {names[-1]!r}"


def _converting(model: nn.Module, group: Group) -> Callable[[Callable[[str], Tensor]], Mapping[str, Tensor]]:
    """The converter of transformers, as a function of what reads a tensor."""

    def convert(read: Callable[[str], Tensor]) -> Mapping[str, Tensor]:
        converter = copy.deepcopy(group.converter)
        for name, pattern in zip(group.sources, group.patterns, strict=True):
            converter.add_tensor(group.target, name, pattern, _Later(read, name))
        converted = converter.convert(group.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    return convert


class _Later:
    """Reads a tensor when it is called: converters take such, and call them when they need them."""

    def __init__(self, read: Callable[[str], Tensor], name: str) -> None:
        self._read = read
        self._name = name

    def __call__(self) -> Tensor:
        return self._read(self._name)


def _untie(model: nn.Module, checkpoint: Checkpoint, tied: Mapping[str, Conversion]) -> None:
    """Gives tied parameters that the files have with other values places of their own.

    transformers does the same: what is stored twice was not tied when it was saved, whatever the config says.
    """
    plain = {name: checkpoint.tensors[conversion.sources[0]] for name, conversion in tied.items() if conversion.plain}
    for name in list(plain)[1:]:
        if same_values(next(iter(plain.values())), plain[name]):
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters[attribute]  # noqa: SLF001
        assert parameter is not None  # noqa: S101  (it is one of named_parameters())
        module._parameters[attribute] = _on_meta(parameter, parameter.dtype)  # noqa: SLF001

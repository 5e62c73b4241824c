"""What in a ``torch.nn.Module`` can be quantized: finding weights, reading and writing them, and the inputs of each.

A :class:`Site` is one weight matrix [N, K] with the places that use it. Kinds:

- ``torch.nn.Linear`` and what derives from it, wherever it stands;
- transformers' ``Conv1D``, a Linear whose weight is stored as [K, N];
- ``torch.nn.Conv1d``, ``Conv2d`` and ``Conv3d`` with one group: K = channels * kernel elements, in the order of
  ``weight.flatten(1)``, and one token is what a kernel position covers. With several groups each group of rows has
  inputs, and so a Hessian, of its own, over K / groups columns (four columns in Mamba's depthwise convolutions): these
  are left alone;
- fused experts, as transformers 5 keeps them: a parameter [E, N, K] (or [E, K, N]) of a module, one matrix for each
  expert, which sees only the tokens that are routed to it.

A matrix with several names (a module in two places, tied weights) is one site. Output embeddings are left alone unless
asked for, embeddings always; whatever has two dimensions or more and is no site is listed with the reason.
"""

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Parameters of a module of fused experts: transformers' decorator for experts knows these names.
EXPERTS = ("gate_up_proj", "up_proj", "down_proj")

Reached = Callable[["Site", Tensor], None]


def listed_parameter(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """A module's parameter, of which only its shape and the like are asked: it may be one without memory."""
    return module._parameters.get(attribute)  # noqa: SLF001  (experts' attributes are shadowed)


def used_parameter(module: nn.Module, attribute: str) -> Any:
    """A module's parameter whose values are asked for: a model in memory by parts (lazy.py) reads it now."""
    return module._parameters[attribute]  # noqa: SLF001  (as above)


class Site(ABC):
    """A weight that can be quantized.

    Attributes:
        name: of the module that uses it; of an expert, the parameter's name and the expert's index
            ("mlp.experts.down_proj.3").
        aliases: further names of the same matrix.
        modules: that use it, in order of definition.
        parameter_name: of the parameter that holds it, as the state dict has it.
    """

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name = name
        self.aliases: tuple[str, ...] = ()
        self.modules: tuple[nn.Module, ...] = (module,)
        self.attribute = attribute
        self.parameter_name = f"{name}.{attribute}" if name else attribute

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.rows} x {self.columns})"

    @property
    def parameter(self) -> nn.Parameter:
        """What holds the matrix, as the module has it at this moment."""
        parameter = listed_parameter(self.modules[0], self.attribute)
        if parameter is None:
            raise ValueError(f"Site: expected {self.name!r} to have a parameter {self.attribute!r}, but got None")
        return parameter

    @property
    def matrix(self) -> Tensor:
        """The weight as [N, K], a view of the parameter."""
        return self.of_parameter(self.parameter)

    @abstractmethod
    def of_parameter(self, values: Tensor) -> Tensor:
        """The weight as [N, K], a view of values that are laid out as the parameter is."""

    @property
    def rows(self) -> int:
        """N, out features."""
        return self.matrix.shape[0]

    @property
    def columns(self) -> int:
        """K, in features."""
        return self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.parameter.dtype

    def read(self) -> Tensor:
        """A copy of the weight on the CPU, [N, K], contiguous."""
        used_parameter(self.modules[0], self.attribute)
        return self.matrix.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def write(self, values: Tensor) -> None:
        """Replaces the weight, for every module that uses it, in the parameter's dtype and on its device.

        Args:
            values: [N, K].

        Raises:
            ValueError: for another shape, or where the parameter has no memory (device "meta").
        """
        used_parameter(self.modules[0], self.attribute)
        matrix = self.matrix
        if values.shape != matrix.shape:
            raise ValueError(
                f"Site: expected values for {self.name!r} to have shape {list(matrix.shape)}, "
                f"but got shape {list(values.shape)}"
            )
        if matrix.device.type == "meta":
            raise ValueError(f"Site: expected {self.name!r} to have memory to write to, but got device meta")
        with torch.inference_mode(matrix.is_inference()), torch.no_grad():
            matrix.copy_(values)

    @property
    def geometry(self) -> Hashable:
        """What :meth:`tokens` depends on beside the source: sites of equal geometry make the same tokens of it."""
        return None

    def tokens(self, source: Tensor) -> Tensor:
        """Inputs of the matrix: of what is given to the module, the rows that it is multiplied with.

        Args:
            source: the module's input.

        Returns:
            [..., K], a view where it can be one.
        """
        return source


class LinearSite(Site):
    """The weight [N, K] of a ``torch.nn.Linear``."""

    def of_parameter(self, values: Tensor) -> Tensor:
        """[N, K]."""
        return values


class TransposedSite(Site):
    """The weight [K, N] of transformers' ``Conv1D``."""

    def of_parameter(self, values: Tensor) -> Tensor:
        """[N, K]."""
        return values.T


class ConvolutionSite(Site):
    """The weight [N, C, *kernel] of a convolution with one group; K = C * kernel elements."""

    def of_parameter(self, values: Tensor) -> Tensor:
        """[N, K]."""
        return values.flatten(1)

    def write(self, values: Tensor) -> None:
        """As of any site; a weight in another memory layout (channels last) has no [N, K] view."""
        parameter = used_parameter(self.modules[0], self.attribute)
        if not parameter.is_contiguous() and values.shape == self.matrix.shape:
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                parameter.copy_(values.reshape(parameter.shape))
            return
        super().write(values)

    @property
    def geometry(self) -> Hashable:
        """Kernel, stride, padding and dilation."""
        module: Any = self.modules[0]
        padding = tuple(module._reversed_padding_repeated_twice)  # noqa: SLF001  (the numbers behind "same")
        return module.kernel_size, module.stride, padding, module.padding_mode, module.dilation

    def tokens(self, source: Tensor) -> Tensor:
        """[B, *positions, K] of the input [B, C, *sizes] (or both without B): what each kernel position covers."""
        geometry: Any = self.geometry
        kernel, stride, padding, padding_mode, dilation = geometry
        batched = source if source.dim() == len(kernel) + 2 else source.unsqueeze(0)
        if any(padding):
            batched = functional.pad(batched, padding, mode="constant" if padding_mode == "zeros" else padding_mode)
        for dimension, (size, step, spread) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
            batched = batched.unfold(dimension, (size - 1) * spread + 1, step)[..., ::spread]
        dimensions = len(kernel)  # now [B, C, *positions, *kernel]
        positions = range(2, 2 + dimensions)
        batched = batched.permute(0, *positions, 1, *range(2 + dimensions, 2 + 2 * dimensions))
        tokens = batched.flatten(1 + dimensions)
        return tokens if source.dim() == dimensions + 2 else tokens.squeeze(0)


class ExpertSite(Site):
    """The matrix of one expert in a parameter [E, N, K], or [E, K, N] where the module multiplies from the left."""

    def __init__(self, name: str, module: nn.Module, attribute: str, expert: int, *, transposed: bool) -> None:
        super().__init__(name, module, attribute)
        self.name = f"{self.parameter_name}.{expert}"
        self.expert = expert
        self.transposed = transposed

    def of_parameter(self, values: Tensor) -> Tensor:
        """[N, K]."""
        matrix = values[self.expert]
        return matrix.T if self.transposed else matrix


_EXPERT = re.compile(r"(?P<module>(?:.*\.)?\w*experts?\.)\d+(?P<rest>\..+)")


def blocks_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Elements of outermost lists of modules, with their names."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield path, child
        else:
            yield from blocks_of(child, f"{path}.")


def siblings_of(site: Site) -> tuple[str, str] | None:
    """Equal for the same layer of different experts: their module, and which of its layers; None for other layers.

    Experts are the matrices of one fused parameter, or modules that are numbered below one whose name ends in "expert"
    or "experts".
    """
    if isinstance(site, ExpertSite):
        return site.parameter_name.rpartition(".")[0], site.attribute
    match = _EXPERT.fullmatch(site.name)
    return None if match is None else (match["module"], match["rest"])


@dataclass(frozen=True)
class LeftAlone:
    """A weight that is not quantized.

    Attributes:
        name: of the parameter.
        shape: its shape.
        reason: why, for a person.
    """

    name: str
    shape: tuple[int, ...]
    reason: str


class Found(NamedTuple):
    """What :func:`find_sites` found.

    Attributes:
        sites: in order of definition; of fused experts all matrices of expert 0, then of expert 1, and so on.
        left_alone: every other parameter of two or more dimensions that is no bias, in order of definition.
    """

    sites: tuple[Site, ...]
    left_alone: tuple[LeftAlone, ...]


def find_sites(model: nn.Module, *, output_embeddings: bool = False) -> Found:
    """The weights of a model that can be quantized, and those that cannot, with the reason.

    Args:
        model: any module. It is not changed, and its weights may be on the device "meta".
        output_embeddings: whether the layer that gives the logits counts (``get_output_embeddings()`` of a model of
            transformers, and a Linear whose weight is an embedding's too). Where its weight is tied to an embedding,
            the embedding is changed with it.

    Raises:
        TypeError: where `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_sites: expected model to be a torch.nn.Module, but got {type(model).__name__}")
    outputs = _output_modules(model)
    embeddings = {
        _memory(parameter): f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and (parameter := module._parameters.get("weight")) is not None  # noqa: SLF001
    }
    sites: dict[Hashable, list[Site]] = {}
    left_alone: list[LeftAlone] = []
    modules: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        again = id(module) in modules
        modules.add(id(module))
        parameters = {key: value for key, value in module._parameters.items() if value is not None}  # noqa: SLF001
        for attribute, parameter in parameters.items():
            if isinstance(parameter, nn.parameter.UninitializedParameter) or _is_no_weight(attribute, parameter):
                continue
            memory = _memory(parameter)
            reason = None
            is_output = id(module) in outputs or (isinstance(module, nn.Linear) and memory in embeddings)
            if is_output and not output_embeddings:
                reason = "output embeddings: quantized only where asked for"
                if memory in embeddings:
                    reason += f"; the weight is also {embeddings[memory]}"
            found = reason or _sites_of(name, module, attribute, parameter)
            if not isinstance(found, str) and memory in sites:  # again: in another module, or under another name
                if _layout(found[0]) == _layout(sites[memory][0]):
                    for site, other in zip(sites[memory], found, strict=True):
                        site.aliases = (*site.aliases, other.name)
                        site.modules = (*site.modules, *(() if again else other.modules))
                    continue
                found = f"shares memory with {sites[memory][0].parameter_name}, which lays it out otherwise"
            if isinstance(found, str):
                if not again:
                    full = f"{name}.{attribute}" if name else attribute
                    left_alone.append(LeftAlone(full, tuple(parameter.shape), found))
            else:
                sites[memory] = found
    return Found(tuple(_expert_by_expert(sites.values())), tuple(left_alone))


def _is_no_weight(attribute: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a norm's or a bias, of experts too: what nobody expects to be quantized."""
    return parameter.dim() < 2 or attribute.endswith("bias")


def _layout(site: Site) -> Hashable:
    """Sites in the same memory are the same matrix where this is equal, too."""
    parameter = site.parameter
    return type(site), tuple(parameter.shape), parameter.stride(), site.geometry, getattr(site, "transposed", False)


def _memory(parameter: Tensor) -> Hashable:
    """Equal for parameters that share their memory."""
    if parameter.device.type == "meta" or parameter.layout != torch.strided or not parameter.numel():
        return id(parameter)
    try:
        return parameter.device, parameter.data_ptr(), parameter.numel(), parameter.dtype
    except RuntimeError:  # a tensor subclass without memory of its own
        return id(parameter)


def _output_modules(model: nn.Module) -> set[int]:
    """The ids of modules that some part of the model names as its output embeddings."""
    found: set[int] = set()
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        if not callable(getter):
            continue
        try:
            outputs = getter()
        except (AttributeError, NotImplementedError):  # a model of transformers that has none
            continue
        found.update(id(output) for output in (outputs if isinstance(outputs, (list, tuple)) else [outputs]))
    return found


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return conv1d is not None and isinstance(module, conv1d)


def _sites_of(name: str, module: nn.Module, attribute: str, parameter: nn.Parameter) -> list[Site] | str:
    """The sites that a parameter of two or more dimensions holds, or why it holds none."""
    kind = type(module).__name__
    sites: list[Site] | str = f"a parameter of {kind}, which is no kind of module that is known here"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        sites = "an embedding"
    elif attribute in EXPERTS and parameter.dim() == 3:
        transposed = _experts_are_transposed(module)
        if transposed is None:
            sites = f"a parameter of {kind}, and which of its dimensions are the inputs is not known"
        else:
            sites = [ExpertSite(name, module, attribute, e, transposed=transposed) for e in range(len(parameter))]
    elif attribute != "weight":
        pass
    elif isinstance(module, nn.Linear):
        sites = [LinearSite(name, module, attribute)]
    elif _is_conv1d_of_transformers(module):
        sites = [TransposedSite(name, module, attribute)]
    elif isinstance(module, CONVOLUTIONS):
        grouped = f"a convolution with {module.groups} groups, each with inputs of its own"
        sites = grouped if module.groups > 1 else [ConvolutionSite(name, module, attribute)]
    return sites if isinstance(sites, str) else _no_plain_matrix(parameter) or sites


def _no_plain_matrix(parameter: nn.Parameter) -> str | None:
    """Why the values of a parameter cannot be read and replaced; None where they can."""
    if type(parameter) not in (nn.Parameter, Tensor):
        return f"its weight is a {type(parameter).__module__}.{type(parameter).__qualname__}, which is no plain tensor"
    if parameter.layout != torch.strided:
        return f"its weight has the layout {str(parameter.layout).removeprefix('torch.')}"
    if parameter.dtype not in FLOATING:
        return f"its weight is {str(parameter.dtype).removeprefix('torch.')}"
    return None if parameter.numel() else "its weight is empty"


def _experts_are_transposed(module: nn.Module) -> bool | None:
    """Whether experts' matrices are stored as [K, N]; None where nothing tells.

    transformers' decorator says it. Otherwise: outputs of down_proj are as many as inputs of the other projection.
    """
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    parameters = module._parameters  # noqa: SLF001  (attributes may be shadowed)
    first, down = parameters.get("gate_up_proj"), parameters.get("down_proj")
    first = parameters.get("up_proj") if first is None else first
    if first is None or down is None or first.dim() != 3 or down.dim() != 3:
        return None
    linear, transposed = down.shape[1] == first.shape[2], down.shape[2] == first.shape[1]
    return None if linear == transposed else transposed


def _expert_by_expert(groups: Sequence[list[Site]] | Any) -> Iterator[Site]:
    """Sites in order, those of one module of fused experts by expert: the order in which its loop comes to them."""
    pending: list[Site] = []

    def flush() -> Iterator[Site]:
        yield from sorted(pending, key=lambda site: site.expert)  # type: ignore[attr-defined]  # experts only
        pending.clear()

    for sites in groups:
        if pending and sites[0].modules[0] is not pending[0].modules[0]:
            yield from flush()
        if isinstance(sites[0], ExpertSite):
            pending.extend(sites)
        else:
            yield from flush()
            yield from sites
    yield from flush()


# Where a site is used


@contextmanager
def watch(sites: Sequence[Site], reached: Reached) -> Iterator[None]:
    """While entered, calls ``reached(site, source)`` right before a site's weight is used, with the module's input.

    The weight that is then used is the one that the site has when `reached` returns. Modules of fused experts run their
    own loop over experts meanwhile (transformers' implementation "eager"), since the others take all experts at once.

    Raises:
        TypeError: in the forward pass, where experts' weights are used in a way in which the inputs of each cannot be
            told.
    """
    with ExitStack() as stack:
        experts: dict[tuple[nn.Module, str], dict[int, ExpertSite]] = {}
        for site in sites:
            for module in site.modules:
                if isinstance(site, ExpertSite):
                    experts.setdefault((module, site.attribute), {})[site.expert] = site
                else:
                    handle = module.register_forward_pre_hook(_hook(site, reached), with_kwargs=True)
                    stack.callback(handle.remove)
        for (module, attribute), of_expert in experts.items():
            stack.enter_context(_eager_experts(module))
            # An instance attribute goes before the parameter of that name, which stays where it is.
            name = next(iter(of_expert.values())).parameter_name
            module.__dict__[attribute] = _Experts(module, attribute, name, of_expert, reached)
            stack.callback(module.__dict__.pop, attribute, None)
        yield


def _hook(site: Site, reached: Reached) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if not isinstance(source, Tensor):
            raise TypeError(
                f"watch: expected {type(module).__name__} {site.name!r} to be called with a tensor, "
                f"but got {type(source).__name__}"
            )
        reached(site, source)

    return hook


@contextmanager
def _eager_experts(module: nn.Module) -> Iterator[None]:
    """The experts' own loop, where transformers' decorator chooses an implementation by the module's config."""
    config: Any = getattr(module, "config", None)
    name = "_experts_implementation_internal"  # the property would set it in nested configs as well
    if config is None or name not in vars(config):
        yield
        return
    before = getattr(config, name)
    setattr(config, name, "eager")
    try:
        yield
    finally:
        setattr(config, name, before)


_LINEAR = functional.linear
PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_BATCHED = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
_PLAIN = frozenset({"shape", "size", "dim", "ndim", "dtype", "device", "numel", "requires_grad", "is_cuda", "is_meta"})


def expert_of(index: object) -> int | str:
    """The number of the expert that an index means; what it is where it is none of one expert."""
    if isinstance(index, Tensor) and index.numel() == 1 and not index.is_floating_point() and index.dim() == 0:
        return int(index)
    if isinstance(index, int) and not isinstance(index, bool):
        return index
    return f"a tensor of shape {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__


class StandIn:
    """Stands for a tensor of which torch's functions see only how it is used."""

    def __rmatmul__(self, other: Tensor) -> Tensor:
        """Python asks here where x @ weight was refused, and would hide why."""
        return torch.matmul(other, self)  # type: ignore[arg-type]  # refused again


class _Experts(StandIn):
    """Stands for a parameter of fused experts: tells which expert's matrix is used, with which inputs."""

    def __init__(
        self, module: nn.Module, attribute: str, name: str, of_expert: Mapping[int, ExpertSite], reached: Reached
    ) -> None:
        self._module = module
        self._attribute = attribute
        self._name = name
        self._of_expert = of_expert
        self._reached = reached

    @property
    def _parameter(self) -> Tensor:
        parameter = listed_parameter(self._module, self._attribute)
        if parameter is None:
            raise ValueError(f"watch: expected {self._name} to be a parameter, but got None")
        return parameter

    def _refuse(self, use: str) -> TypeError:
        return TypeError(
            f"watch: expected {self._name} to be used one expert at a time (x @ weight[e], linear(x, weight[e]), or "
            f"bmm of all), but got {use}: leave these experts out"
        )

    def __getattr__(self, name: str) -> Any:
        if name in _PLAIN:
            return getattr(self._parameter, name)
        raise self._refuse(f".{name}")

    def __len__(self) -> int:
        return len(self._parameter)

    def __getitem__(self, index: object) -> "_Expert":
        number = expert_of(index)
        if isinstance(number, str):
            raise self._refuse(f"an index that is {number}")
        return _Expert(self, range(len(self._parameter))[number], transposed=False)

    def __iter__(self) -> Iterator["_Expert"]:
        return (self[expert] for expert in range(len(self)))

    def use(self, expert: int, source: Tensor) -> Tensor:
        """Says that an expert is reached; gives its matrix as stored."""
        site = self._of_expert.get(expert)
        if site is not None:
            self._reached(site, source)
        matrix: Tensor = used_parameter(self._module, self._attribute)[expert]
        return matrix

    def stored_transposed(self) -> bool:
        """Whether matrices are [K, N]."""
        return next(iter(self._of_expert.values())).transposed

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, cls))
        # x [E, tokens, K] @ weight [E, K, N]: every expert with its own
        if func in _BATCHED and len(args) == 2 and args[1] is self and isinstance(args[0], Tensor) and not kwargs:
            if args[0].dim() != 3 or not self.stored_transposed():
                raise self._refuse(f"{func.__name__} of an input of shape {list(args[0].shape)}")
            for expert in range(len(self)):
                self.use(expert, args[0][expert])
            return func(args[0], used_parameter(self._module, self._attribute))
        raise self._refuse(getattr(func, "__name__", str(func)))


class _Expert(StandIn):
    """Stands for the matrix of one expert, transposed or as stored."""

    def __init__(self, experts: _Experts, expert: int, *, transposed: bool) -> None:
        self._experts = experts
        self._expert = expert
        self._transposed = transposed

    @property
    def _stored(self) -> Tensor:
        matrix = self._experts._parameter[self._expert]  # noqa: SLF001  (its other half)
        return matrix.T if self._transposed else matrix

    def __getattr__(self, name: str) -> Any:
        if name in ("T", "mT"):
            return self.t()
        if name in _PLAIN:
            return getattr(self._stored, name)
        raise self._experts._refuse(f".{name} of an expert's matrix")  # noqa: SLF001

    def t(self) -> "_Expert":
        """The matrix transposed."""
        return _Expert(self._experts, self._expert, transposed=not self._transposed)

    def transpose(self, first: int, second: int) -> "_Expert":
        """The matrix with two dimensions swapped."""
        return self if first % 2 == second % 2 else self.t()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        self = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, cls))
        experts = self._experts
        given = (*args, *(kwargs.pop(name) for name in ("weight", "mat2", "other") if name in kwargs))
        if len(given) >= 2 and given[1] is self and isinstance(given[0], Tensor):
            # A linear function takes [N, K], a product [K, N].
            if func is _LINEAR:
                inputs_last = True
            elif func in PRODUCTS:
                inputs_last = False
            else:
                raise experts._refuse(f"{getattr(func, '__name__', func)} of an expert's matrix")  # noqa: SLF001
            stored_inputs_last = inputs_last != self._transposed
            if stored_inputs_last == experts.stored_transposed():
                raise experts._refuse(f"{func.__name__} with the inputs along the other dimension")  # noqa: SLF001
            matrix = experts.use(self._expert, given[0])
            return func(given[0], matrix.T if self._transposed else matrix, *given[2:], **kwargs)
        raise experts._refuse(f"{getattr(func, '__name__', func)} of an expert's matrix")  # noqa: SLF001

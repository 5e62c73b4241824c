"""A model of which only the parts in use are in memory: its weights are read from a folder when a batch needs them.

The model is built without weights. A *block* is an element of an outermost ``ModuleList``: a decoder layer, an encoder
layer. When a batch enters a block whose weights are not there, they are read; before that, whatever no batch is in is
dropped. In a walk (:mod:`miniquant.walk`) a batch that comes to a block first lets all others leave the one before::

    with LazyModel("Llama-3.1-8B") as lazy:
        lazy.restore = restore  # writes finished layers of a parameter that is read once more
        quantize_model(lazy.model, calibration, recipe, progress=store)

A module outside of blocks (embeddings, final norm, head) is read as a part of its own. What is used without its module
being called, as in ``linear(x, self.embed.weight)``, is read when it is looked up, and dropped the same way.

Memory
    Let B be the bytes of the largest block in the dtype of the model, or of the largest module outside of blocks; F
    those of the largest parameter that several tensors are joined to (fused experts), T of the largest tensor of the
    files in its dtype there, where that is another. Then the weights take, at any moment of a walk whose batches all
    run the same modules, at most ::

        B + max(2 F, T) + buffers

    which does not depend on how many blocks there are. To it come what the walk holds (the activations of paused
    batches: those of one block, for all tokens) and what the solver holds (Hessians, (2 + 1) K^2 * 4 bytes for halves
    and held-out tokens, and about as much again while it solves). Where batches are in several blocks at once, as where
    only some have an image, each of these blocks is in memory; where experts saw too few tokens of their own and are
    quantized after their block was left, the parameter that holds them is, beside the next block.
    :attr:`LazyModel.peak_bytes` says what it came to.

A model is read once by a walk. Outside of one, each pass reads it anew.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from miniquant.architecture import Conversion, build_model, find_sources
from miniquant.checkpoint import Checkpoint
from miniquant.modules import blocks_of
from miniquant.walk import to_device, wait_for_others


class LazyModel:
    """A model whose weights are read from its folder when they are used; see the module.

    Args:
        folder: of a model as transformers saves it: config.json and safetensors files; or what reads one.
        dtype: of the model; None: what the config says.
        device: where the model runs. Batches are taken there.
        trust_remote_code: whether code of the folder may run, which some architectures are defined by.
        keep: whether what was read stays in memory, for who has enough of it and wants nothing read twice.

    Raises:
        FileNotFoundError, ValueError, OSError: for a folder that is none of a model, or a damaged one; for one that is
            quantized already; for weights that do not fit the architecture. All of that before a weight is read.
        ImportError: without transformers.

    Attributes:
        model: an ``nn.Module`` of transformers, whose parameters are on the device "meta" but for those in use.
        checkpoint: the folder's tensors.
        unused: names of tensors that the model has no place for.
        restore: called with the name of a parameter that was written to, and dropped, and is read once more: writes to
            it what it is to have (:meth:`miniquant.modules.Site.write`). Without it, such a parameter is an error.
        loaded_bytes: of the weights in memory.
        peak_bytes: the most that these were.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | Checkpoint,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        *,
        trust_remote_code: bool = False,
        keep: bool = False,
    ) -> None:
        self.checkpoint = folder if isinstance(folder, Checkpoint) else Checkpoint(folder)
        if (quantized := self.checkpoint.config.get("quantization_config")) is not None:
            method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
            raise ValueError(
                f"LazyModel: {self.checkpoint.folder}: expected a model that is not quantized, but got one with a "
                f"quantization_config of {method!r} in config.json"
            )
        self.model: Any = build_model(self.checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)
        sources = find_sources(self.model, self.checkpoint)
        self.unused = sources.unused
        self.restore: Callable[[str], None] | None = None
        self._device = torch.device(device)
        self._keep = keep
        self._sources = sources.conversions
        self._parts = _parts_of(self.model, sources.conversions)
        self._of_name = {name: part for part in self._parts for name in part.names}
        self._of_meta = {id(part.meta): part for part in self._parts}
        self._of_conversion: dict[Conversion, list[_Part]] = {}
        for part in self._parts:
            self._of_conversion.setdefault(part.conversion, []).append(part)
        self._unit_bytes = self._sizes()
        self._loaded: dict[_Part, None] = {}
        self._busy = False
        self._stack: ExitStack | None = None
        self.loaded_bytes = self.peak_bytes = 0

    def source_names(self, parameter_name: str) -> tuple[str, ...]:
        """The tensors of the checkpoint that a parameter is made from: one, but where several are fused.

        Raises:
            KeyError: for another name than one of ``model.named_parameters()``.
        """
        if parameter_name not in self._of_name:
            raise KeyError(f"LazyModel: expected the name of a parameter, but got {parameter_name!r}")
        return self._of_name[parameter_name].conversion.sources

    def is_plain(self, parameter_name: str) -> bool:
        """Whether a parameter is one tensor of the checkpoint as it is, but for the dtype.

        Raises:
            KeyError: as of :meth:`source_names`.
        """
        self.source_names(parameter_name)
        return self._of_name[parameter_name].conversion.plain

    def read(self, parameter_name: str) -> Tensor:
        """The values that the checkpoint has for a parameter, on the CPU, in memory of their own.

        Raises:
            KeyError: as of :meth:`source_names`.
            ValueError, OSError: where they cannot be read.
        """
        self.source_names(parameter_name)
        part = self._of_name[parameter_name]
        return part.conversion.read()[part.source]

    def unit_bytes(self) -> dict[str, int]:
        """Bytes of what is read at once, by name of a block, or of a module outside of blocks."""
        return dict(self._unit_bytes)

    def _sizes(self) -> dict[str, int]:
        blocks = dict(blocks_of(self.model))
        inside = {id(module) for block in blocks.values() for module in block.modules()}
        loose = {name: module for name, module in self.model.named_modules() if id(module) not in inside}
        sizes = {}
        for name, module in {**loose, **blocks}.items():
            parts = self._parts_in(module.modules() if name in blocks else (module,))
            if parts:
                sizes[name] = sum({part.conversion: part.conversion.nbytes for part in parts}.values())
        return sizes

    def __enter__(self) -> "LazyModel":  # noqa: PYI034  (Self is of Python 3.11)
        if self._stack is not None:
            raise RuntimeError("LazyModel: expected to be entered once at a time, but got entered again")
        with ExitStack() as stack:
            stack.callback(self._drop_all)
            self._place_buffers()
            blocks = [module for _, module in blocks_of(self.model)]
            for module in blocks:
                self._watch(stack, module, self._parts_in(module.modules()))
            whole = {id(module) for module in blocks}
            for module in self.model.modules():
                if any(parameter is not None for parameter in module._parameters.values()):  # noqa: SLF001
                    if id(module) not in whole:
                        self._watch(stack, module, self._parts_in((module,)))
                    stack.enter_context(_Lookup(module, self._looked_up))
                if isinstance(getattr(type(module), "device", None), property):
                    stack.enter_context(_OnDevice(module, self._device))
            if self._device.type != "cpu":
                taken = self.model.register_forward_pre_hook(self._take_batch, with_kwargs=True)
                stack.callback(taken.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()

    def _parts_in(self, modules: Iterator[nn.Module] | tuple[nn.Module, ...]) -> list["_Part"]:
        listed = [one for module in modules for one in module._parameters.values() if one is not None]  # noqa: SLF001
        return list(dict.fromkeys(self._of_meta[id(parameter)] for parameter in listed))

    def _watch(self, stack: ExitStack, module: nn.Module, parts: list["_Part"]) -> None:
        """Reads parts before a module runs, and holds on to them while it does."""

        def before(*_: Any) -> None:
            if any(part not in self._loaded for part in parts):
                if self._loaded:
                    wait_for_others()
                self._drop_idle(but=parts)
                for part in parts:
                    self._read(part)
            for part in parts:
                part.users.append(greenlet.getcurrent())

        def after(*_: Any) -> None:
            current = greenlet.getcurrent()
            for part in parts:
                if current in part.users:  # not where the call failed before it came to `before`
                    part.users.remove(current)

        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after, always_call=True).remove)

    def _looked_up(self, parameter: nn.Parameter) -> bool:
        """Reads a parameter that is used and not there; whether there was one to read."""
        if self._busy:
            return False
        part = self._of_meta.get(id(parameter))
        if part is None:
            return False
        if self._loaded:
            wait_for_others()
        self._drop_idle(but=[part])
        self._read(part)
        return True

    def _read(self, part: "_Part") -> None:
        """Reads a part, and whatever else its tensors hold."""
        if part in self._loaded:
            return
        missing = [other for other in self._of_conversion[part.conversion] if other not in self._loaded]
        self._busy = True  # rules of transformers ask the model for shapes
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                values = part.conversion.read(self._device)
                for other in missing:
                    other.place(values[other.source])
                    self._loaded[other] = None
                    self.loaded_bytes += other.nbytes
        finally:
            self._busy = False
        self.peak_bytes = max(self.peak_bytes, self.loaded_bytes)
        for other in missing:
            self._restore(other)

    def _restore(self, part: "_Part") -> None:
        if not part.is_written:
            return
        if self.restore is None:
            raise RuntimeError(
                f"LazyModel: expected restore to be set, but got None: parameter {part.names[0]!r} was written to, and "
                "is needed again after it was dropped"
            )
        for name in part.names:
            self.restore(name)

    def _drop_idle(self, *, but: list["_Part"]) -> None:
        """Drops what no batch is in."""
        if self._keep:
            return
        idle = [one for one in self._loaded if not one.in_use() and one not in but]
        for part in idle:
            self._drop(part)
        if idle:
            give_back_memory()

    def _drop(self, part: "_Part") -> None:
        part.remove()
        del self._loaded[part]
        self.loaded_bytes -= part.nbytes

    def _drop_all(self) -> None:
        for part in list(self._loaded):
            part.users.clear()
            self._drop(part)

    def _place_buffers(self) -> None:
        """Reads buffers that the files hold, and takes all to the device."""
        for prefix, module in self.model.named_modules():
            for attribute, buffer in module._buffers.items():  # noqa: SLF001
                if buffer is None:
                    continue
                name = f"{prefix}.{attribute}".lstrip(".")
                source = self._sources.get(name)
                value = buffer if source is None else source.read(self._device)[name]
                module._buffers[attribute] = value.to(self._device)  # noqa: SLF001

    def _take_batch(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return to_device(args, self._device), to_device(kwargs, self._device)


def give_back_memory() -> None:
    """Has the allocator return what is free to the system.

    glibc's keeps freed tensors of up to 32 MB between others: what the process takes would grow with every block,
    though no more is in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Part:
    """A parameter, under all of its names.

    Attributes:
        names: in the state dict.
        places: modules and attributes that have it.
        meta: what is there while it is not in memory.
        source: the name that `conversion` has for it.
        conversion: what it is read by.
        users: coroutines that are in a module that uses it, once for each call.
        is_written: whether it ever had other values than the checkpoint's.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        places: list[tuple[nn.Module, str]],
        meta: nn.Parameter,
        source: str,
        conversion: Conversion,
    ) -> None:
        self.names = names
        self.places = places
        self.meta = meta
        self.source = source
        self.conversion = conversion
        self.nbytes = meta.numel() * meta.element_size()
        self.users: list[greenlet.greenlet] = []
        self.is_written = False
        self._version = 0

    def in_use(self) -> bool:
        """Whether a batch is in a module that uses it; one that was ended in it is not any more."""
        self.users = [user for user in self.users if not user.dead]
        return bool(self.users)

    def place(self, value: Tensor) -> None:
        """Gives it its values."""
        parameter = nn.Parameter(value, requires_grad=False)
        self._version = parameter._version  # noqa: SLF001  (the count of writes)
        self._set(parameter)

    def remove(self) -> None:
        """Lets go of its values."""
        module, attribute = self.places[0]
        parameter = module._parameters.get(attribute)  # noqa: SLF001
        self.is_written |= parameter is not None and parameter._version != self._version  # noqa: SLF001
        self._set(self.meta)

    def _set(self, parameter: nn.Parameter) -> None:
        for module, attribute in self.places:
            module._parameters[attribute] = parameter  # noqa: SLF001


def _parts_of(model: nn.Module, conversions: Mapping[str, Conversion]) -> list[_Part]:
    names: dict[int, list[str]] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    metas: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is None:
                continue
            metas[id(parameter)] = parameter
            names.setdefault(id(parameter), []).append(f"{prefix}.{attribute}".lstrip("."))
            found = places.setdefault(id(parameter), [])
            if not any(other is module and name == attribute for other, name in found):
                found.append((module, attribute))
    parts = []
    for key, meta in metas.items():
        source = next(name for name in names[key] if name in conversions)
        parts.append(_Part(tuple(names[key]), places[key], meta, source, conversions[source]))
    return parts


class _Lookup:
    """While entered, a parameter of a module that is looked up by its name is read first, where it is not in memory.

    Forward code does so (``self.weight``), and :func:`miniquant.modules.used_parameter`. Listing parameters does not.
    """

    def __init__(self, module: nn.Module, read: Callable[[nn.Parameter], bool]) -> None:
        self._module = module
        self._read = read

    def __enter__(self) -> None:
        self._module.__dict__["_parameters"] = _Parameters(self._module._parameters, self._read)  # noqa: SLF001

    def __exit__(self, *_: object) -> None:
        self._module.__dict__["_parameters"] = dict(self._module._parameters)  # noqa: SLF001


class _Parameters(dict[str, Any]):
    """A module's parameters by name."""

    def __init__(self, values: Mapping[str, Any], read: Callable[[nn.Parameter], bool]) -> None:
        super().__init__(values)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None and parameter.device.type == "meta" and self._read(parameter):
            return super().__getitem__(name)
        return parameter


class _OnDevice:
    """While entered, a model of transformers says that it is on a device, and not what its first parameter says.

    A property can only be replaced in a class, so the module gets a class of its own.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._kind = type(module)
        names = {"__module__": self._kind.__module__, "__qualname__": self._kind.__qualname__}
        namespace = {"device": property(lambda _: device), **names}
        self._with_device = type(self._kind.__name__, (self._kind,), namespace)

    def __enter__(self) -> None:
        self._module.__class__ = self._with_device

    def __exit__(self, *_: object) -> None:
        self._module.__class__ = self._kind

"""Which layers write to a residual stream, and what the stream is before them: found while the model runs.

In a transformer's block some outputs are added to what the block was given: ``h = h + self_attn(norm(h))``. No module
says so. When one batch first comes to a block of a class, the block therefore runs once more, only to be watched: where
what a module is given, or what the block gives back, is exactly ``r + output`` for the output of a layer and an input r
that a module of the block had before, the layer writes to a stream, and r is the stream before it. In all blocks of
that class the stream before this layer is then what that module was given.

Layers whose output goes elsewhere first, as through another norm, are not found.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from miniquant.modules import LinearSite, Site, TransposedSite, blocks_of


@dataclass
class _Rehearsal:
    """What is seen of a block that runs only to be watched.

    Attributes:
        given: what its modules were given so far, by their names.
        outputs: of its layers so far.
        found: by name of a layer that writes to a stream, the module that was given it.
    """

    given: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)

    def came(self, tensor: Tensor) -> None:
        """Compares what a module is given, or what the block gives back, with sums of what came before."""
        for layer, output in self.outputs.items():
            if layer not in self.found:
                source = next((name for name, r in self.given if _is_sum(tensor, r, output)), None)
                if source is not None:
                    self.found[layer] = source


@dataclass
class Streams:
    """What one batch keeps of the streams of the block that it is in.

    Attributes:
        is_watched: whether it is the batch that blocks are learned from.
        rehearsal: while it runs a block only to be watched.
        before: what modules were given that streams are known by, by the block's id and the module's name there.
    """

    is_watched: bool = False
    rehearsal: _Rehearsal | None = None
    before: dict[tuple[int, str], Tensor] = field(default_factory=dict)


def _is_sum(tensor: Tensor, r: Tensor, output: Tensor) -> bool:
    """Whether a tensor is r + output; it may have other dimensions for the tokens."""
    if tensor is r or r.shape != output.shape or tensor.shape[-1] != r.shape[-1] or tensor.numel() != r.numel():
        return False
    return torch.equal(tensor, (r + output).view_as(tensor)) and bool(output.any())


class Residuals:
    """The streams of a model's blocks.

    Args:
        model: whose blocks are the elements of its outermost lists of modules.
        sites: the layers whose streams are looked for.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self._blocks = dict(blocks_of(model))
        self._places: dict[int, tuple[nn.Module, str]] = {}  # by id of a site: its block, its name there
        for site in sites:
            name = next((name for name in self._blocks if site.name.startswith(f"{name}.")), None)
            if name is not None and type(site) in (LinearSite, TransposedSite) and len(site.modules) == 1:
                self._places[id(site)] = (self._blocks[name], site.name.removeprefix(f"{name}."))
        self._known: dict[type[nn.Module], dict[str, str]] = {}  # of blocks of a class: layer, module given the stream

    @contextmanager
    def watching(self, streams: Callable[[], Streams | None]) -> Iterator[None]:
        """While entered, notes streams as batches come to blocks.

        Args:
            streams: gives what the batch that runs at the moment keeps; None where it is nobody's.
        """
        with ExitStack() as stack:
            for block in dict.fromkeys(self._blocks.values()):
                for name, module in block.named_modules():
                    hook = self._before(block, name, streams)
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(_after_block(streams)).remove)
            for site_block, layer in self._places.values():
                module = site_block.get_submodule(layer)
                stack.callback(module.register_forward_hook(_after_layer(layer, streams)).remove)
            yield

    def before(self, site: Site, streams: Streams) -> Tensor | None:
        """The stream that a layer's output will be added to, in the batch that waits at it; None where none is known.

        Args:
            site: of the layer.
            streams: of the batch.
        """
        block, layer = self._places.get(id(site), (None, ""))
        if block is None:
            return None
        source = self._known.get(type(block), {}).get(layer)
        return None if source is None else streams.before.get((id(block), source))

    def _before(self, block: nn.Module, name: str, streams: Callable[[], Streams | None]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given, of_batch = _first_tensor((*args, *kwargs.values())), streams()
            if given is None or of_batch is None:
                return
            if of_batch.rehearsal is not None:
                of_batch.rehearsal.came(given)
                of_batch.rehearsal.given.append((name, given))
                return
            if of_batch.is_watched and not name and type(block) not in self._known:
                of_batch.rehearsal = _Rehearsal(given=[(name, given)])
                try:
                    self._known[type(block)] = _rehearsed(block, args, kwargs, of_batch.rehearsal)
                finally:
                    of_batch.rehearsal = None
            if name in self._known.get(type(block), {}).values():
                of_batch.before[id(block), name] = given

        return hook


def _rehearsed(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rehearsal: _Rehearsal
) -> dict[str, str]:
    """Runs a block with what it is about to be given: by name of a layer that writes to a stream, what was given it."""
    output = block.forward(*args, **kwargs)
    given_back = _first_tensor(output if isinstance(output, (tuple, list)) else (output,))
    if given_back is not None:
        rehearsal.came(given_back)
    return rehearsal.found


def _after_layer(layer: str, streams: Callable[[], Streams | None]) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        of_batch = streams()
        if of_batch is not None and of_batch.rehearsal is not None and isinstance(output, Tensor):
            of_batch.rehearsal.outputs[layer] = output

    return hook


def _after_block(streams: Callable[[], Streams | None]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        of_batch = streams()
        if of_batch is not None:
            of_batch.before.clear()

    return hook


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)

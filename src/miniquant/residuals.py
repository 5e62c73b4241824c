"""Which layers write to a residual stream, and what the stream is before them: found while the model runs.

In a transformer's block some outputs are added to what the block was given: ``h = h + self_attn(norm(h))``. No module
says so. One batch is therefore watched in the first block of each class; it runs ahead through the model's first block,
so that this one is known before anything is done to it. Where what a module is given, or what the
block gives back, is exactly ``r + output`` for the output of a layer and an input r that a module of the block had
before, the layer writes to a stream, and r is the stream before it. In all blocks of that class the stream before this
layer is then what that module was given.

Layers whose output goes elsewhere first, as through another norm, are not found. Those of the first block of a further
class, as a decoder's behind an encoder, are known only when it is over.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from miniquant.modules import LinearSite, Site, TransposedSite, blocks_of


@dataclass
class Streams:
    """What one batch keeps of the streams of the block that it is in.

    Attributes:
        is_watched: whether it is the batch that blocks are learned from.
        ends: whether it runs for no more than that: it ends with the first block that is learned.
    """

    is_watched: bool = False
    ends: bool = False
    _before: dict[tuple[int, str], Tensor] = field(default_factory=dict)  # by block and module: what it was given
    _given: list[tuple[str, Tensor]] = field(default_factory=list)
    _outputs: dict[str, Tensor] = field(default_factory=dict)  # by layer of the block
    _found: dict[str, str] = field(default_factory=dict)

    def clear(self) -> None:
        """Lets go of everything, when a block is left."""
        for held in (self._before, self._given, self._outputs, self._found):
            held.clear()

    def came(self, tensor: Tensor) -> None:
        """Compares what a module is given, or what the block gives back, with sums of what came before."""
        for layer, output in self._outputs.items():
            if layer not in self._found:
                source = next((name for name, r in self._given if _is_sum(tensor, r, output)), None)
                if source is not None:
                    self._found[layer] = source


def _is_sum(tensor: Tensor, r: Tensor, output: Tensor) -> bool:
    """Whether a tensor is r + output; it may have other dimensions for the tokens."""
    if tensor is r or r.shape != output.shape or tensor.shape[-1] != r.shape[-1] or tensor.numel() != r.numel():
        return False
    return torch.equal(tensor, (r + output).view_as(tensor)) and bool(output.any())


class Residuals:
    """The streams of a model's blocks.

    Args:
        model: whose blocks are the elements of its outermost lists of modules.
        sites: the layers that are asked for.
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
            for site_block, layer in self._places.values():
                after_layer = self._after_layer(site_block, layer, streams)
                stack.callback(site_block.get_submodule(layer).register_forward_hook(after_layer).remove)
            for block in dict.fromkeys(self._blocks.values()):
                stack.callback(block.register_forward_hook(self._after_block(block, streams)).remove)
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
        return None if source is None else streams._before.get((id(block), source))  # noqa: SLF001  (a part of it)

    def _before(self, block: nn.Module, name: str, streams: Callable[[], Streams | None]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given, of_batch = _first_tensor((*args, *kwargs.values())), streams()
            if given is None or of_batch is None:
                return
            known = self._known.get(type(block))
            if known is not None:
                if name in known.values():
                    of_batch._before[id(block), name] = given  # noqa: SLF001
            elif of_batch.is_watched:
                of_batch.came(given)
                of_batch._given.append((name, given))  # noqa: SLF001

        return hook

    def _after_layer(self, block: nn.Module, layer: str, streams: Callable[[], Streams | None]) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            of_batch = streams()
            if of_batch is not None and of_batch.is_watched and type(block) not in self._known:
                of_batch._outputs[layer] = output  # noqa: SLF001

        return hook

    def _after_block(self, block: nn.Module, streams: Callable[[], Streams | None]) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            of_batch = streams()
            if of_batch is None:
                return
            if of_batch.is_watched and type(block) not in self._known:
                given_back = _first_tensor(output if isinstance(output, (tuple, list)) else (output,))
                if given_back is not None:
                    of_batch.came(given_back)
                self._known[type(block)] = dict(of_batch._found)  # noqa: SLF001
            of_batch.clear()
            if of_batch.ends:
                raise greenlet.GreenletExit

        return hook


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)

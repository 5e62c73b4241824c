"""One forward pass of a model over all calibration batches, paused at every weight to be quantized.

Each batch is a coroutine (a greenlet) that runs the model's own forward pass. It pauses when it reaches a site. When
every batch waits or has ended, one site is handed out with the inputs at hand; whoever takes it replaces the weight,
and the batches that wait there go on. So every layer sees what the quantized layers before it give, after one pass, and
masks, position embeddings and branches are the model's own::

    with Walk(model, batches, find_sites(model).sites) as walk:
        for visit in walk:
            accumulator = HessianAccumulator(visit.site.columns, halves=True)
            for given in visit.inputs:
                accumulator.update(given.tokens(), mask=given.mask)
            visit.site.write(dequantize(gptq_auto(visit.site.read(), accumulator)))

Which site comes first
    Batches may wait at different sites: one routes no token to an expert, another has no image. A site must not be
    handed out while a batch that waits elsewhere is still to come to it, since its inputs would be missing. Experts of
    one module run in their order. Otherwise the walk looks ahead: batches run once more without a pause, one after
    another and each once at most, until it is known which of the sites comes before the others. Where that stays open,
    the one that is defined first goes first. A batch that comes to a site after all when it is quantized already goes
    on, and :attr:`Walk.late` says so. A model whose batches all run the same modules needs none of this: then all wait
    at one site.

Several processes
    Each walks with batches of its own, and all hand out the same sites in the same order: at every site they tell one
    another where their batches wait, and what was seen by looking ahead. A process none of whose batches comes to a
    site hands it out without inputs.

Memory
    What is kept for a site is what its batches hold anyway: a module's input lives as long as the call that waits. No
    input is copied, and what a convolution unfolds is made for one batch at a time. So a walk holds, for each batch,
    what its forward pass holds at that point (no cache of keys and values, nothing for gradients), and nothing more.

State of torch
    Gradients, inference mode, autocast and the stacks of torch's function and dispatch modes belong to a thread, and
    batches take turns on one. Each batch keeps its own: a block under ``no_grad`` or ``autocast`` in which a batch
    pauses is not seen by another, nor by whoever takes the sites. Batches start without gradients. What is global to
    the process (default dtype, random number generators, backend flags) is not kept apart.
"""

import contextvars
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from miniquant._torch_state import TorchState, evaluation_mode
from miniquant.modules import ExpertSite, Site, siblings_of, watch
from miniquant.residuals import Residuals, Streams

MASKS = ("attention_mask", "decoder_attention_mask")
_REMEMBERED = 4  # visits whose inputs a later site is compared with: q, k, v; gate, up; branches side by side


class WalkError(RuntimeError):
    """A batch's forward pass failed; the cause is the error it raised.

    Attributes:
        batch: its number.
        site: the last site that it came to, if any.
    """

    def __init__(self, message: str, batch: int, site: Site | None) -> None:
        super().__init__(message)
        self.batch = batch
        self.site = site


@dataclass(eq=False)
class Given:
    """What one batch gives to a site.

    Attributes:
        batch: the batch's number.
        source: the input of the module that uses the weight.
        mask: bool, of the leading dimensions of :meth:`tokens`; False is padding. None: every token counts.
        original: the module's input in the model whose weights are as they were, where the walk has one beside.
        stream: what the module's output will be added to, [..., N], where the walk looks for it and it is known
            (:mod:`miniquant.residuals`).
        original_stream: the same in the model whose weights are as they were.
    """

    batch: int
    source: Tensor
    mask: Tensor | None
    _site: Site
    original: Tensor | None = None
    stream: Tensor | None = None
    original_stream: Tensor | None = None

    def tokens(self) -> Tensor:
        """The inputs of the weight, [..., K]."""
        return self._site.tokens(self.source)

    def original_tokens(self) -> Tensor | None:
        """The same in the model whose weights are as they were; None without one."""
        return None if self.original is None else self._site.tokens(self.original)


@dataclass(eq=False)
class Visit:
    """A site at which batches wait.

    Attributes:
        site: whose weight may be replaced now.
        inputs: what each batch that waits gives to it, by number of the batch; emptied when the walk goes on.
        inputs_id: equal for two sites that are given the same tensors, unchanged in between, by the same batches: their
            Hessians are equal.
    """

    site: Site
    inputs: list[Given]
    inputs_id: int


class Walk:
    """The paused pass. Iterating gives a :class:`Visit` for each site that a batch reaches, in order of execution.

    While entered, the model is in evaluation mode and its configs have no cache; leaving puts everything back, also
    after an error or a ``break``: hooks, modes, and batches, which end where they wait. After the last site, a batch
    that has come to all of them is not run to its end, unless `ended` is given.

    Args:
        model: any module on memory; sites' weights may be replaced, nothing else is changed.
        batches: what the model is called with: keyword arguments (a mapping), arguments (a tuple or list), or its one
            argument. Tensors go to the device of the model's parameters where these are on one.
        sites: those at which to stop; every other layer runs as it is.
        forward: called as ``forward(model, batch)`` in place of ``model(...)``.
        masks: for each batch None or a mask [B, T] of the tokens that count. Without, the entries "attention_mask" and
            "decoder_attention_mask" of a batch are taken. A mask counts for inputs of shape [B, T, K] and
            [B * T, K], and for those of fused experts.
        beside: whether every batch runs a second time, beside the first, in the model as it was: its sites' weights are
            put back while it goes on from one to the next. Visits then have the inputs of both. A batch whose two runs
            come to different sites has only the first from there on, and so has every batch from the first expert on:
            experts may be given other tokens. Takes twice the memory for what batches hold.
        streams: those of the sites for which it is looked for what their outputs are added to, in both runs; they need
            `beside`.
        look_ahead: whether a batch may run once more to see in which order it comes to sites, where batches wait at
            different ones; otherwise the one that is defined first goes first.
        gathered: where other processes walk with other batches: gives what each of them says, in an order that all
            share. All have to take every visit, whether it has inputs here or not.
        ended: called as ``ended(number, output)`` when a batch has run to its end.
        going_on: called each time before a batch goes on; what it raises ends the walk.

    Raises:
        TypeError, ValueError: for a bad argument.
        WalkError: while iterating, where the model fails on a batch; it names the batch and the last site.

    Attributes:
        late: by name of a site, how many tokens reached it only after it was quantized, from batches that had given it
            none: they are not in its Hessian.
        again: the same of batches that came to it once more, as to a module that is used twice.
        parted: by number of a batch, the name of the site from which on it runs in one model only.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        sites: Sequence[Site],
        *,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        masks: Sequence[Tensor | None] | None = None,
        beside: bool = False,
        streams: Sequence[Site] = (),
        look_ahead: bool = True,
        gathered: Callable[[Any], list[Any]] | None = None,
        ended: Callable[[int, Any], None] | None = None,
        going_on: Callable[[], None] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Walk: expected model to be a torch.nn.Module, but got {type(model).__name__}")
        if isinstance(batches, (Tensor, Mapping, str)):
            raise TypeError(
                f"Walk: expected batches to be an iterable of batches, but got one {type(batches).__name__} "
                "(for one batch pass a list of it)"
            )
        self._model = model
        self._batches = list(batches)
        self._sites = tuple(sites)
        self._order = {id(site): number for number, site in enumerate(self._sites)}
        if len(self._order) != len(self._sites):
            raise ValueError("Walk: expected every site once, but got one twice")
        if masks is not None and len(masks) != len(self._batches):
            raise ValueError(
                f"Walk: expected a mask or None for each of {len(self._batches)} batches, but got {len(masks)}"
            )
        if streams and not beside:
            raise ValueError("Walk: expected streams to be looked for only with a second run beside (beside=True)")
        if any(id(site) not in self._order for site in streams):
            raise ValueError("Walk: expected streams to be some of the sites, but got another one")
        self._masks = masks
        self._beside = beside
        self._residuals = Residuals(model, streams) if streams else None
        self._look_ahead = look_ahead
        self._gathered = _alone if gathered is None else gathered
        self._orders: dict[int, dict[int, int]] = {}  # by number of a batch: the place of each site it came to
        self._forward = call if forward is None else forward
        self._ended = ended
        self._going_on = going_on
        self._stack: ExitStack | None = None
        self._runs: list[_Run] = []
        self._twins: dict[int, _Run] = {}  # by number of a batch: its run in the model as it was
        self._original: Tensor | None = None  # the weight at hand, as it was
        self._reached: set[int] = set()  # sites that are done, or done without
        self._handed_out: set[int] = set()
        self._recent: list[tuple[int, list[Any]]] = []
        self._ids = 0
        self._visit: Visit | None = None
        self._waited_at: tuple[Site, ...] = ()  # when the visit was handed out, in any process
        self.late: dict[str, int] = {}
        self.again: dict[str, int] = {}
        self.parted: dict[int, str] = {}

    @property
    def unreached(self) -> tuple[Site, ...]:
        """Sites that have not been handed out so far, nor left out."""
        return tuple(site for site in self._sites if id(site) not in self._reached)

    @property
    def waiting(self) -> tuple[Site, ...]:
        """Sites at which batches wait at this moment, also those of other processes; in order of definition."""
        return self._waited_at

    def leave_out(self, site: Site) -> None:
        """Says that a site is not waited for any more: a batch that comes to it yet goes on, and is counted as late.

        Raises:
            ValueError: where a batch waits at it.
        """
        if site in self.waiting:
            raise ValueError(f"Walk: expected a site to leave out at which no batch waits, but got {site.name!r}")
        self._reached.add(id(site))

    def __enter__(self) -> "Walk":  # noqa: PYI034  (Self is of Python 3.11)
        if self._stack is not None:
            raise RuntimeError("Walk: expected to be entered once, but got entered again")
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self._model))
            stack.enter_context(without_cache(self._model))
            stack.enter_context(not_compiled())
            device = _device(self._model)
            encoder = _encoder(self._model)
            for number, batch in enumerate(self._batches):
                masks = masks_of(batch) if self._masks is None else {MASKS[0]: self._masks[number]}
                self._runs.append(_Run(self, number, batch, device, _padding(number, masks), encoder))
                if self._beside:
                    self._twins[number] = _Run(self, number, batch, device, {}, None, is_twin=True)
            self._batches.clear()
            if any(run.masks for run in self._runs):
                stack.enter_context(_noting_what_masks_are_for(encoder, self._sites))
            if self._residuals is not None:
                if self._twins:  # the first to come to a block
                    next(iter(self._twins.values())).streams.is_watched = True
                stack.enter_context(self._residuals.watching(self._streams))
            stack.enter_context(watch(self._sites, self._pause))
            stack.callback(self._end_all)  # first of all when leaving: while hooks are as batches found them
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stack is not None:
            self._stack.close()

    def __iter__(self) -> "Walk":
        return self

    def __next__(self) -> Visit:
        if self._stack is None:
            raise RuntimeError("Walk: expected to be entered (with Walk(...) as walk) before its visits are taken")
        try:
            self._go_on()
            waiting = self._waiting()
            self._waited_at = self._sites_of_all({site for _, site, _ in waiting})
            if self._waited_at and (self._ended is not None or self.unreached):
                first = self._first([(run, site) for run, site, _ in waiting], self._waited_at)
                self._visit = self._visit_of(first, [(run, source) for run, site, source in waiting if site is first])
                return self._visit
        except BaseException:
            self._end_all()
            raise
        self._end_all()
        raise StopIteration

    def _sites_of_all(self, sites: Iterable[Site]) -> tuple[Site, ...]:
        """Sites that any process names, in order of definition."""
        named = self._gathered([self._order[id(site)] for site in sites])
        return tuple(self._sites[number] for number in sorted({number for numbers in named for number in numbers}))

    def _first(self, waiting: Sequence[tuple["_Run", Site]], sites: Sequence[Site]) -> Site:
        """Of the sites at which batches wait, the one that goes first: the same in all processes.

        Args:
            waiting: batches of this process, and where they wait.
            sites: those at which batches of any process wait, in order of definition.
        """
        if not self._look_ahead or len(sites) == 1:
            return sites[0]
        one_of_each = {site: run for run, site in reversed(waiting)}
        runs = (*(one_of_each[site] for site in sites if site in one_of_each), *(run for run, _ in waiting))
        ahead = [run for run in dict.fromkeys(runs) if run.number not in self._orders]
        while True:
            said = self._gathered((self._places(sites), bool(ahead)))
            places = [of_batch for of_process, _ in said for of_batch in of_process]
            for site in sites:
                if all(site is other or self._comes_before(site, other, places) for other in sites):
                    return site
            if not any(more for _, more in said):  # every batch has looked ahead
                break
            if ahead:
                run = ahead.pop(0)
                self._orders[run.number] = run.looked_ahead()
        # Those that none is known to come to from another one.
        return next((one for one in sites if not any(self._comes_before(two, one, places) for two in sites)), sites[0])

    def _places(self, sites: Sequence[Site]) -> list[dict[int, int]]:
        """By number of a site, when each batch of this process that has looked ahead came to it."""
        return [
            {self._order[id(site)]: order[id(site)] for site in sites if id(site) in order}
            for order in self._orders.values()
        ]

    def _comes_before(self, site: Site, other: Site, places: Sequence[Mapping[int, int]]) -> bool:
        """Whether some batch is known to come to a site before another, and none the other way round."""
        one, two = self._order[id(site)], self._order[id(other)]
        if isinstance(site, ExpertSite) and isinstance(other, ExpertSite) and site.modules[0] is other.modules[0]:
            return one < two
        known = [of_batch[one] < of_batch[two] for of_batch in places if one in of_batch and two in of_batch]
        return bool(known) and all(known)

    def _waiting(self) -> list[tuple["_Run", Site, Tensor]]:
        return [(run, *run.at) for run in self._runs if run.at is not None]

    def _go_on(self) -> None:
        """Lets the batches run on that waited for the visit before; at first all of them."""
        before, self._visit = self._visit, None
        if before is None:
            self._advance(self._twins.values())
            group = [run for run in self._runs if run.at is None]
        else:
            before.inputs.clear()
            self._reached.add(id(before.site))
            self._handed_out.add(id(before.site))
            group = [run for run in self._runs if run.at is not None and run.at[0] is before.site]
            if self._ended is None and not self.unreached:  # nothing is to come but what is late
                group = [run for run in group if not run.visited >= self._handed_out]
            self._advance_twins(before.site, [run.number for run in group])
        self._advance(group)
        while held := [run for run in (*self._twins.values(), *self._runs) if run.held]:
            self._advance(held)

    def _advance(self, group: Iterable["_Run"]) -> None:
        for run in group:
            if self._going_on is not None:
                self._going_on()
            run.advance()

    def _advance_twins(self, site: Site, numbers: Sequence[int]) -> None:
        """Lets the other runs of batches go on from a site, with the weight that it had."""
        twins = [self._twins[number] for number in numbers if number in self._twins]
        original, self._original = self._original, None
        if not twins or original is None:
            return
        replaced = site.matrix.detach().clone()
        site.write(original)
        try:
            self._advance(twins)
        finally:
            site.write(replaced)

    def _part(self, site: Site, group: Sequence["_Run"]) -> None:
        """Ends the second runs of batches that cannot go on beside the first, now that a site is handed out."""
        here = {run.number for run in group}
        routed = siblings_of(site) is not None
        for number, twin in list(self._twins.items()):
            is_here = twin.at is not None and twin.at[0] is site
            if routed or (is_here != (number in here)):
                self.parted[number] = site.name
                twin.end()
                del self._twins[number]

    def _visit_of(self, site: Site, group: list[tuple["_Run", Tensor]]) -> Visit:
        self._part(site, [run for run, _ in group])
        twins = {number: (twin, twin.at[1]) for number, twin in self._twins.items() if twin.at is not None}
        if any(run.number in twins for run, _ in group):
            self._original = site.matrix.detach().clone()
        inputs = []
        for run, source in group:
            given = Given(run.number, source, run.mask(site, source), site)
            if run.number in twins:
                twin, given.original = twins[run.number]
                if self._residuals is not None:
                    given.stream = self._residuals.before(site, run.streams)
                    given.original_stream = self._residuals.before(site, twin.streams)
            inputs.append(given)
        keys = [site.geometry, *((run.number, _identity(source)) for run, source in group)]
        for inputs_id, others in self._recent:
            if _same(keys, others):
                return Visit(site, inputs, inputs_id)
        self._ids += 1
        self._recent = [(self._ids, keys), *self._recent[: _REMEMBERED - 1]]
        return Visit(site, inputs, self._ids)

    def _pause(self, site: Site, source: Tensor) -> None:
        """Called in a batch's greenlet when it reaches a site."""
        run = greenlet.getcurrent()
        if not isinstance(run, _Run) or run.walk is not self:
            return  # someone else runs the model in between, to evaluate it for instance
        if run.streams.rehearsal is not None:
            return
        run.last = site
        if run.order is not None:
            run.order.setdefault(id(site), len(run.order))
            if all(id(one) in run.order for one in self.unreached):
                raise greenlet.GreenletExit
        elif id(site) in self._reached:
            if not run.is_twin:
                self._count(run, site, source)
        else:
            run.visited.add(id(site))
            run.pause(site, source)

    def _streams(self) -> Streams | None:
        """Those of the batch that runs at the moment."""
        run = greenlet.getcurrent()
        return run.streams if isinstance(run, _Run) and run.walk is self and run.order is None else None

    def _count(self, run: "_Run", site: Site, source: Tensor) -> None:
        """Tokens that come to a site that is done."""
        tokens = site.tokens(source)
        counts = self.again if id(site) in run.visited else self.late
        counts[site.name] = counts.get(site.name, 0) + tokens.numel() // max(1, tokens.shape[-1])

    def _end_all(self) -> None:
        """Ends batches where they wait, and lets go of them."""
        for run in (*self._twins.values(), *self._runs):
            run.end()
        self._twins.clear()
        self._runs.clear()
        self._waited_at = ()


def _alone(said: Any) -> list[Any]:
    """What all processes say, where there is one."""
    return [said]


def wait_for_others() -> None:
    """In a batch's forward pass: first lets every other batch of the walk run as far as it can. Elsewhere, nothing."""
    run = greenlet.getcurrent()
    if isinstance(run, _Run) and run.order is None:
        run.hold()


class _Run(greenlet.greenlet):  # type: ignore[misc]  # it ships no types
    """A batch, running the model."""

    def __init__(
        self,
        walk: Walk,
        number: int,
        batch: Any,
        device: torch.device | None,
        masks: Mapping[str, Tensor],
        encoder: nn.Module | None,
        *,
        is_twin: bool = False,
    ) -> None:
        super().__init__()
        self.walk = walk
        self.number = number
        self.is_twin = is_twin  # whether it runs in the model as it was, beside another
        self.at: tuple[Site, Tensor] | None = None  # where it waits, with which input
        self.held = False  # whether it waits for no site, but until the others have run
        self.last: Site | None = None
        self.visited: set[int] = set()
        self.masks = masks
        self.routed: dict[int, tuple[Tensor, Tensor]] = {}  # by id of a module of experts: tokens, experts of each
        self.encoded: list[weakref.ref[Tensor]] = []  # what the encoder gave
        self.order: dict[int, int] | None = None  # of one that only looks ahead: the place of each site it came to
        self.streams = Streams()
        self._encoder = encoder
        self._batch = batch
        self._device = device
        self._state = replace(TorchState.now(), grad=False, inference=False)
        self.gr_context = contextvars.copy_context()

    def run(self) -> None:
        """The forward pass: what the greenlet does when it is first switched to."""
        output = self.walk._forward(self.walk._model, to_device(self._batch, self._device))  # noqa: SLF001  (a part of it)
        if self.walk._ended is not None and self.order is None and not self.is_twin:  # noqa: SLF001
            self.walk._ended(self.number, output)  # noqa: SLF001

    def looked_ahead(self) -> dict[int, int]:
        """The order in which the batch comes to sites, by a forward pass of its own without a pause."""
        ahead = _Run(self.walk, self.number, self._batch, self._device, {}, None)
        ahead.order = {}
        ahead.advance()
        return ahead.order

    def mask(self, site: Site, source: Tensor) -> Tensor | None:
        """Which tokens of a site's input count, of the leading dimensions of the input; None: all do."""
        if not self.masks or site.geometry is not None:  # what a kernel covers is no token
            return None
        if isinstance(site, ExpertSite):
            return self._mask_of_expert(site, source)
        names: Sequence[str] = MASKS
        if self._encoder is not None:
            encoders = {id(module) for module in self._encoder.modules()}
            encoded = any(_root(source) is output() for output in self.encoded)
            if not encoded and not any(id(module) in encoders for module in site.modules):
                names = MASKS[::-1]
        masks = (self.masks[name] for name in names if name in self.masks)
        return next((found for mask in masks if (found := _spread(mask, source)) is not None), None)

    def _mask_of_expert(self, site: ExpertSite, source: Tensor) -> Tensor | None:
        """The same of the tokens that are routed to an expert, in the order in which transformers' loop takes them."""
        tokens, experts = self.routed.get(id(site.modules[0]), (None, None))
        if tokens is None or experts is None or tokens.dim() != 2 or experts.dim() != 2 or source.dim() != 2:
            return None
        masks = (_spread(mask, tokens) for mask in self.masks.values())
        mask = next((mask for mask in masks if mask is not None), None)
        chosen = experts.T.eq(site.expert).nonzero()[:, 1]
        if mask is None or len(chosen) != len(source):
            return None
        if (
            site.columns == tokens.shape[1]
            and not torch.equal(tokens[chosen], source)
            and site.attribute != "down_proj"
        ):
            return None
        return mask[chosen]

    def pause(self, site: Site, source: Tensor) -> None:
        """In the greenlet: goes back to whoever switched to it, until it is switched to again."""
        self.at = (site, source)
        del source
        self._switch_back()

    def hold(self) -> None:
        """In the greenlet: the same, without a site to wait at."""
        self.held = True
        self._switch_back()

    def _switch_back(self) -> None:
        parent = self.parent
        assert parent is not None  # noqa: S101  (set by advance)
        parent.switch()

    def advance(self) -> None:
        """Runs on to the next site, or to the end."""
        if self.dead:
            return
        self.at, self.held = None, False
        try:
            self._switch(self.switch)
        except Exception as error:
            where = "before it came to a layer" if self.last is None else f"after it came to layer {self.last.name!r}"
            raise WalkError(
                f"Walk: batch {self.number} failed {where}: {type(error).__name__}: {error}",
                self.number,
                self.last,
            ) from error

    def end(self) -> None:
        """Ends the forward pass where it waits."""
        self.at, self.held = None, False
        self.streams.before.clear()
        for _ in range(100):  # code that catches every exception may come to another site, where it is ended again
            if not bool(self) or self.dead:
                break
            self._switch(lambda: self.throw(greenlet.GreenletExit))
            self.at, self.held = None, False

    def _switch(self, switch: Callable[[], object]) -> None:
        """Switches to the batch with its state of torch, and back with the caller's."""
        self.parent = greenlet.getcurrent()
        mine = TorchState.now()
        with torch.inference_mode(mode=self._state.inference):
            self._state.set()
            torch.clear_autocast_cache()  # it holds weights as they were
            try:
                switch()
            finally:
                self._state = TorchState.now()
                mine.set()


# Whether sites are given the same


def _root(tensor: Tensor) -> Tensor:
    """The tensor whose memory a view looks at."""
    base = tensor._base  # noqa: SLF001  (the only way to ask)
    return tensor if base is None else base


def _identity(tensor: Tensor) -> Any:
    """Which part of which tensor this is, and how often that was written to; None where this cannot be told."""
    if tensor.is_inference() or tensor.layout != torch.strided:  # no count of writes
        return None
    root = _root(tensor)
    place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return weakref.ref(root), root._version, tensor.data_ptr(), place  # noqa: SLF001


def _same(keys: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two visits' inputs are the same tensors, alive all the time and not written to in between."""
    if len(keys) != len(others) or keys[0] != others[0]:
        return False
    for (number, identity), (other_number, other) in zip(keys[1:], others[1:], strict=True):
        if number != other_number or identity is None or other is None or identity[1:] != other[1:]:
            return False
        root = identity[0]()
        if root is None or root is not other[0]():
            return False
    return True


# Masks


def masks_of(batch: Any) -> dict[str, Tensor]:
    """The entries of a batch that say which tokens are padding."""
    if not isinstance(batch, Mapping):
        return {}
    # An attention mask of four dimensions says more than what is padding, and one of one dimension nothing known.
    return {name: batch[name] for name in MASKS if isinstance(batch.get(name), Tensor) and batch[name].dim() == 2}


def _padding(number: int, masks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masks as bool [B, T]."""
    found = {}
    for name, mask in masks.items():
        if mask is None:
            continue
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"Walk: expected the mask of batch {number} to be a tensor [B, T], but got {got}")
        found[name] = mask != 0
    return found


def _spread(mask: Tensor, source: Tensor) -> Tensor | None:
    """A mask [B, T] for inputs [B, T, ..., K] or [B * T, K]; None for others."""
    mask = mask.to(source.device)
    if source.dim() >= 3 and source.shape[:2] == mask.shape:
        return mask.reshape(*mask.shape, *(1,) * (source.dim() - 3)).expand(source.shape[:-1])
    if source.dim() == 2 and len(source) == mask.numel():
        return mask.flatten()
    return None


@contextmanager
def _noting_what_masks_are_for(encoder: nn.Module | None, sites: Sequence[Site]) -> Iterator[None]:
    """While entered, batches note what their encoder gave and which tokens go to which expert."""

    def encoded(_module: nn.Module, _args: Any, output: Any) -> None:
        run = greenlet.getcurrent()
        first = output if isinstance(output, Tensor) else output[0]
        if isinstance(run, _Run) and isinstance(first, Tensor):
            run.encoded.append(weakref.ref(_root(first)))

    def routing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = greenlet.getcurrent()
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        experts = [value for value in given[1:] if not value.is_floating_point()]
        if isinstance(run, _Run) and experts:
            run.routed[id(module)] = (given[0], experts[0])

    def routed(module: nn.Module, *_: Any) -> None:
        run = greenlet.getcurrent()
        if isinstance(run, _Run):
            run.routed.pop(id(module), None)

    with ExitStack() as stack:
        if encoder is not None:
            stack.callback(encoder.register_forward_hook(encoded).remove)
        for module in {module for site in sites if isinstance(site, ExpertSite) for module in site.modules}:
            stack.callback(module.register_forward_pre_hook(routing, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(routed, always_call=True).remove)
        yield


# The model and its batches


def call(model: nn.Module, batch: Any) -> Any:
    """What a model gives for a batch: keyword arguments, arguments, or its one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _device(model: nn.Module) -> torch.device | None:
    """The device of a model that is on one."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 and "meta" not in {device.type for device in devices} else None


def on_device_of(model: nn.Module, batch: Any) -> Any:
    """A batch with its tensors on the device of the model, where that is on one."""
    return to_device(batch, _device(model))


def to_device(batch: Any, device: torch.device | None) -> Any:
    """A batch with its tensors on a device."""
    if device is None:
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: to_device(value, device) for name, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of a model of transformers that has encoder and decoder."""
    getter = getattr(model, "get_encoder", None)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not callable(getter):
        return None
    encoder = getter()
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Without the cache of keys and values that a model of transformers builds for the next token."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def not_compiled() -> Iterator[None]:
    """Compiled modules run as they are written: what is compiled has no place to pause."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

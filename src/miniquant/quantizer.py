"""One run: every layer that the walk comes to is solved, judged, replaced and kept."""

import re
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from math import isnan
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from miniquant.gptq import gptq
from miniquant.gradients import squared_gradients
from miniquant.grid import QuantizedWeight, dequantize, rtn
from miniquant.layer_hessians import FEWEST_HELD_OUT, LayerHessians, Weighing, accumulated, judged_rows
from miniquant.loss import quantization_loss
from miniquant.modules import Site, siblings_of
from miniquant.plan import Plan
from miniquant.ranks import Ranks
from miniquant.recipe import LayerOptions
from miniquant.results import (
    FinishedLayer,
    LayerResult,
    LayerStore,
    ModelResult,
    QuantizationError,
    Stopped,
    TooFewTokensError,
)
from miniquant.ridge import POWER_OF_TOKENS, LinAlgError, ridge_by_halves, with_choice
from miniquant.superblocks import gptq_superblocks, rtn_superblocks
from miniquant.token_weights import GRADIENT, causal_sites
from miniquant.walk import Visit, Walk

# Ridges are carried over to so many layers of a kind until one is searched for again: where two that were found lie
# within one step of the search, and not where the tokens say next to nothing.
CARRIED = 3
NEARBY = 2.0
LARGEST_CARRIED = 10.0

Value = TypeVar("Value")


class Quantizer:
    """The state of one run.

    Args:
        model: which the walk goes through.
        plan: for this model.
        result: filled as the run goes on.
        first_held_out: the number of the first batch that is only used to judge.
        scale_dtype: of stored scales; None is that of the weights.
        weights: gives the weight [N, K] of a layer; None is the model's own.
        progress: called after each layer, as of :func:`miniquant.quantize_model`.
        store: keeps finished layers; None leaves them in the result.
        stop: says whether the run is to end.
        ranks: the processes of the run; None is this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        result: ModelResult,
        first_held_out: int,
        scale_dtype: torch.dtype | None,
        weights: Callable[[Site], Tensor] | None,
        progress: Callable[[LayerResult, int, int], None] | None,
        store: LayerStore | None,
        stop: Callable[[], bool] | None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks
        self._first_held_out = first_held_out
        self._options = {id(site): options for site, options in plan.layers}
        self._families: dict[str, dict[str, list[Site]]] = {}  # by module of experts and layer
        for site, _ in plan.layers:
            if (family := siblings_of(site)) is not None:
                self._families.setdefault(family[0], {}).setdefault(family[1], []).append(site)
        self._result = result
        self._scale_dtype = scale_dtype
        self._weights = weights
        self._progress = progress
        self._store = store
        self._stop = stop
        self._seconds = dict.fromkeys(("hessians", "solver", "judging"), 0.0)
        self._causal = causal_sites(model, [site for site, _ in plan.layers])
        self._inputs: Hashable = None  # what the Hessian of the layer at hand is made of
        self._last: LayerHessians | None = None  # of these inputs
        self._ridges: dict[Any, float] = {}  # found in them: by grid
        self._carried = _CarriedRidges()
        self._gradients: dict[str, list[Tensor]] = {}  # by name of a layer
        self._searched = False  # whether the ridge of the layer at hand was found in its own tokens
        self._pools: dict[tuple[str, str], LayerHessians] = {}
        self._few: dict[int, int] = {}  # experts that wait for their siblings: tokens of their own
        self._visited_families: dict[str, None] = {}

    def run(self, walk: Walk) -> None:
        """Quantizes the layers of a walk, and times the parts of it."""
        start = time.perf_counter() - self._seconds.get("gradients", 0.0)
        with walk:
            for visit in walk:
                self._leave_families(walk, visit.site)
                self._visit(visit)
            self._leave_families(walk, None)
            self._unreached(walk.unreached)
        self._note_what_was_missed(walk)
        total = time.perf_counter() - start
        self._result.seconds = {"total": total, "forward": total - sum(self._seconds.values()), **self._seconds}

    def _note_what_was_missed(self, walk: Walk) -> None:
        """Tokens that layers did not see, and batches that left the way of the float model: those of all ranks."""
        missed = walk.late, walk.again, list(walk.parted.values())
        of_all = [missed] if self._ranks is None else self._ranks.gathered(missed)
        late: Counter[str] = Counter()
        again: Counter[str] = Counter()
        left: list[str] = []
        for late_here, again_here, left_here in of_all:
            late.update(late_here)
            again.update(again_here)
            left += left_here
        for counts, text in (
            (late, "{} tokens came to it only after it was quantized, and are not in its Hessian"),
            (again, "{} tokens came to it again after it was quantized, as it is used more than once"),
        ):
            for name, tokens in counts.items():
                self._note(name, text.format(tokens))
        if left:
            batches = self._result.batches + self._result.held_out_batches
            count = min(len(left), batches)  # ranks may have parts of one
            self._result.notes.append(
                f"errors of earlier layers are corrected before layer {left[0]!r} only: from there on {count} of "
                f"{batches} batches do not take the way of the float model"
            )

    def take_gradients(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        sites: Sequence[Site],
        forward: Callable[[nn.Module, Any], Any] | None,
        masks: Sequence[Tensor | None] | None,
    ) -> None:
        """Has the gradients that layers' tokens are weighed by, where the recipe asks for them."""
        asked = [site for site in sites if self._options[id(site)].token_weights == GRADIENT]
        if not asked:
            return
        start = time.perf_counter()
        try:
            self._gradients = squared_gradients(
                model, batches, asked, forward=forward, masks=masks, before=self.check_stop
            )
        except ValueError as error:
            raise ValueError(
                f"quantize_model: token_weights {GRADIENT!r}: {error} (the other token_weights are for any model)"
            ) from error
        missing = [site.name for site in asked if site.name not in self._gradients]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            self._result.notes.append(
                f"tokens of layer {missing[0]!r}{more} are weighed by norm+position: there is no gradient for each of "
                "them (experts, convolutions, layers that some batch does not come to)"
            )
        self._seconds["gradients"] = time.perf_counter() - start

    def check_stop(self) -> None:
        """Ends the run where it is asked to.

        Raises:
            Stopped: then.
        """
        if self._stop is not None and self._stop():
            done, of = len(self._result.layers), len(self._options)
            raise Stopped(f"quantize_model: stopped after {done} of {of} layers", self._result)

    def _visit(self, visit: Visit) -> None:
        site = visit.site
        before = self._busy()
        family = siblings_of(site)
        if family is not None:
            self._visited_families[family[0]] = None
        finished = self._finished(site)
        pools = family is not None and self._pool_is_needed(family)
        self._come_to(visit)
        if finished is None or pools:
            try:
                hessians = self._hessians(visit)
            except (ValueError, TypeError) as error:
                raise self._failed(site, error) from error
            if family is not None and pools:
                pool = self._pools.setdefault(family, LayerHessians.empty(site.columns, hessians.calibration.dtype))
                pool.merge(hessians)
        if finished is not None:
            if finished.waited:
                self._few[id(site)] = 0
            else:
                self._restore(finished)
            return
        options = self._options[id(site)]
        tokens = hessians.calibration.tokens
        if tokens >= options.tokens_needed(site.columns):
            self._quantize(site, hessians, before)
        elif family is not None and options.unseen != "rtn":  # until it is known what all its siblings saw
            self._few[id(site)] = tokens
        else:
            self._refuse_without_siblings([(site, tokens)])
            self._quantize(
                site, hessians, before, self._too_few(site, tokens, "it is rounded to nearest"), nearest=True
            )

    def _finished(self, site: Site) -> FinishedLayer | None:
        """A layer that the store has."""
        if self._store is None or not self._is_kept(site):
            return None
        return self._store.load(site, self._options[id(site)])

    def _is_kept(self, site: Site) -> bool:
        return self._store is not None and site.name in self._store

    def _pool_is_needed(self, family: tuple[str, str]) -> bool:
        """Whether an expert may yet be quantized with the tokens of all its siblings."""
        return any(
            self._options[id(one)].unseen == "siblings" and not self._is_kept(one)
            for one in self._families[family[0]][family[1]]
        )

    def _come_to(self, visit: Visit) -> None:
        """Forgets Hessians and ridges of other inputs than those of the layer at hand."""
        weighing = self._weighing(visit.site)
        has_own = weighing.gradients is not None or any(given.stream is not None for given in visit.inputs)
        of_layer = visit.site.name if has_own else None
        inputs = visit.inputs_id, _sum_dtype(visit.site), weighing.scheme, weighing.causal, of_layer
        same = self._inputs == inputs
        if self._ranks is not None:  # where no batch of this one came, the others know
            same = self._ranks.on_all(holds=same or not visit.inputs)
        self._inputs = inputs
        if not same:
            self._last = None
            self._ridges.clear()

    def _weighing(self, site: Site) -> Weighing:
        scheme = self._options[id(site)].token_weights
        gradients = self._gradients.get(site.name) if scheme == GRADIENT else None
        return Weighing(scheme, id(site) in self._causal, gradients)

    def _hessians(self, visit: Visit) -> LayerHessians:
        """Of the tokens that batches give to a layer; those of the layer before, where it was given the same."""
        if self._last is not None:
            return self._last
        columns, dtype, weighing = visit.site.columns, _sum_dtype(visit.site), self._weighing(visit.site)
        start = time.perf_counter()
        first_held_out = self._first_held_out
        calibration = [given for given in visit.inputs if given.batch < first_held_out]
        held_out = [given for given in visit.inputs if given.batch >= first_held_out]
        weight = cache(partial(self._weight, visit.site))
        known, sample, errors = accumulated(
            calibration, columns, dtype, weighing, halves=True, ranks=self._ranks, weight=weight
        )
        judged, _, held_out_errors = accumulated(held_out, columns, dtype, weighing, halves=False, weight=weight)
        hessians = LayerHessians(known, judged, sample, errors, held_out_errors)
        if self._ranks is not None:
            hessians.sum_over(self._ranks, weight, has_held_out=bool(held_out))
        self._seconds["hessians"] += time.perf_counter() - start
        self._last = hessians
        return hessians

    def _leave_families(self, walk: Walk, site: Site | None) -> None:
        """Deals with experts that saw too few tokens once the walk has left their module."""
        here = None if site is None else siblings_of(site)
        waiting = {family[0] for one in walk.waiting if (family := siblings_of(one)) is not None}
        for module in [one for one in self._visited_families if one not in waiting and (not here or one != here[0])]:
            del self._visited_families[module]
            unreached = {id(one) for one in walk.unreached}
            few: list[tuple[Site, int, LayerHessians | None]] = []
            for layer, sites in self._families[module].items():
                pool = self._pools.pop((module, layer), None)
                for one in sites:
                    if id(one) in unreached:
                        walk.leave_out(one)
                        self._few[id(one)] = 0
                    if id(one) in self._few:
                        few.append((one, self._few.pop(id(one)), pool))
            self._with_siblings(few)

    def _with_siblings(self, few: Sequence[tuple[Site, int, LayerHessians | None]]) -> None:
        """Quantizes experts that saw too few tokens of their own: how many, and what their siblings saw."""
        wrong = []
        for site, tokens, pool in few:
            if self._is_kept(site):
                continue
            pooled = 0 if pool is None else pool.calibration.tokens
            options = self._options[id(site)]
            if options.unseen == "error":
                wrong.append((site, tokens, ""))
            elif options.unseen == "siblings" and pooled < options.tokens_needed(site.columns):
                wrong.append((site, tokens, f", and its siblings, all together, {pooled}"))
        self._refuse(wrong)
        for site, tokens, pool in few:
            finished = self._finished(site)
            if finished is not None:
                self._restore(finished)
            elif self._options[id(site)].unseen == "siblings":
                so = "it is quantized with those of all its siblings"
                self._quantize(site, pool, self._busy(), self._too_few(site, tokens, so), waited=True)
            else:
                so = "it is rounded to nearest"
                self._quantize(site, None, self._busy(), self._too_few(site, tokens, so), waited=True)

    def _unreached(self, sites: Sequence[Site]) -> None:
        """Deals with layers that no batch came to."""
        self._refuse_without_siblings([(site, 0) for site in sites if not self._is_kept(site)])
        for site in sites:
            finished = self._finished(site)
            if finished is not None:
                self._restore(finished)
            else:
                self._quantize(site, None, self._busy(), self._too_few(site, 0, "it is rounded to nearest"))

    def _too_few(self, site: Site, tokens: int, so: str) -> str:
        return f"saw {tokens} of {self._options[id(site)].tokens_needed(site.columns)} tokens needed, so {so}"

    def _refuse_without_siblings(self, layers: Sequence[tuple[Site, int]]) -> None:
        """Says which layers saw too few tokens, but for those that are to be rounded to nearest then."""
        asked = [(site, tokens, self._options[id(site)].unseen) for site, tokens in layers]
        suffix = {"siblings": ", and has no siblings", "error": ""}
        self._refuse([(site, tokens, suffix[unseen]) for site, tokens, unseen in asked if unseen in suffix])

    def _refuse(self, layers: Sequence[tuple[Site, int, str]]) -> None:
        """Layers, how many tokens each saw, and what else is to be said of it."""
        if not layers:
            return
        listed = "; ".join(
            f"{site.name} saw {tokens} of {self._options[id(site)].tokens_needed(site.columns)}{more}"
            for site, tokens, more in layers
        )
        raise TooFewTokensError(
            f"quantize_model: expected every layer to see as many tokens as it needs, but {listed} "
            '(unseen="rtn" rounds such layers to nearest, unseen="siblings" is for experts; or skip them, or calibrate '
            "on more tokens; a layer that saw none may be one whose weight the model uses without calling it)",
            [site.name for site, *_ in layers],
            self._result,
        )

    def _busy(self) -> float:
        return sum(self._seconds.values())

    def _failed(self, site: Site, error: Exception) -> QuantizationError:
        return QuantizationError(
            f"quantize_model: layer {site.name!r} [{site.rows}, {site.columns}]: {error}", [site.name], self._result
        )

    def _quantize(
        self,
        site: Site,
        hessians: LayerHessians | None,
        before: float,
        *notes: str,
        nearest: bool = False,
        waited: bool = False,
    ) -> None:
        """Quantizes a layer, replaces its weight and has it kept."""
        self.check_stop()
        options = self._options[id(site)]
        try:
            layer = self._solved(site, options, hessians, [*notes], nearest=nearest or hessians is None)
            site.write(dequantize(layer["quantized"], dtype=site.dtype))
        except Exception as error:
            raise self._failed(site, error) from error
        done = LayerResult(name=site.name, site=site, options=options, seconds=self._busy() - before, **layer)
        if self._store is not None:
            shared = hessians is not None and hessians is self._last
            found = self._ridges.get(options.grid) if shared else None
            self._store.save(FinishedLayer(done, found, self._searched, waited))
        self._add(done)

    def _restore(self, finished: FinishedLayer) -> None:
        """Replaces a layer's weight by the one that is kept."""
        done = finished.result
        try:
            done.site.write(dequantize(done.quantized, dtype=done.site.dtype))
        except Exception as error:
            raise self._failed(done.site, error) from error
        if finished.found_ridge is not None:
            grid = done.options.grid
            if finished.searched:
                self._carried.found(_kind(done.site, done.options, done.tokens), finished.found_ridge, done.tokens)
            elif grid not in self._ridges:
                self._carried.take(_kind(done.site, done.options, done.tokens), done.tokens)
            self._ridges[grid] = finished.found_ridge
        self._add(replace(done, restored=True))

    def _add(self, done: LayerResult) -> None:
        """Adds a layer to the result, without its codes where they are kept."""
        if self._store is not None:
            done = replace(done, quantized=done.quantized.map(lambda tensor: tensor.to("meta")))
        self._result.layers[done.name] = done
        if self._progress is not None:
            self._progress(done, len(self._result.layers), len(self._options))

    def _solved(
        self, site: Site, options: LayerOptions, hessians: LayerHessians | None, notes: list[str], *, nearest: bool
    ) -> dict[str, Any]:
        """All that a :class:`LayerResult` says of the solver."""
        weight = self._weight(site)
        self._searched = False
        start = time.perf_counter()
        rounded = _rounded_to_nearest(weight, options, self._scale_dtype)
        quantized: QuantizedWeight = rounded
        ridge: float | None = None
        target = weight
        if hessians is not None and not nearest:
            target, quantized, ridge = self._with_hessian(site, weight, options, hessians, notes)
        solved = time.perf_counter()
        losses = self._losses(target, {"": quantized, "rtn_": rounded}, hessians, site.dtype)
        ours, its = losses["held_out_loss"], losses["held_out_rtn_loss"]
        if ours is not None and its is not None and ours > its and hessians is not None:
            notes.append(
                f"keeps rounding to nearest: on {hessians.held_out.tokens} held-out tokens GPTQ loses {ours:.4g}, "
                f"rounding to nearest {its:.4g}"
            )
            quantized, ridge = rounded, None
            losses |= {"loss": losses["rtn_loss"], "held_out_loss": its}
        self._seconds["solver"] += solved - start
        self._seconds["judging"] += time.perf_counter() - solved
        return {
            "quantized": quantized,
            "method": "rtn" if ridge is None else "gptq",
            "tokens": 0 if hessians is None else hessians.calibration.tokens,
            "held_out_tokens": 0 if hessians is None else hessians.held_out.tokens,
            "ridge": ridge,
            "notes": tuple(notes),
            **losses,
        }

    def _losses(
        self,
        weight: Tensor,
        candidates: Mapping[str, QuantizedWeight],
        hessians: LayerHessians | None,
        dtype: torch.dtype,
    ) -> dict[str, float | None]:
        """Losses of ways to quantize a layer: the sum over all rows, which ranks share, from those it is judged by."""
        some, ranks = judged_rows(len(weight)), self._ranks
        mine = some if ranks is None else some[ranks.rank :: ranks.count]
        totals = _summed_losses(weight, candidates, hessians, dtype, mine)
        if ranks is not None:
            ranks.sum(totals)
        names = [f"{part}{name}loss" for part in ("", "held_out_") for name in candidates]
        return {
            name: None if isnan(loss) else loss / max(len(some), 1) * len(weight)
            for name, loss in zip(names, totals.tolist(), strict=True)
        }

    def _with_hessian(
        self, site: Site, weight: Tensor, options: LayerOptions, hessians: LayerHessians, notes: list[str]
    ) -> tuple[Tensor, QuantizedWeight, float]:
        """The weight to be approached, the quantized one, and the ridge."""
        grid = options.grid
        shared = self._last is hessians
        if options.ridge != "auto":
            return self._with_ridge(weight, options, hessians, float(options.ridge), notes)
        if shared and grid in self._ridges:
            return self._with_ridge(weight, options, hessians, self._ridges[grid], notes)
        tokens = hessians.calibration.tokens
        kind = _kind(site, options, tokens)
        carried = self._carried.take(kind, tokens) if shared else None
        if carried is not None:
            with suppress(LinAlgError):  # then its own is searched for
                found = self._with_ridge(weight, options, hessians, carried, notes)
                self._ridges[grid] = carried
                return found
        choice = self._from_first(
            lambda: ridge_by_halves(
                weight, hessians.calibration.proportional_halves(), hessians.sample.effective_tokens, **grid._asdict()
            )
        )
        target = self._target(weight, options, hessians, choice.ridge, notes)
        hessian = hessians.calibration.hessian()
        quantized, ridge, failed = with_choice(choice, lambda ridge: self._by_rows(target, hessian, options, ridge))
        if shared:
            self._ridges[grid] = ridge
            self._searched = True
            self._carried.found(kind, ridge, tokens)
        if failed:
            tried = ", ".join(f"{one:.2g}" for one in failed)
            notes.append(f"the Hessian was not positive definite with ridge {tried}, so it is {ridge:.2g}")
        return target, quantized, ridge

    def _with_ridge(
        self, weight: Tensor, options: LayerOptions, hessians: LayerHessians, ridge: float, notes: list[str]
    ) -> tuple[Tensor, QuantizedWeight, float]:
        target = self._target(weight, options, hessians, ridge, notes)
        hessian = hessians.calibration.hessian()
        return target, self._by_rows(target, hessian, options, ridge), ridge

    def _by_rows(self, target: Tensor, hessian: Tensor, options: LayerOptions, ridge: float) -> QuantizedWeight:
        """A weight quantized as options say, a share of the rows by each rank."""
        if self._ranks is None:
            return _with_options(target, hessian, options, ridge, self._scale_dtype)
        return self._ranks.by_rows(
            len(target), lambda rows: _with_options(target[rows], hessian, options, ridge, self._scale_dtype)
        )

    def _from_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes; what this process makes where it is alone."""
        return make() if self._ranks is None else self._ranks.from_first(make)

    def _target(
        self, weight: Tensor, options: LayerOptions, hessians: LayerHessians, ridge: float, notes: list[str]
    ) -> Tensor:
        parts = options.corrected_part, options.corrected_stream
        target, not_corrected = hessians.corrected(weight, ridge, *parts, self._from_first)
        notes.extend(not_corrected)
        return target

    def _weight(self, site: Site) -> Tensor:
        """What is quantized of a layer, [N, K]."""
        return site.read() if self._weights is None else self._weights(site)

    def _note(self, name: str, note: str) -> None:
        layer = self._result.layers[name]
        self._result.layers[name] = replace(layer, notes=(*layer.notes, note))


class _CarriedRidges:
    """The ridges of layers of one kind, block after block and expert after expert.

    They hardly change, but with the number of tokens, as the usual ridge does. Where two in a row are about the same
    but for that, the next ones take the ridge without a search, which takes several times as long as the solver.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, tuple[float, int]] = {}  # ridge and tokens
        self._left: dict[Hashable, int] = {}

    def take(self, kind: Hashable, tokens: int) -> float | None:
        """The ridge for the next layer of a kind, with so many tokens; None where it is to be searched for."""
        if not self._left.get(kind):
            return None
        self._left[kind] -= 1
        return self._expected(kind, tokens)

    def found(self, kind: Hashable, ridge: float, tokens: int) -> None:
        """Notes the ridge that was found for a layer of a kind."""
        before = self._expected(kind, tokens)
        is_same = before is not None and max(before, ridge) < NEARBY * min(before, ridge)
        self._found[kind] = ridge, tokens
        self._left[kind] = CARRIED if is_same and ridge < LARGEST_CARRIED else 0

    def _expected(self, kind: Hashable, tokens: int) -> float | None:
        """The last one that was found, for another number of tokens."""
        if kind not in self._found:
            return None
        ridge, of_tokens = self._found[kind]
        return ridge * float((of_tokens / tokens) ** POWER_OF_TOKENS)


def _rounded_to_nearest(weight: Tensor, options: LayerOptions, scale_dtype: torch.dtype | None) -> QuantizedWeight:
    """A weight rounded to nearest on the grid of options."""
    if options.superblocks is not None:
        return rtn_superblocks(weight, options.superblocks)
    return rtn(weight, **options.grid._asdict(), full_range=options.full_range, scale_dtype=scale_dtype)


def _with_options(
    weight: Tensor, hessian: Tensor, options: LayerOptions, ridge: float, scale_dtype: torch.dtype | None
) -> QuantizedWeight:
    """A weight quantized as options say, with this ridge."""
    arguments = {**options.arguments(scale_dtype), "ridge": ridge}
    if options.superblocks is not None:
        return gptq_superblocks(weight, hessian, options.superblocks, **arguments)
    return gptq(weight, hessian, **arguments)


def _sum_dtype(site: Site) -> torch.dtype:
    """The dtype of a Hessian of a layer."""
    return torch.float64 if site.dtype == torch.float64 else torch.float32


def _kind(site: Site, options: LayerOptions, tokens: int) -> Hashable:
    """Equal for the same layer of different blocks and of different experts, to which the same is done.

    Those with too few tokens for small ridges to be tried (:func:`miniquant.choose_ridge`) are apart.
    """
    return re.sub(r"\d+", "#", site.name), site.rows, site.columns, options, tokens // 2 < site.columns


def _summed_losses(
    weight: Tensor,
    candidates: Mapping[str, QuantizedWeight],
    hessians: LayerHessians | None,
    dtype: torch.dtype,
    rows: Tensor,
) -> Tensor:
    """Sums of some rows' losses, in the values that the layer gets.

    Returns:
        float64 [2 C]: of each candidate on calibration tokens, then on held-out tokens; NaN where there are too few.
    """
    values = torch.cat(
        [dequantize(one.map(lambda tensor: tensor[rows]), dtype=dtype) for one in candidates.values()]
    ).to(weight.dtype)
    originals = weight[rows].repeat(len(candidates), 1)
    sums = []
    for part, fewest in (("calibration", 1), ("held_out", FEWEST_HELD_OUT)):
        accumulator = None if hessians is None else getattr(hessians, part)
        if accumulator is not None and accumulator.tokens >= fewest:
            of_rows = quantization_loss(originals, values, accumulator.hessian()).double()
            sums.append(of_rows.view(len(candidates), -1).sum(1))
        else:
            sums.append(torch.full((len(candidates),), torch.nan, dtype=torch.float64))
    return torch.cat(sums)

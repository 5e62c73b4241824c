"""Quantizing whole models: the walk, the solver and the recipe."""

import re
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import isnan
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from miniquant.calibration import Calibration
from miniquant.correction import Correction, Errors, ErrorSum
from miniquant.gptq import gptq
from miniquant.gradients import squared_gradients
from miniquant.grid import QuantizedWeight, dequantize, rtn
from miniquant.hessian import HessianAccumulator
from miniquant.loss import quantization_loss
from miniquant.modules import LeftAlone, Site, find_sites, siblings_of
from miniquant.ranks import RankError, Ranks
from miniquant.recipe import LayerOptions, Recipe
from miniquant.ridge import LinAlgError, choose_ridge, with_choice
from miniquant.rotation import rotate_model
from miniquant.superblocks import gptq_superblocks, rtn_superblocks
from miniquant.token_weights import GRADIENT, TokenWeights, causal_sites, weigh
from miniquant.walk import Given, Visit, Walk

# Fewer held-out tokens than these say too little about a layer.
FEWEST_HELD_OUT = 16
# The part of the tokens that is held out where nobody says otherwise.
HELD_OUT = 0.05
# Batches are held out only where that takes no more than this part of the tokens from calibration.
MOST_HELD_OUT = 0.25

# Ridges are carried over to so many layers of a kind until one is searched for again: where two that were found lie
# within one step of the search, and not where the tokens say next to nothing.
CARRIED = 3
NEARBY = 2.0
LARGEST_CARRIED = 10.0

# Layers are judged by so many of their rows: with all, judging would take longer than quantizing.
JUDGED_ROWS = 256

# Of a batch that is nothing but sequences of tokens.
SEQUENCES = frozenset({"input_ids", "attention_mask", "token_type_ids"})

Method = Literal["gptq", "rtn"]
Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class LayerResult:
    """One quantized layer.

    Losses are what the layer's squared output error is per token (:func:`miniquant.quantization_loss`, summed over
    rows; the mean over tokens as ``options.token_weights`` weighs them), with the values that the model now computes
    with; None where no token says. The error is that to the output of the layer's own weight or, with
    ``options.corrected_part`` or ``options.corrected_stream``, of the weight that makes up for errors of earlier
    layers; that of rounding to nearest, too. Of a layer with more than 256 rows they are taken from 256 evenly spaced
    ones, the same for each loss, times N / 256.

    Attributes:
        name: of the layer.
        site: the weight in the model.
        options: what the recipe says of it.
        quantized: the weight on its grid; the model holds its values. Where a store keeps it, its tensors are on the
            device "meta": shapes and dtypes without memory.
        method: "rtn" where it is rounded to nearest; a note says why.
        tokens: of calibration.
        held_out_tokens: that were only used to judge.
        ridge: that was used; None for RTN.
        loss, rtn_loss: on calibration tokens, of `quantized` and of rounding to nearest.
        held_out_loss, held_out_rtn_loss: the same on held-out tokens.
        seconds: that its Hessians, the solver and judging took.
        notes: what a person should know, a sentence each.
        restored: whether the store had it, of an earlier run.
    """

    name: str
    site: Site
    options: LayerOptions
    quantized: QuantizedWeight
    method: Method
    tokens: int
    held_out_tokens: int
    ridge: float | None
    loss: float | None
    rtn_loss: float | None
    held_out_loss: float | None
    held_out_rtn_loss: float | None
    seconds: float
    notes: tuple[str, ...]
    restored: bool = False


@dataclass(eq=False)
class ModelResult:
    """A quantized model.

    Attributes:
        layers: by name, in the order in which they were quantized.
        left_alone: weights that were not quantized, with the reason.
        batches: of calibration.
        held_out_batches: the last ones, that were only used to judge.
        seconds: of the whole run, and of its parts: "hessians", "solver", "judging", "gradients" where they are taken,
            and "forward", which is all else; what restored layers took in an earlier run is not in them.
        notes: on the run as a whole.
    """

    layers: dict[str, LayerResult] = field(default_factory=dict)
    left_alone: tuple[LeftAlone, ...] = ()
    batches: int = 0
    held_out_batches: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class QuantizationError(RuntimeError):
    """A layer could not be quantized.

    Attributes:
        layers: names of those it is about.
        result: what was done before; these layers' weights are replaced in the model.
    """

    def __init__(self, message: str, layers: Sequence[str], result: ModelResult) -> None:
        super().__init__(message)
        self.layers = tuple(layers)
        self.result = result


class TooFewTokensError(QuantizationError):
    """Layers saw too few tokens, and the recipe's `unseen` says that this is an error, or proposes what cannot be."""


class Stopped(RuntimeError):  # noqa: N818  (somebody asked for it)
    """A run ended at a layer's boundary because it was asked to.

    Attributes:
        result: what was done before; these layers' weights are replaced in the model.
    """

    def __init__(self, message: str, result: ModelResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, eq=False)
class FinishedLayer:
    """All that a run has to know of a layer that an earlier one finished, to go on to the same bytes.

    Attributes:
        result: of the layer.
        found_ridge: that a layer on the same inputs with the same grid takes; None where there is none.
        searched: whether that ridge was found in the tokens of this layer.
        waited: whether it kept its weight while the walk was among its siblings.
    """

    result: LayerResult
    found_ridge: float | None
    searched: bool
    waited: bool


class LayerStore(Protocol):
    """Keeps finished layers, on a disk for instance, in place of the run's memory."""

    def __contains__(self, name: object) -> bool:
        """Whether a layer of this name is kept."""

    def load(self, site: Site, options: LayerOptions) -> FinishedLayer:
        """A layer that is kept, with its weight in memory."""

    def save(self, layer: FinishedLayer) -> None:
        """Keeps a layer. What it raises ends the run."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be done to a model.

    Attributes:
        layers: weights and their options, in order of definition.
        left_alone: the others, with the reason.
    """

    layers: tuple[tuple[Site, LayerOptions], ...]
    left_alone: tuple[LeftAlone, ...]


def as_recipe(recipe: Recipe | LayerOptions | Mapping[str, Any] | None) -> Recipe:
    """A recipe from what stands for one: options for all layers, what a file of a recipe holds, or None.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is None or isinstance(recipe, LayerOptions):
        return Recipe(recipe or LayerOptions())
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(recipe)
    raise TypeError(
        f"quantize_model: expected recipe to be a Recipe, LayerOptions, a dict or None, but got {type(recipe).__name__}"
    )


def plan_model(model: nn.Module, recipe: Recipe, *, output_embeddings: bool = False) -> Plan:
    """Which weights are quantized, and how.

    Args:
        model: any module; its weights may be on the device "meta".
        recipe: all of whose rules must apply to some weight.
        output_embeddings: whether the layer that gives the logits counts.

    Raises:
        ValueError: where a rule applies to nothing, or only to output embeddings that are not asked for; where nothing
            is left to quantize.
    """
    found = find_sites(model, output_embeddings=output_embeddings)
    everything = find_sites(model, output_embeddings=True).sites
    names = {site.name for site in found.sites}
    recipe.check([site.name for site in everything])
    for number, rule in enumerate(recipe.rules, start=1):
        matched = [site.name for site in everything if rule.matches(site.name)]
        if not rule.options.get("skip", recipe.defaults.skip) and not names & set(matched):
            raise ValueError(
                f"quantize_model: rule {number}: expected pattern {rule.pattern!r} to match more than output "
                f"embeddings without output_embeddings=True, but it matches {', '.join(matched)}"
            )
    layers = [(site, recipe.options(site.name)) for site in found.sites]
    skipped = [
        LeftAlone(site.parameter_name, (site.rows, site.columns), f"{site.name} is skipped by the recipe")
        for site, options in layers
        if options.skip
    ]
    kept = tuple((site, options) for site, options in layers if not options.skip)
    if not kept:
        why = "the recipe skips all" if layers else "it has none that is known here"
        raise ValueError(f"quantize_model: expected a model with layers to quantize, but {why}")
    return Plan(kept, (*found.left_alone, *skipped))


def quantize_model(
    model: nn.Module,
    calibration: Calibration | Iterable[Any],
    recipe: Recipe | LayerOptions | Mapping[str, Any] | None = None,
    *,
    held_out: float | Iterable[Any] | None = None,
    output_embeddings: bool = False,
    scale_dtype: torch.dtype | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    progress: Callable[[LayerResult, int, int], None] | None = None,
    store: LayerStore | None = None,
    stop: Callable[[], bool] | None = None,
) -> ModelResult:
    """Quantizes the weights of a model in place, each on the inputs that the quantized layers before it give.

    One forward pass over all batches (:class:`miniquant.walk.Walk`). When it comes to a layer, the layer is quantized
    from the Hessian of its inputs and its weight replaced by the values of the codes. Where
    ``options.corrected_part`` or ``options.corrected_stream`` of any layer is above 0, a second pass runs beside the
    first in the float model, and layers make up for what the quantized layers before did to their inputs and to the
    residual stream that they write to (:mod:`miniquant.correction`). The model may be on any device, in float32,
    float64, bfloat16 or float16; the solver runs on the CPU.

    Batches that are held out walk along and do not enter any Hessian; each layer's loss on them is compared with that
    of rounding to nearest. A layer that is worse keeps rounding to nearest, and says so. They are given, or the last
    ones of those for calibration. Where these are so few that more than a quarter of the tokens would be held out, none
    is, and the result's notes say it.

    Layers that are given the same inputs, as q, k and v, share a Hessian, and with the same grid the ridge that is
    found in it for the first of them. A layer whose like had about the same ridge in the two blocks before takes it
    without a search, at most three times in a row; experts never do.

    A layer that sees fewer tokens than ``options.tokens_needed(K)`` is dealt with as ``options.unseen`` says. With
    "siblings" it stays as it is while the walk is among its siblings (other experts of the same module), and is then
    quantized with the Hessian of all their tokens.

    A layer that `store` has is not quantized: its weight is replaced by the values that are kept. With the same model,
    calibration and options, on the same machine, the layers after it become what they would have been.

    Args:
        model: any module on memory; its weights are replaced.
        calibration: of :func:`miniquant.load_calibration`; or batches: keyword arguments of the model's forward (a
            mapping), arguments (a tuple or list), or its one argument. "attention_mask" and "decoder_attention_mask"
            [B, T] of a mapping say which tokens are padding and do not count.
        recipe: what is done to which layer; options for all of them; None: the defaults of
            :class:`miniquant.LayerOptions`.
        held_out: batches that are only used to judge; or the part of the tokens for calibration that is, at most a
            quarter, where 0 means that no layer is judged. None: those of a calibration that has some, else 0.05.
        output_embeddings: whether the layer that gives the logits is quantized, and with it an embedding that is tied
            to it.
        scale_dtype: the dtype in which scales will be stored; None is the weight's.
        forward: called as ``forward(model, batch)`` in place of ``model(...)``.
        masks: for each batch None or a mask [B, T], in place of the batch's own; held-out batches that are given come
            last.
        progress: called as ``progress(layer, number, of)`` after each layer.
        store: given every layer when it is finished; the result then holds no codes.
        stop: asked before each batch that goes on and before each layer is solved; the run ends where it says True.

    Raises:
        ValueError, TypeError: for a bad argument, before the walk starts.
        QuantizationError: where a layer fails or sees too few tokens; it names the layer, and has what was done before.
        Stopped: where `stop` said True.
        miniquant.walk.WalkError: where the model fails on a batch; it names the batch and the last layer.

    Example:
        >>> result = quantize_model(model, batches, LayerOptions(bits=4, group_size=128, preset="fast"))
        >>> result.layers["model.layers.0.mlp.down_proj"].held_out_loss
    """
    recipe = as_recipe(recipe)
    if recipe.rotation:  # what is refused is refused before the model changes
        if not isinstance(calibration, Calibration):
            calibration = _batches("calibration", calibration)
        if held_out is not None and not isinstance(held_out, (int, float)):
            held_out = _batches("held_out", held_out)
        Walk(model, _all_batches(calibration, held_out)[0], (), forward=forward, masks=masks)
        plan_model(model, recipe, output_embeddings=output_embeddings)
        rotate_model(model)
    return quantize_planned(
        model,
        calibration,
        plan_model(model, recipe, output_embeddings=output_embeddings),
        held_out=held_out,
        scale_dtype=scale_dtype,
        forward=forward,
        masks=masks,
        progress=progress,
        store=store,
        stop=stop,
    )


def quantize_planned(
    model: nn.Module,
    calibration: Calibration | Iterable[Any],
    plan: Plan,
    *,
    held_out: float | Iterable[Any] | None = None,
    scale_dtype: torch.dtype | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    masks: Sequence[Tensor | None] | None = None,
    weights: Callable[[Site], Tensor] | None = None,
    progress: Callable[[LayerResult, int, int], None] | None = None,
    store: LayerStore | None = None,
    stop: Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
) -> ModelResult:
    """:func:`quantize_model` with a plan that is made already.

    Args:
        model: as there, with all other arguments that are not said here.
        calibration: as there.
        plan: of :func:`plan_model`, for this model, or with fewer layers.
        held_out: as there.
        scale_dtype: as there.
        forward: as there.
        masks: as there.
        weights: gives the weight [N, K] that is quantized, where the model holds it with fewer bits than there are;
            None is the model's own.
        progress: as there.
        store: as there.
        stop: as there.
        ranks: the processes of the run, each of which has all batches given and takes its share of them; None is this
            one alone.

    Raises:
        RankError: for fewer batches than ranks.
    """
    batches, count, notes = _all_batches(calibration, held_out)
    result = ModelResult(left_alone=plan.left_alone, batches=len(batches) - count, held_out_batches=count)
    if ranks is not None:
        batches, count, masks = _share_of(ranks, batches, count, masks)
    result.notes += notes
    quantizer = _Quantizer(
        model, plan, result, len(batches) - count, scale_dtype, weights, progress, store, stop, ranks
    )
    sites = [site for site, _ in plan.layers]
    streams = [site for site, options in plan.layers if options.corrected_stream > 0]
    beside = bool(streams) or any(options.corrected_part > 0 for _, options in plan.layers)
    going_on = quantizer.check_stop
    quantizer.take_gradients(model, batches, sites, forward, masks)
    quantizer.run(
        Walk(
            model,
            batches,
            sites,
            forward=forward,
            masks=masks,
            beside=beside,
            streams=streams,
            gathered=None if ranks is None else ranks.gathered,
            going_on=going_on,
        )
    )
    return result


# Batches


def _all_batches(
    calibration: Calibration | Iterable[Any], held_out: float | Iterable[Any] | None
) -> tuple[list[Any], int, list[str]]:
    """Batches, those held out last, how many are held out, and notes."""
    notes: list[str] = []
    if isinstance(calibration, Calibration):
        held_out = (calibration.held_out or None) if held_out is None else held_out
        notes += calibration.notes
    batches = _batches("calibration", calibration.batches if isinstance(calibration, Calibration) else calibration)
    part, kept = held_out_of(HELD_OUT if held_out is None else held_out)
    if not batches:
        raise ValueError("quantize_model: expected calibration to have batches, but got none")
    count, note = (len(kept), None) if kept else _held_out_batches([_size(batch) for batch in batches], part)
    return batches + kept, count, [*notes, *(() if note is None else (note,))]


def _share_of(
    ranks: Ranks, batches: list[Any], held_out: int, masks: Sequence[Tensor | None] | None
) -> tuple[list[Any], int, Sequence[Tensor | None] | None]:
    """This rank's batches, those held out last, how many are held out, and their masks.

    Held-out batches go on where the others end, so that all ranks have as many. What is left of them then, fewer than
    there are ranks, is cut into parts; batches for calibration are not, since their parts would come to other halves.
    """
    first = len(batches) - held_out
    if first < ranks.count:
        raise RankError(
            f"quantize_model: expected a calibration batch for each of {ranks.count} ranks, but got {first} (smaller "
            "batches can be shared)"
        )
    all_masks = [None] * len(batches) if masks is None else list(masks)
    whole = len(batches) - len(batches) % ranks.count
    mine = []  # number, batch, mask
    for number, (batch, mask) in enumerate(zip(batches, all_masks, strict=True)):
        if number >= max(whole, first) and _has_only_sequences(batch, mask):
            part = _sequences_of_rank(ranks, batch, mask)
            mine += [(number, *part)] if part is not None else []
        elif number % ranks.count == ranks.rank:
            mine.append((number, batch, mask))
    kept = sum(number >= first for number, *_ in mine)
    return [batch for _, batch, _ in mine], kept, None if masks is None else [mask for *_, mask in mine]


def _has_only_sequences(batch: Any, mask: Tensor | None) -> bool:
    """Whether a batch is sequences of tokens and nothing else, so that it can be cut between them."""
    if not isinstance(batch, Mapping) or not SEQUENCES.issuperset(batch) or "input_ids" not in batch:
        return False
    tensors = [*batch.values(), *([] if mask is None else [mask])]
    return all(isinstance(one, Tensor) and one.dim() == 2 for one in tensors) and len({*map(len, tensors)}) == 1


def _sequences_of_rank(
    ranks: Ranks, batch: Mapping[str, Tensor], mask: Tensor | None
) -> tuple[dict[str, Tensor], Tensor | None] | None:
    """This rank's part of a batch of sequences, and of its mask; None where it has none."""
    part = {name: tensor.tensor_split(ranks.count)[ranks.rank] for name, tensor in batch.items()}
    if not len(part["input_ids"]):
        return None
    return part, None if mask is None else mask.tensor_split(ranks.count)[ranks.rank]


def _batches(name: str, given: Any) -> list[Any]:
    if isinstance(given, (Tensor, Mapping, str)) or not isinstance(given, Iterable):
        raise TypeError(
            f"quantize_model: expected {name} to be an iterable of batches, but got one {type(given).__name__} "
            "(for one batch pass a list of it)"
        )
    return list(given)


def held_out_of(given: Any) -> tuple[float, list[Any]]:
    """The part of the tokens that is held out, or the batches that are.

    Raises:
        ValueError, TypeError: for anything else.
    """
    if isinstance(given, bool) or (isinstance(given, (int, float)) and not 0 <= given <= MOST_HELD_OUT):
        raise ValueError(
            f"quantize_model: expected held_out to be batches or a number from 0 to {MOST_HELD_OUT}, but got {given!r}"
        )
    return (float(given), []) if isinstance(given, (int, float)) else (0.0, _batches("held_out", given))


def _size(batch: Any) -> int:
    """About how many tokens a batch has: enough to tell which batches are held out."""
    if isinstance(batch, Mapping):
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return int((mask != 0).sum())
        values = list(batch.values())
    else:
        values = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    tensors = [value for value in values if isinstance(value, Tensor) and value.dim()]
    ids = [tensor for tensor in tensors if not tensor.is_floating_point()]
    return ids[0].numel() if ids else tensors[0].shape[0] if tensors else 1


def _held_out_batches(sizes: Sequence[int], part: float) -> tuple[int, str | None]:
    """How many of the last batches are held out, and a note where none is though it is asked for."""
    total = sum(sizes)
    if part == 0:
        return 0, None
    count = held = 0
    while held < part * total:
        count += 1
        held += sizes[-count]
    if held > MOST_HELD_OUT * total or count == len(sizes):
        return 0, (
            f"no batch is held out, so no layer is judged: of {len(sizes)} batches the last {count} would be "
            f"{held / max(total, 1):.0%} of the tokens (smaller batches can be held out)"
        )
    return count, None


# Hessians


def _parts_in_halves(tokens: int, before: Sequence[int]) -> list[tuple[int, slice]]:
    """Which half each part of a batch goes to, as in a :class:`HessianAccumulator`.

    A batch that is longer than all before is cut so that both have as many tokens, any other goes to the half that has
    fewer.

    Args:
        tokens: of the batch.
        before: tokens of either half so far, or of all where there are no halves.
    """
    lighter, cut = before.index(min(before)), tokens
    if len(before) == 2 and tokens > sum(before):
        cut = (tokens + max(before) - min(before) + 1) // 2
    return [(lighter, slice(cut)), *([(1 - lighter, slice(cut, None))] if cut < tokens else [])]


def _parts_of_ranks(ranks: Ranks, inputs: Sequence[Given]) -> list[list[tuple[int, slice]]]:
    """The same for each batch of this rank, as if one process had the batches of all in their order."""
    mine = [(given.batch * ranks.count + ranks.rank, _tokens_that_count(given)) for given in inputs]
    sums, parts_of = [0, 0], {}
    for number, tokens in sorted(batch for of_rank in ranks.gathered(mine) for batch in of_rank):
        parts_of[number] = _parts_in_halves(tokens, sums)
        for half, part in parts_of[number]:
            sums[half] += len(range(*part.indices(tokens)))
    return [parts_of[number] for number, _ in mine]


def _tokens_that_count(given: Given) -> int:
    tokens = given.tokens()
    return int(tokens.shape[:-1].numel() if given.mask is None else given.mask.sum())


class _DeviceSums:
    """X^T diag(w) X of either half of the tokens on the device where inputs are, for a :class:`HessianAccumulator`."""

    def __init__(self, columns: int, dtype: torch.dtype, device: torch.device, *, halves: bool) -> None:
        self._sums = torch.zeros(2 if halves else 1, columns, columns, dtype=dtype, device=device)
        self._tokens = [0] * len(self._sums)
        self._weights = torch.zeros(2, len(self._sums), dtype=torch.float64, device=device)

    def update(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        parts: list[tuple[int, slice]] | None = None,
    ) -> None:
        rows = inputs.flatten(0, -2) if mask is None else inputs[mask]
        of_rows = None if weights is None else weights.flatten() if mask is None else weights[mask]
        if not bool(rows.isfinite().all()):
            raise ValueError("expected inputs to be finite, but got others")
        for number, cut_out in _parts_in_halves(len(rows), self._tokens) if parts is None else parts:
            part = rows[cut_out].to(self._sums.dtype)
            if of_rows is not None:
                part = part * of_rows[cut_out, None].sqrt().to(part.dtype)
            self._sums[number].addmm_(part.T, part)
            self._tokens[number] += len(part)
            for power, row in enumerate(self._weights, start=1):
                total = float(len(part)) if of_rows is None else of_rows[cut_out].double().pow(power).sum()
                row[number] += total

    def accumulator(self) -> HessianAccumulator:
        accumulator = HessianAccumulator(self._sums.shape[-1], self._sums.dtype, halves=len(self._tokens) == 2)
        state = {"sums": self._sums.cpu(), "tokens": torch.tensor(self._tokens), "weights": self._weights.cpu()}
        accumulator.load_state_dict(state)
        return accumulator


def accumulated(
    inputs: Sequence[Given],
    columns: int,
    dtype: torch.dtype,
    weighing: "Weighing",
    *,
    halves: bool,
    ranks: Ranks | None = None,
) -> tuple[HessianAccumulator, "_Sample", Errors | None]:
    """The Hessian of what batches give to a layer, how many tokens the sample amounts to, and errors of layers before.

    The last are None where not every batch runs in the float model too, and have none of a stream where it is not known
    in every batch. With ranks, which have to be here together, halves are those of all batches of the run; sums are of
    this rank's.
    """
    on_device: _DeviceSums | None = None
    accumulator = HessianAccumulator(columns, dtype, halves=halves)
    parts = None
    if ranks is not None and halves:
        parts = _parts_of_ranks(ranks, inputs)
    sample = _Sample()
    errors = _no_errors(inputs, columns, dtype)
    for number, given in enumerate(inputs):
        tokens = given.tokens()
        if tokens.shape[-1] != columns:
            raise ValueError(f"expected inputs of {columns} columns, but got shape {list(tokens.shape)}")
        if not tokens.numel():
            continue
        try:
            weights, sampled = weighing.of(given, tokens)
            of_batch = None if parts is None else parts[number]
            if tokens.device.type != "cpu":
                on_device = on_device or _DeviceSums(columns, dtype, tokens.device, halves=halves)
                on_device.update(tokens, given.mask, weights, of_batch)
            elif of_batch is None:
                accumulator.update(tokens, mask=given.mask, token_weights=weights)
            else:
                _add_to_halves(accumulator, tokens, given.mask, weights, of_batch)
            sample.add(tokens, given.mask, sampled)
            if errors is not None:
                _add_errors(errors, given, tokens, weights)
        except (ValueError, TypeError) as error:
            raise type(error)(f"batch {given.batch}: {error}") from error
    if on_device is None:
        return accumulator, sample, errors
    elsewhere = on_device.accumulator()
    if accumulator.tokens:
        elsewhere.merge(accumulator)
    return elsewhere, sample, errors


def _no_errors(inputs: Sequence[Given], columns: int, dtype: torch.dtype) -> Errors | None:
    """Sums of errors for what batches give to a layer."""
    if not inputs or any(given.original is None for given in inputs):
        return None
    streams = [given.stream for given in inputs if given.stream is not None and given.original_stream is not None]
    of_stream = ErrorSum(streams[0].shape[-1], columns, dtype) if len(streams) == len(inputs) else None
    return Errors(ErrorSum(columns, columns, dtype), of_stream)


def _add_errors(errors: Errors, given: Given, tokens: Tensor, weights: Tensor | None) -> None:
    """Adds a batch."""
    original = given.original_tokens()
    if original is not None:
        errors.inputs.update(original, tokens, tokens, given.mask, weights)
    if errors.stream is not None and given.stream is not None and given.original_stream is not None:
        errors.stream.update(given.original_stream, given.stream, tokens, given.mask, weights)


def _add_to_halves(
    accumulator: HessianAccumulator,
    tokens: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    parts: Sequence[tuple[int, slice]],
) -> None:
    """Adds parts of a batch on the CPU to the halves that they are for."""
    rows = tokens.flatten(0, -2) if mask is None else tokens[mask]
    of_rows = None if weights is None else weights.flatten() if mask is None else weights[mask]
    for half, part in parts:
        accumulator.update_half(half, rows[part], token_weights=None if of_rows is None else of_rows[part])


class Weighing(NamedTuple):
    """How a layer's tokens are weighed (token_weights.py).

    Attributes:
        scheme: which weights.
        causal: whether tokens are in causal order.
        gradients: |g|^2 of the tokens of each batch, at the output of the layer; None where there are none.
    """

    scheme: TokenWeights
    causal: bool
    gradients: Sequence[Tensor] | None = None

    def of(self, given: Given, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """As of :func:`miniquant.token_weights.weigh`."""
        gradients = None if self.gradients is None else self.gradients[given.batch]
        if gradients is not None and gradients.shape != tokens.shape[:-1]:
            raise ValueError(
                f"expected gradients of tokens of shape {list(tokens.shape[:-1])}, but got shape "
                f"{list(gradients.shape)}"
            )
        return weigh(tokens, given.mask, self.scheme, causal=self.causal, gradients=gradients, relative_to=given.stream)


@dataclass
class _Sample:
    """The sums of the weights that tokens have as a sample, and of their squares."""

    weights: float = 0.0
    squares: float = 0.0

    def add(self, tokens: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
        """Adds the tokens of a batch."""
        if weights is None:
            count = float(tokens.shape[:-1].numel() if mask is None else mask.sum())
            self.weights += count
            self.squares += count
        else:
            counted = (weights if mask is None else weights[mask.to(weights.device)]).double()
            self.weights += float(counted.sum())
            self.squares += float(counted.square().sum())

    def merge(self, other: "_Sample") -> None:
        self.weights += other.weights
        self.squares += other.squares

    @property
    def effective_tokens(self) -> float:
        """(sum w)^2 / sum w^2, at least 1."""
        return max(1.0, self.weights**2 / self.squares) if self.squares else 1.0


@dataclass
class _Hessians:
    """What a layer's tokens say: those of calibration, and those held out."""

    calibration: HessianAccumulator
    held_out: HessianAccumulator
    sample: _Sample  # of calibration
    errors: Errors | None = None  # of calibration
    held_out_errors: Errors | None = None
    _corrections: dict[float, Correction] = field(default_factory=dict)  # by ridge

    @classmethod
    def empty(cls, columns: int, dtype: torch.dtype) -> "_Hessians":
        return cls(HessianAccumulator(columns, dtype, halves=True), HessianAccumulator(columns, dtype), _Sample())

    def merge(self, other: "_Hessians") -> None:
        self.calibration.merge(other.calibration)
        self.held_out.merge(other.held_out)
        self.sample.merge(other.sample)

    def sum_over(self, ranks: Ranks, *, has_held_out: bool) -> None:
        """Adds the tokens of all ranks.

        Args:
            ranks: of the run.
            has_held_out: whether batches of this one are held out.
        """
        for accumulator in (self.calibration, self.held_out):
            accumulator.merge_over(ranks.sum)
        lacks = [  # on any rank
            self.errors is None,
            any(
                errors is None or errors.stream is None for errors in (self.errors, self.held_out_errors or self.errors)
            ),
            has_held_out and self.held_out_errors is None,
        ]
        said = torch.tensor([self.sample.weights, self.sample.squares, has_held_out, *lacks], dtype=torch.float64)
        ranks.sum(said)
        weights, squares, judging, without_errors, without_stream, without_held_out = said.tolist()
        self.sample = _Sample(weights, squares)
        if without_errors or self.errors is None:
            self.errors = self.held_out_errors = None
            return
        is_judged = judging and not without_held_out
        self.held_out_errors = (self.held_out_errors or self.errors.like()) if is_judged else None
        for errors in filter(None, (self.errors, self.held_out_errors)):
            if without_stream:
                errors.stream = None
            errors.merge_over(ranks.sum)

    def corrected(
        self,
        weight: Tensor,
        ridge: float,
        part: float,
        stream_part: float,
        decided: Callable[[Callable[[], bool]], bool],
    ) -> tuple[Tensor, list[str]]:
        """The weight that makes up for errors of layers before, and what is not corrected of them.

        Args:
            weight: [N, K].
            ridge: of the layer.
            part: of the errors of its inputs.
            stream_part: of the errors of the stream that it writes to.
            decided: says whether a target gains on held-out tokens, with a function that finds out.
        """
        if self.errors is None:
            return weight, []
        if ridge not in self._corrections:
            self._corrections[ridge] = Correction(self.errors, self.calibration.hessian(), ridge)
        attempts = [(part, stream_part)] if stream_part and self.errors.stream is not None else []
        attempts += [(part, 0.0)] if part else []
        notes: list[str] = []
        for parts in attempts:
            target = self._corrections[ridge].of(weight, *parts)
            if decided(partial(self._gains, weight, target, *parts)):
                return target, notes
            whose = "of the residual stream" if parts[1] else "of earlier layers"
            notes.append(f"errors {whose} are not corrected: on held-out tokens that loses more than it gains")
        return weight, notes

    def _gains(self, weight: Tensor, target: Tensor, part: float, stream_part: float) -> bool:
        """Whether ||u + W x - (v + W' y)||^2 is at most ||u + W x - (v + W y)||^2 on held-out tokens, in some rows.

        Of what is not corrected, u - v or x - y, nothing is counted.
        """
        if self.held_out_errors is None or self.held_out.tokens < FEWEST_HELD_OUT:
            return True
        some = _judged_rows(len(weight))
        change = (target[some] - weight[some]).double()
        wanted = self.held_out_errors.wanted(weight, float(part > 0), float(stream_part > 0), some)
        gained = 2 * wanted - change @ self.held_out.hessian().double()
        return float((gained * change).sum()) >= 0


# Layers


class _Quantizer:
    """The state of one run."""

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
        self._last: _Hessians | None = None  # of these inputs
        self._ridges: dict[Any, float] = {}  # found in them: by grid
        self._carried = _CarriedRidges()
        self._gradients: dict[str, list[Tensor]] = {}  # by name of a layer
        self._searched = False  # whether the ridge of the layer at hand was found in its own tokens
        self._pools: dict[tuple[str, str], _Hessians] = {}
        self._few: dict[int, int] = {}  # experts that wait for their siblings: tokens of their own
        self._visited_families: dict[str, None] = {}

    def run(self, walk: Walk) -> None:
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
                pool = self._pools.setdefault(family, _Hessians.empty(site.columns, hessians.calibration.dtype))
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
            same = all(self._ranks.gathered(same or not visit.inputs))
        self._inputs = inputs
        if not same:
            self._last = None
            self._ridges.clear()

    def _weighing(self, site: Site) -> Weighing:
        scheme = self._options[id(site)].token_weights
        gradients = self._gradients.get(site.name) if scheme == GRADIENT else None
        return Weighing(scheme, id(site) in self._causal, gradients)

    def _hessians(self, visit: Visit) -> _Hessians:
        """Of the tokens that batches give to a layer; those of the layer before, where it was given the same."""
        if self._last is not None:
            return self._last
        columns, dtype, weighing = visit.site.columns, _sum_dtype(visit.site), self._weighing(visit.site)
        start = time.perf_counter()
        first_held_out = self._first_held_out
        calibration = [given for given in visit.inputs if given.batch < first_held_out]
        held_out = [given for given in visit.inputs if given.batch >= first_held_out]
        known, sample, errors = accumulated(calibration, columns, dtype, weighing, halves=True, ranks=self._ranks)
        judged, _, held_out_errors = accumulated(held_out, columns, dtype, weighing, halves=False)
        hessians = _Hessians(known, judged, sample, errors, held_out_errors)
        if self._ranks is not None:
            hessians.sum_over(self._ranks, has_held_out=bool(held_out))
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
            few: list[tuple[Site, int, _Hessians | None]] = []
            for layer, sites in self._families[module].items():
                pool = self._pools.pop((module, layer), None)
                for one in sites:
                    if id(one) in unreached:
                        walk.leave_out(one)
                        self._few[id(one)] = 0
                    if id(one) in self._few:
                        few.append((one, self._few.pop(id(one)), pool))
            self._with_siblings(few)

    def _with_siblings(self, few: Sequence[tuple[Site, int, _Hessians | None]]) -> None:
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
        hessians: _Hessians | None,
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
                self._carried.found(_kind(done.site, done.options), finished.found_ridge)
            elif grid not in self._ridges:
                self._carried.take(_kind(done.site, done.options))
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
        self, site: Site, options: LayerOptions, hessians: _Hessians | None, notes: list[str], *, nearest: bool
    ) -> dict[str, Any]:
        """All that a :class:`LayerResult` says of the solver."""
        weight = site.read() if self._weights is None else self._weights(site)
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
        hessians: _Hessians | None,
        dtype: torch.dtype,
    ) -> dict[str, float | None]:
        """Losses of ways to quantize a layer: the sum over all rows, which ranks share, from those it is judged by."""
        some, ranks = _judged_rows(len(weight)), self._ranks
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
        self, site: Site, weight: Tensor, options: LayerOptions, hessians: _Hessians, notes: list[str]
    ) -> tuple[Tensor, QuantizedWeight, float]:
        """The weight to be approached, the quantized one, and the ridge."""
        grid = options.grid
        shared = self._last is hessians
        if options.ridge != "auto":
            return self._with_ridge(weight, options, hessians, float(options.ridge), notes)
        if shared and grid in self._ridges:
            return self._with_ridge(weight, options, hessians, self._ridges[grid], notes)
        carried = self._carried.take(_kind(site, options)) if shared and siblings_of(site) is None else None
        if carried is not None:
            with suppress(LinAlgError):  # then its own is searched for
                found = self._with_ridge(weight, options, hessians, carried, notes)
                self._ridges[grid] = carried
                return found
        choice = self._from_first(
            lambda: choose_ridge(
                weight,
                hessians.calibration,
                **grid._asdict(),
                effective_tokens=hessians.sample.effective_tokens,
            )
        )
        target = self._target(weight, options, hessians, choice.ridge, notes)
        hessian = hessians.calibration.hessian()
        quantized, ridge, failed = with_choice(choice, lambda ridge: self._by_rows(target, hessian, options, ridge))
        if shared:
            self._ridges[grid] = ridge
            self._searched = True
            if siblings_of(site) is None:
                self._carried.found(_kind(site, options), ridge)
        if failed:
            tried = ", ".join(f"{one:.2g}" for one in failed)
            notes.append(f"the Hessian was not positive definite with ridge {tried}, so it is {ridge:.2g}")
        return target, quantized, ridge

    def _with_ridge(
        self, weight: Tensor, options: LayerOptions, hessians: _Hessians, ridge: float, notes: list[str]
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
        self, weight: Tensor, options: LayerOptions, hessians: _Hessians, ridge: float, notes: list[str]
    ) -> Tensor:
        parts = options.corrected_part, options.corrected_stream
        target, not_corrected = hessians.corrected(weight, ridge, *parts, self._from_first)
        notes.extend(not_corrected)
        return target

    def _note(self, name: str, note: str) -> None:
        layer = self._result.layers[name]
        self._result.layers[name] = replace(layer, notes=(*layer.notes, note))


class _CarriedRidges:
    """The ridges of layers of one kind, block after block.

    They hardly change: where two in a row are about the same, the next ones take the ridge without a search, which
    takes several times as long as the solver.
    """

    def __init__(self) -> None:
        self._ridges: dict[Hashable, float] = {}
        self._left: dict[Hashable, int] = {}

    def take(self, kind: Hashable) -> float | None:
        """The ridge for the next layer of a kind; None where it is to be searched for."""
        if not self._left.get(kind):
            return None
        self._left[kind] -= 1
        return self._ridges[kind]

    def found(self, kind: Hashable, ridge: float) -> None:
        """Notes the ridge that was found for a layer of a kind."""
        before = self._ridges.get(kind)
        is_same = before is not None and max(before, ridge) < NEARBY * min(before, ridge)
        self._ridges[kind] = ridge
        self._left[kind] = CARRIED if is_same and ridge < LARGEST_CARRIED else 0


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


def _kind(site: Site, options: LayerOptions) -> Hashable:
    """Equal for the same layer of different blocks, to which the same is done."""
    return re.sub(r"\d+", "#", site.name), site.rows, site.columns, options


def _judged_rows(rows: int) -> Tensor:
    """Evenly spaced rows, by which a layer is judged."""
    return torch.arange(min(rows, JUDGED_ROWS)) * rows // min(rows, JUDGED_ROWS)


def _summed_losses(
    weight: Tensor,
    candidates: Mapping[str, QuantizedWeight],
    hessians: _Hessians | None,
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

"""Quantizing whole models: the plan, the batches, the walk and the solver."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from miniquant.batches import all_batches, listed_batches, share_of
from miniquant.calibration import Calibration
from miniquant.modules import Site
from miniquant.plan import Plan, as_recipe, plan_model
from miniquant.quantizer import Quantizer
from miniquant.ranks import Ranks
from miniquant.recipe import LayerOptions, Recipe
from miniquant.results import LayerResult, LayerStore, ModelResult
from miniquant.rotation import rotate_model
from miniquant.walk import Walk


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
            calibration = listed_batches("calibration", calibration)
        if held_out is not None and not isinstance(held_out, (int, float)):
            held_out = listed_batches("held_out", held_out)
        Walk(model, all_batches(calibration, held_out)[0], (), forward=forward, masks=masks)
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
    batches, count, notes = all_batches(calibration, held_out)
    result = ModelResult(left_alone=plan.left_alone, batches=len(batches) - count, held_out_batches=count)
    if ranks is not None:
        batches, count, masks = share_of(ranks, batches, count, masks)
    result.notes += notes
    quantizer = Quantizer(model, plan, result, len(batches) - count, scale_dtype, weights, progress, store, stop, ranks)
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

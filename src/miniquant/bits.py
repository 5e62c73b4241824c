"""Bits where they count: how wide the codes of each layer are to be, for a given average.

What a layer's error does to the model
    Let e_t be the error of a layer's output at token t, and g_t the gradient at it of -log p(y) of the whole window,
    where the next tokens y are drawn from the model itself. To second order, the KL divergence of the model's
    predictions from those without the error, summed over the window, is ::

        1/2 E_y[(sum_t g_t . e_t)^2]

    because the Fisher information of a softmax is the covariance of those gradients. Errors of different tokens are
    taken as independent, so what is summed is (g_t . e_t)^2. One backward pass gives g_t of every layer, and then every
    way to quantize a layer costs one product: e = (Q - W) x. Squares have a heavy tail over tokens (first tokens of
    windows): tokens are drawn with a probability that grows with |g_t| |x_t|, and weighted by its reciprocal.

    Per layer this is the idea of HAWQ (arXiv:1905.03696) and of the Fisher weights of SqueezeLLM (arXiv:2306.07629),
    with the error that quantizing makes in place of a bound or of a diagonal.

Which bits
    Layers that are given the same inputs (q, k and v; gate and up) get the same bits, because engines fuse them into
    one. The least sum of costs at no more than the average is a multiple-choice knapsack, solved exactly by dynamic
    programming over the number of bits in units of the greatest common divisor of the layers' sizes.
"""

import glob
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from miniquant.gptq import gptq
from miniquant.gradients import each_gradient, has_gradient
from miniquant.grid import dequantize
from miniquant.layer_hessians import Weighing, accumulated
from miniquant.modules import Site, find_sites
from miniquant.recipe import LayerOptions, Recipe, Rule
from miniquant.token_weights import causal_sites
from miniquant.walk import Walk

WIDTHS = (2, 3, 4, 5, 6, 8)
# Tokens by which a layer's errors are weighed.
SAMPLED = 1024
# Of the Hessians that errors are measured with.
RIDGE = 0.05
# States of the dynamic program at most; beyond, sizes are rounded up to fewer units.
MOST_STATES = 1 << 16


@dataclass(frozen=True, eq=False)
class Unit:
    """Layers that get the same bits.

    Attributes:
        names: of the layers.
        weights: how many they have, together.
        costs: by bits, the KL divergence in nats per token that quantizing them adds, to second order.
    """

    names: tuple[str, ...]
    weights: int
    costs: Mapping[int, float]


@dataclass(frozen=True)
class Allocation:
    """Bits for every unit.

    Attributes:
        bits: by name of a layer.
        average: bits of a code, over weights.
        cost: the sum of costs, nats per token.
    """

    bits: Mapping[str, int]
    average: float
    cost: float


def allocate(units: Sequence[Unit], average: float) -> Allocation:
    """The bits of least cost whose average over weights is at most `average`.

    Raises:
        ValueError: for an average below the least that the units' widths allow, and without units.
    """
    if not units:
        raise ValueError("allocate: expected layers to choose bits for, but got none")
    total = sum(unit.weights for unit in units)
    least = sum(unit.weights * min(unit.costs) for unit in units)
    if not math.isfinite(average) or average * total < least:
        raise ValueError(f"allocate: expected an average of at least {least / total:.4g} bits, but got {average:.4g}")
    step = math.gcd(*(unit.weights for unit in units))
    room = min(int(average * total / step + 1e-9), sum(unit.weights * max(unit.costs) for unit in units) // step)
    if room > MOST_STATES:
        step = -(-int(average * total) // MOST_STATES)
        room = int(average * total) // step
    infinite = float("inf")
    best = torch.full((room + 1,), infinite, dtype=torch.float64)  # the least cost at exactly so many units of bits
    best[0] = 0.0
    choices = []
    for unit in units:
        widths = sorted(unit.costs)
        after = torch.full((len(widths), room + 1), infinite, dtype=torch.float64)
        sizes = [-(-unit.weights * bits // step) for bits in widths]
        for row, (bits, size) in enumerate(zip(widths, sizes, strict=True)):
            if size <= room:
                after[row, size:] = best[: room + 1 - size] + unit.costs[bits]
        best, chosen = after.min(dim=0)
        choices.append((unit, widths, sizes, chosen))
    place = int(best.argmin())
    if not math.isfinite(float(best[place])):  # only where sizes were rounded up
        raise ValueError(f"allocate: expected an average of more than {average:.4g} bits for layers of such sizes")
    cost, bits_of = float(best[place]), {}
    for unit, widths, sizes, chosen in reversed(choices):
        row = int(chosen[place])
        bits_of[unit] = widths[row]
        place -= sizes[row]
    in_order = {name: bits_of[unit] for unit in units for name in unit.names}
    return Allocation(in_order, sum(unit.weights * bits_of[unit] for unit in units) / total, cost)


def curve(units: Sequence[Unit], averages: Iterable[float]) -> list[Allocation]:
    """Allocations for several averages."""
    return [allocate(units, average) for average in averages]


def uniform_cost(units: Sequence[Unit], bits: int) -> float:
    """The sum of costs where every layer has as many bits."""
    return sum(unit.costs[bits] for unit in units)


def recipe_of(allocation: Allocation, recipe: Recipe) -> Recipe:
    """A recipe with the bits of an allocation: a rule for each layer whose bits are not the most frequent ones.

    Args:
        allocation: of layers whose options `recipe` has.
        recipe: all else of the options; a layer's own rule there is merged into its new one.
    """
    weights = list(allocation.bits.values())
    usual = max(sorted(set(weights)), key=weights.count)
    defaults = replace(recipe.defaults, bits=usual)
    rules = []
    for name, bits in allocation.bits.items():
        stated = next((rule.options for rule in recipe.rules if rule.matches(name)), {})
        if bits != usual or "bits" in stated:
            rules.append(Rule(glob.escape(name), {**stated, "bits": bits}))
    return replace(recipe, defaults=defaults, rules=[*rules, *recipe.rules])


# Costs


@dataclass(eq=False)
class _Sample:
    """Tokens of a layer: inputs [S, K], gradients at outputs [S, N], and how many tokens each stands for, [S]."""

    inputs: Tensor
    gradients: Tensor
    weights: Tensor

    def cost(self, error: Tensor) -> float:
        """The sum over all tokens of (g . e)^2 / 2, where e = x error^T."""
        along = (self.inputs.float() @ error.T * self.gradients.float()).sum(1).double()
        return float((along.square() * self.weights).sum()) / 2


def measure_units(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    options: LayerOptions | None = None,
    *,
    widths: Sequence[int] = WIDTHS,
    skip: Iterable[str] = (),
    seed: int = 0,
) -> list[Unit]:
    """What it costs a language model to have each of its layers quantized, at each width.

    The model is in memory whole, and so are the activations of one batch for its backward pass: a batch may be one
    window. Experts and convolutions are left out: their bits are not chosen.

    Args:
        model: whose output has logits [B, T, V]; it is not changed.
        batches: keyword arguments of its forward, with "input_ids" [B, T].
        options: all but the bits; the preset "fast" and a fixed ridge are taken for the errors.
        widths: the bits to choose from.
        skip: names of layers that are not to be counted.
        seed: of the tokens that are drawn.

    Raises:
        ValueError, TypeError: for a model without logits, and without batches or layers.
    """
    if len(batches) < 2:
        raise ValueError(
            "measure_units: expected at least two batches (errors are measured on others than those that layers are "
            f"quantized with), but got {len(batches)}"
        )
    options = options or LayerOptions()
    skipped = set(skip)
    sites: list[Site] = [site for site in find_sites(model).sites if has_gradient(site) and site.name not in skipped]
    if not sites:
        raise ValueError("measure_units: expected a model with Linear layers, but got none")
    generator = torch.Generator().manual_seed(seed)
    judging = batches[1::2]
    samples, tokens = _sampled(model, judging, sites, generator)
    causal = causal_sites(model, sites)
    units: dict[int, list[tuple[Site, dict[int, float]]]] = {}
    with Walk(model, batches[::2], sites) as walk:
        hessian, last = None, None
        for visit in walk:
            site = visit.site
            sample = samples.pop(site.name, None)
            if sample is None:
                continue
            if hessian is None or last != visit.inputs_id:
                weighing = Weighing(options.token_weights, id(site) in causal)
                sums, *_ = accumulated(visit.inputs, site.columns, torch.float32, weighing, halves=False)
                hessian, last = sums.hessian(), visit.inputs_id
            weight = site.read().float()
            costs = {}
            for bits in widths:
                arguments = replace(options, bits=bits, superblocks=None, preset="fast", ridge=RIDGE).arguments()
                error = dequantize(gptq(weight, hessian, **arguments)) - weight
                costs[bits] = sample.cost(error) / tokens
            units.setdefault(visit.inputs_id, []).append((site, costs))
    return [
        Unit(
            tuple(site.name for site, _ in layers),
            sum(site.rows * site.columns for site, _ in layers),
            {bits: sum(costs[bits] for _, costs in layers) for bits in widths},
        )
        for layers in units.values()
    ]


def _sampled(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], sites: Sequence[Site], generator: torch.Generator
) -> tuple[dict[str, _Sample], int]:
    """Inputs and gradients of some tokens of each layer, and how many tokens there are."""
    parts: dict[str, list[_Sample]] = {site.name: [] for site in sites}
    of_batch = -(-SAMPLED // len(batches))

    def watch(site: Site, _number: int, inputs: Tensor) -> Callable[[Tensor], None]:
        def came(gradient: Tensor) -> None:
            parts[site.name].append(_drawn(inputs.flatten(0, -2), gradient.flatten(0, -2), of_batch, generator))

        return came

    try:
        tokens = each_gradient(model, batches, sites, watch, generator=generator)
    except ValueError as error:
        raise TypeError(f"measure_units: {error}") from error
    return {name: _joined(found) for name, found in parts.items() if found}, tokens


def _drawn(inputs: Tensor, gradients: Tensor, count: int, generator: torch.Generator) -> _Sample:
    """Tokens drawn with replacement, with a probability that grows with the product of their norms."""
    sizes = (inputs.float().norm(dim=1) * gradients.float().norm(dim=1)).double().cpu()
    if not float(sizes.sum()) > 0:
        return _Sample(inputs[:0].cpu(), gradients[:0].cpu(), torch.zeros(0, dtype=torch.float64))
    shares = sizes / sizes.sum()
    chosen = torch.multinomial(shares, count, replacement=True, generator=generator)
    place = chosen.to(inputs.device)
    return _Sample(inputs[place].cpu(), gradients[place].cpu(), 1 / (shares[chosen] * count))


def _joined(parts: Sequence[_Sample]) -> _Sample:
    return _Sample(
        torch.cat([part.inputs for part in parts]),
        torch.cat([part.gradients for part in parts]),
        torch.cat([part.weights for part in parts]),
    )

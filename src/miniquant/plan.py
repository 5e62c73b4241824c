"""Which weights of a model are quantized, and how."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from miniquant.modules import LeftAlone, Site, find_sites
from miniquant.recipe import LayerOptions, Recipe


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

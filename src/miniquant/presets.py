"""Options that belong together, as keyword arguments of :func:`miniquant.gptq`."""

from typing import Any, Literal, get_args

import torch

Preset = Literal["plain", "fast", "best"]


def _changed_options(name: str, *, symmetric: bool) -> dict[str, Any]:
    """What a preset sets otherwise than :func:`miniquant.gptq` does by itself."""
    schema, of_gptq = (getattr(torch.ops.miniquant, op).default._schema for op in ("preset", "gptq"))  # noqa: SLF001
    defaults = {argument.name: argument.default_value for argument in of_gptq.arguments}
    values = torch.ops.miniquant.preset(name, symmetric=symmetric)
    options = {returned.name: value for returned, value in zip(schema.returns, values, strict=True)}
    return {option: value for option, value in options.items() if value != defaults[option]}


# Read once, so that a compiled function finds plain values.
_PRESETS = {
    (name, symmetric): _changed_options(name, symmetric=symmetric)
    for name in get_args(Preset)
    for symmetric in (True, False)
}


def preset(name: Preset, *, symmetric: bool = True) -> dict[str, Any]:
    """Keyword arguments of :func:`miniquant.gptq`; bits, group_size and ridge keep their defaults, or are added beside.

    - "plain": scales that just hold each group's range, codes in [-7, 7] at 4 bits, columns from left to right.
    - "fast": a lower loss for little more time: columns in activation order, scales of least squared error, every code
      used.
    - "best": the lowest loss: groups in order of activation, each group's scale chosen by what it adds to the loss,
      every code used, a beam search of the codes, two rounds of refinement.

    docs/algorithm.md says what each gains and costs. To replace an option that the preset has, merge it in: the second
    example.

    Args:
        name: of the preset.
        symmetric: False for an asymmetric grid. It has every code already, so ``full_range`` is left out and
            ``symmetric=False`` put in.

    Raises:
        ValueError: for another name.

    Example:
        >>> miniquant.gptq(weight, hessian, bits=3, **miniquant.preset("best"))
        >>> miniquant.gptq(weight, hessian, **{**miniquant.preset("best"), "refine": 4})
        >>> miniquant.gptq(weight, hessian, **miniquant.preset("best", symmetric=False))
    """
    if name not in get_args(Preset):
        raise ValueError(f"preset: expected name to be one of {', '.join(get_args(Preset))}, but got {name!r}")
    return dict(_PRESETS[name, bool(symmetric)])

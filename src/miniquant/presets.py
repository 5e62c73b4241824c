"""Presets: sets of options, as keyword arguments of :func:`miniquant.gptq`."""

from typing import Any, Literal, get_args

import torch

from miniquant.grid import SuperblockKind
from miniquant.superblocks import GRIDS

Preset = Literal["plain", "fast", "best"]


def _changed_options(name: str, *, symmetric: bool) -> dict[str, Any]:
    """The options of a preset that differ from the defaults of :func:`miniquant.gptq`."""
    schema, of_gptq = (getattr(torch.ops.miniquant, op).default._schema for op in ("preset", "gptq"))  # noqa: SLF001
    defaults = {argument.name: argument.default_value for argument in of_gptq.arguments}
    values = torch.ops.miniquant.preset(name, symmetric=symmetric)
    options = {returned.name: value for returned, value in zip(schema.returns, values, strict=True)}
    return {option: value for option, value in options.items() if value != defaults[option]}


# Read at import: a compiled function needs plain values.
_PRESETS = {
    (name, symmetric): _changed_options(name, symmetric=symmetric)
    for name in get_args(Preset)
    for symmetric in (True, False)
}


_OF_GRIDS = ("symmetric", "full_range")


def preset(name: Preset, *, symmetric: bool = True, kind: SuperblockKind | None = None) -> dict[str, Any]:
    """Keyword arguments of :func:`miniquant.gptq` for a preset; pass bits, group_size and ridge in addition.

    - "plain": the smallest scale that covers each group's range, codes in [-7, 7] at 4 bits, columns from left to
      right.
    - "fast": a lower loss for little more time: columns in activation order, scales of least squared error, all codes
      used.
    - "best": the lowest loss: groups in descending mean of diag(H), each group's scale chosen by what it adds to the
      loss, all codes used, a beam search of the codes, two rounds of refinement.

    docs/algorithm.md says what each gains and costs. To replace an option of the preset, merge the dictionaries as in
    the second example.

    Args:
        name: "plain", "fast" or "best".
        symmetric: False for an asymmetric grid. This grid uses all codes already, so the result contains
            ``symmetric=False`` instead of ``full_range``.
        kind: a type of :func:`miniquant.gptq_superblocks`, whose arguments are then given: the type has a grid of its
            own, so ``symmetric`` is not read.

    Raises:
        ValueError: for any other name or kind.

    Example:
        >>> miniquant.gptq(weight, hessian, bits=3, **miniquant.preset("best"))
        >>> miniquant.gptq(weight, hessian, **{**miniquant.preset("best"), "refine": 4})
        >>> miniquant.gptq(weight, hessian, **miniquant.preset("best", symmetric=False))
    """
    if name not in get_args(Preset):
        raise ValueError(f"preset: expected name to be one of {', '.join(get_args(Preset))}, but got {name!r}")
    if kind is None:
        return dict(_PRESETS[name, bool(symmetric)])
    if kind not in GRIDS:
        raise ValueError(f"preset: expected kind to be one of {', '.join(GRIDS)}, but got {kind!r}")
    return {key: value for key, value in _PRESETS[name, True].items() if key not in _OF_GRIDS}

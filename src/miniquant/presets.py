"""Options that belong together, as keyword arguments of :func:`miniquant.gptq`."""

from typing import Any, Literal

Preset = Literal["plain", "fast", "best"]

_PRESETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": {"full_range": True, "scale_method": "mse", "column_order": "activation"},
    "best": {
        "full_range": True,
        "scale_method": "loss",
        "group_scales": "dynamic",
        "column_order": "group",
        "beam_scales": 2,
        "refine": 2,
    },
}


def preset(name: Preset) -> dict[str, Any]:
    """Keyword arguments of :func:`miniquant.gptq`; bits, group_size and ridge are the defaults, and yours to add.

    - "plain": scales that just hold each group's range, codes in [-7, 7] at 4 bits, columns from left to right.
    - "fast": a lower loss for little more time: columns in activation order, scales of least squared error, every code
      used.
    - "best": the lowest loss: groups in order of activation, each group's scale chosen by what it adds to the loss,
      every code used, a beam search of the codes, two rounds of refinement.

    docs/algorithm.md says what each gains and costs.

    Raises:
        ValueError: for another name.

    Example:
        >>> miniquant.gptq(weight, hessian, bits=3, **miniquant.preset("best"))
    """
    if name not in _PRESETS:
        raise ValueError(f"preset: expected name to be one of {', '.join(_PRESETS)}, but got {name!r}")
    return dict(_PRESETS[name])

"""A ridge from the data, and GPTQ with it."""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniquant.gptq import GptqResult, gptq
from miniquant.hessian import HessianAccumulator
from miniquant.operators import call

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it


class RidgeChoice(NamedTuple):
    """The ridge that the data ask for, and what was found on the way.

    Attributes:
        ridge: relative to the Hessian's mean diagonal, as ``ridge`` of :func:`miniquant.gptq`.
        ridges: those that were judged, ascending; with the last GPTQ rounds to nearest.
        held_out: the held-out loss of each, relative to that of the last: below 1 where GPTQ is better than rounding to
            nearest.
        fallbacks: larger ridges, to try in turn where the Hessian is not positive definite with ``ridge``.
    """

    ridge: float
    ridges: tuple[float, ...]
    held_out: tuple[float, ...]
    fallbacks: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class AutoGptqResult(GptqResult):
    """What :func:`miniquant.gptq` gives with a ridge from the data, and that ridge.

    Attributes:
        choice: how the ridge was found.
        ridge: the one that was used: ``choice.ridge``, or larger.
        failed: ridges, ascending, with which the Hessian was not positive definite.
    """

    choice: RidgeChoice
    ridge: float
    failed: tuple[float, ...]


_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(gptq).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "ridge"
)


def _check_accumulator(op: str, accumulator: HessianAccumulator) -> None:
    if not isinstance(accumulator, HessianAccumulator):
        raise TypeError(
            f"{op}: expected accumulator to be a HessianAccumulator with halves=True (a ridge is judged by halves of "
            f"the tokens), but got {type(accumulator).__name__}"
        )


def choose_ridge(
    weight: Tensor,
    accumulator: HessianAccumulator,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
) -> RidgeChoice:
    """Judges ridges by the tokens themselves.

    Some rows of the weight are quantized with the Hessian of one half of the tokens and measured with that of the
    other, both ways round, and the ridge of least loss is taken. With fewer tokens in a half than columns, ridges below
    (128 / tokens)^0.7 are not tried: docs/algorithm.md, "The ridge from the data", says why. Where tokens have weights,
    the effective number of tokens takes the place of theirs. Costs twelve factorizations of H, and at most twelve
    sweeps over 128 rows.

    Args:
        weight: [N, K].
        accumulator: one that keeps its halves apart (``HessianAccumulator(K, halves=True)``), with a token in either.
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    _check_accumulator("choose_ridge", accumulator)
    ridge, ridges, losses, fallbacks = call(
        "choose_ridge",
        weight,
        accumulator.half(0),
        accumulator.half(1),
        round(accumulator.effective_tokens),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    nearest = float(losses[-1]) or 1.0
    held_out = (losses / nearest).tolist()
    return RidgeChoice(float(ridge), tuple(ridges.tolist()), tuple(held_out), tuple(fallbacks.tolist()))


def gptq_auto(weight: Tensor, accumulator: HessianAccumulator, **options: Any) -> AutoGptqResult:
    """:func:`miniquant.gptq` with the ridge that :func:`choose_ridge` finds: the call to start from.

    Where the Hessian is not positive definite with it, the choice's ``fallbacks`` are tried; the result says which ridge
    was used.

    Args:
        weight: [N, K].
        accumulator: one that keeps its halves apart, with a token in either.
        options: those of :func:`miniquant.gptq` but ``ridge``.

    Raises:
        ValueError, TypeError: for a bad argument.
        torch.linalg.LinAlgError: where no such ridge makes the Hessian positive definite.

    Example:
        >>> accumulator = HessianAccumulator(layer.in_features, halves=True)
        >>> ...
        >>> quantized = gptq_auto(layer.weight, accumulator, bits=4, **preset("best"))
    """
    _check_accumulator("gptq_auto", accumulator)
    if "ridge" in options:
        raise TypeError(
            f"gptq_auto: expected no ridge (it finds one in the data; gptq takes one), but got {options['ridge']}"
        )
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"gptq_auto: expected an option of gptq ({', '.join(_OPTIONS)}), but got {name!r}")
    grid = {name: options[name] for name in ("bits", "group_size", "symmetric") if name in options}
    choice = choose_ridge(weight, accumulator, **grid)
    hessian = accumulator.hessian()

    failed: list[float] = []
    for ridge in (choice.ridge, *choice.fallbacks):
        try:
            result = gptq(weight, hessian, ridge=ridge, **options)
        except LinAlgError:
            if ridge == choice.fallbacks[-1]:
                raise
            failed.append(ridge)
        else:
            break
    return AutoGptqResult(**vars(result), choice=choice, ridge=ridge, failed=tuple(failed))

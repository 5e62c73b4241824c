"""A ridge from the data, and GPTQ with it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniquant.gptq import GptqResult, gptq
from miniquant.hessian import HessianAccumulator

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it
MOST_FAILURES = 3


class RidgeChoice(NamedTuple):
    """The ridge that the data ask for, and what was found on the way.

    Attributes:
        ridge: relative to the Hessian's mean diagonal, as ``ridge`` of :func:`miniquant.gptq`.
        ridges: those that were judged, ascending; with the last GPTQ rounds to nearest.
        held_out: the held-out loss of each, relative to that of the last: below 1 where GPTQ is better than rounding to
            nearest.
    """

    ridge: float
    ridges: tuple[float, ...]
    held_out: tuple[float, ...]


class AutoGptqResult(NamedTuple):
    """What :func:`miniquant.gptq` gives with a ridge from the data.

    Attributes:
        result: codes, scales, zero points and the loss of each row.
        ridge: the one that was used: ``choice.ridge``, or larger.
        choice: how it was found.
        failed: ridges, ascending, with which the Hessian was not positive definite.
    """

    result: GptqResult
    ridge: float
    choice: RidgeChoice
    failed: tuple[float, ...]


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
    other, both ways round, and the ridge of least loss is taken. With fewer tokens in a half than columns none below
    (128 / tokens)^0.7 is: docs/algorithm.md, "The ridge from the data", says why. Costs twelve factorizations of H, and
    no more than twelve sweeps over 128 rows.

    Args:
        weight: [N, K].
        accumulator: one that keeps its halves apart (``HessianAccumulator(K, halves=True)``), with a token in either.
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    ridge, ridges, losses = torch.ops.miniquant.choose_ridge(
        weight,
        accumulator.half(0),
        accumulator.half(1),
        accumulator.tokens,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    nearest = float(losses[-1]) or 1.0
    return RidgeChoice(float(ridge), tuple(ridges.tolist()), tuple((losses / nearest).tolist()))


def gptq_auto(weight: Tensor, accumulator: HessianAccumulator, **options: Any) -> AutoGptqResult:
    """:func:`miniquant.gptq` with the ridge that :func:`choose_ridge` finds.

    Where the Hessian is not positive definite with it, a ridge ten times larger is tried, three times at most, and
    reported.

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
    grid = {name: options[name] for name in ("bits", "group_size", "symmetric") if name in options}
    choice = choose_ridge(weight, accumulator, **grid)
    hessian = accumulator.hessian()

    def quantize(ridge: float, failed: tuple[float, ...]) -> AutoGptqResult:
        try:
            return AutoGptqResult(gptq(weight, hessian, ridge=ridge, **options), ridge, choice, failed)
        except LinAlgError:
            if len(failed) == MOST_FAILURES:
                raise
        return quantize(10 * ridge, (*failed, ridge))

    return quantize(choice.ridge, ())

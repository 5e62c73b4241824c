"""The ridge chosen from the data, and GPTQ with that ridge."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from miniquant.gptq import GptqResult, gptq
from miniquant.hessian import HessianAccumulator
from miniquant.operators import call

Result = TypeVar("Result")

LinAlgError: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # torch does not list it


# The best ridge falls with the number of tokens to this power, as choose_ridge takes it.
POWER_OF_TOKENS = 0.7


class RidgeChoice(NamedTuple):
    """The ridge chosen from the data, and the held-out losses that it was chosen by.

    Attributes:
        ridge: relative to the Hessian's mean diagonal, as ``ridge`` of :func:`miniquant.gptq`.
        ridges: all ridges that were tried, ascending; the last one stands for rounding to nearest.
        held_out: the held-out loss of each ridge, relative to that of the last: below 1 if GPTQ is better than rounding
            to nearest. Infinite if the Hessian of a half is not positive definite with it.
        fallbacks: larger ridges, to try in turn if the Hessian is not positive definite with ``ridge``.
    """

    ridge: float
    ridges: tuple[float, ...]
    held_out: tuple[float, ...]
    fallbacks: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class AutoGptqResult(GptqResult):
    """The result of :func:`miniquant.gptq` with a ridge chosen from the data, and that ridge.

    Attributes:
        choice: how the ridge was chosen.
        ridge: the ridge that was used: ``choice.ridge``, or a larger one.
        failed: the ridges, ascending, with which the Hessian was not positive definite.
    """

    choice: RidgeChoice
    ridge: float
    failed: tuple[float, ...]


# The loss that stands for a ridge that was not tried, in the operator's result.
_NOT_TRIED = -1

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
    effective_tokens: float | None = None,
) -> RidgeChoice:
    """Chooses the ridge by cross-validation on the calibration tokens.

    Some rows of the weight are quantized with the Hessian of one half of the tokens, and their loss is measured with
    the Hessian of the other half; for fewer than 4096 columns also the other way round. The ridge of least loss is
    chosen. If a half has fewer tokens than columns, ridges below (128 / tokens)^0.7 are not tried: docs/algorithm.md,
    "The ridge from the data", says why. With token weights the effective number of tokens is used, or what
    `effective_tokens` says. The choice costs two to five factorizations of H for each way round, and as many
    sweeps over at most 128 rows.

    Args:
        weight: [N, K].
        accumulator: an accumulator with halves (``HessianAccumulator(K, halves=True)``), each with at least one token.
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: a symmetric or an asymmetric grid.
        effective_tokens: at least 1; None is ``accumulator.effective_tokens``. That one is too few where a weight is
            large not because a token stands for others, but because many tokens that are nearly equal matter more.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    _check_accumulator("choose_ridge", accumulator)
    if effective_tokens is not None and not 1 <= effective_tokens < math.inf:
        raise ValueError(
            f"choose_ridge: expected effective_tokens to be finite and at least 1, but got {effective_tokens}"
        )
    return ridge_by_halves(
        weight,
        (accumulator.half(0), accumulator.half(1)),
        accumulator.effective_tokens if effective_tokens is None else effective_tokens,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )


def ridge_by_halves(
    weight: Tensor,
    halves: tuple[Tensor, Tensor],
    effective_tokens: float,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> RidgeChoice:
    """:func:`choose_ridge` with the Hessians of both halves, [K, K] each, times any number."""
    first, second = halves
    ridge, ridges, losses, fallbacks = call(
        "choose_ridge",
        weight,
        first,
        second,
        round(effective_tokens),
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
    )
    nearest = float(losses[-1]) or 1.0
    tried = losses != _NOT_TRIED
    held_out = (losses[tried] / nearest).tolist()
    return RidgeChoice(float(ridge), tuple(ridges[tried].tolist()), tuple(held_out), tuple(fallbacks.tolist()))


def gptq_auto(
    weight: Tensor, accumulator: HessianAccumulator, *, effective_tokens: float | None = None, **options: Any
) -> AutoGptqResult:
    """:func:`miniquant.gptq` with the ridge that :func:`choose_ridge` chooses: the recommended call.

    If the Hessian is not positive definite with that ridge, the choice's ``fallbacks`` are tried in turn; the result
    says which ridge was used.

    Args:
        weight: [N, K].
        accumulator: an accumulator with ``halves=True``, each half with at least one token.
        effective_tokens: as in :func:`choose_ridge`.
        options: the options of :func:`miniquant.gptq`, except ``ridge``.

    Raises:
        ValueError, TypeError: for a bad argument.
        torch.linalg.LinAlgError: if none of these ridges makes the Hessian positive definite.

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
    choice = choose_ridge(weight, accumulator, effective_tokens=effective_tokens, **grid)
    hessian = accumulator.hessian()
    result, ridge, failed = with_choice(choice, lambda ridge: gptq(weight, hessian, ridge=ridge, **options))
    return AutoGptqResult(**vars(result), choice=choice, ridge=ridge, failed=failed)


def with_choice(choice: RidgeChoice, solve: Callable[[float], Result]) -> tuple[Result, float, tuple[float, ...]]:
    """What a solver gives with the ridge of a choice, or with the first of its fallbacks that serves.

    Args:
        choice: of :func:`choose_ridge`.
        solve: takes a ridge.

    Returns:
        The result, the ridge, and the ridges that failed before.

    Raises:
        torch.linalg.LinAlgError: if none of these ridges makes the Hessian positive definite.
    """
    failed: list[float] = []
    for ridge in (choice.ridge, *choice.fallbacks[:-1]):
        try:
            return solve(ridge), ridge, tuple(failed)
        except LinAlgError:  # noqa: PERF203  (at most three times)
            failed.append(ridge)
    return solve(choice.fallbacks[-1]), choice.fallbacks[-1], tuple(failed)

"""The Hessian of a layer's inputs, X X^T / n, and sums of other products."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from miniquant import large_pages
from miniquant.operators import call

_STATE = ("sums", "tokens", "weights")
# How exact the products of a Hessian are: as those of the sum's dtype; or, for float32 inputs of a float32 sum, three
# products of bfloat16 values each, where the CPU has a unit with which that is faster.
HessianPrecision = Literal["full", "bf16x3"]


def hessian_update_(
    hessian: Tensor, inputs: Tensor, *, token_weights: Tensor | None = None, precision: HessianPrecision = "full"
) -> Tensor:
    """``hessian += X^T diag(w) X`` for a batch of inputs, in place.

    Args:
        hessian: [K, K], float32 or float64; changed and returned.
        inputs: [..., K], float32, float64, bfloat16 or float16; cast to the Hessian's dtype before the product.
        token_weights: w, floating point [...], finite and not negative, one for each token; 1 each without. The inputs
            of a token of weight 0 are not read.
        precision: "full"; or "bf16x3", with which float32 inputs of a float32 sum may be multiplied in three products
            of bfloat16 values, where the CPU has a unit with which that is faster (AMX): an entry then has an error of
            at most 1.3e-4 times that of ``|X|^T diag(w) |X|``. Elsewhere, and for other dtypes, it is as "full".

    Several threads may update the same tensor: calls wait for one another.

    Raises:
        ValueError, TypeError: for a bad argument, including inputs that are not finite and inputs with which the sum
            would overflow; the Hessian is then unchanged.
    """
    call("hessian_update_", hessian, inputs, token_weights=token_weights, precision=precision)
    return hessian


def product_update_(sum: Tensor, left: Tensor, right: Tensor) -> Tensor:  # noqa: A002  (as the operator has it)
    """``sum += X^T Y`` for two batches of the same tokens, in place.

    Where a Hessian says what a layer's inputs have in common with themselves, such a sum says what they have in common
    with something else, as with errors. Values of 16 bits on both sides are multiplied as those of a Hessian are, where
    the CPU has a unit for that and the sum is float32. Other products are PyTorch's where it has MKL, except on CPUs
    with AVX-512 that are not Intel's, where MKL is slower. The order of the sums does not depend on the number of
    threads where the products are not PyTorch's.

    Args:
        sum: [M, K], float32 or float64; changed and returned.
        left: X [..., M], float32, float64, bfloat16 or float16; cast to the sum's dtype before the product.
        right: Y [..., K], likewise, with the same leading dimensions.

    Several threads may update the same tensor: calls wait for one another.

    Raises:
        ValueError, TypeError: for a bad argument, including values that are not finite and such with which the sum
            would overflow; the sum is then unchanged.
    """
    call("product_update_", sum, left, right)
    return sum


# Rows of a triangle that are stored together, all up to the last one's diagonal: little more than the triangle.
_ROWS_TOGETHER = 256


def _row_ranges(columns: int) -> list[tuple[int, int]]:
    """First and last row (exclusive) of those that are stored together."""
    return [(first, min(first + _ROWS_TOGETHER, columns)) for first in range(0, columns, _ROWS_TOGETHER)]


def _row_parts(sums: Tensor, lower: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Of the lower triangles of sums [S, K, K]: rows that are stored together, and a view of these [S, rows, last]."""
    count, columns = sums.shape[:2]
    offset = 0
    for first, last in _row_ranges(columns):
        size = count * (last - first) * last
        yield first, last, lower[offset : offset + size].view(count, last - first, last)
        offset += size


def _lower_triangle(sums: Tensor) -> Tensor:
    """The lower triangles of symmetric sums [S, K, K], in about half of their memory."""
    count, columns = sums.shape[:2]
    lower = sums.new_empty(count * sum((last - first) * last for first, last in _row_ranges(columns)))
    for first, last, part in _row_parts(sums, lower):
        part.copy_(sums[:, first:last, :last])
    return lower


def _set_both_triangles(sums: Tensor, lower: Tensor) -> None:
    """Writes what :func:`_lower_triangle` gives, and its mirror image."""
    for first, last, part in _row_parts(sums, lower):
        sums[:, first:last, :last] = part
        sums[:, :first, first:last] = part[:, :, :first].mT


class HessianAccumulator:
    """Counts tokens and gives X X^T / n over any number of batches.

    The division of the tokens into batches changes the result by rounding only. A call that raises changes nothing.

    Threads may share an accumulator: calls wait for one another (their order changes the sum by rounding only). A
    process that has used PyTorch's threads must not fork and continue to compute in the child: start workers of
    ``torch.utils.data.DataLoader`` and ``multiprocessing`` with "spawn", or before the first update.

    Args:
        in_features: K.
        dtype: dtype of the sum, torch.float32 or torch.float64.
        halves: keep one sum for each half of the tokens, for :func:`miniquant.choose_ridge` and
            :func:`miniquant.gptq_auto`; takes twice the memory. A batch with more tokens than all before it is cut in
            two; any other goes to the half with fewer tokens, so texts that come as batches of their own stay whole.
        precision: of the products, as of :func:`hessian_update_`.

    Example:
        >>> accumulator = HessianAccumulator(layer.in_features, halves=True)
        >>> handle = layer.register_forward_pre_hook(lambda _, inputs: accumulator.update(inputs[0]))
        >>> model(calibration_batch)
        >>> result = gptq_auto(layer.weight, accumulator)
    """

    def __init__(
        self,
        in_features: int,
        dtype: torch.dtype = torch.float32,
        *,
        halves: bool = False,
        precision: HessianPrecision = "full",
    ) -> None:
        if in_features < 0:
            raise ValueError(f"HessianAccumulator: expected in_features to be at least 0, but got {in_features}")
        if dtype not in (torch.float32, torch.float64):
            got = str(dtype).removeprefix("torch.")
            raise TypeError(f"HessianAccumulator: expected dtype to be float32 or float64, but got {got}")
        if precision not in get_args(HessianPrecision):
            raise ValueError(f"HessianAccumulator: expected precision to be 'full' or 'bf16x3', but got {precision!r}")
        self._precision = precision
        count = 2 if halves else 1
        with torch.inference_mode(mode=False):  # normal tensors, for updates in any mode
            self._state = (
                large_pages.zeros(count, in_features, in_features, dtype=dtype),
                torch.zeros(count, dtype=torch.int64, device="cpu"),
                torch.zeros(2, count, dtype=torch.float64, device="cpu"),
            )

    @classmethod
    def from_sums(cls, sums: Tensor, tokens: int | Sequence[int]) -> "HessianAccumulator":
        """Makes an accumulator from sums that were computed elsewhere.

        Args:
            sums: X X^T, not divided by the number of tokens, float32 or float64: [K, K] of all tokens, or [2, K, K]
                with one sum for each half; copied.
            tokens: the number of tokens; two numbers if ``sums`` has two halves.

        Raises:
            ValueError, TypeError: for a bad argument.
        """
        if not isinstance(sums, Tensor):
            raise TypeError(f"HessianAccumulator: expected sums to be a Tensor, but got {type(sums).__name__}")
        counts = torch.tensor([tokens] if isinstance(tokens, int) else list(tokens), dtype=torch.int64)
        whole = sums.unsqueeze(0) if sums.dim() == 2 else sums
        return cls._from_state((whole, counts, counts.double().expand(2, -1)))

    @classmethod
    def _from_state(cls, state: tuple[Tensor, Tensor, Tensor]) -> "HessianAccumulator":
        accumulator = cls(0)
        with torch.inference_mode(mode=False):
            sums = large_pages.zeros(*state[0].shape, dtype=state[0].dtype)
            accumulator._state = (sums, torch.zeros_like(state[1]), torch.zeros_like(state[2]))
        call("accumulator_merge_", *accumulator._state, *state)
        return accumulator

    def update(self, inputs: Tensor, *, mask: Tensor | None = None, token_weights: Tensor | None = None) -> None:
        """Adds a batch; its leading dimensions are tokens.

        Args:
            inputs: [..., K], float32, float64, bfloat16 or float16.
            mask: bool [...], True for tokens that count, for example ``attention_mask.bool()``; the values of other
                tokens are ignored.
            token_weights: floating point [...], finite and not negative: the weight of each token. A token of weight 0
                is left out.

        Raises:
            ValueError, TypeError: for a bad argument, including inputs that are not finite and inputs with which the
                sum would overflow.
        """
        options = {"mask": mask, "token_weights": token_weights, "precision": self._precision}
        call("accumulator_update_", *self._state, inputs, **options)

    def update_half(self, index: int, inputs: Tensor, *, token_weights: Tensor | None = None) -> None:
        """Adds a batch to one half, where whoever calls knows which: as :meth:`update` without a mask.

        Raises:
            ValueError, TypeError: as there; if the accumulator has no halves, or for another index than 0 or 1.
        """
        if not self.halves or index not in (0, 1):
            raise ValueError(
                f"HessianAccumulator: expected index to be 0 or 1 of an accumulator with halves, but got {index}"
                + ("" if self.halves else " of one without")
            )
        sums, tokens, weights = self._state
        call(
            "accumulator_update_",
            *(sums[index : index + 1], tokens[index : index + 1], weights[:, index : index + 1], inputs),
            mask=None,
            token_weights=token_weights,
            precision=self._precision,
        )

    def merge_over(self, total: Callable[..., None]) -> None:
        """Adds the tokens of other processes.

        Args:
            total: sums tensors over all of them, in place.
        """
        sums, tokens, weights = self._state
        lower = _lower_triangle(sums)
        total(lower, tokens, weights)
        _set_both_triangles(sums, lower)

    def merge(self, other: "HessianAccumulator") -> None:
        """Adds the tokens of another accumulator.

        Raises:
            ValueError, TypeError: if its in_features, dtype or halves differ.
        """
        if not isinstance(other, HessianAccumulator):
            raise TypeError(
                f"HessianAccumulator: expected other to be a HessianAccumulator, but got {type(other).__name__}"
            )
        call("accumulator_merge_", *self._state, *other._state)  # noqa: SLF001

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, for :meth:`load_state_dict`; ``torch.load(weights_only=True)`` can read it.

        Returns:
            sums [S, K, K], tokens int64 [S] and weights float64 [2, S] (the sums of the token weights and of their
            squares), where S is 2 with ``halves=True``, otherwise 1.
        """
        return dict(zip(_STATE, self._from_state(self._state)._state, strict=True))  # noqa: SLF001

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the state by one from :meth:`state_dict`.

        Raises:
            ValueError, TypeError: if it is not the state of an accumulator with the same in_features, dtype and halves.
        """
        if set(state) != set(_STATE):
            raise ValueError(
                f"HessianAccumulator: expected a state of {', '.join(_STATE)}, but got {', '.join(map(str, state))}"
            )
        for name in _STATE:
            if not isinstance(state[name], Tensor):
                got = type(state[name]).__name__
                raise TypeError(f"HessianAccumulator: expected {name} of the state to be a Tensor, but got {got}")
        empty = HessianAccumulator(self.in_features, self.dtype, halves=self.halves)
        call("accumulator_merge_", *empty._state, *(state[name] for name in _STATE))
        self._state = empty._state

    @property
    def in_features(self) -> int:
        """K."""
        return self._state[0].shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sum."""
        return self._state[0].dtype

    @property
    def halves(self) -> bool:
        """Whether each half of the tokens has a sum of its own."""
        return len(self._state[0]) == 2

    @property
    def precision(self) -> HessianPrecision:
        """How exact the products are."""
        return self._precision

    @property
    def tokens(self) -> int:
        """The number of tokens so far, without masked tokens and tokens of weight 0."""
        return int(call("accumulator_tokens", *self._state)[0])

    @property
    def effective_tokens(self) -> float:
        """The effective sample size: (sum of weights)^2 / sum of squared weights.

        Without token weights it is the number of tokens.
        """
        return float(call("accumulator_tokens", *self._state)[1])

    def proportional_halves(self) -> tuple[Tensor, Tensor]:
        """The Hessians of both halves times the same number, [K, K] each, with less memory than :meth:`half` takes.

        The first is what updates add to, not a copy; so is the second where the weights of both halves have one sum.

        Raises:
            ValueError: if the accumulator has no halves, or while one of them has no token.
        """
        if not all(self.half_tokens(half) for half in range(2)):
            raise ValueError(
                f"HessianAccumulator: expected at least one token in each half, but got {self.tokens} in total"
            )
        sums, _, weights = self._state
        of_first, of_second = weights[0].tolist()
        if of_first == of_second:
            return sums[0], sums[1]
        second = large_pages.zeros(*sums[1].shape, dtype=sums.dtype)
        return sums[0], torch.mul(sums[1], of_first / of_second, out=second)

    def hessian(self) -> Tensor:
        """X diag(w) X^T / (sum of the weights w), a new tensor [K, K]; without token weights X X^T / tokens.

        Raises:
            ValueError: before the first token.
        """
        return cast("Tensor", call("accumulator_hessian", *self._state))

    def half(self, index: int) -> Tensor:
        """The Hessian of the first or the second half (index 0 or 1), a new tensor [K, K].

        Raises:
            ValueError: if the accumulator has no halves, for any other index, or while that half has no token.
        """
        return cast("Tensor", call("accumulator_hessian", *self._state, half=index))

    def half_tokens(self, index: int) -> int:
        """The number of tokens in the first or the second half (index 0 or 1) so far.

        Raises:
            ValueError: if the accumulator has no halves, or for any other index.
        """
        return int(call("accumulator_tokens", *self._state, half=index)[0])

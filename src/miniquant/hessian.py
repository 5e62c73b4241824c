"""The Hessian of a layer's inputs, X X^T / n."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from miniquant.operators import call

_STATE = ("sums", "tokens", "weights")


def hessian_update_(hessian: Tensor, inputs: Tensor) -> Tensor:
    """``hessian += X^T X`` for a batch of inputs, in place.

    Args:
        hessian: [K, K], float32 or float64; changed and returned.
        inputs: [..., K], float32, float64, bfloat16 or float16; cast to the Hessian's dtype before the product.

    Threads may update one tensor at a time: calls wait for one another.

    Raises:
        ValueError, TypeError: for a bad argument, among them inputs that are not finite, or whose products with what
            is there would not be; the Hessian is then as it was.
    """
    call("hessian_update_", hessian, inputs)
    return hessian


class HessianAccumulator:
    """Counts tokens and gives X X^T / n over any number of batches.

    How the tokens are split into batches changes the result by rounding only. A call that raises changes nothing.

    Threads may share an accumulator: calls wait for one another (the sum then depends on their order, by rounding
    only). A process that has used PyTorch's threads must not fork and go on: start workers of
    ``torch.utils.data.DataLoader`` and ``multiprocessing`` with "spawn", or before the first update.

    Args:
        in_features: K.
        dtype: of the sum, torch.float32 or torch.float64.
        halves: keep one sum for either half of the tokens, for :func:`miniquant.choose_ridge` and
            :func:`miniquant.gptq_auto`; twice the memory. A batch that is longer than all before it is cut in two; any
            other goes to the half that has fewer tokens, so texts that come as batches of their own stay whole.

    Example:
        >>> accumulator = HessianAccumulator(layer.in_features, halves=True)
        >>> handle = layer.register_forward_pre_hook(lambda _, inputs: accumulator.update(inputs[0]))
        >>> model(calibration_batch)
        >>> result = gptq_auto(layer.weight, accumulator)
    """

    def __init__(self, in_features: int, dtype: torch.dtype = torch.float32, *, halves: bool = False) -> None:
        if in_features < 0:
            raise ValueError(f"HessianAccumulator: expected in_features to be at least 0, but got {in_features}")
        if dtype not in (torch.float32, torch.float64):
            got = str(dtype).removeprefix("torch.")
            raise TypeError(f"HessianAccumulator: expected dtype to be float32 or float64, but got {got}")
        count = 2 if halves else 1
        with torch.inference_mode(mode=False):  # normal tensors, for updates in any mode
            self._state = (
                torch.zeros(count, in_features, in_features, dtype=dtype, device="cpu"),
                torch.zeros(count, dtype=torch.int64, device="cpu"),
                torch.zeros(2, count, dtype=torch.float64, device="cpu"),
            )

    @classmethod
    def from_sums(cls, sums: Tensor, tokens: int | Sequence[int]) -> "HessianAccumulator":
        """Goes on from sums that were made elsewhere.

        Args:
            sums: X X^T, not divided by anything, float32 or float64, of all tokens [K, K] or of either half [2, K, K];
                copied.
            tokens: how many these are; of either half where ``sums`` is of both.

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
            accumulator._state = (torch.zeros_like(state[0]), torch.zeros_like(state[1]), torch.zeros_like(state[2]))
        call("accumulator_merge_", *accumulator._state, *state)
        return accumulator

    def update(self, inputs: Tensor, *, mask: Tensor | None = None, token_weights: Tensor | None = None) -> None:
        """Adds a batch; its leading dimensions are tokens.

        Args:
            inputs: [..., K], float32, float64, bfloat16 or float16.
            mask: bool [...], True for tokens that count, as ``attention_mask.bool()``; what is in the others is not
                looked at.
            token_weights: floating point [...], finite and not negative: what each token counts. A token of weight 0
                is left out.

        Raises:
            ValueError, TypeError: for a bad argument, among them inputs that are not finite, or whose products with
                those before would not be.
        """
        call("accumulator_update_", *self._state, inputs, mask=mask, token_weights=token_weights)

    def merge(self, other: "HessianAccumulator") -> None:
        """Adds what another accumulator has seen.

        Raises:
            ValueError, TypeError: where its in_features, dtype or halves differ.
        """
        if not isinstance(other, HessianAccumulator):
            raise TypeError(
                f"HessianAccumulator: expected other to be a HessianAccumulator, but got {type(other).__name__}"
            )
        call("accumulator_merge_", *self._state, *other._state)  # noqa: SLF001

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all that is kept, for :meth:`load_state_dict`; ``torch.load(weights_only=True)`` reads it.

        Returns:
            sums [S, K, K], tokens int64 [S] and weights float64 [2, S] (of tokens, and their squares), where S is 2 if
            halves are kept apart, otherwise 1.
        """
        return dict(zip(_STATE, self._from_state(self._state)._state, strict=True))  # noqa: SLF001

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces all that is kept by what :meth:`state_dict` gave.

        Raises:
            ValueError, TypeError: where it is not the state of an accumulator of this in_features, dtype and halves.
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
        """Of the sum."""
        return self._state[0].dtype

    @property
    def halves(self) -> bool:
        """Whether either half of the tokens has a sum of its own."""
        return len(self._state[0]) == 2

    @property
    def tokens(self) -> int:
        """Tokens that counted so far."""
        return int(call("accumulator_tokens", *self._state)[0])

    @property
    def effective_tokens(self) -> float:
        """How many tokens of equal weight say as much: (sum of weights)^2 / sum of their squares.

        The number of tokens where no weights were given.
        """
        return float(call("accumulator_tokens", *self._state)[1])

    def hessian(self) -> Tensor:
        """X diag(w) X^T / (sum of the weights w), a new tensor [K, K]: X X^T / tokens where no weights were given.

        Raises:
            ValueError: before the first token.
        """
        return cast("Tensor", call("accumulator_hessian", *self._state))

    def half(self, index: int) -> Tensor:
        """The same of the first or the second half, a new tensor [K, K].

        Raises:
            ValueError: where halves are not kept, for another index than 0 and 1, or while that half has no token.
        """
        return cast("Tensor", call("accumulator_hessian", *self._state, half=index))

    def half_tokens(self, index: int) -> int:
        """Tokens of the first or the second half so far.

        Raises:
            ValueError: where halves are not kept, or for another index than 0 and 1.
        """
        return int(call("accumulator_tokens", *self._state, half=index)[0])

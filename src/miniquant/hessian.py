"""The Hessian of a layer's inputs, X X^T / n."""

import torch
from torch import Tensor


def hessian_update_(hessian: Tensor, inputs: Tensor) -> Tensor:
    """``hessian += X^T X`` for a batch of inputs, in place.

    Args:
        hessian: [K, K], float32 or float64; changed and returned.
        inputs: [..., K], float32, float64, bfloat16 or float16; cast to the Hessian's dtype before the product.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    torch.ops.miniquant.hessian_update_(hessian, inputs)
    return hessian


class HessianAccumulator:
    """Counts tokens and gives X X^T / n over any number of batches.

    How the tokens are split into batches changes the result by rounding only.

    Args:
        in_features: K.
        dtype: of the sum, torch.float32 or torch.float64.
        halves: keep one sum for either half of the tokens, for :func:`miniquant.choose_ridge`; twice the memory. A
            batch that is longer than all before it is cut in two; any other goes to the half that has fewer tokens, so
            that texts that come as batches of their own stay whole.

    Example:
        >>> accumulator = HessianAccumulator(layer.in_features)
        >>> handle = layer.register_forward_pre_hook(lambda _, inputs: accumulator.update(inputs[0]))
        >>> model(calibration_batch)
        >>> result = gptq(layer.weight, accumulator.hessian())
    """

    def __init__(self, in_features: int, dtype: torch.dtype = torch.float32, *, halves: bool = False) -> None:
        if in_features < 0:
            raise ValueError(f"HessianAccumulator: expected in_features to be at least 0, but got {in_features}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"HessianAccumulator: expected dtype to be float32 or float64, but got {dtype}")
        self._sums = [torch.zeros(in_features, in_features, dtype=dtype) for _ in range(2 if halves else 1)]
        self._tokens = [0, 0]

    @property
    def tokens(self) -> int:
        """Tokens seen so far."""
        return sum(self._tokens)

    def update(self, inputs: Tensor) -> None:
        """Adds a batch [..., K]; its leading dimensions are tokens."""
        if len(self._sums) == 1 or inputs.numel() == 0 or inputs.dim() == 0 or inputs.shape[-1] != len(self._sums[0]):
            self._add(0, inputs)  # which refuses what has the wrong shape
            return
        batch = inputs.reshape(-1, inputs.shape[-1])
        lighter = 0 if self._tokens[0] <= self._tokens[1] else 1
        if len(batch) <= self.tokens:
            self._add(lighter, batch)
            return
        # Both halves have as many tokens afterwards, to one.
        cut = (len(batch) + self._tokens[1 - lighter] - self._tokens[lighter] + 1) // 2
        self._add(lighter, batch[:cut])
        self._add(1 - lighter, batch[cut:])

    def _add(self, index: int, inputs: Tensor) -> None:
        hessian_update_(self._sums[index], inputs)
        self._tokens[index] += inputs.shape[:-1].numel()

    def hessian(self) -> Tensor:
        """X X^T / tokens, a new tensor [K, K].

        Raises:
            ValueError: before the first token.
        """
        if self.tokens == 0:
            raise ValueError("HessianAccumulator: expected at least one token before hessian(), but got 0")
        total = self._sums[0] + self._sums[1] if len(self._sums) == 2 else self._sums[0]
        return total / self.tokens

    def half(self, index: int) -> Tensor:
        """X X^T / tokens of the first or the second half, a new tensor [K, K].

        Raises:
            ValueError: where halves are not kept, for another index than 0 and 1, or while that half has no token.
        """
        if self.half_tokens(index) == 0:
            raise ValueError(
                f"HessianAccumulator: expected at least one token in either half, but got {self.tokens} in all"
            )
        return self._sums[index] / self._tokens[index]

    def half_tokens(self, index: int) -> int:
        """Tokens of the first or the second half so far.

        Raises:
            ValueError: where halves are not kept, or for another index than 0 and 1.
        """
        if index not in (0, 1):
            raise ValueError(f"HessianAccumulator: expected half to be 0 or 1, but got {index}")
        if len(self._sums) == 1:
            raise ValueError("HessianAccumulator: expected halves that are kept apart (halves=True), but they are not")
        return self._tokens[index]

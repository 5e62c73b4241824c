r"""The weight that makes up for what the quantized layers before did to a layer's inputs.

Let x be a token's input in the float model and y its input in the model as it is quantized so far. GPTQ with the
Hessian H = E[y y^T] makes Q y close to W y, but the float model computes W x. The least squares solution of
||W x - Q y|| is

    W' = W E[x y^T] H^-1 = W + W (C - H) H^-1        C = E[x y^T]

after which Q is found for W' as for any weight, because ||W x - Q y||^2 = ||(W' - Q) y||^2 + a constant. Two things
keep W' from fitting the calibration tokens instead of the model: the ridge r of the layer, and a factor a from 0 to 1:

    W' = W + a W (C - H) (H + r I)^-1

C - H = E[(x - y) y^T] is summed as such: the difference of two sums would lose what it is about. Sources: QEP
(arXiv:2504.09629), which has the factor; GPTAQ (arXiv:2504.02692); Qronos (arXiv:2505.11695).

Costs: the float model's forward pass beside the other one, T K^2 multiplications and additions for each set of inputs
(twice those of H), and K^3 / 3 + 2 N K^2 for a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class InputErrors:
    """E[(x - y) y^T] over any number of batches, with weights of tokens.

    Args:
        columns: K.
        dtype: of the sum, torch.float32 or torch.float64.
    """

    def __init__(self, columns: int, dtype: torch.dtype) -> None:
        self._sum = torch.zeros(columns, columns, dtype=dtype)
        self._weight = 0.0

    def update(self, inputs: Tensor, original: Tensor, mask: Tensor | None, weights: Tensor | None) -> None:
        """Adds a batch.

        Args:
            inputs: y, [..., K].
            original: x, of the same shape: the inputs of the same tokens in the float model.
            mask: bool [...], True for tokens that count.
            weights: [...] of the tokens; None: 1 each.

        Raises:
            ValueError: where shapes differ, and for values that are not finite.
        """
        if original.shape != inputs.shape:
            raise ValueError(
                f"expected inputs of the float model to have shape {list(inputs.shape)}, "
                f"but got shape {list(original.shape)}"
            )
        y, x = (tokens.flatten(0, -2) if mask is None else tokens[mask] for tokens in (inputs, original))
        errors = x.to(self._sum.dtype) - y.to(self._sum.dtype)
        if weights is None:
            self._weight += len(errors)
        else:
            of_tokens = weights.flatten() if mask is None else weights[mask]
            self._weight += float(of_tokens.sum())
            errors *= of_tokens.unsqueeze(1).to(errors.dtype)
        # bfloat16 is multiplied as it is: its products are fast, and errors of errors matter little. float16 does not
        # have the range for errors times weights.
        kind = y.dtype if y.dtype == torch.bfloat16 else self._sum.dtype
        product = errors.to(kind).T @ y.to(kind)
        if not bool(product.isfinite().all()):
            raise ValueError("expected inputs whose products are finite, but got others")
        self._sum += product.to("cpu", self._sum.dtype)

    def merge_over(self, total: Callable[..., None]) -> None:
        """Adds the tokens of other processes.

        Args:
            total: sums tensors over all of them, in place.
        """
        weight = torch.tensor([self._weight], dtype=torch.float64)
        total(self._sum, weight)
        self._weight = float(weight)

    def mean(self) -> Tensor:
        """E[(x - y) y^T], [K, K]; 0 of no tokens."""
        return self._sum / self._weight if self._weight else self._sum.clone()


class Correction:
    """Corrects weights that are given the same inputs.

    Args:
        errors: E[(x - y) y^T], [K, K].
        hessian: E[y y^T], [K, K].
        ridge: relative to the Hessian's mean diagonal.
    """

    def __init__(self, errors: Tensor, hessian: Tensor, ridge: float) -> None:
        self._errors = errors
        damped = hessian.double()
        damped.diagonal().add_(ridge * damped.diagonal().mean())
        self._factor, failed = torch.linalg.cholesky_ex(damped)
        self._usable = not bool(failed)

    def of(self, weight: Tensor, part: float) -> Tensor:
        """W' of a weight [N, K] and the factor a, in the weight's dtype; W itself where H + r I has no inverse."""
        if not self._usable or not part:
            return weight
        wide = weight.double()
        change = torch.cholesky_solve((wide @ self._errors.double()).T, self._factor).T
        return (wide + part * change).to(weight.dtype)

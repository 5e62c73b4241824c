r"""The weight that makes up for what the quantized layers before did.

Let x be a token's input in the float model and y its input in the model as it is quantized so far. GPTQ with the
Hessian H = E[y y^T] makes Q y close to W y, but the float model computes W x. A layer that writes to a residual stream
adds to that of the float model, u, and of this one, v: what comes next in the float model is u + W x. The least squares
solution of ||u + W x - (v + Q y)|| is

    W' = W + (W E + D) H^-1        E = E[(x - y) y^T],  D = E[(u - v) y^T]

with D = 0 for all other layers, after which Q is found for W' as for any weight, because
||u + W x - (v + Q y)||^2 = ||(W' - Q) y||^2 + a constant. Two things keep W' from fitting the calibration tokens
instead of the model: the ridge r of the layer, and factors a and b from 0 to 1:

    W' = W + (a W E + b D) (H + r I)^-1

E and D are summed as such: the difference of two sums would lose what it is about. Sources: QEP (arXiv:2504.09629),
which has E and its factor; GPTAQ (arXiv:2504.02692); Qronos (arXiv:2505.11695). D is our own.

Costs: the float model's forward pass beside the other one, T K^2 multiplications and additions for each set of inputs
(twice those of H), T N K for a layer that writes to a stream, K^3 / 3 for a set of inputs, and 2 N K^2 for a layer, or
K^3 and N K^2 where it has at least as many rows as columns; the K^3 are for all layers on the same inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from miniquant import large_pages
from miniquant.hessian import product_update_


class ErrorSum:
    """E[(u - v) y^T] over any number of batches, with weights of tokens.

    Args:
        rows: M, of the errors.
        columns: K, of the inputs.
        dtype: of the sum, torch.float32 or torch.float64.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self._sum = large_pages.zeros(rows, columns, dtype=dtype)
        self._weight = 0.0

    def like(self) -> "ErrorSum":
        """Of no tokens, of the same shape and dtype."""
        rows, columns = self._sum.shape
        return ErrorSum(rows, columns, self._sum.dtype)

    def update(
        self, original: Tensor, now: Tensor, inputs: Tensor, mask: Tensor | None, weights: Tensor | None
    ) -> None:
        """Adds a batch.

        Args:
            original: u, [..., M]: of the tokens in the float model.
            now: v, of the same shape.
            inputs: y, [..., K]; may be v.
            mask: bool [...], True for tokens that count.
            weights: [...] of the tokens; None: 1 each.

        Raises:
            ValueError: where shapes differ, and for values that are not finite.
        """
        if original.shape != now.shape:
            raise ValueError(
                f"expected what the float model gives to have shape {list(now.shape)}, "
                f"but got shape {list(original.shape)}"
            )
        u, v, y = (tokens.flatten(0, -2) if mask is None else tokens[mask] for tokens in (original, now, inputs))
        errors = u.to(self._sum.dtype) - v.to(self._sum.dtype)
        if weights is None:
            self._weight += len(errors)
        else:
            of_tokens = weights.flatten() if mask is None else weights[mask]
            self._weight += float(of_tokens.sum())
            errors *= of_tokens.unsqueeze(1).to(errors.dtype)
        try:
            self._add(errors, y)
        except ValueError as error:
            raise ValueError("expected inputs whose products are finite, but got others") from error

    def _add(self, errors: Tensor, inputs: Tensor) -> None:
        """Adds errors^T inputs.

        bfloat16 is multiplied as it is: its products are fast, and errors of errors matter little. float16 does not
        have the range for errors times weights.
        """
        if inputs.dtype == torch.bfloat16 or inputs.device.type != "cpu":
            kind = inputs.dtype if inputs.dtype == torch.bfloat16 else self._sum.dtype
            product = (errors.to(kind).T @ inputs.to(kind)).to("cpu", self._sum.dtype)
            if not bool(product.isfinite().all()):
                raise ValueError
            self._sum += product
        else:
            product_update_(self._sum, errors, inputs)

    def merge_over(self, total: Callable[..., None]) -> None:
        """Adds the tokens of other processes.

        Args:
            total: sums tensors over all of them, in place.
        """
        weight = torch.tensor([self._weight], dtype=torch.float64)
        total(self._sum, weight)
        self._weight = float(weight)

    def mean(self) -> Tensor:
        """E[(u - v) y^T], [M, K]; 0 of no tokens."""
        return self._sum / self._weight if self._weight else self._sum.clone()


@dataclass
class Errors:
    """What the layers before did to a layer's tokens.

    Attributes:
        inputs: E, of its inputs.
        stream: D, of the stream that it writes to; None where it writes to none.
    """

    inputs: ErrorSum
    stream: ErrorSum | None = None

    def like(self) -> "Errors":
        """Of no tokens, for the same layer."""
        return Errors(self.inputs.like(), None if self.stream is None else self.stream.like())

    def merge_over(self, total: Callable[..., None]) -> None:
        """As of :class:`ErrorSum`."""
        for errors in (self.inputs, self.stream):
            if errors is not None:
                errors.merge_over(total)

    def wanted(self, weight: Tensor, part: float, stream_part: float, rows: Tensor | slice = slice(None)) -> Tensor:
        """What W E and D give with the factors a and b, for some rows of a weight [N, K]: a W E + b D.

        In the dtype of the sums, which is as exact as they are.
        """
        products = _product(weight[rows], self.inputs.mean()).mul_(part)
        if self.stream is not None and stream_part:
            products.add_(self.stream.mean()[rows], alpha=stream_part)
        return products


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, in the dtype of the second."""
    sums = large_pages.zeros(len(left), right.shape[1], dtype=right.dtype)
    return product_update_(sums, left.T, right)


class Correction:
    """Corrects weights that are given the same inputs.

    Works in the dtype of the sums: Cholesky's method is backward stable, so it is as if the sums had been rounded once
    more. Sums that are positive definite only to the precision of float64 are factored in that.

    Args:
        errors: of the layers before.
        hessian: E[y y^T], [K, K], in the dtype of the errors.
        ridge: relative to the Hessian's mean diagonal.
    """

    def __init__(self, errors: Errors, hessian: Tensor, ridge: float) -> None:
        self._errors = errors
        damped = hessian.clone()
        damped.diagonal().add_(ridge * hessian.diagonal().double().mean().to(hessian.dtype))
        self._factor, failed = torch.linalg.cholesky_ex(damped)
        if bool(failed) and damped.dtype != torch.float64:
            self._factor, failed = torch.linalg.cholesky_ex(damped.double())
        self._usable = not bool(failed)
        self._of_inputs: Tensor | None = None  # E (H + r I)^-1

    def of(self, weight: Tensor, part: float, stream_part: float = 0.0) -> Tensor:
        """W' of a weight [N, K] and the factors a and b, in its dtype; W itself where H + r I has no inverse."""
        if not self._usable or not (part or stream_part):
            return weight
        change = (
            self._solve(self._errors.wanted(weight, part, stream_part))
            if stream_part
            else self._without_stream(weight).mul_(part)
        )
        return (weight + change).to(weight.dtype)

    def _without_stream(self, weight: Tensor) -> Tensor:
        """W E (H + r I)^-1.

        Weights of at least as many rows as columns are multiplied with E (H + r I)^-1, which is computed once. Others
        never are, so that the bits do not depend on which layers came before.
        """
        if len(weight) < weight.shape[1]:
            return self._solve(self._errors.wanted(weight, 1.0, 0.0))
        if self._of_inputs is None:
            self._of_inputs = self._solve(self._errors.inputs.mean()).contiguous()
        return _product(weight, self._of_inputs)

    def _solve(self, products: Tensor) -> Tensor:
        """P (H + r I)^-1, in the dtype of P."""
        return torch.cholesky_solve(products.T.to(self._factor.dtype), self._factor).T.to(products.dtype)

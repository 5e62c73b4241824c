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

E and D are summed as such: the difference of two sums would lose what it is about. A layer with far more columns than
rows, whose inputs no other layer has, sums W E = E[W (x - y) y^T] in place of E. Sources: QEP (arXiv:2504.09629), which
has E and its factor; GPTAQ (arXiv:2504.02692); Qronos (arXiv:2505.11695). D is our own.

Costs: the float model's forward pass beside the other one, T K^2 multiplications and additions for each set of inputs
(twice those of H) or 2 T N K for W E, T N K for a layer that writes to a stream, K^3 / 3 for a set of inputs, and
2 N K^2 for a layer, or K^3 and N K^2 where it has at least as many rows as columns; the K^3 are for all layers on the
same inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

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
        self,
        original: Tensor,
        now: Tensor,
        inputs: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        through: Tensor | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            original: u, [..., M]: of the tokens in the float model.
            now: v, of the same shape.
            inputs: y, [..., K]; may be v.
            mask: bool [...], True for tokens that count.
            weights: [...] of the tokens; None: 1 each.
            through: W [M, L]: W (u - v) is summed in place of u - v, and u and v have L in place of M.

        Raises:
            ValueError: where shapes differ, and for values that are not finite.
        """
        if original.shape != now.shape:
            raise ValueError(
                f"expected what the float model gives to have shape {list(now.shape)}, "
                f"but got shape {list(original.shape)}"
            )
        u, v, y = (tokens.flatten(0, -2) if mask is None else tokens[mask] for tokens in (original, now, inputs))
        kind = self._kind(y)
        errors = u - v if u.dtype == v.dtype == kind else (u.to(self._sum.dtype) - v.to(self._sum.dtype)).to(kind)
        if weights is None:
            self._weight += len(errors)
        else:
            of_tokens = weights.flatten() if mask is None else weights[mask]
            self._weight += float(of_tokens.sum())
            errors *= of_tokens.unsqueeze(1).to(errors.dtype)  # a product of two dtypes takes ten times as long
        try:
            self._add(errors if through is None else self._times(errors, through), y)
        except ValueError as error:
            raise ValueError("expected inputs whose products are finite, but got others") from error

    def _kind(self, inputs: Tensor) -> torch.dtype:
        """The dtype in which errors are multiplied with inputs.

        Beside bfloat16 they are rounded to that: its products are fast, and errors of errors matter little. float16
        does not have the range for errors times weights.
        """
        return inputs.dtype if inputs.dtype == torch.bfloat16 else self._sum.dtype

    def _times(self, errors: Tensor, weight: Tensor) -> Tensor:
        """Errors [T, L] as a weight [M, L] hands them on: [T, M], in their dtype."""
        if errors.dtype == self._sum.dtype and errors.device.type == "cpu":
            return _product(errors, weight.to(errors.dtype).T)
        return errors @ weight.to(errors.device, errors.dtype).T

    def _add(self, errors: Tensor, inputs: Tensor) -> None:
        """Adds errors^T inputs."""
        if inputs.device.type == "cpu":
            product_update_(self._sum, errors, inputs)
            return
        product = (errors.T @ inputs.to(errors.dtype)).to("cpu", self._sum.dtype)
        if not bool(product.isfinite().all()):
            raise ValueError
        self._sum += product

    def multiply(self, weight: Tensor) -> None:
        """Makes it the sum of W (u - v), for a weight W [L, M]."""
        self._sum = _product(weight, self._sum)

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
        inputs: E, of its inputs; or W E.
        stream: D, of the stream that it writes to; None where it writes to none.
        multiplied: whether `inputs` is W E.
    """

    inputs: ErrorSum
    stream: ErrorSum | None = None
    multiplied: bool = False

    @classmethod
    def empty(cls, columns: int, dtype: torch.dtype, stream_rows: int | None = None) -> "Errors":
        """Of no tokens.

        Args:
            columns: K of the layer.
            dtype: of the sums.
            stream_rows: N of a layer that writes to a stream, which is taken to have its inputs to itself; None for any
                other layer, and where the stream is not known.
        """
        if stream_rows is None:
            return cls(ErrorSum(columns, columns, dtype))
        multiplied = 2 * stream_rows < columns  # less to compute then, and less to keep
        return cls(
            ErrorSum(stream_rows if multiplied else columns, columns, dtype),
            ErrorSum(stream_rows, columns, dtype),
            multiplied,
        )

    def like(self) -> "Errors":
        """Of no tokens, for the same layer."""
        stream = None if self.stream is None else self.stream.like()
        return replace(self, inputs=self.inputs.like(), stream=stream)

    def add_inputs(
        self, original: Tensor, now: Tensor, mask: Tensor | None, weights: Tensor | None, weight: Callable[[], Tensor]
    ) -> None:
        """Adds a batch: inputs x in the float model and y now, as of :meth:`ErrorSum.update`.

        Args:
            original: x.
            now: y.
            mask: of tokens.
            weights: of tokens.
            weight: gives W.
        """
        self.inputs.update(original, now, now, mask, weights, weight() if self.multiplied else None)

    def multiply(self, weight: Tensor) -> None:
        """Makes W E of E, where it is not that already."""
        if not self.multiplied:
            self.inputs.multiply(weight)
            self.multiplied = True

    def merge_over(self, total: Callable[..., None]) -> None:
        """As of :class:`ErrorSum`."""
        for errors in (self.inputs, self.stream):
            if errors is not None:
                errors.merge_over(total)

    def wanted(self, weight: Tensor, part: float, stream_part: float, rows: Tensor | slice = slice(None)) -> Tensor:
        """What W E and D give with the factors a and b, for some rows of a weight [N, K]: a W E + b D.

        In the dtype of the sums, which is as exact as they are.
        """
        of_inputs = self.inputs.mean()
        products = (of_inputs[rows] if self.multiplied else _product(weight[rows], of_inputs)).mul_(part)
        if self.stream is not None and stream_part:
            products.add_(self.stream.mean()[rows], alpha=stream_part)
        return products


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, in the dtype of the second."""
    sums = large_pages.zeros(len(left), right.shape[1], dtype=right.dtype)
    return product_update_(sums, left.T, right)


def _factored(hessian: Tensor, ridge: float) -> tuple[Tensor, bool]:
    """Cholesky's factor of H + r I in the memory of H, and whether there is one."""
    hessian.diagonal().add_(ridge * hessian.diagonal().double().mean().to(hessian.dtype))
    failed = torch.zeros((), dtype=torch.int32)
    # H is its transpose, and LAPACK's matrices are stored by columns: no copy is made.
    torch.linalg.cholesky_ex(hessian.T, out=(hessian.T, failed))
    return hessian.T, not bool(failed)


class Correction:
    """Corrects weights that are given the same inputs.

    Works in the dtype of the sums: Cholesky's method is backward stable, so it is as if the sums had been rounded once
    more. Sums that are positive definite only to the precision of float64 are factored in that.

    Args:
        errors: of the layers before.
        hessian: gives E[y y^T], [K, K], in the dtype of the errors: a new tensor each time, which becomes the factor.
        ridge: relative to the Hessian's mean diagonal.
    """

    def __init__(self, errors: Errors, hessian: Callable[[], Tensor], ridge: float) -> None:
        self._errors = errors
        self._factor, self._usable = _factored(hessian(), ridge)
        if not self._usable and self._factor.dtype != torch.float64:
            self._factor, self._usable = _factored(hessian().double(), ridge)
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

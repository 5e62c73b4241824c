"""GPTQ and what belongs to it: the operators of ``torch.ops.miniquant``, typed and documented.

Dimensions: N out features (rows of a weight), K in features (columns), G = ceil(K / group_size) groups of a row.

The grid
    ``value = (code - zero_point) * scale``, one scale and zero point for each group of ``group_size`` consecutive
    columns of a row. With q = 2^(bits - 1) - 1:

    - symmetric: codes in [-q, q], scale = max|w| / q, zero point 0;
    - symmetric, full range: codes in [-q - 1, q], scale = -w / (q + 1) of the weight w of largest magnitude, of either
      sign, zero point 0;
    - asymmetric: codes in [-q - 1, q], scale = (hi - lo) / (2^bits - 1), where [lo, hi] is the group's range widened
      to contain 0, so that 0 is represented exactly.

    ``group_size=-1`` is one group per row; the last group of a row may be shorter.

The loss
    With E = W - Q and H = X X^T / n of the layer's inputs X [K, n], the layer's squared output error is
    tr(E H E^T) per input vector: the sum over rows of e H e^T.

Weights are float32 or float64; bfloat16 and float16 are accepted and computed in float32. Strides are free, inputs are
never changed (but for the operator whose name ends in ``_``), and nothing is recorded for autograd. A bad argument is a
ValueError or a TypeError that names the argument, what was expected and what came.

Sources: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, Algorithm 1; the form without an inverse: "The Geometry of LLM Quantization: GPTQ as Babai's Nearest
Plane Algorithm", arXiv:2507.18553.
"""

from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

GroupScales = Literal["static", "dynamic"]
ColumnOrder = Literal["natural", "activation", "group"]
ScaleMethod = Literal["absmax", "mse", "hessian", "loss"]


class QuantizedWeight(NamedTuple):
    """A weight on its grid.

    Attributes:
        codes: int8 [N, K].
        scales: [N, G], in the weight's dtype.
        zero_points: int8 [N, G]; all 0 for a symmetric grid.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor


class GptqResult(NamedTuple):
    """A weight on its grid, and what that costs.

    Attributes:
        codes: int8 [N, K].
        scales: [N, G], in the weight's dtype.
        zero_points: int8 [N, G]; all 0 for a symmetric grid.
        row_loss: [N], e H e^T of each row with the ridge in H; float64 for a float64 weight, else float32.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor
    row_loss: Tensor


def rtn(
    weight: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    full_range: bool = False,
    scale_method: Literal["absmax", "mse"] = "absmax",
) -> QuantizedWeight:
    """Rounds every weight to the nearest point of its group's grid, ties to even.

    ``code = clamp(round(w / scale) + zero_point)``

    Args:
        weight: [N, K].
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids (see the module).
        scales: [N, G] to use instead of the weight's own; the weight's dtype, positive (not 0 with ``full_range``).
        zero_points: int8 [N, G] that go with ``scales``; needed where ``symmetric`` is false.
        full_range: the symmetric grid with one code more (see the module).
        scale_method: "absmax", or "mse": of scales that hold from half to 1.1 times the group's range the one of least
            squared error.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return QuantizedWeight(
        *torch.ops.miniquant.rtn(
            weight,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            scales=scales,
            zero_points=zero_points,
            full_range=full_range,
            scale_method=scale_method,
        )
    )


def gptq(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    ridge: float = 0.01,
    block_size: int = 128,
    group_scales: GroupScales = "static",
    column_order: ColumnOrder = "natural",
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    full_range: bool = False,
    scale_method: ScaleMethod = "absmax",
    refine: int = 0,
    beam_scales: int = 0,
) -> GptqResult:
    """Quantizes a column at a time and moves what rounding lost onto the columns still to come.

    With H + ridge * mean(diag H) * I = R R^T, R upper triangular, and E = W - Q:

    ``target_j = w_j + (sum_{i<j} E_i R_ij) / R_jj``,  ``q_j = quantize(target_j)``

    This is Algorithm 1 of the paper without the inverse of H; :func:`gptq_reference` is the algorithm as printed. The
    result does not depend on the number of threads, nor on ``block_size`` beyond rounding. An input that is always 0
    (diag H = 0) has its column rounded to nearest.

    Args:
        weight: [N, K].
        hessian: [K, K], float32 or float64, symmetric: X X^T / n without a ridge (:class:`HessianAccumulator`).
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids (see the module).
        ridge: added to the Hessian's diagonal, relative to its mean.
        block_size: columns per block of the sweep: time, not the result.
        group_scales: "static" takes a group's scale from the original weights; "dynamic" from the weights as updated
            by every earlier column, when the group is reached (not in activation order, and no given scales).
        column_order: "natural"; "activation": descending diag(H); or "group": whole groups by descending mean diag(H),
            a shorter last one last, and their columns so that from the last on each has the least variance given those
            behind it. Scales stay with the stored columns.
        scales: [N, G] to use instead of the weight's own; the weight's dtype, positive (not 0 with ``full_range``).
        zero_points: int8 [N, G] that go with ``scales``; needed where ``symmetric`` is false.
        full_range: the symmetric grid with one code more (see the module).
        scale_method: how scales are computed: "absmax"; "mse", the one of least squared error of several; "hessian",
            the same with column j weighted by H_jj; "loss" (dynamic scales only), the one of several with which the
            sweep adds least to the loss.
        refine: rounds of refinement after the sweep, at most. The first moves single codes, scales held, until hardly
            any move lowers the loss; further ones fit the scales to their codes as well. Stops when nothing changes.
        beam_scales: of the scales that ``scale_method="loss"`` tries, the number, up to 25, with which each group is
            quantized once more by a beam search that keeps four partial choices of codes.

    Raises:
        ValueError, TypeError: for a bad argument.
        torch.linalg.LinAlgError: H is not positive definite with its ridge; the message names the leading minor, the
            ridge used and what to try.
    """
    return GptqResult(
        *torch.ops.miniquant.gptq(
            weight,
            hessian,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            ridge=ridge,
            block_size=block_size,
            group_scales=group_scales,
            column_order=column_order,
            scales=scales,
            zero_points=zero_points,
            full_range=full_range,
            scale_method=scale_method,
            refine=refine,
            beam_scales=beam_scales,
        )
    )


def gptq_reference(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int = 64,
    symmetric: bool = True,
    ridge: float = 0.01,
    block_size: int = 128,
    group_scales: GroupScales = "static",
    column_order: ColumnOrder = "natural",
    scales: Tensor | None = None,
    zero_points: Tensor | None = None,
    full_range: bool = False,
    scale_method: ScaleMethod = "absmax",
    refine: int = 0,
    beam_scales: int = 0,
) -> GptqResult:
    """The textbook form of :func:`gptq`: the loop over blocks, groups and columns of the paper's Algorithm 1.

    With ``Hinv`` the UPPER Cholesky factor of the inverse of H + ridge * mean(diag H) * I, for each column k:

    ``err = (w_k - q_k) / Hinv[k, k]``,  ``W[:, k:] -= outer(err, Hinv[k, k:])``

    Written on PyTorch's own operations, for any device; slow, and what :func:`gptq` is tested against. The two agree
    code for code but where a target lies on a rounding tie to within the precision of the arithmetic. Arguments, result
    and errors are those of :func:`gptq`, but that ``scale_method="loss"``, ``beam_scales`` and ``refine`` are left to
    it, and that other methods than "absmax" need the CPU.
    """
    return GptqResult(
        *torch.ops.miniquant.gptq_reference(
            weight,
            hessian,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            ridge=ridge,
            block_size=block_size,
            group_scales=group_scales,
            column_order=column_order,
            scales=scales,
            zero_points=zero_points,
            full_range=full_range,
            scale_method=scale_method,
            refine=refine,
            beam_scales=beam_scales,
        )
    )


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


def quantization_loss(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> Tensor:
    """The layer loss per row, e H e^T with e = weight - dequantized; the loss of the layer is its sum.

    Args:
        weight: [N, K].
        dequantized: [N, K], of the weight's dtype.
        hessian: [K, K], float32 or float64.

    Returns:
        [N], float64 for a float64 weight, else float32; accumulated in float64.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", torch.ops.miniquant.quantization_loss(weight, dequantized, hessian))


def dequantize(codes: Tensor, scales: Tensor, zero_points: Tensor, group_size: int) -> Tensor:
    """``(codes - zero_points) * scales``, each group with its own.

    Args:
        codes: int8 [N, K].
        scales: [N, G].
        zero_points: int8 [N, G].
        group_size: columns per scale; -1 is one group per row.

    Returns:
        [N, K] in the dtype of ``scales``.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", torch.ops.miniquant.dequantize(codes, scales, zero_points, group_size))


def pack_int4(codes: Tensor) -> Tensor:
    """Two signed 4-bit codes per byte, in two's complement.

    Column 2i is the low half of byte i and column 2i + 1 the high half; the high half after an odd last column is 0.

    Args:
        codes: int8 [N, K], values in [-8, 7].

    Returns:
        uint8 [N, ceil(K / 2)].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", torch.ops.miniquant.pack_int4(codes))


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The inverse of :func:`pack_int4`.

    Args:
        packed: uint8 [N, ceil(columns / 2)].
        columns: K.

    Returns:
        int8 [N, columns].

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    return cast("Tensor", torch.ops.miniquant.unpack_int4(packed, columns))


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

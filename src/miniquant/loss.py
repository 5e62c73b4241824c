"""What a layer loses by quantization."""

from typing import cast

from torch import Tensor

from miniquant.operators import call


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
    return cast("Tensor", call("quantization_loss", weight, dequantized, hessian))

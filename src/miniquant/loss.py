"""The loss of a quantized layer."""

from typing import cast

import torch
from torch import Tensor

from miniquant.grid import QuantizedWeight, dequantize
from miniquant.operators import call


def quantization_loss(weight: Tensor, dequantized: Tensor | QuantizedWeight, hessian: Tensor) -> Tensor:
    """The layer loss per row, e H e^T with e = weight - dequantized; the loss of the layer is its sum.

    Args:
        weight: [N, K].
        dequantized: [N, K], in any dtype that a weight may have; or a :class:`miniquant.QuantizedWeight`, measured like
            ``row_loss``: with (code - zero_point) * scale computed in float32 (float64 if the weight or the scales are
            float64). A bfloat16 or float16 layer rounds these values once more: pass
            ``dequantize(quantized, dtype=weight.dtype)`` to measure the values that such a layer computes with.
        hessian: [K, K], float32 or float64. ``row_loss`` is measured with the ridge added to the diagonal; add it here
            to compare.

    Returns:
        [N], float64 for a float64 weight, otherwise float32; accumulated in float64.

    Raises:
        ValueError, TypeError: for a bad argument.
    """
    if isinstance(dequantized, QuantizedWeight):
        compute = torch.promote_types(torch.promote_types(weight.dtype, dequantized.scales.dtype), torch.float32)
        dequantized = dequantize(dequantized, dtype=compute)
    return cast("Tensor", call("quantization_loss", weight, dequantized, hessian))

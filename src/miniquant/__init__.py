"""GPTQ weight quantization for PyTorch on CPUs.

Importing the package registers the operators ``torch.ops.miniquant.*``; the functions here are the same operators,
typed and documented.

Dimensions: N out features (rows of a weight), K in features (columns), G = ceil(K / group_size) groups of a row.

The grid
    ``value = (code - zero_point) * scale``, one scale and zero point for each group of ``group_size`` consecutive
    columns of a row. With q = 2^(bits - 1) - 1:

    - symmetric: codes in [-q, q], scale = max|w| / q, zero point 0;
    - symmetric, full range: codes in [-q - 1, q], scale = -w / (q + 1) of the weight w of largest magnitude, of either
      sign, zero point 0;
    - asymmetric: codes in [-q - 1, q], scale = (hi - lo) / (2^bits - 1), where [lo, hi] is the group's range widened
      to contain 0, so 0 is represented exactly.

    ``group_size=-1`` is one group per row; the last group of a row may be shorter.

The loss
    With E = W - Q and H = X X^T / n of the layer's inputs X [K, n], the layer's squared output error is
    tr(E H E^T) per input vector: the sum over rows of e H e^T.

Weights are float32 or float64; bfloat16 and float16 are accepted and computed in float32. Tensors may have any strides.
Only operators whose name ends in ``_`` change an argument, and nothing is recorded for autograd. A bad argument raises
a ValueError or a TypeError that names the argument, the requirement and the value.

Sources: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, Algorithm 1; the form without an inverse: "The Geometry of LLM Quantization: GPTQ as Babai's Nearest
Plane Algorithm", arXiv:2507.18553.
"""

import importlib
from typing import TYPE_CHECKING, Any

from miniquant._startup import is_command

if TYPE_CHECKING or not is_command():
    from miniquant._interface import *  # noqa: F403  (it lists them)
    from miniquant._interface import __all__ as __all__
    from miniquant._interface import __version__ as __version__
else:

    def __getattr__(name: str) -> Any:
        """A name of the package. Help of the command line is there without torch, which takes seconds to load."""
        interface = importlib.import_module("miniquant._interface")
        names = {one: getattr(interface, one) for one in (*interface.__all__, "__all__", "__version__")}
        globals().update(names)
        if name not in names:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return names[name]

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

import torch

from miniquant._library import load_library

load_library()

from miniquant.build import instruction_set  # noqa: E402  (the operators must exist first)
from miniquant.calibration import Calibration, load_calibration  # noqa: E402
from miniquant.evaluate import EmbeddingScores, LanguageScores, Reference, compare_embeddings, evaluate  # noqa: E402
from miniquant.gptq import GptqResult, gptq, gptq_reference  # noqa: E402
from miniquant.grid import QuantizedWeight, dequantize, rtn  # noqa: E402
from miniquant.hessian import HessianAccumulator, hessian_update_  # noqa: E402
from miniquant.layer_file import SavedLayer, load_layer, save_layer  # noqa: E402
from miniquant.linear import QuantizedLinear  # noqa: E402
from miniquant.loading import contents_of, load  # noqa: E402
from miniquant.loss import quantization_loss  # noqa: E402
from miniquant.output import GgufOptions  # noqa: E402
from miniquant.packing import pack, pack_int4, unpack, unpack_int4  # noqa: E402
from miniquant.presets import preset  # noqa: E402
from miniquant.quantize import LayerResult, ModelResult, QuantizationError, Stopped, quantize_model  # noqa: E402
from miniquant.recipe import LayerOptions, Recipe, Rule  # noqa: E402
from miniquant.ridge import AutoGptqResult, RidgeChoice, choose_ridge, gptq_auto  # noqa: E402
from miniquant.run import Converted, FolderResult, convert_folder, quantize_folder  # noqa: E402

__version__ = str(torch.ops.miniquant.version())

__all__ = [
    "AutoGptqResult",
    "Calibration",
    "Converted",
    "EmbeddingScores",
    "FolderResult",
    "GgufOptions",
    "GptqResult",
    "HessianAccumulator",
    "LanguageScores",
    "LayerOptions",
    "LayerResult",
    "ModelResult",
    "QuantizationError",
    "QuantizedLinear",
    "QuantizedWeight",
    "Recipe",
    "Reference",
    "RidgeChoice",
    "Rule",
    "SavedLayer",
    "Stopped",
    "choose_ridge",
    "compare_embeddings",
    "contents_of",
    "convert_folder",
    "dequantize",
    "evaluate",
    "gptq",
    "gptq_auto",
    "gptq_reference",
    "hessian_update_",
    "instruction_set",
    "load",
    "load_calibration",
    "load_layer",
    "pack",
    "pack_int4",
    "preset",
    "quantization_loss",
    "quantize_folder",
    "quantize_model",
    "rtn",
    "save_layer",
    "unpack",
    "unpack_int4",
]

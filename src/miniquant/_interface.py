"""All that ``import miniquant`` gives. Importing it loads torch and the library."""

import torch

from miniquant._library import load_library

load_library()

from miniquant.build import bfloat16_unit, instruction_set  # noqa: E402  (the operators must exist first)
from miniquant.calibration import Calibration, load_calibration  # noqa: E402
from miniquant.convert import Converted, convert_folder  # noqa: E402
from miniquant.evaluate import EmbeddingScores, LanguageScores, Reference, compare_embeddings, evaluate  # noqa: E402
from miniquant.gptq import GptqResult, gptq, gptq_reference  # noqa: E402
from miniquant.grid import QuantizedWeight, SuperblockWeight, dequantize, rtn  # noqa: E402
from miniquant.hessian import HessianAccumulator, hessian_update_, product_update_  # noqa: E402
from miniquant.layer_file import SavedLayer, load_layer, save_layer  # noqa: E402
from miniquant.linear import QuantizedLinear  # noqa: E402
from miniquant.loading import contents_of, load  # noqa: E402
from miniquant.loss import quantization_loss  # noqa: E402
from miniquant.output import GgufOptions  # noqa: E402
from miniquant.packing import pack, pack_int4, unpack, unpack_int4  # noqa: E402
from miniquant.presets import preset  # noqa: E402
from miniquant.quantize import quantize_model  # noqa: E402
from miniquant.recipe import LayerOptions, Recipe, Rule  # noqa: E402
from miniquant.results import LayerResult, ModelResult, QuantizationError, Stopped  # noqa: E402
from miniquant.ridge import AutoGptqResult, RidgeChoice, choose_ridge, gptq_auto  # noqa: E402
from miniquant.rotation import rotate_model  # noqa: E402
from miniquant.run import FolderResult, quantize_folder  # noqa: E402
from miniquant.superblocks import SuperblockResult, gptq_superblocks, rtn_superblocks  # noqa: E402

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
    "SuperblockResult",
    "SuperblockWeight",
    "bfloat16_unit",
    "choose_ridge",
    "compare_embeddings",
    "contents_of",
    "convert_folder",
    "dequantize",
    "evaluate",
    "gptq",
    "gptq_auto",
    "gptq_reference",
    "gptq_superblocks",
    "hessian_update_",
    "instruction_set",
    "load",
    "load_calibration",
    "load_layer",
    "pack",
    "pack_int4",
    "preset",
    "product_update_",
    "quantization_loss",
    "quantize_folder",
    "quantize_model",
    "rotate_model",
    "rtn",
    "rtn_superblocks",
    "save_layer",
    "unpack",
    "unpack_int4",
]

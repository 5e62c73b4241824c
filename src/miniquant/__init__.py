"""GPTQ weight quantization for PyTorch on CPUs.

Importing the package registers the operators ``torch.ops.miniquant.*``; the functions here are the same operators,
typed and documented (see :mod:`miniquant.gptq`).
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def _load_library() -> None:
    """Registers the operators, unless another way of loading the library has done so already."""
    if hasattr(torch.ops.miniquant, "gptq"):
        return
    library = Path(__file__).parent / "lib" / "libminiquant.so"
    if not library.is_file():
        raise ImportError(
            f"miniquant's library is missing: expected {library}. "
            "Run scripts/setup in a clone, or install the package with `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"miniquant's library {library} does not load with torch {torch.__version__}: {error}. "
            "It must be built against the torch that is installed: run scripts/setup in a clone, "
            "or install the package again with `pip install --no-build-isolation .`"
        ) from error


_load_library()

from miniquant.gptq import (  # noqa: E402  (the operators must exist first)
    GptqResult,
    HessianAccumulator,
    QuantizedWeight,
    dequantize,
    gptq,
    gptq_reference,
    hessian_update_,
    pack_int4,
    quantization_loss,
    rtn,
    unpack_int4,
)
from miniquant.presets import preset  # noqa: E402
from miniquant.ridge import AutoGptqResult, RidgeChoice, choose_ridge, gptq_auto  # noqa: E402

try:
    __version__ = version("miniquant")
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "AutoGptqResult",
    "GptqResult",
    "HessianAccumulator",
    "QuantizedWeight",
    "RidgeChoice",
    "choose_ridge",
    "dequantize",
    "gptq",
    "gptq_auto",
    "gptq_reference",
    "hessian_update_",
    "pack_int4",
    "preset",
    "quantization_loss",
    "rtn",
    "unpack_int4",
]

"""Checkpoint formats: the tensors and the configuration of quantized layers, one file per format.

Formats know nothing of models and modules: a layer is a name and a :class:`miniquant.QuantizedWeight`. The exception is
a GGUF file, which is a whole model: ``gguf_file`` writes it.
"""

from collections.abc import Callable, Mapping

from miniquant.formats.base import ConfigObject, Format, LayerFormat, LayerGrid, with_scale_dtype
from miniquant.formats.compressed_tensors import CompressedTensors
from miniquant.formats.gguf_blocks import Gguf
from miniquant.formats.gptq import Gptq
from miniquant.formats.native import Native

__all__ = [
    "FORMATS",
    "CompressedTensors",
    "Format",
    "Gguf",
    "Gptq",
    "LayerFormat",
    "LayerGrid",
    "Native",
    "format_named",
    "format_of",
    "layer_format",
    "with_scale_dtype",
]

FORMATS: Mapping[str, Callable[[], Format]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": lambda: Gptq(version=1),
    "gptq_v2": lambda: Gptq(version=2),
    "miniquant": Native,
}


def format_named(name: str) -> Format:
    """The format of a name, of those that are a folder with config.json and safetensors files.

    Raises:
        ValueError: for another name than those of ``FORMATS``.
    """
    if name not in FORMATS:
        raise ValueError(f"format_named: expected name to be one of {', '.join(FORMATS)}, but got {name!r}")
    return FORMATS[name]()


def layer_format(name: str) -> LayerFormat:
    """The format of a name, "gguf" among them, for what is asked before work starts.

    Raises:
        ValueError: for another name.
    """
    if name == "gguf":
        return Gguf()
    if name not in FORMATS:
        raise ValueError(f"layer_format: expected name to be one of {', '.join(FORMATS)}, gguf, but got {name!r}")
    return FORMATS[name]()


def format_of(config: object) -> Format:
    """The format that a checkpoint is in.

    Args:
        config: ``quantization_config`` of its config.json.

    Raises:
        ValueError: where none of ``FORMATS`` is described.
    """
    values = ConfigObject("format_of", config).values
    method = values.get("quant_method")
    name = values.get("checkpoint_format", "gptq") if method == "gptq" else method
    if not isinstance(name, str) or name not in FORMATS:
        what = "checkpoint_format" if method == "gptq" else "quant_method"
        raise ValueError(
            f"format_of: expected {what} of quantization_config to be one of {', '.join(FORMATS)}, but got {name!r}"
        )
    return FORMATS[name]()

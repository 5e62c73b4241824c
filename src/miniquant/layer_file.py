"""One quantized layer in a safetensors file; the driver's ``--save`` writes the same format.

Tensors: ``codes`` int8 [N, K], ``scales`` [N, G], ``zero_points`` int8 [N, G] and, if the weight was quantized with a
Hessian, ``row_loss`` [N]. Metadata, all strings: ``format`` "miniquant.layer", ``version`` "1", ``bits``,
``group_size``, ``symmetric`` and ``full_range`` ("true" or "false"), ``layer`` (the layer's name, or "") and
``options`` (a JSON object with the options that it was quantized with).
"""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniquant.gptq import GptqResult
from miniquant.grid import QuantizedWeight, SuperblockWeight
from miniquant.superblocks import SUPERBLOCK, SuperblockResult

FORMAT = "miniquant.layer"
VERSION = "1"
_TENSORS = ("codes", "scales", "zero_points", "row_loss")
SCALE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROW_LOSS_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class SavedLayer:
    """The contents of a layer file.

    Attributes:
        quantized: the quantized weight; a :class:`miniquant.GptqResult` if the file has the loss of each row.
        layer: the layer's name, or "".
        options: the options that it was quantized with, as keyword arguments of :func:`miniquant.gptq`; information
            only.
    """

    quantized: QuantizedWeight | GptqResult
    layer: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def save_layer(
    path: str | os.PathLike[str],
    quantized: QuantizedWeight,
    *,
    layer: str = "",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Writes a quantized weight to a safetensors file, which appears whole or not at all.

    Args:
        path: path of the file; an existing file is replaced.
        quantized: result of :func:`miniquant.rtn`, :func:`miniquant.gptq` or :func:`miniquant.gptq_auto`.
        layer: the layer's name; information only.
        options: the options that it was quantized with, as values that JSON can represent; information only.

    Raises:
        ValueError, TypeError: for a bad argument.
        OSError: if the file cannot be written.

    Example:
        >>> options = preset("best")
        >>> save_layer("fc1.safetensors", gptq(weight, hessian, **options), layer="fc1", options=options)
        >>> values = dequantize(load_layer("fc1.safetensors").quantized)
    """
    if isinstance(quantized, SuperblockWeight):
        raise TypeError(
            f"save_layer: expected quantized to have one level of scales, but got a {type(quantized).__name__} "
            f"({quantized.kind})"
        )
    if not isinstance(quantized, QuantizedWeight):
        raise TypeError(f"save_layer: expected quantized to be a QuantizedWeight, but got {type(quantized).__name__}")
    if not isinstance(layer, str):
        raise TypeError(f"save_layer: expected layer to be a str, but got {type(layer).__name__}")
    try:
        options_text = json.dumps(dict(options or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"save_layer: expected options to be values that JSON can hold, but got {error}") from error
    tensors = {"codes": quantized.codes, "scales": quantized.scales, "zero_points": quantized.zero_points}
    if isinstance(quantized, GptqResult):
        tensors["row_loss"] = quantized.row_loss
    check_quantized("save_layer", "quantized", quantized)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "bits": str(quantized.bits),
        "group_size": str(quantized.group_size),
        "symmetric": json.dumps(quantized.symmetric),
        "full_range": json.dumps(quantized.full_range),
        "layer": layer,
        "options": options_text,
    }
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    from safetensors.torch import save  # noqa: PLC0415  (not for whoever saves and loads no layers)

    content = save(stored, metadata=metadata)
    with replacing(Path(path)) as new:
        new.write_bytes(content)


def load_layer(path: str | os.PathLike[str]) -> SavedLayer:
    """Reads a file of :func:`save_layer` or of the driver's ``--save``, and checks all of its contents.

    Args:
        path: path of the file.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a valid layer file; the message names the file, what was expected and what it has.
    """
    tensors, metadata = _read(Path(path))
    where = f"load_layer: {os.fspath(path)}"

    def entry(name: str, values: Mapping[str, Any]) -> Any:
        text = metadata.get(name)
        if text is None or text not in values:
            raise ValueError(f"{where}: expected metadata {name!r} to be {' or '.join(values)}, but got {text!r}")
        return values[text]

    entry("format", {FORMAT: None})
    entry("version", {VERSION: None})
    truth = {"true": True, "false": False}
    symmetric, full_range = entry("symmetric", truth), entry("full_range", truth)
    grid = {}
    for name in ("bits", "group_size"):
        text = metadata.get(name, "")
        try:
            grid[name] = int(text)
        except ValueError:
            raise ValueError(f"{where}: expected metadata {name!r} to be an integer, but got {text!r}") from None
    options_text = metadata.get("options", "{}")
    try:
        options = json.loads(options_text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"{where}: expected metadata 'options' to be a JSON object, but got {options_text!r}")  # noqa: TRY004
    for name in _TENSORS[:3]:
        if name not in tensors:
            raise ValueError(f"{where}: expected a tensor {name!r}, but got none of that name")
    parts = (tensors["codes"], tensors["scales"], tensors["zero_points"])
    quantized = QuantizedWeight(*parts, grid["bits"], grid["group_size"], symmetric, full_range)
    row_loss = tensors.get("row_loss")
    if row_loss is not None:
        quantized = GptqResult(*parts, grid["bits"], grid["group_size"], symmetric, full_range, row_loss)
    try:
        check_quantized(where, "the file", quantized)
    except TypeError as error:  # a wrong dtype in a file is not a wrong argument type
        raise ValueError(str(error)) from None
    return SavedLayer(quantized, metadata.get("layer", ""), options)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The layer's tensors in a safetensors file, and the file's metadata."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  (as in save_layer)

    with path.open("rb"):  # raises an OSError that names the file; the package raises a type of its own
        pass
    try:
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name in _TENSORS]  # noqa: SIM118  (it is no dict)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"load_layer: {path}: expected a safetensors file, but got: {error}") from error


def dtype_names(*dtypes: torch.dtype) -> str:
    """Dtypes as messages show them: "float32 or float16"."""
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_quantized(where: str, what: str, quantized: QuantizedWeight) -> None:
    """Checks that a quantized weight is consistent: dtypes, shapes, and codes in the range of its grid.

    Args:
        where: begins the message: a function, and a file if there is one.
        what: whose tensors they are.
        quantized: the weight; row_loss, minima and the steps of superblocks are checked where it has them.

    Raises:
        ValueError, TypeError: the latter for a tensor of another dtype.
    """

    def expect(name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], tensor: Tensor) -> None:
        if tensor.dtype not in dtypes:
            raise TypeError(
                f"{where}: expected {name} of {what} to be {dtype_names(*dtypes)}, but got {dtype_names(tensor.dtype)}"
            )
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{where}: expected {name} of {what} to have shape {list(shape)}, but got shape {list(tensor.shape)}"
            )

    bits, group_size = quantized.bits, quantized.group_size
    if not 2 <= bits <= 8:
        raise ValueError(f"{where}: expected bits of {what} to be 2 to 8, but got {bits}")
    if group_size != -1 and group_size < 1:
        raise ValueError(
            f"{where}: expected group_size of {what} to be positive, or -1 for one group per row, but got {group_size}"
        )
    if quantized.full_range and not quantized.symmetric:
        raise ValueError(f"{where}: expected full_range of {what} to be False where symmetric is False, but got True")
    if quantized.codes.dim() != 2:
        raise ValueError(
            f"{where}: expected codes of {what} to be a matrix [N, K], but got shape {list(quantized.codes.shape)}"
        )
    rows, columns = quantized.codes.shape
    groups = -(-columns // (columns if group_size == -1 else group_size)) if columns else 0
    expect("codes", (torch.int8,), (rows, columns), quantized.codes)
    expect("scales", SCALE_DTYPES, (rows, groups), quantized.scales)
    expect("zero_points", (torch.int8,), (rows, groups), quantized.zero_points)
    if isinstance(quantized, SuperblockWeight):
        expect("minima", (torch.float32,), (rows, groups), quantized.minima)
        for name in ("super_scales", "super_minima"):
            expect(name, (torch.float16,), (rows, columns // SUPERBLOCK), getattr(quantized, name))
    if isinstance(quantized, GptqResult | SuperblockResult):
        expect("row_loss", ROW_LOSS_DTYPES, (rows,), quantized.row_loss)
    largest = 2 ** (bits - 1) - 1
    smallest = -largest if quantized.symmetric and not quantized.full_range else -largest - 1
    for name, tensor in (("codes", quantized.codes), ("zero_points", quantized.zero_points)):
        if tensor.numel() and not smallest <= int(tensor.min()) <= int(tensor.max()) <= largest:
            got = f"{int(tensor.min())} to {int(tensor.max())}"
            raise ValueError(
                f"{where}: expected {name} of {what} to be in [{smallest}, {largest}] for {bits} bits, but got {got}"
            )
    if quantized.symmetric and bool(quantized.zero_points.any()):
        raise ValueError(f"{where}: expected zero_points of {what} to be 0 where symmetric is True, but got others")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path in the same folder to write to, then renames that file: a reader never sees a partial file.

    If the block raises, the new file is removed and an existing one stays.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise

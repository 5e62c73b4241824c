"""The format of this package: whatever a quantized weight has comes back, whichever options it was quantized with.

For each layer: ``codes`` uint8 [N, ceil(K * bits / 8)] (:func:`miniquant.pack`); ``scales`` [N, G] in their own dtype;
``zero_points`` int8 [N, G] where the grid is asymmetric; ``row_loss`` [N] where the weight was quantized with a
Hessian. Layers in superblocks, which only unfinished runs keep here, have ``minima``, ``super_scales`` and
``super_minima``, too, and ``superblocks`` in the configuration.

The configuration has the grid of every layer, and the options that it was quantized with:

    {"quant_method": "miniquant", "version": 1, "ignored": ["lm_head"], "layers": {"h.0.fc": {"shape": [64, 96],
     "bits": 4, "group_size": 32, "symmetric": true, "full_range": false, "scale_dtype": "float32", "options": {}}}}
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from miniquant.formats.base import (
    ConfigObject,
    Format,
    LayerGrid,
    check_finite,
    check_layers,
    check_model_dtype,
    check_one_level,
    checked_grid,
    grid_of_layer,
    is_integer,
    layer_tensor,
    method_config,
)
from miniquant.gptq import GptqResult
from miniquant.grid import QuantizedWeight, SuperblockWeight
from miniquant.layer_file import ROW_LOSS_DTYPES, SCALE_DTYPES, check_quantized, dtype_names
from miniquant.packing import pack, unpack
from miniquant.superblocks import GRIDS, SUPERBLOCK, SuperblockResult

METHOD = "miniquant"
VERSION = 1
_OF_SUPERBLOCKS = ("minima", "super_scales", "super_minima")
_DTYPES = {dtype_names(dtype): dtype for dtype in SCALE_DTYPES}


class Native(Format):
    """A :class:`miniquant.formats.Format`."""

    name = METHOD
    value_suffixes: tuple[str, ...] = ()

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype; scales of any other are stored as they are."""
        check_model_dtype(METHOD, model_dtype)
        return model_dtype

    def check(self, name: str, grid: LayerGrid) -> list[str]:
        """Any layer with one level of scales. Others are kept while a run goes on, but no module computes with them."""
        check_one_level(METHOD, name, grid)
        return []

    def nbytes(self, name: str, grid: LayerGrid) -> int:  # noqa: ARG002  (as for any format)
        """Of codes, scales, zero points and the loss of each row, which a layer that is rounded to nearest has not."""
        row_loss = max(grid.scale_dtype.itemsize, 4)
        of_group = grid.scale_dtype.itemsize + (not grid.symmetric)
        return grid.rows * (-(-grid.columns * grid.bits // 8) + grid.groups * of_group + row_loss)

    def tensors(self, name: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
        """``codes``, ``scales`` and, where there are such, ``zero_points`` and ``row_loss``."""
        grid = checked_grid(METHOD, name, quantized)
        tensors = {f"{name}.codes": pack(quantized), f"{name}.scales": quantized.scales.detach().contiguous()}
        if not grid.symmetric:
            tensors[f"{name}.zero_points"] = quantized.zero_points.contiguous()
        if isinstance(quantized, SuperblockWeight):
            tensors |= {f"{name}.{part}": getattr(quantized, part).contiguous() for part in _OF_SUPERBLOCKS}
        if isinstance(quantized, GptqResult | SuperblockResult):
            tensors[f"{name}.row_loss"] = quantized.row_loss.detach().contiguous()
        return tensors

    def config(
        self,
        layers: Mapping[str, LayerGrid],
        ignored: Sequence[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """The grid of every layer, its options, and the layers left out."""
        check_layers(METHOD, layers, ignored)
        options = options or {}
        if unknown := sorted(set(options) - set(layers)):
            raise ValueError(f"{METHOD}: expected options of quantized layers, but got those of {unknown[0]!r}")
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "ignored": list(ignored),
            "layers": {
                name: {
                    "shape": [grid.rows, grid.columns],
                    "bits": grid.bits,
                    "group_size": grid.group_size,
                    "symmetric": grid.symmetric,
                    "full_range": grid.full_range,
                    "scale_dtype": dtype_names(grid.scale_dtype),
                    **({} if grid.superblocks is None else {"superblocks": grid.superblocks}),
                    "options": _json_object(name, options.get(name, {})),
                }
                for name, grid in layers.items()
            },
        }

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LayerGrid]:
        """The layers that the configuration lists; each has to have its tensors."""
        grids = {}
        for name, entry in _entries(config).items():
            shape = entry.take("shape", "two integers", lambda value: isinstance(value, list) and len(value) == 2)
            rows, columns = shape
            dtype = entry.take("scale_dtype", f"one of {', '.join(_DTYPES)}", _is_dtype)
            values = (entry.values.get(key) for key in ("bits", "group_size", "symmetric", "full_range"))
            kind = entry.take("superblocks", f"one of {', '.join(GRIDS)}", lambda value: value in (None, *GRIDS))
            grid = grid_of_layer(METHOD, name, rows, columns, *values, _DTYPES[dtype], kind)
            _stored(name, tensors, grid)
            grids[name] = grid
        return grids

    def options(self, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The options that each layer of a checkpoint was quantized with, for the record.

        Raises:
            ValueError: for a damaged configuration, or one of another format.
        """
        return {name: dict(entry.object("options").values) for name, entry in _entries(config).items()}

    def read(self, name: str, tensors: Mapping[str, Tensor], grid: LayerGrid) -> QuantizedWeight:
        """The layer's codes, scales and zero points; a :class:`miniquant.GptqResult` where the loss was stored."""
        codes, scales, zero_points, row_loss = _stored(name, tensors, grid)
        check_finite(METHOD, name, "scales", scales)
        if zero_points is None:
            zero_points = torch.zeros(grid.rows, grid.groups, dtype=torch.int8)
        kind = (grid.bits, grid.group_size, grid.symmetric, grid.full_range)
        parts = (unpack(codes, grid.bits, grid.columns), scales, zero_points, *kind)
        quantized: QuantizedWeight
        if grid.superblocks is not None:
            further = (grid.superblocks, *_superblocks(name, tensors, grid))
            quantized = SuperblockWeight(*parts, *further)
            if row_loss is not None:
                quantized = SuperblockResult(*parts, *further, row_loss)
        else:
            quantized = QuantizedWeight(*parts) if row_loss is None else GptqResult(*parts, row_loss)
        check_quantized(METHOD, f"layer {name!r}", quantized)
        return quantized


def _entries(config: Mapping[str, Any]) -> dict[str, ConfigObject]:
    """What the configuration says of each layer."""
    whole = method_config(METHOD, config, METHOD)
    whole.take("version", repr(VERSION), lambda value: is_integer(value) and value == VERSION)
    whole.object("layers")
    return whole.objects("layers")


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _stored(
    name: str, tensors: Mapping[str, Tensor], grid: LayerGrid
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, scales, zero points and loss of each row of a layer, of the shapes and dtypes that its grid has."""
    rows, bits = grid.rows, grid.bits
    codes = layer_tensor(METHOD, name, tensors, "codes", (torch.uint8,), (rows, -(-grid.columns * bits // 8)))
    scales = layer_tensor(METHOD, name, tensors, "scales", (grid.scale_dtype,), (rows, grid.groups))
    zero_points = row_loss = None
    if grid.symmetric and f"{name}.zero_points" in tensors:
        raise ValueError(f"{METHOD}: expected no tensor '{name}.zero_points' where symmetric is True, but got one")
    if not grid.symmetric:
        zero_points = layer_tensor(METHOD, name, tensors, "zero_points", (torch.int8,), (rows, grid.groups))
    if f"{name}.row_loss" in tensors:
        row_loss = layer_tensor(METHOD, name, tensors, "row_loss", ROW_LOSS_DTYPES, (rows,))
    return codes, scales, zero_points, row_loss


def _superblocks(name: str, tensors: Mapping[str, Tensor], grid: LayerGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Minima, and the steps of scales and of minima."""
    halves = ((torch.float16,), (grid.rows, grid.columns // SUPERBLOCK))
    kinds = (((torch.float32,), (grid.rows, grid.groups)), halves, halves)
    minima, super_scales, super_minima = (
        layer_tensor(METHOD, name, tensors, part, dtypes, shape)
        for part, (dtypes, shape) in zip(_OF_SUPERBLOCKS, kinds, strict=True)
    )
    return minima, super_scales, super_minima


def _json_object(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON keeps them; what it would not give back is refused."""
    try:
        stored = json.loads(json.dumps(dict(options), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{METHOD}: expected options of layer {name!r} to be values that JSON can hold, but got {error}"
        ) from error
    if not isinstance(stored, dict) or stored != dict(options):
        raise ValueError(
            f"{METHOD}: expected options of layer {name!r} to be values that JSON can hold, but got {dict(options)!r}"
        )
    return stored

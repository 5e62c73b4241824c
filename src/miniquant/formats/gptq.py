"""The checkpoint format of AutoGPTQ and GPTQModel, which transformers (through GPTQModel), vLLM and SGLang load.

For each layer, with integers ``code + 2^(bits - 1)`` without gaps in words (:func:`miniquant.packing.pack_words`):
``qweight`` int32 [K * bits / 32, N], packed along K; ``qzeros`` int32 [G, N * bits / 32], packed along N; ``scales``
float16 [G, N]; ``g_idx`` int32 [K], the group of each column. Columns stay in their order (``desc_act`` false).

The label ``checkpoint_format`` says what ``qzeros`` has: "gptq", version 1, the zero point's integer less 1; "gptq_v2"
the integer itself. Version 1 has no place for 0, the lowest zero point of an asymmetric grid.

Layers that differ from the most frequent grid, and those left out, are described by regular expressions under
``dynamic``, as GPTQModel and vLLM read it.

A checkpoint does not say whether a symmetric grid uses the code -2^(bits - 1). What is read back has ``full_range``
set, the grid that holds either.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from miniquant.formats.base import (
    ConfigObject,
    Format,
    LayerGrid,
    check_finite,
    check_float16_scales,
    check_layers,
    check_model_dtype,
    check_one_level,
    check_whole_groups,
    checked_grid,
    compiled,
    grid_of_layer,
    is_integer,
    layer_tensor,
    method_config,
    uneven_sizes,
)
from miniquant.formats.names import name_patterns
from miniquant.grid import QuantizedWeight
from miniquant.layer_file import check_quantized
from miniquant.packing import pack_words, unpack_words

METHOD = "gptq"
BITS = (2, 3, 4, 8)
KERNEL_MULTIPLE = 32
WORD_BITS = 32
QWEIGHT = ".qweight"


class Kind(NamedTuple):
    """What one entry of the configuration says of its layers."""

    bits: int
    group_size: int
    sym: bool


class Gptq(Format):
    """A :class:`miniquant.formats.Format`.

    Args:
        version: 1 or 2: what ``qzeros`` has and the label says.
    """

    value_suffixes: tuple[str, ...] = ()

    def __init__(self, version: Literal[1, 2] = 1) -> None:
        if version not in (1, 2):
            raise ValueError(f"Gptq: expected version to be 1 or 2, but got {version!r}")
        self.version = version
        self.name = "gptq" if version == 1 else "gptq_v2"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """float16, whatever the model has."""
        check_model_dtype(self.name, model_dtype)
        return torch.float16

    def check(self, name: str, grid: LayerGrid) -> list[str]:
        """2, 3, 4 or 8 bits, float16 scales, whole groups, and rows and columns that fill words."""
        where = f"of layer {name!r}"
        check_one_level(self.name, name, grid)
        if grid.bits not in BITS:
            raise ValueError(
                f"{self.name}: expected bits {where} to be 2, 3, 4 or 8, but got {grid.bits} (the format "
                "compressed-tensors has 2 to 8)"
            )
        check_float16_scales(self.name, name, grid)
        check_whole_groups(self.name, name, grid)
        whole = WORD_BITS if grid.bits == 3 else WORD_BITS // grid.bits
        for what, value in (("rows", grid.rows), ("columns", grid.columns)):
            if value % whole:
                raise ValueError(
                    f"{self.name}: expected {what} {where} to be a multiple of {whole} for {grid.bits} bits, but got "
                    f"{value} (skip the layer, or choose the format compressed-tensors)"
                )
        warnings = []
        if uneven := uneven_sizes(grid, KERNEL_MULTIPLE):
            warnings.append(
                f"{self.name}: layer {name!r}: most kernels that read the format need rows and columns in multiples of "
                f"{KERNEL_MULTIPLE}, but it has {uneven}"
            )
        if self.version == 1 and not grid.symmetric:
            warnings.append(
                f"{self.name}: layer {name!r}: version 1 has no place for the lowest zero point of an asymmetric grid, "
                "and GPTQModel loads asymmetric layers of version 1 from its own hand only: choose gptq_v2"
            )
        return warnings

    def nbytes(self, name: str, grid: LayerGrid) -> int:  # noqa: ARG002  (as for any format)
        """Of the packed codes and zero points, the scales and the group of each column."""
        codes = grid.columns * grid.bits // 8 * grid.rows
        zero_points = grid.groups * (grid.rows * grid.bits // 8)
        return codes + zero_points + grid.groups * grid.rows * grid.scale_dtype.itemsize + 4 * grid.columns

    def tensors(self, name: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
        """``qweight``, ``qzeros``, ``scales`` and ``g_idx``."""
        grid = checked_grid(self.name, name, quantized)
        self.check(name, grid)
        zero_points = quantized.zero_points.t().contiguous()  # [G, N]
        if self.version == 1:
            if bool((zero_points == -(1 << (grid.bits - 1))).any()):
                raise ValueError(
                    f"{self.name}: expected zero_points of layer {name!r} to be above {-(1 << (grid.bits - 1))}, which "
                    "version 1 of the format cannot hold, but got it (choose gptq_v2)"
                )
            zero_points = zero_points - 1
        return {
            f"{name}.qweight": pack_words(quantized.codes, grid.bits).t().contiguous(),
            f"{name}.qzeros": pack_words(zero_points, grid.bits),
            f"{name}.scales": quantized.scales.detach().t().contiguous(),
            f"{name}.g_idx": _group_index(grid),
        }

    def config(
        self,
        layers: Mapping[str, LayerGrid],
        ignored: Sequence[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,  # noqa: ARG002  (the format has no place for them)
    ) -> dict[str, Any]:
        """The most frequent grid, and under ``dynamic`` what differs from it.

        Readers take every Linear of the model's blocks for quantized that ``dynamic`` does not leave out; "lm_head" is
        left out by a key of its own.
        """
        check_layers(self.name, layers, ignored)
        kinds: dict[str, Kind] = {}
        for name, grid in layers.items():
            self.check(name, grid)
            kinds[name] = Kind(grid.bits, grid.group_size, grid.symmetric)
        common, _ = Counter(kinds.values()).most_common(1)[0]
        dynamic: dict[str, dict[str, Any]] = {}
        left_out = [name for name in ignored if not _is_head(name)]
        for pattern in name_patterns(left_out, layers):
            dynamic[f"-:{pattern.expression}"] = {}
        for kind in dict.fromkeys(kinds.values()):
            if kind != common:
                names = [name for name, other in kinds.items() if other == kind]
                others = [*(name for name, other in kinds.items() if other != kind), *ignored]
                for pattern in name_patterns(names, others):
                    dynamic[f"+:{pattern.expression}"] = kind._asdict()
        config = {
            "quant_method": METHOD,
            **common._asdict(),
            "desc_act": False,
            "lm_head": any(_is_head(name) for name in layers),
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"miniquant:{torch.ops.miniquant.version()}"]},
        }
        return {**config, "dynamic": dynamic} if dynamic else config

    def files(self, layers: Mapping[str, LayerGrid], ignored: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """quantize_config.json, the same again: what readers older than the entry in config.json look for."""
        return {"quantize_config.json": self.config(layers, ignored)}

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LayerGrid]:
        """Every layer that has a ``qweight``, with the grid that ``dynamic`` or the rest of the configuration says."""
        whole = method_config(self.name, config, METHOD)
        whole.take("checkpoint_format", repr(self.name), lambda value: value == self.name, default="gptq")
        whole.take("pack_dtype", "'int32'", lambda value: value == "int32", default="int32")
        common = self._kind(whole)
        dynamic = [
            (
                compiled(self.name, "keys of dynamic", key.removeprefix("-:").removeprefix("+:")),
                None if key.startswith("-:") else self._kind(entries, common),
            )
            for key, entries in whole.objects("dynamic").items()
        ]
        grids = {}
        for name in (whole.removesuffix(QWEIGHT) for whole in tensors if whole.endswith(QWEIGHT)):
            kind = next((value for expression, value in dynamic if expression.match(name)), common)
            if kind is None:
                raise ValueError(
                    f"{self.name}: expected dynamic of quantization_config to leave out no packed layer, "
                    f"but got {name!r}"
                )
            grids[name] = self._layer_grid(name, kind, tensors)
        return grids

    def read(self, name: str, tensors: Mapping[str, Tensor], grid: LayerGrid) -> QuantizedWeight:
        """The layer's codes, scales and zero points; a layer of ``desc_act`` is refused."""
        rows, columns, groups, bits = grid.rows, grid.columns, grid.groups, grid.bits
        integers = (torch.int32,)
        packed = layer_tensor(self.name, name, tensors, "qweight", integers, (columns * bits // WORD_BITS, rows))
        stored = layer_tensor(self.name, name, tensors, "qzeros", integers, (groups, rows * bits // WORD_BITS))
        scales = layer_tensor(self.name, name, tensors, "scales", (torch.float16,), (groups, rows))
        check_finite(self.name, name, "scales", scales)
        index = layer_tensor(self.name, name, tensors, "g_idx", integers, (columns,))
        if not torch.equal(index, _group_index(grid)):
            raise ValueError(
                f"{self.name}: expected tensor '{name}.g_idx' to be the groups of columns in their order, but got "
                "another order (desc_act), which has no place in a grid of consecutive columns"
            )
        zero_points = unpack_words(stored, bits, rows).t().contiguous()  # [N, G]
        highest = (1 << (bits - 1)) - 1
        if self.version == 1:
            if bool((zero_points == highest).any()):
                raise ValueError(
                    f"{self.name}: expected tensor '{name}.qzeros' to be below {2 * highest + 1}, to which readers "
                    f"add 1, but got it (zero points of version 2 under the label {self.name!r}?)"
                )
            zero_points = zero_points + 1
        if grid.symmetric and bool(zero_points.any()):
            value = int(zero_points[zero_points != 0][0]) + highest + 1
            raise ValueError(
                f"{self.name}: expected zero points of layer {name!r} to be {highest + 1} where sym is true, but got "
                f"{value} (is the label {self.name!r} true?)"
            )
        codes = unpack_words(packed.t(), bits, columns)
        quantized = QuantizedWeight(
            codes, scales.t().contiguous(), zero_points, bits, grid.group_size, grid.symmetric, grid.full_range
        )
        check_quantized(self.name, f"layer {name!r}", quantized)
        return quantized

    def _kind(self, entries: ConfigObject, common: Kind | None = None) -> Kind:
        """What an object of the configuration says; what it leaves out is as in `common`."""
        bits, group_size, sym = (None, None, None) if common is None else common
        entries.take("desc_act", "false", lambda value: value in (None, False))
        return Kind(
            entries.take("bits", "2, 3, 4 or 8", lambda value: is_integer(value) and value in BITS, bits),
            entries.take(
                "group_size",
                "positive or -1",
                lambda value: is_integer(value) and (value == -1 or value > 0),
                group_size,
            ),
            entries.take("sym", "true or false", lambda value: isinstance(value, bool), sym),
        )

    def _layer_grid(self, name: str, kind: Kind, tensors: Mapping[str, Tensor]) -> LayerGrid:
        """The grid of a layer, as far as its tensors' shapes agree with what the configuration says."""
        bits, group_size, symmetric = kind
        words, rows = layer_tensor(self.name, name, tensors, "qweight", (torch.int32,), None).shape
        columns = words * WORD_BITS // bits
        grid = grid_of_layer(self.name, name, rows, columns, bits, group_size, symmetric, symmetric, torch.float16)
        layer_tensor(self.name, name, tensors, "g_idx", (torch.int32,), (columns,))
        layer_tensor(self.name, name, tensors, "scales", (torch.float16,), (grid.groups, rows))
        layer_tensor(self.name, name, tensors, "qzeros", (torch.int32,), (grid.groups, rows * bits // WORD_BITS))
        self.check(name, grid)
        return grid


def _is_head(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "lm_head"


def _group_index(grid: LayerGrid) -> Tensor:
    """int32 [K]: the group of each column."""
    return torch.arange(grid.columns, dtype=torch.int32) // grid.columns_per_group

"""The format ``pack-quantized`` of the package compressed-tensors, which transformers and vLLM load.

For each layer: ``weight_packed`` int32 [N, ceil(K * bits / 32)], the codes (:func:`miniquant.packing.pack_words`);
``weight_scale`` [N, G]; ``weight_shape`` int64 [2], N and K; and where the grid is asymmetric ``weight_zero_point``
int32 [ceil(N * bits / 32), G], the zero points packed the same way along dimension 0.

2, 4 and 8 bits are stored alike by all versions of the package. Up to 0.17 it left gaps between codes of 3, 5, 6 and 7
bits; what is written and read here is the layout since 0.18.

A checkpoint names the file layout only: it does not say whether a symmetric grid uses the code -2^(bits - 1). What is
read back has ``full_range`` set, the grid that holds either.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

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
from miniquant.layer_file import SCALE_DTYPES, check_quantized
from miniquant.packing import pack_words, unpack_words

METHOD = "compressed-tensors"
LAYOUT = "pack-quantized"
VERSION = (0, 18)  # of the package, whose layout of 3, 5, 6 and 7 bits this is
CHANGED_WIDTHS = (3, 5, 6, 7)
VLLM_CPU_MULTIPLE = 32
PACKED = ".weight_packed"


class CompressedTensors(Format):
    """A :class:`miniquant.formats.Format`; a layer has to be a ``torch.nn.Linear``: its readers look at no other.

    vLLM fuses layers (query, key and value; gate and up), and reads a fused layer with the grid of its first part:
    give the parts equal grids for it.
    """

    name = METHOD
    value_suffixes: tuple[str, ...] = (".weight_shape",)

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype."""
        check_model_dtype(METHOD, model_dtype)
        return model_dtype

    def check(self, name: str, grid: LayerGrid) -> list[str]:
        """Any layer of 2 to 8 bits whose columns are a whole number of groups."""
        check_one_level(METHOD, name, grid)
        check_whole_groups(METHOD, name, grid)
        warnings = []
        if grid.bits in CHANGED_WIDTHS:
            warnings.append(
                f"{METHOD}: layer {name!r}: {grid.bits} bits are read by version 0.18 and newer of the package "
                "compressed-tensors; older ones expect gaps between the codes"
            )
        if grid.bits != 4:
            warnings.append(
                f"{METHOD}: layer {name!r}: vLLM's CPU kernels load 4 bits only, and on GPUs older versions 4 and 8, "
                f"but it has {grid.bits}"
            )
        if not grid.symmetric:
            warnings.append(
                f"{METHOD}: layer {name!r}: transformers 5.23 with compressed-tensors 0.20 loads asymmetric grids only "
                "where all layers are alike, and with quantization_config=CompressedTensorsConfig(dequantize=True)"
            )
        if uneven := uneven_sizes(grid, VLLM_CPU_MULTIPLE):
            warnings.append(
                f"{METHOD}: layer {name!r}: vLLM's CPU kernels need rows and columns in multiples of "
                f"{VLLM_CPU_MULTIPLE}, but it has {uneven}"
            )
        return warnings

    def nbytes(self, name: str, grid: LayerGrid) -> int:  # noqa: ARG002  (as for any format)
        """Of the packed codes and zero points, the scales and the shape."""
        words = grid.rows * -(-grid.columns * grid.bits // 32)
        if not grid.symmetric:
            words += grid.groups * -(-grid.rows * grid.bits // 32)
        return 4 * words + grid.rows * grid.groups * grid.scale_dtype.itemsize + 2 * 8

    def tensors(self, name: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
        """``weight_packed``, ``weight_scale``, ``weight_shape`` and for an asymmetric grid ``weight_zero_point``."""
        grid = checked_grid(METHOD, name, quantized)
        self.check(name, grid)
        tensors = {
            f"{name}.weight_packed": pack_words(quantized.codes, grid.bits),
            f"{name}.weight_scale": quantized.scales.detach().contiguous(),
            f"{name}.weight_shape": torch.tensor([grid.rows, grid.columns]),
        }
        if not grid.symmetric:
            zero_points = pack_words(quantized.zero_points.t().contiguous(), grid.bits)
            tensors[f"{name}.weight_zero_point"] = zero_points.t().contiguous()
        return tensors

    def config(
        self,
        layers: Mapping[str, LayerGrid],
        ignored: Sequence[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,  # noqa: ARG002  (the format has no place for them)
    ) -> dict[str, Any]:
        """One group for each kind of grid.

        Where all layers are alike, its target is the class ``Linear``, and ``ignored`` has to name every Linear that is
        not quantized; otherwise targets are names, and regular expressions of names that differ in numbers only.
        """
        check_layers(METHOD, layers, ignored)
        kinds: dict[tuple[int, bool, int], list[str]] = {}
        for name, grid in layers.items():
            self.check(name, grid)
            kinds.setdefault((grid.bits, grid.symmetric, grid.group_size), []).append(name)
        groups = {}
        for index, ((bits, symmetric, group_size), names) in enumerate(kinds.items()):
            targets = ["Linear"]
            if len(kinds) > 1:
                others = [*(set(layers) - set(names)), *ignored]
                patterns = name_patterns(names, others)
                targets = [
                    pattern.names[0] if len(pattern.names) == 1 else f"re:{pattern.expression}" for pattern in patterns
                ]
            groups[f"group_{index}"] = {
                "targets": targets,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group_size == -1 else "group",
                    "group_size": None if group_size == -1 else group_size,
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": METHOD,
            "format": LAYOUT,
            "quantization_status": "compressed",
            "ignore": list(ignored),
            "config_groups": groups,
        }

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LayerGrid]:
        """Every layer that has a ``weight_packed``, with the first group that names it, else that of its class."""
        whole = method_config(METHOD, config, METHOD)
        groups = whole.objects("config_groups")
        ignore = whole.take("ignore", "a list of names", lambda value: value is None or _is_texts(value)) or []
        targets: dict[str, _Scheme] = {}  # of groups with the same target the last counts, as in the package
        for group in groups.values():
            scheme = _scheme(whole, group)
            targets.update(dict.fromkeys(group.take("targets", "a list of names", _is_texts), scheme))
        chosen = _Targets(targets, "targets")
        left_out = _Targets(dict.fromkeys(ignore, True), "ignore")
        grids = {}
        for name in (tensor.removesuffix(PACKED) for tensor in tensors if tensor.endswith(PACKED)):
            if left_out.of(name):
                raise ValueError(
                    f"{METHOD}: expected ignore of quantization_config to match no packed layer, but got {name!r}"
                )
            chosen_scheme = chosen.of(name)
            if chosen_scheme is None:
                raise ValueError(
                    f"{METHOD}: expected a target of quantization_config that matches layer {name!r}, "
                    f"but got {', '.join(map(repr, targets)) or 'none'}"
                )
            grids[name] = _layer_grid(name, chosen_scheme, tensors)
        return grids

    def read(self, name: str, tensors: Mapping[str, Tensor], grid: LayerGrid) -> QuantizedWeight:
        """The layer's codes, scales and zero points."""
        rows, columns, groups, bits = grid.rows, grid.columns, grid.groups, grid.bits
        words = (rows, -(-columns * bits // 32))
        packed = layer_tensor(METHOD, name, tensors, "weight_packed", (torch.int32,), words)
        scales = layer_tensor(METHOD, name, tensors, "weight_scale", (grid.scale_dtype,), (rows, groups))
        shape = layer_tensor(METHOD, name, tensors, "weight_shape", (torch.int64,), (2,))
        if shape.tolist() != [rows, columns]:
            raise ValueError(
                f"{METHOD}: expected tensor '{name}.weight_shape' to be {[rows, columns]}, but got {shape.tolist()}"
            )
        check_finite(METHOD, name, "scales", scales)
        zero_points = torch.zeros(rows, groups, dtype=torch.int8)
        if not grid.symmetric:
            words = (-(-rows * bits // 32), groups)
            stored = layer_tensor(METHOD, name, tensors, "weight_zero_point", (torch.int32,), words)
            zero_points = unpack_words(stored.t(), bits, rows).t().contiguous()
        codes = unpack_words(packed, bits, columns)
        quantized = QuantizedWeight(codes, scales, zero_points, bits, grid.group_size, grid.symmetric, grid.full_range)
        check_quantized(METHOD, f"layer {name!r}", quantized)
        return quantized


class _Scheme(NamedTuple):
    """What a group says of its layers."""

    bits: int
    group_size: int
    symmetric: bool


_T = TypeVar("_T")


class _Targets(Generic[_T]):
    """Which of some values a layer has: by its name, else by the first regular expression, else by its class.

    What is neither a layer's name nor an expression is the name of a class; every layer here is a Linear.
    """

    def __init__(self, targets: Mapping[str, _T], key: str) -> None:
        self.targets = targets
        self.expressions = [
            (compiled(METHOD, key, target.removeprefix("re:")), targets[target])
            for target in sorted(targets)  # the package's order
            if target.startswith("re:")
        ]

    def of(self, name: str) -> _T | None:
        """The value of a layer; None where no target matches it."""
        if name in self.targets:
            return self.targets[name]
        for expression, value in self.expressions:
            if expression.match(name):
                return value
        return self.targets.get("Linear")


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _scheme(whole: ConfigObject, group: ConfigObject) -> _Scheme:
    """What a group says of its layers, as far as this format holds it."""
    layout = group.values.get("format")
    (whole if layout is None else group).take("format", repr(LAYOUT), lambda value: value == LAYOUT)
    for key in ("input_activations", "output_activations"):
        group.take(key, "null, because weights alone are quantized", lambda value: value is None)
    weights = group.object("weights")
    weights.take("type", "'int'", lambda value: value == "int", default="int")
    bits = weights.take("num_bits", "2 to 8", lambda value: is_integer(value) and 2 <= value <= 8, default=8)
    symmetric = weights.take("symmetric", "true or false", lambda value: isinstance(value, bool), default=True)
    weights.take("dynamic", "false", lambda value: value is False, default=False)
    weights.take("actorder", "null or 'weight'", lambda value: value in (None, False, "weight", "static"))
    size = weights.values.get("group_size")
    strategy = "tensor" if size is None else "channel" if size == -1 else "group"  # where it is missing or null
    if weights.values.get("strategy") is not None:
        strategy = weights.values["strategy"]
    if strategy not in ("group", "channel"):
        raise ValueError(
            f"{METHOD}: expected {weights.where}.strategy of quantization_config to be 'group' or 'channel', "
            f"but got {strategy!r}"
        )
    group_size = -1
    if strategy == "group":
        group_size = weights.take("group_size", "positive", lambda value: is_integer(value) and value > 0)
    else:
        weights.take("group_size", "null or -1 for the strategy 'channel'", lambda value: value in (None, -1))
    version = whole.values.get("version")
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if bits in CHANGED_WIDTHS and numbers is not None and tuple(map(int, numbers.groups())) < VERSION:
        raise ValueError(
            f"{METHOD}: expected version of quantization_config to be 0.18 or newer for {bits} bits, "
            f"but got {version!r}, which stored them with gaps"
        )
    return _Scheme(bits, group_size, symmetric)


def _layer_grid(name: str, scheme: _Scheme, tensors: Mapping[str, Tensor]) -> LayerGrid:
    """The grid of a layer that a group describes, as far as its tensors' shapes agree."""
    packed = layer_tensor(METHOD, name, tensors, "weight_packed", (torch.int32,), None)
    scales = layer_tensor(METHOD, name, tensors, "weight_scale", SCALE_DTYPES, None)
    rows, columns = layer_tensor(METHOD, name, tensors, "weight_shape", (torch.int64,), (2,)).tolist()
    if f"{name}.weight_g_idx" in tensors:
        raise ValueError(
            f"{METHOD}: expected no tensor '{name}.weight_g_idx' (groups of columns in another order), but got one"
        )
    bits, group_size, symmetric = scheme
    grid = grid_of_layer(METHOD, name, rows, columns, bits, group_size, symmetric, symmetric, scales.dtype)
    for suffix, tensor, shape in (
        ("weight_packed", packed, (rows, -(-columns * bits // 32))),
        ("weight_scale", scales, (rows, grid.groups)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{METHOD}: expected tensor '{name}.{suffix}' to have shape {list(shape)} for {bits} bits and a weight "
                f"of shape {[rows, columns]}, but got shape {list(tensor.shape)}"
            )
    if (f"{name}.weight_zero_point" in tensors) == symmetric:
        has = "no" if symmetric else "a"
        got = "one" if symmetric else "none"
        raise ValueError(
            f"{METHOD}: expected {has} tensor '{name}.weight_zero_point' where symmetric is {symmetric}, but got {got}"
        )
    CompressedTensors().check(name, grid)
    return grid

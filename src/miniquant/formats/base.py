"""What the checkpoint formats have in common: a layer's grid, the functions that each has, and checks of tensors.

A layer is named as its module is, "model.layers.0.mlp.up_proj"; its weight is [N, K], its scales [N, G].
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor

from miniquant.grid import QuantizedWeight, SuperblockKind, SuperblockWeight
from miniquant.layer_file import SCALE_DTYPES, check_quantized, dtype_names
from miniquant.superblocks import GRIDS


@dataclass(frozen=True)
class LayerGrid:
    """The grid of a layer's weight, before its codes exist: what a format looks at before work starts.

    Attributes:
        rows: N.
        columns: K.
        bits: of a code, 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids (see the package).
        full_range: whether it is the symmetric grid with one code more.
        scale_dtype: of the stored scales: float32, float64, bfloat16 or float16.
        superblocks: the type of a grid with two levels of scales, "Q4_K" for instance; None of any other grid.

    Raises:
        ValueError: for values that no grid has.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    symmetric: bool
    full_range: bool
    scale_dtype: torch.dtype
    superblocks: SuperblockKind | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("rows", 1, None), ("columns", 1, None), ("bits", 2, 8)):
            value = getattr(self, name)
            if not is_integer(value) or value < least or (most is not None and value > most):
                raise ValueError(
                    f"LayerGrid: expected {name} to be {'positive' if most is None else f'{least} to {most}'}, "
                    f"but got {value!r}"
                )
        if not is_integer(self.group_size) or (self.group_size != -1 and self.group_size < 1):
            raise ValueError(
                "LayerGrid: expected group_size to be positive, or -1 for one group per row, "
                f"but got {self.group_size!r}"
            )
        for name in ("symmetric", "full_range"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(  # noqa: TRY004  (values come from files)
                    f"LayerGrid: expected {name} to be True or False, but got {getattr(self, name)!r}"
                )
        if self.full_range and not self.symmetric:
            raise ValueError("LayerGrid: expected full_range to be False where symmetric is False, but got True")
        if self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(
                f"LayerGrid: expected scale_dtype to be {dtype_names(*SCALE_DTYPES)}, but got {self.scale_dtype!r}"
            )
        if self.superblocks is not None:
            self._check_superblocks(self.superblocks)

    def _check_superblocks(self, kind: SuperblockKind) -> None:
        if kind not in GRIDS:
            raise ValueError(f"LayerGrid: expected superblocks to be one of {', '.join(GRIDS)}, but got {kind!r}")
        grid = GRIDS[kind]
        of_type = (*grid, grid.symmetric, torch.float32)
        ours = (self.bits, self.group_size, self.symmetric, self.full_range, self.scale_dtype)
        if ours != of_type:
            raise ValueError(
                f"LayerGrid: expected bits, group_size, symmetric, full_range and scale_dtype of {kind} to "
                f"be {of_type}, but got {ours}"
            )

    @property
    def columns_per_group(self) -> int:
        """Columns per scale: all of a row for a group_size of -1."""
        return self.columns if self.group_size == -1 else self.group_size

    @property
    def groups(self) -> int:
        """G: scales per row."""
        return -(-self.columns // self.columns_per_group)

    @classmethod
    def of(cls, quantized: QuantizedWeight) -> "LayerGrid":
        """The grid of a quantized weight."""
        rows, columns = quantized.codes.shape
        return cls(
            rows,
            columns,
            quantized.bits,
            quantized.group_size,
            quantized.symmetric,
            quantized.full_range,
            quantized.scales.dtype,
            quantized.kind if isinstance(quantized, SuperblockWeight) else None,
        )

    @property
    def text(self) -> str:
        """What people call it: "Q4_K", "4", "4 asym."."""
        return grid_text(self.bits, self.superblocks, symmetric=self.symmetric)


def grid_text(bits: int, superblocks: str | None, *, symmetric: bool) -> str:
    """What people call a grid: "Q4_K", "4", "4 asym."."""
    return superblocks or f"{bits}{'' if symmetric else ' asym.'}"


class LayerFormat(Protocol):
    """What is asked of any format before work starts.

    Attributes:
        name: as :func:`miniquant.formats.layer_format` takes it.
    """

    name: str

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the scales of a model of ``model_dtype`` are stored: codes are chosen for it.

        Raises:
            ValueError: for a dtype that no model to quantize has.
        """
        ...

    def check(self, name: str, grid: LayerGrid) -> list[str]:
        """Whether the format can hold a layer.

        Returns:
            Warnings: what some of the format's readers will not do with this layer.

        Raises:
            ValueError: where it cannot; the message names the layer and what can be done.
        """
        ...

    def nbytes(self, name: str, grid: LayerGrid) -> int:
        """Bytes that a layer takes which ``check`` accepts, before its codes exist."""
        ...


class Format(LayerFormat, Protocol):
    """A format of a folder with config.json and safetensors files.

    Attributes:
        name: as :func:`miniquant.formats.format_named` takes it.
        value_suffixes: endings of the names of those tensors, all of them small, whose values ``layers`` reads.
    """

    value_suffixes: tuple[str, ...]

    def tensors(self, name: str, quantized: QuantizedWeight) -> dict[str, Tensor]:
        """The tensors that stand for ``<name>.weight`` in the checkpoint, by their whole names.

        Raises:
            ValueError, TypeError: where ``check`` raises, and for tensors that do not fit together.
        """
        ...

    def config(
        self,
        layers: Mapping[str, LayerGrid],
        ignored: Sequence[str] = (),
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config`` of config.json.

        Args:
            layers: every quantized layer with its grid.
            ignored: every other Linear of the model: some formats tell the quantized ones by them.
            options: those that each layer was quantized with, for the record; of formats that have a place for them.

        Raises:
            ValueError: where ``check`` raises, and for layers that one configuration cannot describe.
        """
        ...

    def files(self, layers: Mapping[str, LayerGrid], ignored: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
        """Further JSON files of the folder, by name: none where config.json has all."""
        del layers, ignored
        return {}

    def layers(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LayerGrid]:
        """The quantized layers of a checkpoint, each with its grid.

        Args:
            config: ``quantization_config`` of its config.json.
            tensors: all of its tensors, by name. Only their shapes and dtypes are read, so that tensors on the device
                "meta" will do, but for those whose names end in one of ``value_suffixes``.

        Raises:
            ValueError: for a damaged configuration, one of another kind, or one that the tensors contradict.
        """
        ...

    def read(self, name: str, tensors: Mapping[str, Tensor], grid: LayerGrid) -> QuantizedWeight:
        """A layer from its tensors, bit for bit as it was stored; nothing is taken on trust.

        Args:
            name: of the layer.
            tensors: at least those of the layer, by their whole names.
            grid: as ``layers`` gave it.

        Raises:
            ValueError: where a tensor is missing, or of another dtype or shape, or has values that the grid has not.
        """
        ...


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value, of a JSON file for instance, is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_model_dtype(form: str, model_dtype: torch.dtype) -> None:
    """Raises a ValueError for a dtype that no model to quantize has."""
    if model_dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{form}: expected the model's dtype to be {dtype_names(*SCALE_DTYPES)}, but got {model_dtype}"
        )


def check_whole_groups(form: str, name: str, grid: LayerGrid) -> None:
    """Raises a ValueError where the last group of a layer would be shorter than the others."""
    if grid.columns % grid.columns_per_group:
        raise ValueError(
            f"{form}: expected group_size of layer {name!r} to divide its {grid.columns} columns, but got "
            f"{grid.group_size} (choose one that does or -1, or skip the layer)"
        )


def check_one_level(form: str, name: str, grid: LayerGrid) -> None:
    """Raises a ValueError for a grid with two levels of scales."""
    if grid.superblocks is not None:
        raise ValueError(
            f"{form}: expected layer {name!r} to have one level of scales, but got {grid.superblocks}, a type of GGUF "
            "(choose the format gguf, or bits and group_size in place of superblocks)"
        )


def check_float16_scales(form: str, name: str, grid: LayerGrid) -> None:
    """Raises a ValueError for a layer with scales of another dtype than the format stores."""
    if grid.scale_dtype != torch.float16:
        raise ValueError(
            f"{form}: expected scales of layer {name!r} to be float16, but got {dtype_names(grid.scale_dtype)} (codes "
            "are chosen for the dtype of the stored scales: quantize with scale_dtype=torch.float16)"
        )


def uneven_sizes(grid: LayerGrid, multiple: int) -> str:
    """Those of a layer's sizes that are no multiple: "40 rows and 72 columns", or ""."""
    sizes = ((grid.rows, "rows"), (grid.columns, "columns"))
    return " and ".join(f"{value} {what}" for value, what in sizes if value % multiple)


def checked_grid(form: str, name: str, quantized: QuantizedWeight) -> LayerGrid:
    """The grid of a quantized weight that fits together and can be stored.

    Args:
        form: the format's name, for messages.
        name: the layer's name.
        quantized: the weight.

    Raises:
        ValueError, TypeError: for tensors of another dtype or shape, codes that the grid has not, scales that are not
            finite.
    """
    if not isinstance(quantized, QuantizedWeight):
        raise TypeError(f"{form}: expected a QuantizedWeight of layer {name!r}, but got {type(quantized).__name__}")
    check_quantized(form, f"layer {name!r}", quantized)
    check_finite(form, name, "scales", quantized.scales)
    return LayerGrid.of(quantized)


def check_finite(form: str, name: str, what: str, values: Tensor) -> None:
    """Raises a ValueError where a layer has values that are not finite."""
    finite = values.isfinite()
    if not bool(finite.all()):
        got = values[~finite][0].item()
        raise ValueError(f"{form}: expected {what} of layer {name!r} to be finite, but got {got}")


def layer_tensor(
    form: str,
    name: str,
    tensors: Mapping[str, Tensor],
    suffix: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
) -> Tensor:
    """The tensor ``<name>.<suffix>``, of one of ``dtypes`` and of ``shape``; None is any matrix.

    Raises:
        ValueError: where it is missing or another.
    """
    whole = f"{name}.{suffix}"
    tensor = tensors.get(whole)
    if tensor is None:
        raise ValueError(f"{form}: expected a tensor {whole!r} of layer {name!r}, but got none of that name")
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{form}: expected tensor {whole!r} to be {dtype_names(*dtypes)}, but got {dtype_names(tensor.dtype)}"
        )
    if shape is None and tensor.dim() != 2:
        raise ValueError(f"{form}: expected tensor {whole!r} to be a matrix, but got shape {list(tensor.shape)}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(
            f"{form}: expected tensor {whole!r} to have shape {list(shape)}, but got shape {list(tensor.shape)}"
        )
    return tensor


class ConfigObject:
    """An object of a ``quantization_config``, whose values are checked as they are taken.

    Args:
        form: the format's name, for messages.
        values: the object; anything else is refused.
        where: its place in the configuration, "" for the whole.

    Raises:
        ValueError: where it is no object.
    """

    def __init__(self, form: str, values: object, where: str = "") -> None:
        self.form, self.where = form, where
        if not isinstance(values, Mapping):
            place = f"{where} of quantization_config" if where else "quantization_config"
            raise ValueError(f"{form}: expected {place} to be an object, but got {values!r}")  # noqa: TRY004
        self.values = values

    def take(self, key: str, requirement: str, accepts: Callable[[Any], bool], default: Any = None) -> Any:
        """The value of a key.

        Args:
            key: the key.
            requirement: in words.
            accepts: the same as a function.
            default: the value where the key is missing.

        Raises:
            ValueError: for a value that is not accepted.
        """
        value = self.values.get(key, default)
        if not accepts(value):
            raise ValueError(
                f"{self.form}: expected {self._place(key)} of quantization_config to be {requirement}, "
                f"but got {value!r}"
            )
        return value

    def object(self, key: str) -> "ConfigObject":
        """The object below a key."""
        return ConfigObject(self.form, self.values.get(key), self._place(key))

    def objects(self, key: str) -> dict[str, "ConfigObject"]:
        """The objects below the keys of the object below a key, which may be missing or null."""
        inner = {} if self.values.get(key) is None else self.object(key).values
        return {name: ConfigObject(self.form, value, f"{self._place(key)}[{name!r}]") for name, value in inner.items()}

    def _place(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key


def grid_of_layer(form: str, name: str, *values: Any) -> LayerGrid:
    """A :class:`LayerGrid` whose ValueError names the format and the layer."""
    try:
        return LayerGrid(*values)
    except ValueError as error:
        raise ValueError(f"{form}: layer {name!r}: {str(error).removeprefix('LayerGrid: ')}") from None


def with_scale_dtype(name: str, quantized: QuantizedWeight, dtype: torch.dtype) -> QuantizedWeight:
    """The same weight with its scales in another dtype: what takes it from one format to another.

    Args:
        name: of the layer, for messages.
        quantized: the weight.
        dtype: float32, float64, bfloat16 or float16.

    Raises:
        ValueError: where the dtype does not hold a scale exactly.
    """
    scales = quantized.scales.to(dtype)
    changed = scales.double() != quantized.scales.double()
    if bool(changed.any()):
        value = quantized.scales[changed][0].item()
        raise ValueError(
            f"with_scale_dtype: expected scales of layer {name!r} that {dtype_names(dtype)} holds exactly, but got "
            f"{value!r} in {dtype_names(quantized.scales.dtype)} (quantize again for the other format)"
        )
    return replace(quantized, scales=scales)


def check_layers(form: str, layers: Mapping[str, LayerGrid], ignored: Sequence[str]) -> None:
    """Raises a ValueError where a configuration is asked for no layers, or for one that is both in and out."""
    if not layers:
        raise ValueError(f"{form}: expected layers to have one or more, but got none")
    if both := sorted(set(layers) & set(ignored)):
        raise ValueError(f"{form}: expected ignored to name no quantized layer, but got {both[0]!r}")


def method_config(form: str, config: object, method: str) -> ConfigObject:
    """A ``quantization_config``, which has to be of a method."""
    checked = ConfigObject(form, config)
    checked.take("quant_method", repr(method), lambda value: value == method)
    return checked


def compiled(form: str, key: str, expression: str) -> re.Pattern[str]:
    """A regular expression of a ``quantization_config``; a ValueError where it is none."""
    try:
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{form}: expected {key} of quantization_config to be regular expressions, but got {expression!r} ({error})"
        ) from None

"""A Linear layer that computes with a quantized weight, which it keeps as codes.

The codes are kept in one of two forms, chosen by the grid:

- For the kernel: as PyTorch's int4 product for CPUs takes them, 4 bits per code. This form depends on the machine's
  instruction set, so it is made when a layer is loaded, and never stored. It needs codes of at most 4 bits, out
  features in multiples of 16, and in features and groups in multiples of 32.
- In rows: packed without gaps (:func:`miniquant.pack`), for every other grid.

An input in bfloat16 of at most 64 tokens is multiplied by PyTorch's kernel, which reads the codes; scales, and for an
asymmetric grid ``-zero_point * scale``, are rounded to bfloat16 for it, the products are summed in float32. For any
other input the weight is dequantized, a million elements at a time, multiplied and dropped: values are those of
``miniquant.dequantize(quantized, dtype=input.dtype)``, bit for bit. From 64 tokens on this is faster than the kernel
also in bfloat16; with few tokens it is slow, since every call dequantizes the whole weight.

docs/guide.md has what it comes to for a language model: generation 1.8 times as fast as with float weights in bfloat16,
and a prompt of 512 tokens 0.7 times.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from miniquant.formats.base import LayerGrid, check_finite
from miniquant.grid import QuantizedWeight, SuperblockWeight
from miniquant.layer_file import check_quantized, dtype_names
from miniquant.modules import PRODUCTS, StandIn, expert_of
from miniquant.packing import pack, unpack

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What PyTorch's kernel takes.
KERNEL_BITS = 4
KERNEL_GROUPS = (256, 128, 64, 32)
KERNEL_ROWS = 16
# Where the kernel takes longer than dequantizing and a product in bfloat16: it was 60 to 80 tokens for matrices of
# 1536 x 576 and 4096 x 4096.
KERNEL_TOKENS = 64
# So much of a weight is dequantized at a time: it stays in a processor's cache.
ELEMENTS = 1 << 20
# Rows in multiples of this are packed alike whether alone or with others.
_PACKED_TOGETHER = 64


class _Layout(NamedTuple):
    """Where PyTorch's kernel has codes: in blocks of rows, for each column the block's codes, two to a byte.

    Attributes:
        block: rows of a block; the last block may have fewer, which are then pairs.
        pairs: whether a byte has rows 2i and 2i + 1 of the block; otherwise rows i and i + block / 2.
    """

    block: int
    pairs: bool


# Of the instruction sets AVX-512 and AVX2, and of others. A weight that was packed otherwise is kept in rows.
# Of AVX-512, AVX2, their portable forms, and ARM.
_LAYOUTS = (
    _Layout(64, pairs=False),
    _Layout(32, pairs=False),
    _Layout(64, pairs=True),
    _Layout(32, pairs=True),
    _Layout(16, pairs=True),
)


class QuantizedLinear(nn.Module):
    """``torch.nn.Linear`` with a quantized weight: ``y = x W^T + b``, in the dtype of x.

    Made from a weight by :meth:`from_quantized`, or empty, for :meth:`load_state_dict`. The state dict has, on any
    machine, ``codes`` uint8 [N, ceil(K * bits / 8)] (:func:`miniquant.pack`), ``scales`` [N, G], for an asymmetric grid
    ``zero_points`` int8 [N, G], and ``bias`` [N] where there is one: the tensors that the format "miniquant" has. The
    grid is the module's, as ``in_features`` is. Scales keep the dtype that they were stored in, whatever dtype the
    module is converted to.

    The weight does not learn. Gradients go through to the input, and to the bias if it asks for them.

    An exported program (``torch.export``) has the codes as they are at that moment: for machines of another kind call
    ``use_kernel(False)`` first. In an exported program the kernel multiplies any number of tokens.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        bits: 2 to 8.
        group_size: columns per scale; -1 is one group per row.
        symmetric: which of the two grids (see the package).
        full_range: whether it is the symmetric grid with one more code.
        scale_dtype: of the scales; None is `dtype`.
        dtype: of the bias and of :attr:`weight`; None is torch's default.
        device: of the tensors.

    Raises:
        ValueError, TypeError: for a bad argument.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    kernel_scales: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        bits: int = 4,
        group_size: int = 64,
        symmetric: bool = True,
        full_range: bool = False,
        scale_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        dtype = _checked_dtype(torch.get_default_dtype() if dtype is None else dtype)
        grid = LayerGrid(
            out_features,
            in_features,
            bits,
            group_size,
            symmetric,
            full_range,
            dtype if scale_dtype is None else scale_dtype,
        )
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric, self.full_range = bits, group_size, symmetric, full_range
        self.dtype = dtype
        self._layout: _Layout | None = None
        packed = torch.zeros(out_features, -(-in_features * bits // 8), dtype=torch.uint8, device=device)
        # Not persistent: the state dict has them as any machine takes them.
        self.register_buffer("codes", packed, persistent=False)
        scales = torch.zeros(out_features, grid.groups, dtype=grid.scale_dtype, device=device)
        self.register_buffer("scales", scales, persistent=False)
        zero_points = None if symmetric else torch.zeros(scales.shape, dtype=torch.int8, device=device)
        self.register_buffer("zero_points", zero_points, persistent=False)
        self.register_buffer("kernel_scales", None, persistent=False)
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        kernel: bool = True,
    ) -> "QuantizedLinear":
        """A layer of a quantized weight.

        Args:
            quantized: the weight, on the CPU.
            bias: [N], or None.
            dtype: of the bias and of :attr:`weight`; None is the bias's, else the scales'.
            kernel: whether codes are kept for PyTorch's kernel where it takes them.

        Raises:
            ValueError, TypeError: for tensors that do not fit together.

        Example:
            >>> layer = QuantizedLinear.from_quantized(gptq(linear.weight, hessian), linear.bias)
        """
        if isinstance(quantized, SuperblockWeight):
            raise TypeError(
                "QuantizedLinear: expected quantized to have one level of scales, but got a "
                f"{type(quantized).__name__} ({quantized.kind})"
            )
        if not isinstance(quantized, QuantizedWeight):
            raise TypeError(
                f"QuantizedLinear: expected quantized to be a QuantizedWeight, but got {type(quantized).__name__}"
            )
        check_quantized("QuantizedLinear", "quantized", quantized)
        rows, columns = quantized.codes.shape
        if bias is not None and tuple(bias.shape) != (rows,):
            raise ValueError(f"QuantizedLinear: expected bias to have shape [{rows}], but got shape {list(bias.shape)}")
        if dtype is None:
            dtype = quantized.scales.dtype if bias is None else bias.dtype
        # Without memory: what it has is set below.
        layer = cls(
            columns,
            rows,
            bias=False,
            bits=quantized.bits,
            group_size=quantized.group_size,
            symmetric=quantized.symmetric,
            full_range=quantized.full_range,
            dtype=dtype,
            device="meta",
        )
        layer._set(quantized, kernel=kernel)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        return layer

    def twin(self, bias: Tensor | None = None) -> "QuantizedLinear":
        """A layer with the same weight, in the same memory, and a bias of its own."""
        other = copy.copy(self)
        other._parameters = {"bias": None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)}  # noqa: SLF001
        return other

    def quantized(self) -> QuantizedWeight:
        """The weight as it was given: codes, scales and zero points, bit for bit, on the layer's device."""
        codes = torch.cat([codes for _, codes in self._codes()])
        zero_points = torch.zeros(self.scales.shape, dtype=torch.int8, device=self.scales.device)
        if self.zero_points is not None:
            zero_points = self.zero_points.clone()
        return QuantizedWeight(
            codes, self.scales.clone(), zero_points, self.bits, self.group_size, self.symmetric, self.full_range
        )

    @property
    def weight(self) -> Tensor:
        """[N, K], in the layer's dtype: made anew at each access, and not kept."""
        return self.dequantized(self.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The values [N, K] of the weight in a dtype: those of :func:`miniquant.dequantize`."""
        return torch.cat([weight.T for _, weight in self._values(dtype)])

    @property
    def kernel(self) -> bool:
        """Whether codes are kept for PyTorch's kernel."""
        return self._layout is not None

    def use_kernel(self, use: bool = True) -> "QuantizedLinear":  # noqa: FBT001, FBT002  (as requires_grad_ has it)
        """Keeps codes for PyTorch's kernel where that takes them, or in rows, as any machine takes them.

        Returns:
            The layer.
        """
        if use != self.kernel:
            self._set(self.quantized().map(Tensor.cpu), kernel=use)
        return self

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that Linear has)
        """``input W^T + bias``; [..., K] gives [..., N]."""
        if torch.is_autocast_enabled(input.device.type) and input.is_floating_point():
            input = input.to(torch.get_autocast_dtype(input.device.type))  # noqa: A001
        tokens = input.reshape(-1, self.in_features)
        outputs = self._kernel_product(tokens) if self._takes(tokens) else self._product(tokens)
        if self.bias is not None:
            outputs = outputs + self.bias.to(outputs.dtype)
        return outputs.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and grid."""
        grid = f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {grid}, "
            f"kernel={self.kernel}"
        )

    # Products

    def _takes(self, tokens: Tensor) -> bool:
        """Whether the kernel multiplies these tokens."""
        if self.kernel_scales is None or tokens.dtype != torch.bfloat16 or tokens.device.type != "cpu":
            return False
        if torch.is_grad_enabled() and tokens.requires_grad:  # the kernel has no derivative
            return False
        return torch.compiler.is_exporting() or 0 < tokens.shape[0] <= KERNEL_TOKENS

    def _kernel_product(self, tokens: Tensor) -> Tensor:
        scales = self.get_buffer("kernel_scales")
        group = self.in_features // len(scales)
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(  # noqa: SLF001  (there is no public way)
            tokens.contiguous(), self.codes, group, scales
        )
        return product

    def _product(self, tokens: Tensor) -> Tensor:
        """``tokens W^T`` by the dequantized weight."""
        if not tokens.is_floating_point():
            raise TypeError(
                f"QuantizedLinear: expected input to be of a floating-point dtype, but got {dtype_names(tokens.dtype)}"
            )
        if torch.is_grad_enabled() and tokens.requires_grad and not torch.compiler.is_compiling():
            result: Tensor = _Product.apply(tokens, self)  # type: ignore[no-untyped-call]
            return result
        parts = [tokens @ weight for _, weight in self._values(tokens.dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    # Codes and values, a part of the rows at a time

    def _parts(self) -> Iterator[tuple[int, int]]:
        """First row and the row after the last, of parts of at most ELEMENTS elements, or of 64 rows."""
        rows = self.out_features
        if not torch.compiler.is_compiling():  # a compiled program fuses what is done to an element
            rows = max(ELEMENTS // self.in_features // _PACKED_TOGETHER, 1) * _PACKED_TOGETHER
        for first in range(0, self.out_features, rows):
            yield first, min(first + rows, self.out_features)

    def _codes(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """int8 [rows, K] of each part."""
        for first, end in self._parts():
            if self._layout is None:
                yield (first, end), self._row_codes(first, end)
            else:
                codes = self._kernel_codes(first, end, self._layout)
                yield (first, end), codes.T.to(torch.int8, memory_format=torch.contiguous_format) - 8

    def _values(self, dtype: torch.dtype) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """[K, rows] of each part, the values of the codes."""
        for first, end in self._parts():
            scales = self.scales[first:end]
            # A product of two numbers in bfloat16 or float16 is computed in float32 and rounded once.
            compute = dtype
            if scales.dtype != dtype:
                compute = torch.promote_types(torch.promote_types(scales.dtype, dtype), torch.float32)
            zeros = None if self.zero_points is None else self.zero_points[first:end].to(compute)
            if self._layout is None:
                codes = self._row_codes(first, end).to(compute)
                values = _grouped(codes, scales.to(compute), zeros, self.group_size).T
            else:
                codes = self._kernel_codes(first, end, self._layout).to(compute).sub_(8)
                values = _grouped_columns(
                    codes, scales.to(compute).T, None if zeros is None else zeros.T, self.group_size
                )
            yield (first, end), values.to(dtype)

    def _row_codes(self, first: int, end: int) -> Tensor:
        """int8 [rows, K] of codes in rows."""
        packed = self.codes[first:end]
        if packed.device.type in ("cpu", "meta"):
            return unpack(packed, self.bits, self.in_features)
        return unpack_anywhere(packed, self.bits, self.in_features)

    def _kernel_codes(self, first: int, end: int, layout: _Layout) -> Tensor:
        """uint8 [K, rows], code + 8, of codes for the kernel; `first` is a multiple of 64."""
        packed = self.codes.view(-1)[first * self.in_features // 2 : end * self.in_features // 2]
        return _from_kernel(packed, end - first, self.in_features, layout)

    # State

    def _set(self, quantized: QuantizedWeight, *, kernel: bool) -> None:
        """Takes a weight, on the CPU, that was checked, to the device on which the layer is."""
        device = self.codes.device
        self.scales = quantized.scales.detach().clone(memory_format=torch.contiguous_format)
        self.zero_points = (
            None if self.symmetric else quantized.zero_points.clone(memory_format=torch.contiguous_format)
        )
        self._layout = self.kernel_scales = None
        group = kernel_group(LayerGrid.of(quantized))
        packed = _for_kernel(quantized.codes) if kernel and group is not None else None
        if packed is None or group is None:
            self.codes = pack(quantized)
        else:
            self.codes, self._layout = packed
            self.kernel_scales = self._scales_for_kernel(group)
        if device.type not in ("cpu", "meta"):
            self.to(device)

    def _scales_for_kernel(self, group: int) -> Tensor:
        """bfloat16 [K / group, N, 2]: the kernel computes ``(code - 8) * [..., 0] + [..., 1]`` of codes from 0."""
        repeats = (self.in_features if self.group_size == -1 else self.group_size) // group
        scales = self.scales.float()
        zeros = torch.zeros_like(scales) if self.zero_points is None else self.zero_points.float() * -scales
        both = torch.stack([scales.T, zeros.T], -1).repeat_interleave(repeats, 0)
        return both[: self.in_features // group].to(torch.bfloat16).contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":  # noqa: FBT001, FBT002
        """Moves tensors; scales keep their dtype."""
        scales, kernel_scales = self.scales, self.kernel_scales
        self.dtype = fn(scales.new_empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        if kernel_scales is not None and self.get_buffer("kernel_scales").dtype != kernel_scales.dtype:
            self.kernel_scales = kernel_scales.to(self.scales.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:  # noqa: FBT001
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes = self.codes
        if self._layout is not None:
            codes = pack(self.quantized().map(Tensor.cpu)).to(codes.device)
        destination[f"{prefix}codes"] = codes
        destination[f"{prefix}scales"] = self.scales
        if self.zero_points is not None:
            destination[f"{prefix}zero_points"] = self.zero_points

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        names = [f"{prefix}{name}" for name in ("codes", "scales", *(() if self.symmetric else ("zero_points",)))]
        unexpected_keys[:] = [name for name in unexpected_keys if name not in names]
        missing = [name for name in names if name not in state_dict]
        missing_keys += missing
        if missing:
            return
        tensors = [state_dict[name].detach().cpu() for name in names]
        try:
            self._set(self._checked(prefix.removesuffix("."), *tensors), kernel=True)
        except (ValueError, TypeError) as error:
            error_msgs.append(str(error))

    def _checked(self, name: str, codes: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> QuantizedWeight:
        """A weight from the tensors of a state dict, which have to be those of this layer's grid."""
        shape = (self.out_features, -(-self.in_features * self.bits // 8))
        if codes.dtype != torch.uint8 or tuple(codes.shape) != shape:
            raise ValueError(
                f"QuantizedLinear: expected codes of {name!r} to be uint8 of shape {list(shape)}, but got "
                f"{dtype_names(codes.dtype)} of shape {list(codes.shape)}"
            )
        if zero_points is None:
            zero_points = torch.zeros(scales.shape, dtype=torch.int8)
        quantized = QuantizedWeight(
            unpack(codes, self.bits, self.in_features),
            scales,
            zero_points,
            self.bits,
            self.group_size,
            self.symmetric,
            self.full_range,
        )
        check_quantized("QuantizedLinear", repr(name), quantized)
        check_finite("QuantizedLinear", name, "scales", scales)
        return quantized


class _Product(torch.autograd.Function):
    """``tokens W^T``, which dequantizes again for the derivative instead of keeping the weight."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        with torch.no_grad():
            return torch.cat([tokens @ weight for _, weight in layer._values(tokens.dtype)], -1)  # noqa: SLF001

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        total = gradient.new_zeros(len(gradient), ctx.layer.in_features)
        for (first, end), weight in ctx.layer._values(gradient.dtype):  # noqa: SLF001
            total += gradient[:, first:end] @ weight.T
        return total, None


def kernel_group(grid: LayerGrid) -> int | None:
    """The columns per scale with which PyTorch's int4 product takes a weight; None where it does not."""
    if grid.bits > KERNEL_BITS or grid.rows % KERNEL_ROWS:
        return None
    common = math.gcd(grid.columns_per_group, grid.columns)
    return next((group for group in KERNEL_GROUPS if common % group == 0), None)


def unpack_anywhere(packed: Tensor, bits: int, columns: int) -> Tensor:
    """:func:`miniquant.unpack`, which runs on the CPU, in functions of torch that run on any device."""
    rows = len(packed)
    # Of eight codes, which fill `bits` bytes, each is in at most two.
    padded = functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits).to(torch.int16)
    pairs = padded | (functional.pad(padded[..., 1:], (0, 1)) << 8)
    bit = torch.arange(8, device=packed.device) * bits
    codes = (pairs[..., bit // 8] >> (bit % 8).to(torch.int16)) & ((1 << bits) - 1)
    half = 1 << (bits - 1)
    return ((codes ^ half) - half).to(torch.int8).flatten(1)[:, :columns].contiguous()


def _checked_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"QuantizedLinear: expected dtype to be {dtype_names(*DTYPES)}, but got {dtype}")
    return dtype


def _grouped(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """``(codes - zeros) * scales``: [N, K] of codes [N, K] and for each group [N, G]."""
    rows, columns = codes.shape
    size = columns if group_size == -1 else group_size
    short = -columns % size  # what the last group lacks
    grouped = (functional.pad(codes, (0, short)) if short else codes).view(rows, -1, size)
    levels = grouped if zeros is None else grouped.sub_(zeros[..., None])
    values = levels.mul_(scales[..., None]).view(rows, -1)
    return values[:, :columns] if short else values


def _grouped_columns(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    """The same of [K, N] and [G, N]."""
    columns, rows = codes.shape
    size = columns if group_size == -1 else group_size
    short = -columns % size
    grouped = (functional.pad(codes, (0, 0, 0, short)) if short else codes).view(-1, size, rows)
    levels = grouped if zeros is None else grouped.sub_(zeros[:, None])
    values = levels.mul_(scales[:, None]).view(-1, rows)
    return values[:columns] if short else values


def _for_kernel(codes: Tensor) -> tuple[Tensor, _Layout] | None:
    """Codes int8 [N, K] as the kernel takes them, uint8 [N, K / 2]; None where they cannot be had back."""
    rows, columns = codes.shape
    size = max(ELEMENTS // columns // _PACKED_TOGETHER, 1) * _PACKED_TOGETHER
    packed = torch.empty(rows, columns // 2, dtype=torch.uint8)
    layout: _Layout | None = None
    for first in range(0, rows, size):
        part = codes[first : first + size].int() + 8
        done: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1)  # noqa: SLF001  (no public way)
        flat = done.view(-1)
        packed.view(-1)[first * columns // 2 :][: len(flat)] = flat
        for candidate in (layout,) if layout is not None else _LAYOUTS:
            if torch.equal(_from_kernel(flat, len(part), columns, candidate).T, part):
                layout = candidate
                break
        else:
            return None
    return None if layout is None else (packed, layout)


def _from_kernel(packed: Tensor, rows: int, columns: int, layout: _Layout) -> Tensor:
    """uint8 [K, rows], code + 8, of the kernel's bytes of whole blocks, but for the last."""
    whole = rows // layout.block * layout.block
    parts = []
    for blocks, block, pairs in (
        (packed[: whole * columns // 2], layout.block, layout.pairs),
        (packed[whole * columns // 2 :], rows - whole, True),
    ):
        if block and len(blocks):
            halves = blocks.view(-1, columns, block // 2).transpose(0, 1)
            parts.append(torch.stack([halves & 15, halves >> 4], 3 if pairs else 2).view(columns, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class QuantizedConvolution(QuantizedLinear):
    """A convolution with one group whose weight is quantized: it is dequantized at every call, and dropped.

    Its state dict is that of a :class:`QuantizedLinear` with K = channels * kernel elements.
    """

    # What the convolution had, which models look at.
    _ATTRIBUTES = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    @classmethod
    def in_place_of(cls, convolution: nn.Module, quantized: QuantizedWeight) -> "QuantizedConvolution":
        """A module that does what a convolution does, with a quantized weight [N, K] and its bias.

        Raises:
            ValueError, TypeError: for a weight of another size.
        """
        weight, bias = convolution._parameters["weight"], convolution._parameters["bias"]  # noqa: SLF001
        assert weight is not None  # noqa: S101  (a convolution has one)
        if tuple(quantized.codes.shape) != tuple(weight.flatten(1).shape):
            raise ValueError(
                f"QuantizedConvolution: expected quantized to have shape {list(weight.flatten(1).shape)}, but got "
                f"shape {list(quantized.codes.shape)}"
            )
        layer = cls.from_quantized(quantized, bias, dtype=weight.dtype, kernel=False)
        assert isinstance(layer, QuantizedConvolution)  # noqa: S101
        layer._take_geometry(convolution, tuple(weight.shape[1:]))  # noqa: SLF001  (its own)
        return layer

    def _take_geometry(self, convolution: nn.Module, kernel_shape: tuple[int, ...]) -> None:
        for name in self._ATTRIBUTES:
            setattr(self, name, getattr(convolution, name))
        self._kernel_shape = kernel_shape
        geometry = copy.copy(convolution)
        geometry._parameters = {"weight": None, "bias": None}  # noqa: SLF001
        self.__dict__["_geometry"] = geometry  # no submodule: it has no tensors

    @property
    def weight(self) -> Tensor:
        """[N, channels, *kernel], in the layer's dtype: made anew at each access, and not kept."""
        return self._shaped(self.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name that convolutions have)
        """The convolution of an input, in its dtype."""
        if torch.is_autocast_enabled(input.device.type) and input.is_floating_point():
            input = input.to(torch.get_autocast_dtype(input.device.type))  # noqa: A001
        bias = None if self.bias is None else self.bias.to(input.dtype)
        geometry: Any = self.__dict__["_geometry"]
        outputs: Tensor = geometry._conv_forward(input, self._shaped(input.dtype), bias)  # noqa: SLF001  (its own product)
        return outputs

    def _shaped(self, dtype: torch.dtype) -> Tensor:
        return self.dequantized(dtype).reshape(self.out_features, *self._kernel_shape)


class QuantizedExperts(nn.ModuleList):
    """Stands for a parameter [E, N, K] or [E, K, N] of fused experts: ``experts[e]`` is the matrix of one.

    It can be used as ``linear(x, experts[e])`` where matrices are [N, K], and as ``x @ experts[e]`` where they are
    [K, N], transposed or not; anything else dequantizes the matrix first. Implementations that take all experts at once
    (transformers' "grouped_mm") cannot use it: a model's own loop can (its ``experts_implementation`` "eager").

    Args:
        experts: a layer without bias for each expert, all of one size.
        transposed: whether the parameter has matrices as [K, N].
    """

    def __init__(self, experts: Iterable[QuantizedLinear], *, transposed: bool) -> None:
        super().__init__(experts)
        self.transposed = transposed

    def __getitem__(self, index: object) -> "ExpertMatrix":  # type: ignore[override]  # a matrix, as of a parameter
        number = expert_of(index)
        if isinstance(number, str):
            raise TypeError(
                f"QuantizedExperts: expected the index of one expert, but got {number} (experts_implementation 'eager' "
                "takes one at a time)"
            )
        layer = super().__getitem__(number)
        assert isinstance(layer, QuantizedLinear)  # noqa: S101
        return ExpertMatrix(layer, transposed=self.transposed)

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return torch.Size((len(self), *self[0].shape))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self[0].dtype

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self[0].device


class ExpertMatrix(StandIn):
    """The quantized matrix of an expert, as functions of torch take a tensor."""

    def __init__(self, layer: QuantizedLinear, *, transposed: bool) -> None:
        self._layer = layer
        self._transposed = transposed

    def dequantized(self) -> Tensor:
        """The values, in the layer's dtype."""
        weight = self._layer.weight
        return weight.T if self._transposed else weight

    def t(self) -> "ExpertMatrix":
        """The matrix transposed."""
        return ExpertMatrix(self._layer, transposed=not self._transposed)

    T = property(t)
    mT = property(t)  # noqa: N815  (as of a tensor)

    def transpose(self, first: int, second: int) -> "ExpertMatrix":
        """The matrix with two dimensions swapped."""
        return self if first % 2 == second % 2 else self.t()

    @property
    def shape(self) -> torch.Size:
        """[N, K], or [K, N]."""
        shape = (self._layer.out_features, self._layer.in_features)
        return torch.Size(shape[::-1] if self._transposed else shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self._layer.dtype

    @property
    def device(self) -> torch.device:
        """Of the codes."""
        return self._layer.codes.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[1], cls) and isinstance(args[0], Tensor) and args[0].dim() > 0:
            outputs = args[1].product(func, args[0], *args[2:], **kwargs)
            if outputs is not None:
                return outputs
        plain = [one.dequantized() if isinstance(one, cls) else one for one in args]
        return func(*plain, **{key: one.dequantized() if isinstance(one, cls) else one for key, one in kwargs.items()})

    def product(self, func: Any, inputs: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """What a function makes of inputs and this matrix; None where it is not the layer's product."""
        is_linear = func is functional.linear and not self._transposed
        if not is_linear and (func not in PRODUCTS or not self._transposed):
            return None
        outputs: Tensor = self._layer(inputs)
        return outputs if bias is None else outputs + bias

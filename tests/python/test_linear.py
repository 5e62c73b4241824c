"""QuantizedLinear: both forms of codes, each dtype, its state, and what torch does with modules."""

from __future__ import annotations

import copy
import itertools
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import miniquant
from format_layers import KINDS, random_layer, same
from miniquant import linear
from miniquant.formats import LayerGrid, Native
from miniquant.linear import KERNEL_TOKENS, QuantizedLinear, kernel_group, unpack_anywhere
from test_compile import COMPILES_CPP

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Of a product, relative to its norm. In half precision each weight and each output is rounded once (each of these
# errors is eps / 7 in the mean), sums are in float32; otherwise it is the error of sums of up to 512 products.
ROUNDING = {dtype: (0.5 if dtype.itemsize == 2 else 8) * torch.finfo(dtype).eps for dtype in DTYPES}
KERNEL = torch.ops.aten._weight_int4pack_mm_for_cpu.default

# rows, columns, bits, group size, kind, and whether PyTorch's kernel takes it.
LAYERS: dict[str, tuple[int, int, int, int, str, bool]] = {
    "blocks of 64 rows": (128, 256, 4, 64, "symmetric", True),
    "and 16 more": (80, 96, 4, 32, "full range", True),
    "and 32 more, asymmetric": (96, 128, 4, 128, "asymmetric", True),
    "48 rows, one group": (48, 192, 4, -1, "asymmetric", True),
    "3 bits, a shorter last group": (64, 160, 3, 64, "symmetric", True),
    "2 bits": (16, 512, 2, 256, "symmetric", True),
    "odd sizes": (33, 70, 4, 32, "asymmetric", False),
    "small groups": (32, 64, 4, 16, "symmetric", False),
    "5 bits": (32, 64, 5, 32, "asymmetric", False),
    "8 bits, full range": (64, 96, 8, 32, "full range", False),
    "8 bits, asymmetric": (64, 96, 8, 96, "asymmetric", False),
    "a single weight": (1, 1, 2, 1, "symmetric", False),
}
of_every_kind = pytest.mark.parametrize("case", LAYERS)


def quantized_of(case: str, dtype: torch.dtype = torch.float32) -> miniquant.QuantizedWeight:
    rows, columns, bits, group_size, kind, _ = LAYERS[case]
    return random_layer(rows, columns, bits=bits, group_size=group_size, kind=kind, dtype=dtype)


def error(outputs: Tensor, expected: Tensor) -> float:
    """Relative to the expected norm."""
    return float((outputs.double() - expected.double()).norm() / expected.double().norm())


def product(inputs: Tensor, quantized: miniquant.QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """In float64, of the exact values."""
    weight = miniquant.dequantize(quantized, dtype=torch.float64)
    return functional.linear(inputs.double(), weight, None if bias is None else bias.double())


class Recorded(TorchDispatchMode):
    """Operators that were called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.called: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


def uses_kernel(layer: QuantizedLinear, inputs: Tensor) -> bool:
    with Recorded() as recorded:
        layer(inputs)
    return KERNEL in recorded.called


# Values


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@of_every_kind
def test_codes_and_values_come_back(case: str, stored: torch.dtype) -> None:
    quantized = quantized_of(case, stored)
    for kernel in (True, False):
        layer = QuantizedLinear.from_quantized(quantized, kernel=kernel)
        assert layer.kernel == (kernel and LAYERS[case][5])
        assert same(layer.quantized(), quantized)
        for dtype in DTYPES:
            weight = layer.to(dtype).weight
            assert weight.dtype == dtype
            assert torch.equal(weight, miniquant.dequantize(quantized, dtype=dtype))
        assert same(layer.quantized(), quantized)  # scales were not converted


@pytest.mark.parametrize("tokens", [1, KERNEL_TOKENS, KERNEL_TOKENS + 1, 0])
@of_every_kind
def test_products(case: str, tokens: int) -> None:
    quantized = quantized_of(case)
    bias = torch.randn(quantized.codes.shape[0])
    inputs = torch.randn(tokens, quantized.codes.shape[1]) + 0.2
    for kernel, dtype in itertools.product((True, False), DTYPES):
        layer = QuantizedLinear.from_quantized(quantized, bias.to(dtype), kernel=kernel)
        outputs = layer(inputs.to(dtype))
        assert (outputs.shape, outputs.dtype) == ((tokens, layer.out_features), dtype)
        if tokens:
            assert error(outputs, product(inputs.to(dtype), quantized, bias.to(dtype))) <= ROUNDING[dtype]


def test_in_parts_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in LAYERS:
        quantized = quantized_of(case)
        inputs = torch.randn(3, quantized.codes.shape[1], dtype=torch.float64)
        layer = QuantizedLinear.from_quantized(quantized)
        whole = layer(inputs)
        monkeypatch.setattr(linear, "ELEMENTS", 1)  # parts of 64 rows
        assert len(list(layer._parts())) == -(-layer.out_features // 64)
        assert same(QuantizedLinear.from_quantized(quantized).quantized(), quantized)
        assert torch.allclose(layer(inputs), whole, rtol=1e-14, atol=1e-14)
        monkeypatch.undo()


def test_shapes_of_inputs() -> None:
    quantized = quantized_of("blocks of 64 rows")
    layer = QuantizedLinear.from_quantized(quantized)
    inputs = torch.randn(2, 3, 5, 256)
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs.to(dtype)
        assert layer(given).shape == (2, 3, 5, 128)
        assert torch.equal(layer(given[0, 0, 0]), layer(given[:1, 0, 0])[0])
        turned = given.transpose(0, 3).contiguous().transpose(0, 3)
        assert torch.equal(layer(turned), layer(given))
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 255))
    with pytest.raises(TypeError, match="expected input to be of a floating-point dtype, but got int64"):
        layer(torch.ones(2, 256, dtype=torch.int64))


def test_when_the_kernel_is_used() -> None:
    layer = QuantizedLinear.from_quantized(quantized_of("blocks of 64 rows"))
    inputs = torch.randn(KERNEL_TOKENS + 1, 256)
    assert uses_kernel(layer, inputs[:1].bfloat16())
    assert uses_kernel(layer, inputs[:KERNEL_TOKENS].view(8, -1, 256).bfloat16())
    assert not uses_kernel(layer, inputs.bfloat16())
    assert not uses_kernel(layer, inputs[:1])
    assert not uses_kernel(layer, inputs[:1].half())
    assert not uses_kernel(layer, inputs[:1].bfloat16().requires_grad_())
    layer.use_kernel(False)
    assert not uses_kernel(layer, inputs[:1].bfloat16())
    assert uses_kernel(layer.use_kernel(), inputs[:1].bfloat16())


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "expected"),
    [
        ((64, 256), 4, 256, 256),
        ((64, 256), 4, 512, 256),
        ((64, 512), 4, 96, 32),
        ((64, 576), 4, -1, 64),
        ((64, 576), 2, 288, 32),
        ((16, 160), 4, 64, 32),
        ((16, 150), 4, 64, None),
        ((24, 64), 4, 64, None),
        ((64, 64), 5, 64, None),
        ((64, 64), 4, 16, None),
        ((64, 96), 4, 48, None),
    ],
)
def test_groups_of_the_kernel(shape: tuple[int, int], bits: int, group_size: int, expected: int | None) -> None:
    grid = LayerGrid(*shape, bits, group_size, True, False, torch.float32)
    assert kernel_group(grid) == expected


@pytest.mark.parametrize("layout", linear._LAYOUTS, ids=lambda layout: f"{layout.block}-{layout.pairs}")
def test_layouts_by_their_definition(layout: Any) -> None:
    rows, columns = 2 * layout.block + 16, 6
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    parts = []
    for first in range(0, rows, layout.block):
        block = codes[first : first + layout.block]
        size = len(block)
        in_pairs = layout.pairs or size < layout.block
        low = [2 * i if in_pairs else i for i in range(size // 2)]
        high = [2 * i + 1 if in_pairs else i + size // 2 for i in range(size // 2)]
        parts += [block[low, column] | (block[high, column] << 4) for column in range(columns)]
    assert torch.equal(linear._from_kernel(torch.cat(parts), rows, columns, layout).T, codes)


def test_an_unknown_layout_is_kept_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantized_of("and 16 more")
    monkeypatch.setattr(linear, "_LAYOUTS", (linear._Layout(48, pairs=True),))
    layer = QuantizedLinear.from_quantized(quantized)
    assert not layer.kernel
    assert same(layer.quantized(), quantized)
    inputs = torch.randn(3, layer.in_features).bfloat16()
    assert error(layer(inputs), product(inputs, quantized)) <= ROUNDING[torch.bfloat16]


OTHER_MACHINE = """
import torch
from safetensors.torch import load_file
from miniquant.linear import QuantizedLinear
assert torch.backends.cpu.get_cpu_capability() == {capability!r}, torch.backends.cpu.get_cpu_capability()
layer = QuantizedLinear(256, 208, bias=False)
layer.load_state_dict(load_file({state!r}))
print(layer.kernel, layer(torch.ones(2, 256).bfloat16()).double().sum().item())
"""


@pytest.mark.parametrize(("variable", "capability"), [("default", "DEFAULT"), ("avx2", "AVX2")])
def test_other_instruction_sets(run: Callable[..., str], tmp_path: Path, variable: str, capability: str) -> None:
    """A stored layer is packed anew on each machine."""
    if capability == "AVX2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("needs a processor with AVX2")
    quantized = random_layer(208, 256, group_size=64, dtype=torch.float32)
    state = tmp_path / "layer.safetensors"
    save_file(QuantizedLinear.from_quantized(quantized).state_dict(), state)
    script = OTHER_MACHINE.format(capability=capability, state=str(state))
    printed = run(sys.executable, "-c", script, env={"ATEN_CPU_CAPABILITY": variable})
    kernel, total = printed.split()
    assert kernel == "True"
    outputs = product(torch.ones(2, 256), quantized)
    assert abs(float(total) - float(outputs.sum())) <= ROUNDING[torch.bfloat16] * float(outputs.abs().sum())


@pytest.mark.parametrize("bits", range(2, 9))
def test_unpacking_on_any_device(bits: int) -> None:
    for columns in (1, 7, 8, 9, 30):
        codes = random_layer(4, columns, bits=bits, kind="full range").codes
        assert torch.equal(unpack_anywhere(miniquant.pack(codes, bits), bits, columns), codes)


# State


@of_every_kind
def test_state_is_that_of_the_format(case: str, tmp_path: Path) -> None:
    quantized = quantized_of(case, torch.float16)
    bias = torch.randn(quantized.codes.shape[0])
    layers = [QuantizedLinear.from_quantized(quantized, bias, kernel=kernel) for kernel in (True, False)]
    expected = {**Native().tensors("fc", quantized), "fc.bias": bias}
    for layer in layers:
        state = nn.ModuleDict({"fc": layer}).state_dict()
        assert state.keys() == expected.keys()
        assert all(state[name].dtype == expected[name].dtype for name in expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        save_file(state, tmp_path / "layer.safetensors")
        fresh = nn.ModuleDict({"fc": empty_like(layer)})
        assert (
            str(fresh.load_state_dict(load_file(tmp_path / "layer.safetensors"))) == "<All keys matched successfully>"
        )
        back = fresh["fc"]
        assert isinstance(back, QuantizedLinear)
        assert same(back.quantized(), quantized)
        assert back.kernel == LAYERS[case][5]
        assert torch.equal(back(torch.ones(1, layer.in_features)), layer(torch.ones(1, layer.in_features)))


def empty_like(layer: QuantizedLinear, device: str | None = None) -> QuantizedLinear:
    return QuantizedLinear(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        bits=layer.bits,
        group_size=layer.group_size,
        symmetric=layer.symmetric,
        full_range=layer.full_range,
        device=device,
    )


def test_an_empty_layer() -> None:
    layer = QuantizedLinear(96, 64, symmetric=False, scale_dtype=torch.float16)
    assert torch.equal(layer(torch.ones(2, 96)), torch.zeros(2, 64))
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
        "codes": torch.uint8,
        "scales": torch.float16,
        "zero_points": torch.int8,
        "bias": torch.float32,
    }
    assert {tensor.device.type for tensor in empty_like(layer, "meta").state_dict().values()} == {"meta"}


def test_meta_layer_takes_a_state() -> None:
    quantized = quantized_of("and 32 more, asymmetric")
    layer = QuantizedLinear.from_quantized(quantized, torch.randn(96))
    fresh = empty_like(layer, "meta")
    fresh.load_state_dict(layer.state_dict(), assign=True)
    inputs = torch.randn(3, layer.in_features)
    assert torch.equal(fresh(inputs), layer(inputs))


def damaged(name: str, state: dict[str, Tensor]) -> None:
    """Damages a state of the case "and 32 more, asymmetric"."""
    if name == "no scales":
        del state["scales"]
    elif name == "one more":
        state["weight"] = torch.ones(2)
    elif name == "codes cut off":
        state["codes"] = state["codes"][:, :-1]
    elif name == "codes of int8":
        state["codes"] = state["codes"].view(torch.int8)
    elif name == "scales of another group size":
        state["scales"] = state["scales"].repeat(1, 2)
    elif name == "scales of int8":
        state["scales"] = state["scales"].to(torch.int8)
    elif name == "scales not finite":
        state["scales"][3, 0] = torch.nan
    elif name == "zero points out of range":
        state["zero_points"][0, 0] = 8
    elif name == "bias too long":
        state["bias"] = torch.ones(97)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no scales", r'Missing key\(s\) in state_dict: "scales"'),
        ("one more", r'Unexpected key\(s\) in state_dict: "weight"'),
        ("codes cut off", r"expected codes of '' to be uint8 of shape \[96, 64\], but got uint8 of shape \[96, 63\]"),
        ("codes of int8", r"expected codes of '' to be uint8 of shape \[96, 64\], but got int8 of shape \[96, 64\]"),
        ("scales of another group size", r"expected scales of '' to have shape \[96, 1\], but got shape \[96, 2\]"),
        ("scales of int8", r"expected scales of '' to be float32 or .*, but got int8"),
        ("scales not finite", r"expected scales of layer '' to be finite, but got nan"),
        ("zero points out of range", r"expected zero_points of '' to be in \[-8, 7\] for 4 bits, but got -8 to 8"),
        ("bias too long", "size mismatch for bias"),
    ],
)
def test_damaged_state(damage: str, message: str) -> None:
    layer = QuantizedLinear.from_quantized(quantized_of("and 32 more, asymmetric"), torch.randn(96))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    damaged(damage, state)
    with pytest.raises(RuntimeError, match=message):
        empty_like(layer).load_state_dict(state)


def test_codes_that_the_grid_has_not_are_refused() -> None:
    layer = QuantizedLinear.from_quantized(quantized_of("blocks of 64 rows"))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["codes"][0, 0] = 0x88  # -8 twice, in a grid without it
    with pytest.raises(RuntimeError, match=r"expected codes of '' to be in \[-7, 7\] for 4 bits, but got -8 to 7"):
        empty_like(layer).load_state_dict(state)


# A module among modules


def test_copies_are_independent() -> None:
    layer = QuantizedLinear.from_quantized(quantized_of("and 32 more, asymmetric"), torch.randn(96))
    inputs = torch.randn(3, 128).bfloat16()
    before = layer(inputs)
    other = copy.deepcopy(layer)
    assert torch.equal(other(inputs), before)
    other.codes.zero_()
    other.scales.zero_()
    assert torch.equal(layer(inputs), before)


@of_every_kind
def test_conversion_keeps_what_is_quantized(case: str) -> None:
    quantized = quantized_of(case, torch.float16)
    layer = QuantizedLinear.from_quantized(quantized, torch.randn(quantized.codes.shape[0]))
    assert layer.dtype == torch.float32
    module = nn.Sequential(layer).to(torch.bfloat16)
    assert layer.bias is not None
    assert (layer.bias.dtype, layer.weight.dtype, layer.scales.dtype) == (torch.bfloat16, torch.bfloat16, torch.float16)
    module.double()
    assert layer.weight.dtype == torch.float64
    assert same(layer.quantized(), quantized)
    module.half()
    assert same(layer.quantized(), quantized)


def test_nothing_keeps_the_weight() -> None:
    """Memory of a layer: codes, scales, and those of the kernel; a graph for gradients does not hold on to more."""
    quantized = quantized_of("blocks of 64 rows", torch.bfloat16)
    layer = QuantizedLinear.from_quantized(quantized)
    tensors = list(layer.buffers())
    assert sum(tensor.nbytes for tensor in tensors) == 128 * 256 // 2 + 128 * 4 * 2 + 128 * 4 * 4
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 256, requires_grad=True)).sum().backward()
    assert all(tensor.numel() < 128 * 256 for tensor in kept)


@of_every_kind
def test_gradients(case: str) -> None:
    quantized = quantized_of(case, torch.float64)
    bias = torch.randn(quantized.codes.shape[0], dtype=torch.float64)
    layer = QuantizedLinear.from_quantized(quantized, bias)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    layer.requires_grad_()
    inputs = torch.randn(2, 3, layer.in_features, dtype=torch.float64, requires_grad=True)
    outputs = layer(inputs)
    gradient = torch.randn(outputs.shape, dtype=torch.float64)
    outputs.backward(gradient)
    weight = miniquant.dequantize(quantized)
    assert inputs.grad is not None
    assert error(inputs.grad, gradient @ weight) <= 1e-14
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert error(layer.bias.grad, gradient.flatten(0, 1).sum(0)) <= 1e-14


def test_autocast() -> None:
    quantized = quantized_of("blocks of 64 rows")
    layer = QuantizedLinear.from_quantized(quantized, torch.randn(128))
    inputs = torch.randn(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert uses_kernel(layer, inputs)
        assert layer(inputs).dtype == torch.bfloat16
    assert layer(inputs).dtype == torch.float32


COMPILED = [
    "blocks of 64 rows",
    "48 rows, one group",
    "3 bits, a shorter last group",
    "8 bits, asymmetric",
    "odd sizes",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_and_exported(case: str, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    quantized = quantized_of(case)
    layer = QuantizedLinear.from_quantized(quantized, torch.randn(quantized.codes.shape[0]).to(dtype))
    columns = layer.in_features
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    example = torch.randn(2, 3, columns).to(dtype)
    exported = torch.export.export(layer, (example,), dynamic_shapes=({0: batch, 1: tokens},)).module()
    assert isinstance(layer.bias, Tensor)
    for shape in ((1, 1), (2, 3), (5, KERNEL_TOKENS)):
        inputs = torch.randn(*shape, columns).to(dtype)
        expected = product(inputs, quantized, layer.bias)
        for run in (compiled, exported):
            outputs = run(inputs)
            assert outputs.dtype == dtype
            assert error(outputs, expected) <= ROUNDING[dtype]


@pytest.mark.slow
@COMPILES_CPP
def test_inductor() -> None:
    torch.compiler.reset()
    quantized = quantized_of("blocks of 64 rows")
    layer = QuantizedLinear.from_quantized(quantized)
    compiled = torch.compile(layer, fullgraph=True)
    for dtype, tokens in itertools.product((torch.float32, torch.bfloat16), (1, KERNEL_TOKENS + 1)):
        inputs = torch.randn(tokens, 256).to(dtype)
        assert error(compiled(inputs), product(inputs, quantized)) <= ROUNDING[dtype]


def test_printed() -> None:
    layer = QuantizedLinear.from_quantized(quantized_of("and 32 more, asymmetric"))
    assert str(layer) == (
        "QuantizedLinear(in_features=128, out_features=96, bias=False, bits=4, group_size=128, symmetric=False, "
        "kernel=True)"
    )


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "expected bits to be 2 to 8, but got 9"),
        ({"group_size": 0}, "expected group_size to be positive, or -1 for one group per row, but got 0"),
        ({"in_features": 0}, "expected columns to be positive, but got 0"),
        ({"symmetric": False, "full_range": True}, "expected full_range to be False where symmetric is False"),
        ({"dtype": torch.int8}, "expected dtype to be float32 or float64 or bfloat16 or float16, but got torch.int8"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedLinear(**{"in_features": 64, "out_features": 64, **arguments})


def test_bad_weights() -> None:
    quantized = quantized_of("blocks of 64 rows")
    with pytest.raises(TypeError, match="expected quantized to be a QuantizedWeight, but got Tensor"):
        QuantizedLinear.from_quantized(quantized.codes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected bias to have shape \[128\], but got shape \[256\]"):
        QuantizedLinear.from_quantized(quantized, torch.ones(256))
    quantized.codes[0, 0] = -8
    with pytest.raises(ValueError, match=r"expected codes of quantized to be in \[-7, 7\] for 4 bits, but got -8 to 7"):
        QuantizedLinear.from_quantized(quantized)


def test_kinds_are_all_covered() -> None:
    assert {kind for _, _, _, _, kind, _ in LAYERS.values()} == set(KINDS)

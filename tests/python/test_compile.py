"""The operators inside PyTorch's machinery: opcheck, compile, export, TorchScript and AOTInductor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import miniquant
import oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

OPS = torch.ops.miniquant
COMPILES_CPP = pytest.mark.skipif(
    " " in torch.__file__,
    reason="torch's compiler of C++ does not take paths with a space, and torch is at such a path",
)
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def gptq_calls(op: str) -> list[Call]:
    """Every dtype, layout and option once."""
    weight, hessian = oracle.layer(5, 20, 50, dtype=torch.float32)
    _, scales, zero_points = oracle.rtn(weight, group_size=8, symmetric=False)
    return [
        (op, (weight, hessian), {}),
        (op, (weight.double(), hessian), {"group_size": 8, "group_scales": "dynamic"}),
        (op, (weight.bfloat16(), hessian.double()), {"group_size": -1, "column_order": "activation"}),
        (op, (weight.half(), hessian), {"bits": 3, "symmetric": False, "block_size": 7, "ridge": 0.1}),
        (op, (weight.t().contiguous().t(), hessian.t()), {"group_size": 6}),
        (op, (weight.clone().requires_grad_(), hessian.clone().requires_grad_()), {}),
        (op, (weight, hessian), {"group_size": 8, "symmetric": False, "scales": scales, "zero_points": zero_points}),
        (op, (weight[:0], hessian), {}),
        (op, (weight.double(), hessian), {"group_size": 8, "scale_dtype": torch.float16}),
    ]


def calls() -> list[Call]:
    """Several calls of every operator."""
    weight, hessian = oracle.layer(5, 20, 50, dtype=torch.float32)
    codes, scales, zero_points = oracle.rtn(weight, group_size=8, symmetric=False)
    packed = torch.arange(30, dtype=torch.uint8).view(5, 6)
    return [
        ("rtn", (weight,), {}),
        ("rtn", (weight.bfloat16(),), {"bits": 2, "group_size": 7, "symmetric": False}),
        ("rtn", (weight.t().contiguous().t(),), {"group_size": -1}),
        ("rtn", (weight.clone().requires_grad_(),), {}),
        ("rtn", (weight,), {"group_size": 8, "scales": scales}),
        ("rtn", (weight,), {"group_size": 8, "symmetric": False, "scales": scales, "zero_points": zero_points}),
        ("rtn", (torch.empty(0, 20),), {}),
        *gptq_calls("gptq"),
        *gptq_calls("gptq_reference"),
        ("rtn_superblocks", (torch.randn(3, 512), "Q4_K"), {}),
        ("rtn_superblocks", (torch.randn(3, 256, dtype=torch.float64, requires_grad=True), "Q3_K"), {}),
        ("gptq_superblocks", (torch.randn(3, 256), torch.eye(256), "Q2_K"), {}),
        ("gptq_superblocks", (torch.randn(3, 256).bfloat16(), torch.eye(256), "Q6_K"), {"refine": 2}),
        ("hessian_update_", (hessian.clone(), weight), {}),
        ("hessian_update_", (hessian.double(), weight.bfloat16().view(1, 5, 20)), {}),
        ("hessian_update_", (hessian.clone(), torch.empty(0, 20)), {}),
        ("hessian_update_", (hessian.clone(), weight), {"token_weights": torch.arange(5.0)}),
        ("product_update_", (torch.zeros(20, 5), weight, weight[:, :5]), {}),
        ("product_update_", (torch.zeros(3, 20).double(), torch.ones(1, 5, 3).bfloat16(), weight.view(1, 5, 20)), {}),
        ("product_update_", (torch.zeros(20, 5), torch.empty(0, 20), torch.empty(0, 5)), {}),
        ("quantization_loss", (weight, weight.round(decimals=2), hessian), {}),
        ("quantization_loss", (weight.half(), torch.zeros(5, 20).half(), hessian.double()), {}),
        ("quantization_loss", (weight.clone().requires_grad_(), weight * 0, hessian), {}),
        ("dequantize", (codes, scales, zero_points, 8), {}),
        ("dequantize", (codes, scales[:, :1].bfloat16(), zero_points[:, :1], -1), {}),
        ("dequantize", (codes, scales.clone().requires_grad_(), zero_points, 8), {}),
        ("rtn", (weight,), {"group_size": 8, "scale_dtype": torch.bfloat16}),
        *(("pack", (codes, bits), {}) for bits in (4, 5, 6, 7, 8)),
        *(("pack", (codes.t().contiguous().t(), bits), {}) for bits in (4, 8)),
        *(("unpack", (packed, bits, 48 // bits), {}) for bits in range(2, 9)),
        ("dequantize", (codes, scales.bfloat16(), zero_points, 8), {"dtype": torch.float64}),
        ("pack_int4", (codes,), {}),
        ("pack_int4", (codes[:, :7],), {}),
        ("unpack_int4", (packed, 12), {}),
        ("unpack_int4", (packed, 11), {}),
    ]


def call_id(call: Call) -> str:
    """The operator, and its options that are not tensors."""
    op, args, options = call
    shown = {key: value for key, value in options.items() if not isinstance(value, Tensor)}
    first = args[0]
    return f"{op}-{str(first.dtype).removeprefix('torch.')}-{oracle.option_id(shown)}"


@pytest.mark.filterwarnings("ignore:.*requires_grad.*:UserWarning")
@pytest.mark.parametrize("call", calls(), ids=call_id)
def test_opcheck(call: Call) -> None:
    """Schema (what is changed, what is aliased), autograd registration, fake tensors, and tracing with them."""
    op, args, options = call
    torch.library.opcheck(getattr(OPS, op).default, args, options)


@pytest.mark.parametrize("call", calls(), ids=call_id)
def test_meta_and_fake_tensors_give_the_same_shapes_and_dtypes(call: Call) -> None:
    op, args, options = call

    def described(outputs: Any) -> list[tuple[Any, ...]]:
        tensors = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        return [(t.shape, t.dtype, t.stride(), t.requires_grad) for t in tensors]

    def converted(convert: Callable[[Tensor], Tensor]) -> Any:
        new_args = [convert(value) if isinstance(value, Tensor) else value for value in args]
        new_options = {key: convert(value) if isinstance(value, Tensor) else value for key, value in options.items()}
        return getattr(miniquant, op)(*new_args, **new_options)

    expected = described(converted(lambda tensor: tensor.clone()))
    assert described(converted(lambda tensor: tensor.to("meta"))) == expected
    mode = FakeTensorMode()
    assert described(converted(mode.from_tensor)) == expected


def whole_layer(weight: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
    """A user's function that calls every operator, including the accumulating one."""
    hessian = miniquant.hessian_update_(torch.zeros(weight.shape[1], weight.shape[1]), inputs) / inputs.shape[0]
    rounded = miniquant.rtn(weight, group_size=16)
    result = miniquant.gptq(weight, hessian, group_size=16)
    textbook = miniquant.gptq_reference(weight, hessian, group_size=16)
    values = miniquant.dequantize(result.codes, result.scales, result.zero_points, 16)
    loss = miniquant.quantization_loss(weight, values, hessian)
    packed = miniquant.pack_int4(result.codes)
    unpacked = miniquant.unpack_int4(packed, weight.shape[1])
    return (*rounded, *result, textbook.codes, values, loss, packed, unpacked, hessian)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static shapes", "dynamic shapes"])
def test_compile_with_no_graph_break(dynamic: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.compiler.reset()
    compiled = torch.compile(whole_layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (6, 9):
        weight, inputs = torch.randn(rows, 40, generator=generator), torch.randn(90, 40, generator=generator)
        assert oracle.same_bits(compiled(weight, inputs), whole_layer(weight, inputs))


@pytest.mark.slow
@COMPILES_CPP
def test_compile_with_inductor() -> None:
    """The default backend, with an in-place update that the caller of the compiled function must see."""

    def update_and_quantize(weight: Tensor, hessian: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        miniquant.hessian_update_(hessian, inputs)
        result = miniquant.gptq(weight, hessian / 50, group_size=16)
        return result.codes, miniquant.dequantize(result.codes, result.scales, result.zero_points, 16)

    torch.compiler.reset()
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 40, generator=generator), torch.randn(50, 40, generator=generator)
    eager_hessian, compiled_hessian = torch.zeros(40, 40), torch.zeros(40, 40)
    expected = update_and_quantize(weight, eager_hessian, inputs)
    actual = torch.compile(update_and_quantize, fullgraph=True)(weight, compiled_hessian, inputs)
    assert oracle.same_bits(actual, expected)
    assert torch.equal(compiled_hessian, eager_hessian)
    assert compiled_hessian.any()


def test_compiled_calls_refuse_what_eager_ones_do() -> None:
    torch.compiler.reset()
    weight, hessian = oracle.layer(4, 8, 20, dtype=torch.float32)

    def quantize(weight: Tensor, hessian: Tensor) -> Tensor:
        return miniquant.gptq(weight, hessian).codes

    compiled = torch.compile(quantize, fullgraph=True, backend="aot_eager")
    # Detected from the shapes while tracing; torch wraps the error and keeps its text.
    with pytest.raises(Exception, match=r"gptq: expected hessian to have shape \[K, K\] = \[8, 8\]"):
        compiled(weight, torch.eye(7))
    # Detected from the values when it runs.
    torch.compiler.reset()
    compiled(weight, hessian)
    with pytest.raises(ValueError, match="gptq: expected hessian to be finite, but got nan"):
        compiled(weight, torch.full((8, 8), float("nan")))


class Quantize(torch.nn.Module):
    """The model that is exported, scripted and packaged; forward(weight, hessian) as tests/consumer calls it."""

    def forward(self, weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        codes, scales, zero_points, row_loss = torch.ops.miniquant.gptq(weight, hessian, group_size=32)
        return codes, scales, zero_points, row_loss


def test_export_with_dynamic_rows(tmp_path: Path) -> None:
    weight, hessian = oracle.layer(12, 96, 200, dtype=torch.float32)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Quantize(), (weight, hessian), dynamic_shapes=({0: rows}, None))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert OPS.gptq.default in targets
    torch.export.save(program, tmp_path / "gptq.pt2")
    loaded = torch.export.load(tmp_path / "gptq.pt2").module()
    for n in (12, 2, 301):
        weight, hessian = oracle.layer(n, 96, 200, dtype=torch.float32, seed=n)
        assert oracle.same_bits(loaded(weight, hessian), Quantize()(weight, hessian))


FAILING_GUARDS = pytest.mark.skipif(
    torch.__version__.startswith("2.9."), reason="the guards that torch 2.9 generates for this program fail"
)


@pytest.mark.parametrize(
    "op",
    [
        "rtn",
        "gptq",
        "gptq_reference",
        pytest.param("quantization_loss", marks=FAILING_GUARDS),
        pytest.param("dequantize", marks=FAILING_GUARDS),
        "pack_int4",
    ],
)
def test_every_op_exports_with_dynamic_rows(op: str) -> None:
    weight, hessian = oracle.layer(7, 24, 60, dtype=torch.float32)
    codes, scales, zero_points = oracle.rtn(weight, group_size=10)
    per_row = {
        "rtn": (weight,),
        "gptq": (weight,),
        "gptq_reference": (weight,),
        "quantization_loss": (weight, weight * 0),
        "dequantize": (codes, scales, zero_points),
        "pack_int4": (codes,),
    }[op]
    fixed: tuple[Any, ...] = {
        "gptq": (hessian,),
        "gptq_reference": (hessian,),
        "quantization_loss": (hessian,),
        "dequantize": (10,),
    }.get(op, ())

    class Call(torch.nn.Module):
        def forward(self, *args: Any) -> Any:
            return getattr(torch.ops.miniquant, op)(*args)

    rows = torch.export.Dim("rows", min=2)
    shapes = (tuple([{0: rows}] * len(per_row) + [None] * len(fixed)),)
    program = torch.export.export(Call(), (*per_row, *fixed), dynamic_shapes=shapes)
    fewer = tuple(tensor[:3] for tensor in per_row)
    actual, expected = program.module()(*fewer, *fixed), Call()(*fewer, *fixed)
    as_tuple = expected if isinstance(expected, tuple) else (expected,)
    assert oracle.same_bits(actual if isinstance(actual, tuple) else (actual,), as_tuple)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_script_trace_save_and_load(tmp_path: Path) -> None:
    weight, hessian = oracle.layer(12, 96, 200, dtype=torch.float32)
    expected = Quantize()(weight, hessian)
    for name, model in (
        ("script", torch.jit.script(Quantize())),
        ("trace", torch.jit.trace(Quantize(), (weight, hessian))),
    ):
        model.save(str(tmp_path / f"{name}.pt"))
        loaded = torch.jit.load(str(tmp_path / f"{name}.pt"))
        assert oracle.same_bits(loaded(weight, hessian), expected), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_runs_in_cpp(
    tmp_path: Path,
    consumer: Path,
    run: Callable[..., str],
    consumer_problem: tuple[Tensor, Tensor],
    codes_checksum: Callable[[Tensor], int],
) -> None:
    torch.jit.script(Quantize()).save(str(tmp_path / "gptq.pt"))
    output = run(consumer / "consumer_torchscript", tmp_path / "gptq.pt")
    codes = Quantize()(*consumer_problem)[0]
    assert (codes != miniquant.rtn(consumer_problem[0], group_size=32).codes).any(), "the problem tells GPTQ from RTN"
    assert output.splitlines() == [f"codes_checksum {codes_checksum(codes)}"]


@COMPILES_CPP
@pytest.mark.slow
def test_aotinductor_package_runs_in_python_and_in_cpp(
    tmp_path: Path,
    consumer: Path,
    run: Callable[..., str],
    consumer_problem: tuple[Tensor, Tensor],
    codes_checksum: Callable[[Tensor], int],
) -> None:
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Quantize(), consumer_problem, dynamic_shapes=({0: rows}, None))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "gptq.pt2"))
    expected = Quantize()(*consumer_problem)
    loaded = torch._inductor.aoti_load_package(package)
    assert oracle.same_bits(tuple(loaded(*consumer_problem)), expected)
    fewer = consumer_problem[0][:5]
    assert oracle.same_bits(tuple(loaded(fewer, consumer_problem[1])), Quantize()(fewer, consumer_problem[1]))
    output = run(consumer / "consumer_aoti", package)
    assert output.splitlines() == [f"codes_checksum {codes_checksum(expected[0])}"]

"""The typed functions reject an argument of a wrong Python type, by its name, before they call the dispatcher."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import miniquant

WEIGHT = torch.ones(3, 8)
HESSIAN = torch.eye(8)
STRIDED = "to be a dense tensor of layout Strided, but got a nested tensor of layout Jagged"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": np.ones((3, 8))}, "weight to be a torch.Tensor, but got a numpy.ndarray of shape [3, 8]"),
        ({"weight": None}, "weight to be a torch.Tensor, but got None"),
        ({"weight": [[1.0]]}, "weight to be a torch.Tensor, but got a list"),
        ({"hessian": np.eye(8)}, "hessian to be a torch.Tensor, but got a numpy.ndarray of shape [8, 8]"),
        ({"bits": 4.0}, "bits to be an int, but got 4.0 of type float"),
        ({"bits": "4"}, "bits to be an int, but got '4' of type str"),
        ({"bits": None}, "bits to be an int, but got None"),
        ({"bits": WEIGHT}, "bits to be an int, but got a torch.Tensor of shape [3, 8]"),
        ({"group_size": 64.0}, "group_size to be an int, but got 64.0 of type float"),
        ({"symmetric": "yes"}, "symmetric to be a bool, but got 'yes' of type str"),
        ({"ridge": "auto"}, "ridge to be a float, but got 'auto' of type str"),
        ({"column_order": 3}, "column_order to be a str, but got 3 of type int"),
        ({"scales": np.ones((3, 1))}, "scales to be a torch.Tensor or None, but got a numpy.ndarray of shape [3, 1]"),
        ({"scale_dtype": "float16"}, "scale_dtype to be a torch.dtype or None, but got 'float16' of type str"),
    ],
)
@pytest.mark.parametrize("op", ["gptq", "gptq_reference"])
def test_another_type_is_named(op: str, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"weight": WEIGHT, "hessian": HESSIAN} | changes
    with pytest.raises(TypeError) as caught:
        getattr(miniquant, op)(arguments.pop("weight"), arguments.pop("hessian"), **arguments)
    assert str(caught.value) == f"{op}: expected {message}"


def test_every_function_names_another_type() -> None:
    codes = torch.zeros(3, 8, dtype=torch.int8)
    packed = torch.zeros(3, 4, dtype=torch.uint8)
    array: Any = np.ones((3, 8))
    got = "but got a numpy.ndarray of shape [3, 8]"
    calls: list[tuple[str, tuple[Any, ...], str]] = [
        ("rtn", (array,), f"rtn: expected weight to be a torch.Tensor, {got}"),
        ("dequantize", (array, WEIGHT, codes, 8), f"dequantize: expected codes to be a torch.Tensor, {got}"),
        (
            "quantization_loss",
            (WEIGHT, array, HESSIAN),
            f"quantization_loss: expected dequantized to be a torch.Tensor, {got}",
        ),
        ("pack", (codes, 4.0), "pack: expected bits to be an int, but got 4.0 of type float"),
        ("unpack", (packed, 4, 8.0), "unpack: expected columns to be an int, but got 8.0 of type float"),
        ("pack_int4", (array,), f"pack_int4: expected codes to be a torch.Tensor, {got}"),
        ("unpack_int4", (array, 8), f"unpack_int4: expected packed to be a torch.Tensor, {got}"),
    ]
    for name, arguments, message in calls:
        with pytest.raises(TypeError) as caught:
            getattr(miniquant, name)(*arguments)
        assert str(caught.value) == message


def test_numbers_of_other_kinds_are_taken() -> None:
    expected = miniquant.gptq(WEIGHT, HESSIAN, bits=3, ridge=0.5, symmetric=True)
    for bits, ridge, symmetric in (
        (np.int64(3), np.float32(0.5), np.bool_(True)),
        (torch.tensor(3), torch.tensor(0.5), 1),
    ):
        found = miniquant.gptq(WEIGHT, HESSIAN, bits=bits, ridge=ridge, symmetric=symmetric)  # type: ignore[arg-type]
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scales, expected.scales)


def test_tensors_that_are_not_strided() -> None:
    nested = torch.nested.nested_tensor([torch.ones(8), torch.ones(8)], layout=torch.jagged)
    with pytest.raises(ValueError, match=f"^gptq: expected weight {STRIDED}$"):
        miniquant.gptq(nested, HESSIAN)
    strided_nested = torch.nested.nested_tensor([torch.ones(8), torch.ones(8)])
    for bad, got in (
        (WEIGHT.to_sparse(), "a tensor of layout Sparse"),
        (WEIGHT.to_sparse_csr(), "a tensor of layout SparseCsr"),
        (WEIGHT.to_mkldnn(), "a tensor of layout Mkldnn"),
        (strided_nested, "a nested tensor"),
    ):
        with pytest.raises(
            ValueError, match=f"^rtn: expected weight to be a dense tensor of layout Strided, but got {got}"
        ):
            torch.ops.miniquant.rtn(bad)
    quantized = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"^gptq: expected weight to be float32, .* but got qint8"):
        miniquant.gptq(quantized, HESSIAN)


def test_types_are_checked_inside_torch_compile() -> None:
    def quantize(weight: torch.Tensor) -> torch.Tensor:
        return miniquant.rtn(weight, bits=4, group_size=8).codes

    compiled = torch.compile(quantize, fullgraph=True)
    assert torch.equal(compiled(WEIGHT), quantize(WEIGHT))

"""Calls of the operators with arguments whose Python types are checked; the typed functions all use it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def _expectations(name: str) -> Mapping[str, str]:
    """The type of each argument in an operator's schema, in order: "Tensor", "Optional[Tensor]", "int", ..."""
    schema = getattr(torch.ops.miniquant, name).default._schema  # noqa: SLF001  (there is no public way)
    return MappingProxyType({argument.name: str(argument.real_type) for argument in schema.arguments})


# Read at import: torch.compile does not trace through schemas.
_EXPECTED = {
    name: _expectations(name)
    for name in (
        "accumulator_hessian",
        "accumulator_merge_",
        "accumulator_tokens",
        "accumulator_update_",
        "choose_ridge",
        "dequantize",
        "gptq",
        "gptq_reference",
        "gptq_superblocks",
        "hessian_update_",
        "pack",
        "pack_int4",
        "product_update_",
        "quantization_loss",
        "rtn",
        "rtn_superblocks",
        "unpack",
        "unpack_int4",
    )
}
_WORDS = {
    "Tensor": "a torch.Tensor",
    "int": "an int",
    "SymInt": "an int",
    "float": "a float",
    "bool": "a bool",
    "str": "a str",
    "ScalarType": "a torch.dtype",
}


def _is_number(expected: str, value: object) -> bool:
    """Whether the dispatcher accepts a value as "int", "SymInt", "float" or "bool"."""
    if isinstance(value, Tensor):  # a tensor of one element is accepted as a number
        return value.numel() == 1 and (expected == "float" or not value.is_floating_point())
    # Numbers of other libraries have conversion methods.
    if expected == "float":
        return isinstance(value, NUMBERS) or hasattr(value, "__float__")
    if expected == "bool":
        return isinstance(value, (int, torch.SymBool)) or type(value).__name__ in ("bool", "bool_")
    return isinstance(value, (int, torch.SymInt)) or (hasattr(value, "__index__") and not isinstance(value, float))


def _is_a(expected: str, value: object) -> bool:
    """Whether the dispatcher accepts a value as a type of the schema language."""
    if expected == "Tensor":
        return isinstance(value, Tensor)
    if expected == "str":
        return isinstance(value, str)
    if expected == "ScalarType":
        return isinstance(value, torch.dtype)
    return _is_number(expected, value)


def _described(value: object) -> str:
    """A value as error messages show it: tensors and unknown types by type and shape."""
    if value is None or isinstance(value, (str, bool, int, float, torch.dtype)):
        return f"{value!r}" if value is None else f"{value!r} of type {type(value).__name__}"
    if isinstance(value, Tensor):
        return f"a torch.Tensor of shape {list(value.shape)}"
    shape = getattr(value, "shape", None)
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    return f"a {kind}" if shape is None else f"a {kind} of shape {list(shape)}"


def check_argument(op: str, name: str, expected: str, value: object) -> None:
    """Raises a TypeError if the argument `name` of `op` is not of the type `expected`, in the schema language."""
    optional = expected.startswith("Optional[")
    inner = expected.removeprefix("Optional[").removesuffix("]")
    if (value is None and optional) or _is_a(inner, value):
        # Nested tensors of layout torch.jagged intercept every operator, so our operator could not check them.
        if inner == "Tensor" and isinstance(value, Tensor) and value.layout == torch.jagged:
            raise ValueError(
                f"{op}: expected {name} to be a dense tensor of layout Strided, "
                "but got a nested tensor of layout Jagged"
            )
        return
    raise TypeError(
        f"{op}: expected {name} to be {_WORDS[inner]}{' or None' if optional else ''}, but got {_described(value)}"
    )


def call(name: str, *arguments: Any, **options: Any) -> Any:
    """Calls ``torch.ops.miniquant.<name>`` with arguments in the schema's order and options by name.

    Raises:
        TypeError: for an argument of another Python type; the message names the argument. Also any error that the
            operator raises.
    """
    expected = _EXPECTED[name]
    for (argument, kind), value in zip(expected.items(), arguments, strict=False):
        check_argument(name, argument, kind, value)
    for option, value in options.items():
        check_argument(name, option, expected[option], value)
    return getattr(torch.ops.miniquant, name)(*arguments, **options)

"""GGUF files, read: metadata, and tensors that stay on the disk until they are asked for.

Nothing in the file is taken on trust: every length is held against what is left of the file before it is used.

The file, little-endian, version 2 or 3: "GGUF", version u32, number of tensors u64, number of entries u64; entries of
a key, a type u32 and a value; for each tensor a name, the number of dimensions u32, these u64 (the columns first), a
type u32 and an offset u64; then, at the next multiple of ``general.alignment``, the tensors' data. A string is its
length u64 and UTF-8; an array is the type of its elements u32, their number u64 and the elements.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miniquant.formats.gguf_blocks import NAME, TYPES, Gguf, gguf_package
from miniquant.grid import QuantizedWeight

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_PLAIN = {"F32": np.float32, "F16": np.float16}


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: in the file.
        kind: the type, "Q4_0" for instance.
        shape: of its values, rows first.
        data: its bytes; they are read from the disk when they are looked at.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    data: "np.ndarray[Any, np.dtype[np.uint8]]"

    def quantized(self) -> QuantizedWeight:
        """The codes, scales and zero points of a matrix in one of the types that are written here.

        Raises:
            ValueError: for another tensor, and for blocks that no grid here gives.
        """
        if self.kind not in TYPES or len(self.shape) != 2:
            raise ValueError(
                f"{NAME}: expected tensor {self.name!r} to be a matrix of {', '.join(TYPES)}, but got {self.kind} of "
                f"shape {list(self.shape)}"
            )
        blocks = torch.from_numpy(self.data.copy()).reshape(self.shape[0], -1)
        return Gguf().read(self.name, blocks, TYPES[self.kind])

    def values(self) -> Tensor:
        """float32, of any type that the package gguf reads.

        Raises:
            ValueError: for another type.
        """
        gguf = gguf_package()
        kind = gguf.GGMLQuantizationType[self.kind]
        try:
            rows = self.data.copy().reshape(-1, gguf.quant_shape_to_byte_shape(self.shape, kind)[-1])
            values = gguf.dequantize(rows, kind) if self.kind not in _PLAIN else rows.view(_PLAIN[self.kind])
        except NotImplementedError:
            raise ValueError(
                f"{NAME}: expected tensor {self.name!r} to be of a type that the package gguf reads, "
                f"but got {self.kind}"
            ) from None
        return torch.from_numpy(values.astype(np.float32)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class GgufContents:
    """What a GGUF file has.

    Attributes:
        metadata: its entries, by key.
        tensors: by name, in the file's order.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: str | os.PathLike[str]) -> GgufContents:
    """Reads a GGUF file's metadata; its tensors are looked at when they are asked for.

    Raises:
        ValueError: for a damaged file, one of another kind or of big-endian numbers; the message names the file.
        OSError: where it cannot be read.
        ImportError: without the package gguf, which knows the types.
    """
    sizes = gguf_package().GGML_QUANT_SIZES
    where = Path(path)
    if where.stat().st_size < 24:
        raise ValueError(f"{NAME}: expected {where} to be a GGUF file, but got {where.stat().st_size} bytes")
    cursor = _Cursor(where, np.memmap(where, dtype=np.uint8, mode="r"))
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != b"GGUF":
        raise cursor.wrong("to begin with 'GGUF'", repr(magic))
    version = cursor.scalar("I", "the version")
    if version not in (2, 3):
        raise cursor.wrong("to be of version 2 or 3, little-endian", f"version {version}")
    tensors, entries = cursor.count(8 + 4 + 4 + 8, "tensors"), cursor.count(8 + 4 + 1, "entries")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = cursor.text("a key")
        if key in metadata:
            raise cursor.wrong("to have every key once", f"{key!r} twice")
        metadata[key] = cursor.value(cursor.scalar("I", f"the type of {key!r}"), key)
    infos = [_info(cursor, sizes) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or isinstance(alignment, bool) or alignment < 1 or alignment % 8:
        raise cursor.wrong("to have a general.alignment that is a multiple of 8", repr(alignment))
    begin = -(-cursor.place // alignment) * alignment
    out: dict[str, GgufTensor] = {}
    for name, kind, shape, nbytes, offset in infos:
        if name in out:
            raise cursor.wrong("to have every tensor once", f"{name!r} twice")
        if offset % alignment or begin + offset + nbytes > len(cursor.data):
            raise cursor.wrong(
                f"to have {nbytes} bytes of tensor {name!r} at a multiple of {alignment}",
                f"offset {offset} in a file of {len(cursor.data)} bytes whose data begin at {begin}",
            )
        out[name] = GgufTensor(name, kind, shape, cursor.data[begin + offset : begin + offset + nbytes])
    return GgufContents(metadata, out)


class _Cursor:
    """A place in a file, from which values are taken."""

    def __init__(self, path: Path, data: "np.ndarray[Any, np.dtype[np.uint8]]") -> None:
        self.path, self.data, self.place = path, data, 0

    def wrong(self, expected: str, got: str) -> ValueError:
        """The error of this file."""
        return ValueError(f"{NAME}: expected {self.path} {expected}, but got {got}")

    def take(self, nbytes: int, what: str) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """The next bytes."""
        left = len(self.data) - self.place
        if nbytes > left:
            raise self.wrong(f"to have {nbytes} bytes of {what} at {self.place}", f"a file that ends after {left}")
        self.place += nbytes
        return self.data[self.place - nbytes : self.place]

    def scalar(self, code: str, what: str) -> Any:
        """The next number."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what).tobytes())[0]

    def count(self, least: int, what: str) -> int:
        """The next number of things, of `least` bytes each, for which there has to be room."""
        number = int(self.scalar("Q", f"the number of {what}"))
        left = len(self.data) - self.place
        if number * least > left:
            raise self.wrong(f"to have room for its {what}", f"{number} in {left} bytes")
        return number

    def text(self, what: str) -> str:
        """The next string."""
        content = self.take(self.count(1, f"bytes of {what}"), what).tobytes()
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"to have {what} in UTF-8", repr(content[:40])) from None

    def value(self, kind: int, key: str) -> Any:
        """The next value of a type."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], repr(key))
        if kind == _STRING:
            return self.text(repr(key))
        if kind != _ARRAY:
            raise self.wrong(f"to have a type of 0 to 12 for {key!r}", str(kind))
        inner = self.scalar("I", f"the type in {key!r}")
        if inner in _SCALARS:
            size = struct.calcsize("<" + _SCALARS[inner])
            number = self.count(size, repr(key))
            return list(struct.unpack(f"<{number}{_SCALARS[inner]}", self.take(number * size, repr(key)).tobytes()))
        if inner != _STRING:
            raise self.wrong(f"to have numbers or texts in the array {key!r}", f"type {inner}")
        return [self.text(repr(key)) for _ in range(self.count(8, repr(key)))]


def _info(cursor: _Cursor, sizes: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, bytes and offset of the next tensor."""
    name = cursor.text("the name of a tensor")
    dimensions = int(cursor.scalar("I", f"the dimensions of {name!r}"))
    if dimensions > _MOST_DIMENSIONS:
        raise cursor.wrong(f"to have at most {_MOST_DIMENSIONS} dimensions for {name!r}", str(dimensions))
    shape = tuple(int(cursor.scalar("Q", f"the shape of {name!r}")) for _ in range(dimensions))[::-1]
    number, offset = cursor.scalar("I", f"the type of {name!r}"), int(cursor.scalar("Q", f"the offset of {name!r}"))
    known = {int(kind): (kind.name, size) for kind, size in sizes.items()}
    if number not in known:
        raise cursor.wrong(f"to have a type that the package gguf knows for {name!r}", str(number))
    kind, (columns, nbytes) = known[number]
    last = shape[-1] if shape else 1
    if last % columns:
        raise cursor.wrong(f"to have columns of {name!r} in multiples of {columns} for {kind}", str(last))
    return name, kind, shape, math.prod(shape) // columns * nbytes, offset

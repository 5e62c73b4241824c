"""The driver's safetensors reader compared with the Python package, on good and bad files made here."""

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize, safe_open

# The dtypes of safetensors 0.8 and their bits, without those that the driver reads.
OTHER_DTYPES = {
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0", "BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("U16", "I16"), 16),
    **dict.fromkeys(("U32", "I32"), 32),
    **dict.fromkeys(("U64", "I64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
READ_DTYPES = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}


def file(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A header with its length, or another one, before it and data behind it."""
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    """A tensor's part of a header, 8 bytes long unless told otherwise."""
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


X = f'{{"x":{entry()}}}'
DATA = struct.pack("<2f", 1.5, -2.0)


def one(text: str, size: int = 8, before: str = "") -> bytes:
    """A file with the tensor "x" of `size` bytes, and other text before it in the header."""
    return file(f'{{{before}"x":{text}}}', bytes(range(1, size + 1)))


def two(first: tuple[str, str], second: tuple[str, str], size: int) -> bytes:
    """A file with the tensors "a" and "b" of U8, each with shape and offsets."""
    a, b = (entry('"U8"', shape, offsets) for shape, offsets in (first, second))
    return file(f'{{"a":{a},"b":{b}}}', bytes(range(size)))


def beside_x(dtype: str, shape: str, size: int) -> bytes:
    """A file with the F32 tensor "x" and behind it one of another dtype, "q"."""
    q = entry(f'"{dtype}"', shape, f"[8,{8 + size}]")
    return file(f'{{"q":{q},"x":{entry()}}}', DATA + bytes(size))


def metadata(text: str) -> bytes:
    return one(entry(), 8, f'"__metadata__":{text},')


def empty(shape: str) -> bytes:
    return one(entry(shape=shape, offsets="[0,0]"), 0)


ACCEPTED = {
    "plain": file(X, DATA),
    "spaces behind the header": file(X + "   ", DATA),
    "tab and line ends behind the header": file(X + "\t\r\n", DATA),
    "spaces before the header": file("  " + X, DATA),
    "a line end before the header": file("\n" + X, DATA),
    "spaces within the header": file(X.replace(":", " : ").replace(",", " ,\n"), DATA),
    "no tensors": file("{}"),
    "a scalar": one(entry(shape="[]", offsets="[0,4]"), 4),
    "67 dimensions": one(entry(shape=str([1] * 66 + [2]))),
    "metadata": metadata('{"format":"pt"}'),
    "empty metadata": metadata("{}"),
    "metadata null": metadata("null"),
    "a key of the metadata twice": metadata('{"a":"1","a":"2"}'),
    "metadata by another spelling": file(f'{{"\\u005f_metadata__":{{"a":"b"}},"x":{entry()}}}', DATA),
    "another key in a tensor": one(entry(more=',"strides":[1]')),
    "another key twice": one(entry(more=',"z":1,"z":2')),
    "another key that nests": one(entry(more=',"z":{"a":{"b":[[{}]]}}')),
    "another key as deep as may be": one(entry(more=f',"z":{"[" * 125}{"]" * 125}')),
    "a key by another spelling": one(entry().replace("dtype", "d\\u0074ype")),
    "a tensor's name twice": file(f'{{"x":{entry()},"x":{entry(shape="[1,2]")}}}', DATA),
    "a name twice, first too large": file(f'{{"x":{entry(shape="[3]")},"x":{entry()}}}', DATA),
    "a tensor as a list": one('["F32",[2],[0,8]]'),
    "a dtype as an object": one(entry('{"F32":null}')),
    "an empty name": file(f'{{"":{entry()}}}', DATA),
    "a name beyond ASCII": file(f'{{"\\ud83d\\ude00é":{entry()}}}', DATA),
    "an escaped NUL in a name": file(f'{{"\\u0000":{entry()}}}', DATA),
    "DEL in a name": file(f'{{"a\x7f":{entry()}}}', DATA),
    "the order of the data is another": two(("[2]", "[3,5]"), ("[3]", "[0,3]"), 5),
    "an empty tensor before another": two(("[4]", "[0,4]"), ("[0]", "[0,0]"), 4),
    "an empty tensor behind another": two(("[4]", "[0,4]"), ("[0]", "[4,4]"), 4),
    "sizes 0 and 2^63 - 1": empty("[0,9223372036854775807]"),
    "sizes 0 and 2^63": empty("[0,9223372036854775808]"),
    "sizes 0 and 2^64 - 1": empty("[0,18446744073709551615]"),
    "sizes 2^63 - 1 and 0": empty("[9223372036854775807,0]"),
    "sizes whose product is hidden by a 0": empty("[0,9223372036854775807,9223372036854775807]"),
    **{
        f"dtype {dtype}": one(entry(f'"{dtype}"', "[8]", f"[0,{bits}]"), bits)
        for dtype, bits in {**READ_DTYPES, **OTHER_DTYPES}.items()
    },
    **{f"{dtype} beside F32": beside_x(dtype, "[2,4]", bits) for dtype, bits in OTHER_DTYPES.items()},
}

REJECTED = {
    "nothing": b"",
    "seven bytes": file(X, DATA)[:7],
    "the length alone": file(X, DATA)[:8],
    "a header cut short": file(X, DATA)[:30],
    "data cut short": file(X, DATA)[:-1],
    "bytes behind the data": file(X, DATA + b"z"),
    "an empty header": file(""),
    "a header of spaces": file("   "),
    "a length beyond the file": file(X, DATA, 1000),
    "a length of all ones": file(X, DATA, 2**64 - 1),
    "NUL behind the header": file(X + "\0\0", DATA),
    "NUL and other bytes behind the header": file(X + "\0garbage", DATA),
    "NUL within the header": file(X.replace(",", ",\0"), DATA),
    "letters behind the header": file(X + "x", DATA),
    "a second object": file(X + X, DATA),
    "a byte order mark": file("\ufeff" + X, DATA),
    "a list": file("[]"),
    "null": file("null"),
    "a comment": file("{/* */}"),
    "a comma too many": file(f'{{"x":{entry()},}}', DATA),
    "bytes that are not UTF-8": file(b'{"x\xff":' + entry().encode() + b"}", DATA),
    "bytes that are not UTF-8 in another key": file(X[:-2].encode() + b',"z":"\xff"}}', DATA),
    "half a surrogate pair": file(f'{{"\\ud800":{entry()}}}', DATA),
    "a control character in a name": file(f'{{"a\x01":{entry()}}}', DATA),
    "metadata of numbers": metadata('{"a":1}'),
    "metadata of null": metadata('{"a":null}'),
    "metadata of objects": metadata('{"a":{}}'),
    "metadata with a number first, then a string": metadata('{"a":1,"a":"1"}'),
    "metadata as a list": metadata("[]"),
    "metadata as a string": metadata('"a"'),
    "metadata twice": metadata('{},"__metadata__":{}'),
    "a tensor as null": one("null"),
    "a tensor as a list of two": one('["F32",[2]]'),
    "a tensor as a list of four": one('["F32",[2],[0,8],1]'),
    "a tensor that is none whose name comes again": file(f'{{"x":{entry(shape="3")},"x":{entry()}}}', DATA),
    "no dtype": one('{"shape":[2],"data_offsets":[0,8]}'),
    "no shape": one('{"dtype":"F32","data_offsets":[0,8]}'),
    "no offsets": one('{"dtype":"F32","shape":[2]}'),
    "dtype twice": one(entry(more=',"dtype":"F32"')),
    "shape twice": one(entry(more=',"shape":[2]')),
    "offsets twice": one(entry(more=',"data_offsets":[0,8]')),
    "dtype as a number": one(entry("1")),
    "dtype as null": one(entry("null")),
    "dtype as an object of a number": one(entry('{"F32":1}')),
    "another key that is no JSON": one(entry(more=',"z":NaN')),
    "another key beyond the range of numbers": one(entry(more=',"z":1e999')),
    "another key that nests too deep": one(entry(more=f',"z":{"[" * 126}{"]" * 126}')),
    "a size with a fraction": one(entry(shape="[2.0]")),
    "a size with an exponent": one(entry(shape="[2e0]")),
    "a negative size": one(entry(shape="[-2]")),
    "a size of -0": empty("[-0]"),
    "a size with a leading 0": one(entry(shape="[02]")),
    "a size of 2^64": empty("[0,18446744073709551616]"),
    "a size as a string": one(entry(shape='["2"]')),
    "a size as a list": one(entry(shape="[[2]]")),
    "shape as null": one(entry(shape="null")),
    "shape as an object": one(entry(shape="{}")),
    "sizes whose product wraps to 0": empty("[4294967296,4294967296]"),
    "sizes whose bits wrap to 0": empty("[4611686018427387904]"),
    "sizes too large before a 0": empty("[9223372036854775807,9223372036854775807,0]"),
    "one offset": one(entry(offsets="[0]")),
    "three offsets": one(entry(offsets="[0,8,8]")),
    "an offset with a fraction": one(entry(offsets="[0,8.0]")),
    "an offset of -0": one(entry(offsets="[-0,8]")),
    "offsets as an object": one(entry(offsets='{"0":0,"1":8}')),
    "offsets in the wrong order": one(entry(offsets="[8,0]")),
    "a shape larger than the data": one(entry(shape="[3]")),
    "a shape smaller than the data": one(entry(shape="[1]")),
    "a hole at the start": one(entry(offsets="[1,9]"), 9),
    "a hole": two(("[2]", "[0,2]"), ("[2]", "[3,5]"), 5),
    "an overlap": two(("[3]", "[0,3]"), ("[3]", "[2,5]"), 5),
    "the same bytes twice": two(("[3]", "[0,3]"), ("[3]", "[0,3]"), 3),
    "an empty tensor inside another": two(("[4]", "[0,4]"), ("[0]", "[2,2]"), 4),
    **{
        f"{dtype} that ends within a byte": one(entry(f'"{dtype}"', "[3]", "[0,2]"), 2)
        for dtype in ("F4", "F6_E2M3", "F6_E3M2")
    },
}


@pytest.fixture(scope="module")
def ours(build_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the driver's reader for every file, by the description of the file."""
    program = build_dir / "tests" / "cpp" / "driver" / "describe_safetensors"
    if not program.is_file():
        pytest.fail(f"{program} does not exist: run scripts/setup")
    folder = tmp_path_factory.mktemp("safetensors")
    files = {**ACCEPTED, **REJECTED}
    assert len(files) == len(ACCEPTED) + len(REJECTED)
    paths = [folder / f"{index}.safetensors" for index in range(len(files))]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    result = subprocess.run([program, *paths], capture_output=True, text=True, check=True)
    return dict(zip(files, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("what", ACCEPTED)
def test_what_the_package_reads_is_read_with_the_same_values(what: str, ours: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(ACCEPTED[what])
    tensors = ours[what]["tensors"]
    with safe_open(tmp_path / "file", "numpy") as reference:
        assert set(tensors) == set(reference.keys())
        for name, tensor in tensors.items():
            stored = reference.get_slice(name)
            assert (tensor["dtype"], tensor["shape"]) == (stored.get_dtype(), stored.get_shape())
    for name, stored in deserialize(ACCEPTED[what]):  # type: ignore[no-untyped-call]
        tensor = tensors[name]
        if stored["dtype"] in READ_DTYPES and max(stored["shape"], default=0) < 2**63 and "hidden" not in what:
            assert bytes.fromhex(tensor["data"]) == bytes(stored["data"])
        else:
            assert f"tensor {name!r}: expected " in tensor["error"]


@pytest.mark.parametrize("what", REJECTED)
def test_what_the_package_rejects_is_rejected(what: str, ours: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(REJECTED[what])
    with pytest.raises(SafetensorError), safe_open(tmp_path / "file", "numpy"):
        pass
    assert set(ours[what]) == {"error"}, ours[what]


def test_a_dtype_that_neither_knows_does_not_hide_the_other_tensors(build_dir: Path, tmp_path: Path, run: Any) -> None:
    """The one difference: the package rejects the whole file."""
    path = tmp_path / "new.safetensors"
    path.write_bytes(beside_x("F3", "[5]", 2))
    with pytest.raises(SafetensorError), safe_open(path, "numpy"):
        pass
    described = json.loads(run(build_dir / "tests" / "cpp" / "driver" / "describe_safetensors", path))["tensors"]
    assert bytes.fromhex(described["x"]["data"]) == DATA
    assert described["q"]["error"] == f"{path}: tensor 'q': expected dtype F64, F32, F16 or BF16, but got 'F3'"

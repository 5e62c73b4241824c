"""Folders of safetensors: read as the package safetensors reads them, refused where they are damaged, written whole."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from miniquant import checkpoint as module
from miniquant.checkpoint import (
    DTYPES,
    Checkpoint,
    CheckpointWriter,
    check_output_folder,
    read_header,
    read_json,
    read_tensor,
    same_values,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = {"model_type": "llama", "hidden_size": 8}


def tensors_of(names: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(3, 5, generator=generator) for name in names.split()}


def folder_of(path: Path, shards: dict[str, dict[str, Tensor]], index: dict[str, Any] | None = None) -> Path:
    """A model's folder as transformers leaves one, with an index where there are several files."""
    path.mkdir(exist_ok=True, parents=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    for name, tensors in shards.items():
        save_file(tensors, path / name, metadata={"format": "pt"})
    if index is None and list(shards) != ["model.safetensors"]:
        index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file in shards for name in shards[file]}}
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded(path: Path) -> Path:
    return folder_of(path, {FIRST: tensors_of("a b"), SECOND: tensors_of("c d", 1)})


def plain(path: Path) -> Path:
    return folder_of(path, {"model.safetensors": tensors_of("a b")})


def raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of a header and data."""
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def every_dtype() -> dict[str, Tensor]:
    """A tensor of each dtype, with all bytes that it may have."""
    found = {}
    for name, dtype in DTYPES.items():
        size = 6 * dtype.itemsize
        values = torch.arange(size, dtype=torch.uint8) * 7 + 3
        found[name] = (values % 2).bool() if name == "BOOL" else values.view(dtype).reshape(2, 3)
    return found


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def assert_same_bits(first: Tensor, second: Tensor) -> None:
    assert first.dtype == second.dtype
    assert first.shape == second.shape
    assert torch.equal(bits(first), bits(second))


# Reading


def test_reads_what_safetensors_reads(tmp_path: Path) -> None:
    """Every dtype, a scalar, an empty tensor, a name that is not ASCII: bit for bit."""
    tensors = {**every_dtype(), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "größe.重み": torch.ones(2)}
    tensors.pop("F8_E8M0")  # the package cannot write it
    folder = folder_of(tmp_path / "model", {"model.safetensors": tensors})
    checkpoint = Checkpoint(folder)
    expected = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(expected)
    for name, tensor in expected.items():
        stored = checkpoint.tensors[name]
        assert (stored.dtype, stored.shape, stored.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert_same_bits(checkpoint.read(name), tensor)


def test_dtypes_are_those_of_safetensors_that_torch_has(tmp_path: Path) -> None:
    """The package's own reader takes the same names; the one that it lacks in torch has the size that we say."""
    for name, dtype in DTYPES.items():
        text = f'{{"x":{{"dtype":"{name}","shape":[2],"data_offsets":[0,{2 * dtype.itemsize}]}}}}'
        (tmp_path / "x").write_bytes(raw(text, bytes(2 * dtype.itemsize)))
        assert deserialize((tmp_path / "x").read_bytes())[0][1]["dtype"] == name  # type: ignore[no-untyped-call]
        assert read_header(tmp_path / "x").tensors["x"].dtype == dtype


def test_reads_shards(tmp_path: Path) -> None:
    checkpoint = Checkpoint(sharded(tmp_path / "model"))
    assert checkpoint.config == CONFIG
    assert [file.name for file in checkpoint.files] == [FIRST, SECOND]
    expected = {**tensors_of("a b"), **tensors_of("c d", 1)}
    assert {name: checkpoint.tensors[name].file.name for name in expected} == dict(
        zip("abcd", (FIRST, FIRST, SECOND, SECOND), strict=True)
    )
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_reads_what_transformers_saves_in_shards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) > 2
    assert set(checkpoint.tensors) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert [file.name for file in checkpoint.other_files()] == ["generation_config.json"]


def test_an_index_with_one_file_is_read(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    weight_map = {"weight_map": dict.fromkeys("ab", "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    assert set(Checkpoint(folder).tensors) == {"a", "b"}


def test_files_may_be_links(tmp_path: Path) -> None:
    """As in the cache of a hub."""
    blobs = sharded(tmp_path / "blobs")
    folder = tmp_path / "model"
    folder.mkdir()
    for number, file in enumerate(sorted(blobs.iterdir())):
        (folder / file.name).symlink_to(file.rename(blobs / str(number)))
    assert torch.equal(Checkpoint(folder).read("c"), tensors_of("c d", 1)["c"])


def test_a_tensor_is_a_copy_and_the_file_is_not_kept(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    checkpoint = Checkpoint(folder)
    tensor = checkpoint.read("a")
    maps = Path("/proc/self/maps").read_text()
    assert str(folder) not in maps
    assert not any(str(folder) in file for file in open_files())
    tensor.zero_()
    assert torch.equal(checkpoint.read("a"), tensors_of("a b")["a"])


def open_files() -> list[str]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the folder is gone
            found.append(str(link.readlink()))
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_of_tensors_goes_back_to_the_system(tmp_path: Path) -> None:
    """Also where others stay between them: half of 64 tensors of 1 MB."""
    tensors = {f"t{number}": torch.ones(2**18) for number in range(64)}
    checkpoint = Checkpoint(folder_of(tmp_path / "model", {"model.safetensors": tensors}))
    del tensors
    before = resident_bytes()
    kept = [checkpoint.read(name) for name in checkpoint.tensors]
    assert resident_bytes() - before > 60 * 2**20
    del kept[::2]
    assert 28 * 2**20 < resident_bytes() - before < 36 * 2**20


def test_tensors_are_compared_bit_for_bit(tmp_path: Path) -> None:
    """Also where they differ behind the first piece that is read."""
    large = torch.arange(3 * 2**19, dtype=torch.float32)
    tensors = {"a": large, "b": large.clone(), "c": large.clone(), "d": large.reshape(2, -1).clone(), "e": large.int()}
    tensors["c"][-1] += 1
    stored = Checkpoint(folder_of(tmp_path / "model", {"model.safetensors": tensors})).tensors
    assert stored["a"].nbytes > module._PIECE
    assert {name: same_values(stored["a"], stored[name]) for name in "abcde"} == {
        "a": True,
        "b": True,
        "c": False,
        "d": False,
        "e": False,
    }


def test_meta_has_shapes_and_values_are_of_the_names_asked_for(tmp_path: Path) -> None:
    checkpoint = Checkpoint(
        folder_of(tmp_path / "model", {"model.safetensors": tensors_of("x.weight x.shape y.shape")})
    )
    meta = checkpoint.meta()
    assert {name: (tensor.device.type, tuple(tensor.shape)) for name, tensor in meta.items()} == dict.fromkeys(
        ("x.weight", "x.shape", "y.shape"), ("meta", (3, 5))
    )
    values = checkpoint.values((".shape",))
    assert {name: tensor.device.type for name, tensor in values.items()} == {
        "x.weight": "meta",
        "x.shape": "cpu",
        "y.shape": "cpu",
    }
    assert torch.equal(values["y.shape"], checkpoint.read("y.shape"))
    assert all(tensor.device.type == "meta" for tensor in checkpoint.values(()).values())


def test_a_name_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="expected the name of a tensor, but got 'z'"):
        Checkpoint(plain(tmp_path / "model")).read("z")


def test_a_file_that_was_cut_off_since(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    checkpoint = Checkpoint(folder)
    last = list(checkpoint.tensors)[-1]
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate((folder / "model.safetensors").stat().st_size - 7)
    with pytest.raises(ValueError, match=rf"tensor '{last}': expected 60 bytes, but got 53: the file has changed"):
        checkpoint.read(last)


def test_bools_have_to_be_bools(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(raw('{"x":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}', b"\x01\x02"))
    with pytest.raises(ValueError, match="expected bytes of 0 and 1 for dtype bool, but got others"):
        read_tensor(read_header(tmp_path / "x").tensors["x"])


def test_fingerprints_tell_checkpoints_apart(tmp_path: Path) -> None:
    first = Checkpoint(plain(tmp_path / "1")).fingerprint()
    assert first == Checkpoint(plain(tmp_path / "2")).fingerprint()
    assert len(first) == 64
    other_config = plain(tmp_path / "3")
    (other_config / "config.json").write_text("{}")
    others = [
        Checkpoint(other_config),
        Checkpoint(folder_of(tmp_path / "4", {"model.safetensors": tensors_of("a c")})),
        Checkpoint(folder_of(tmp_path / "5", {"model.safetensors": {"a": torch.ones(5, 3), "b": torch.ones(3, 5)}})),
        Checkpoint(sharded(tmp_path / "6")),
    ]
    assert len({first, *(other.fingerprint() for other in others)}) == 5


# What else a folder has


def test_other_files(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    kept = [
        "LICENSE",
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "additional_chat_templates/tool_use.jinja",
    ]
    left = [
        *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth", "tf_model.h5"),
        *("flax_model.msgpack", "model.gguf", "rust_model.ot", "quantize_config.json", "report.json", "report.html"),
        *("consolidated.safetensors", "adapter_model.safetensors", "modeling_custom.py", ".gitattributes"),
        *("onnx/model.onnx", "onnx/model.onnx_data", "onnx/model_quantized.ONNX", ".git/config", ".cache/x.json"),
        *("__pycache__/x.pyc", "original/consolidated.00.pth", "training_args.bin", "optimizer.pt"),
    ]
    for name in (*kept, *left):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.json").symlink_to(folder / "nothing")
    os.mkfifo(folder / "pipe.txt")
    checkpoint = Checkpoint(folder)
    assert [path.relative_to(folder).as_posix() for path in checkpoint.other_files()] == kept
    with_code = {path.relative_to(folder).as_posix() for path in checkpoint.other_files(code=True)}
    assert with_code - set(kept) == {"modeling_custom.py"}


def test_other_files_of_sentence_transformers(tmp_path: Path) -> None:
    """Weights of the modules behind the model are no weights of the model: without them the folder is none."""
    folder = plain(tmp_path / "model")
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    for name in ("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    for name in ("2_Dense/pytorch_model.bin", "3_Dense/pytorch_model.bin", "onnx/model.onnx", "onnx/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert [path.relative_to(folder).as_posix() for path in Checkpoint(folder).other_files()] == [
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "3_Dense/pytorch_model.bin",
        "onnx/config.json",
    ]


@pytest.mark.parametrize("text", ["{}", "[", "[" * 100_000, "3"], ids=["object", "cut", "deep", "number"])
def test_other_files_with_a_damaged_list_of_modules(tmp_path: Path, text: str) -> None:
    folder = plain(tmp_path / "model")
    (folder / "modules.json").write_text(text)
    with pytest.raises(ValueError, match=r"modules\.json: expected a JSON list of modules, but got"):
        Checkpoint(folder).other_files()


def test_modules_of_sentence_transformers_lead_nowhere_else(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_text("x")
    (folder / "modules.json").write_text(json.dumps([{"path": "../other"}, {"path": 3}, None, {"path": "."}]))
    assert [path.name for path in Checkpoint(folder).other_files()] == ["modules.json"]


# Damaged folders


def replaced(name: str, content: bytes | str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def removed(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def several(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
MAP = {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}


def indexed(weight_map: object) -> Callable[[Path], None]:
    return replaced(INDEX, json.dumps({"metadata": {}, "weight_map": weight_map}))


def entry(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]", more: str = "") -> str:
    return f'{{"x":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}}}'


def weights(header: str | bytes, data: bytes = bytes(8), length: int | None = None) -> Callable[[Path], None]:
    return replaced(WEIGHTS, raw(header, data, length))


def two(first: str, second: str, size: int) -> Callable[[Path], None]:
    """Tensors "a" and "b" of U8 with 2 values each, at offsets."""
    texts = (f'"{name}":{{"dtype":"U8","shape":[2],"data_offsets":{at}}}' for name, at in (("a", first), ("b", second)))
    return weights(f"{{{','.join(texts)}}}", bytes(size))


# Of a folder with one file: what is done to it, and what the error says.
DAMAGED: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no config": (removed("config.json"), FileNotFoundError, "expected a file config.json, but got none"),
    "config is cut": (replaced("config.json", '{"a": '), ValueError, r"config\.json: expected a JSON object, but got:"),
    "config is empty": (replaced("config.json", ""), ValueError, r"config\.json: expected a JSON object"),
    "config is a list": (replaced("config.json", "[1]"), ValueError, r"expected a JSON object, but got \[1\]"),
    "config is text": (replaced("config.json", '"x"'), ValueError, "expected a JSON object, but got 'x'"),
    "config is binary": (replaced("config.json", b"\xff\xfe\x00"), ValueError, r"config\.json: expected a JSON object"),
    "config is deep": (
        replaced("config.json", '{"a":' * 70 + "1" + "}" * 70),
        ValueError,
        "nested more than 64 deep",
    ),
    "config is bottomless": (replaced("config.json", '{"a":' * 200_000), ValueError, r"config\.json: expected a JSON"),
    "config is a list without bottom": (replaced("config.json", "[" * 10**6), ValueError, "nested too deeply"),
    "config has a long number": (
        replaced("config.json", '{"a":' + "1" * 10_000 + "}"),
        ValueError,
        r"config\.json: expected a JSON object",
    ),
    "no weights": (removed(WEIGHTS), FileNotFoundError, "expected model.safetensors, or .* but got neither"),
    "pickles": (
        several(removed(WEIGHTS), replaced("pytorch_model.bin", b"x")),
        FileNotFoundError,
        "but got pytorch_model.bin, a pickle, .*convert it to safetensors",
    ),
    "gguf": (
        several(removed(WEIGHTS), replaced("model.gguf", b"x")),
        FileNotFoundError,
        r"but got model\.gguf \(convert it to safetensors\)",
    ),
    "another name": (
        several(removed(WEIGHTS), replaced("consolidated.safetensors", b"x")),
        FileNotFoundError,
        r"but got consolidated\.safetensors \(rename it",
    ),
    "shards without an index": (
        several(removed(WEIGHTS), replaced(FIRST, b"x")),
        FileNotFoundError,
        f"but got {FIRST} without an index",
    ),
    "one file and an index of others": (
        several(replaced(FIRST, b"x"), indexed({"a": FIRST})),
        ValueError,
        "expected model.safetensors or an index of shards, but got both",
    ),
    "weights are empty": (replaced(WEIGHTS, b""), ValueError, "of at least 8 bytes, but got 0 bytes"),
    "weights are short": (replaced(WEIGHTS, b"\x02\0\0"), ValueError, "of at least 8 bytes, but got 3 bytes"),
    "a pointer of LFS": (
        replaced(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ValueError,
        "got a pointer of Git LFS",
    ),
    "a pickle by that name": (replaced(WEIGHTS, b"PK\x03\x04" + bytes(60)), ValueError, "expected a header of at most"),
    "header length too large": (weights("{}", length=2**62), ValueError, "expected a header of at most 10 bytes"),
    "header cut off": (replaced(WEIGHTS, raw(entry())[:30]), ValueError, "expected a header of at most 22 bytes"),
    "header without brace": (weights(f" {entry()}"), ValueError, "expected a header that starts with '{'"),
    "header no JSON": (weights('{"x"'), ValueError, "expected a JSON object, but got:"),
    "header no UTF-8": (weights(b'{"\xff":1}'), ValueError, "expected a JSON object, but got:"),
    "header too deep": (weights("{" + '"a":{' * 50_000), ValueError, "expected a JSON object"),
    "metadata a list": (
        weights(f'{{"__metadata__":[],{entry()[1:]}'),
        ValueError,
        "expected __metadata__ to be",
    ),
    "metadata no text": (weights(f'{{"__metadata__":{{"a":1}},{entry()[1:]}'), ValueError, "to be an object of texts"),
    "a tensor twice": (weights(f"{entry()[:-1]},{entry()[1:]}"), ValueError, "expected every name once, but got 'x'"),
    "a key twice": (weights(entry(more=',"dtype":"F32"')), ValueError, "expected every name once, but got 'dtype'"),
    "half a character": (weights(entry().replace("x", "\\ud800")), ValueError, "expected a name of characters"),
    "entry a number": (weights('{"x":3}'), ValueError, "tensor 'x': expected an object with dtype, shape and"),
    "entry without shape": (weights('{"x":{"dtype":"F32","data_offsets":[0,8]}}'), ValueError, "expected an object"),
    "entry with more": (weights(entry(more=',"y":1')), ValueError, "expected an object with dtype, shape and"),
    "dtype unknown": (weights(entry(dtype='"F31"')), ValueError, "expected dtype to be one of F64, .*but got 'F31'"),
    "dtype a number": (weights(entry(dtype="32")), ValueError, "expected dtype to be one of .*but got 32"),
    "dtype without torch": (weights(entry('"F4"', "[16]")), ValueError, "expected dtype to be one of .*but got 'F4'"),
    "shape a number": (weights(entry(shape="2")), ValueError, "expected shape to be a list of sizes, but got 2"),
    "shape negative": (weights(entry(shape="[-1,-2]")), ValueError, r"expected shape to be a list of sizes"),
    "shape with a fraction": (weights(entry(shape="[2.0]")), ValueError, r"expected shape to be a list of sizes"),
    "shape with a bool": (weights(entry(shape="[true,2]")), ValueError, r"expected shape to be a list of sizes"),
    "shape that overflows": (weights(entry(shape=f"[{2**62},{2**62},2]")), ValueError, "expected shape to be a list"),
    "empty shape that overflows": (
        weights(entry(shape=f"[0,{2**62},4]", offsets="[0,0]")),
        ValueError,
        "expected shape to be a list of sizes",
    ),
    "shape and bytes": (weights(entry(shape="[3]")), ValueError, "expected data_offsets 12 bytes apart for F32 of"),
    "offsets backwards": (weights(entry(offsets="[8,0]")), ValueError, "expected data_offsets to be begin and end"),
    "offsets negative": (weights(entry(offsets="[-8,0]")), ValueError, "expected data_offsets to be begin and end"),
    "three offsets": (weights(entry(offsets="[0,4,8]")), ValueError, "expected data_offsets to be begin and end"),
    "offsets null": (weights(entry(offsets="null")), ValueError, "expected data_offsets to be begin and end"),
    "a hole before": (weights(entry(offsets="[8,16]"), bytes(16)), ValueError, "at byte 0, but got 8"),
    "a hole between": (two("[0,2]", "[4,6]", 6), ValueError, "tensor 'b' to begin where .*at byte 2, but got 4"),
    "an overlap": (two("[0,2]", "[1,3]", 3), ValueError, "tensor 'b' to begin where .*at byte 2, but got 1"),
    "the same bytes twice": (two("[0,2]", "[0,2]", 2), ValueError, "tensor 'b' to begin where .*at byte 2, but got 0"),
    "bytes behind": (weights(entry(), bytes(9)), ValueError, r"expected a file of \d+ bytes, as its header says"),
    "bytes missing": (weights(entry(), bytes(7)), ValueError, r"expected a file of \d+ bytes, as its header says"),
}

# The same of a folder with two shards.
DAMAGED_SHARDS: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "index is cut": (replaced(INDEX, "{"), ValueError, r"index\.json: expected a JSON object"),
    "index is a list": (replaced(INDEX, "[]"), ValueError, r"index\.json: expected a JSON object, but got \[\]"),
    "index without a map": (replaced(INDEX, '{"metadata": {}}'), ValueError, "expected weight_map .*but got None"),
    "map is a list": (indexed(["a"]), ValueError, r"expected weight_map to be an object .*but got \['a'\]"),
    "map is empty": (indexed({}), ValueError, "expected weight_map to be an object with tensors, but got {}"),
    "map to a number": (indexed({**MAP, "a": 1}), ValueError, "expected the file of tensor 'a' to be the name"),
    "map out of the folder": (indexed({**MAP, "a": f"../{FIRST}"}), ValueError, "expected the file of tensor 'a'"),
    "map to a path": (indexed({**MAP, "a": "/etc/x.safetensors"}), ValueError, "expected the file of tensor 'a'"),
    "map to a folder below": (indexed({**MAP, "a": f"x/{FIRST}"}), ValueError, "expected the file of tensor 'a'"),
    "map with a NUL": (indexed({**MAP, "a": "\0.safetensors"}), ValueError, "expected the file of tensor 'a'"),
    "map to a pickle": (indexed({**MAP, "a": "pytorch_model.bin"}), ValueError, "expected the file of tensor 'a'"),
    "a shard is missing": (removed(SECOND), FileNotFoundError, f"expected the file {SECOND} .* with tensor 'c'"),
    "a link to nothing": (
        several(removed(SECOND), lambda folder: (folder / SECOND).symlink_to("nothing")),
        FileNotFoundError,
        f"expected the file {SECOND}",
    ),
    "a shard too many": (
        replaced("model-00003-of-00003.safetensors", raw("{}")),
        ValueError,
        "to name every shard, but got model-00003-of-00003",
    ),
    "a tensor of the index is missing": (indexed({**MAP, "e": FIRST}), ValueError, f"expected tensor 'e' in {FIRST}"),
    "a tensor is elsewhere": (
        indexed({**MAP, "a": SECOND}),
        ValueError,
        f"expected tensor 'a' in {SECOND}, but got it in {FIRST}",
    ),
    "a tensor is not in the index": (
        indexed({"a": FIRST, "c": SECOND, "d": SECOND}),
        ValueError,
        f"every tensor, but got 'b' in {FIRST}",
    ),
    "a tensor in two shards": (
        lambda folder: save_file(tensors_of("b c d"), folder / SECOND),
        ValueError,
        f"{SECOND}: expected every tensor in one file, but got 'b', which {FIRST} has too",
    ),
    "the second shard is damaged": (replaced(SECOND, raw("{", b"")), ValueError, f"{SECOND}: expected a JSON object"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_folders_are_refused(tmp_path: Path, what: str) -> None:
    change, kind, message = DAMAGED[what]
    folder = plain(tmp_path / "model")
    change(folder)
    with pytest.raises(kind, match=message) as raised:
        Checkpoint(folder)
    assert str(folder) in str(raised.value)


@pytest.mark.parametrize("what", DAMAGED_SHARDS)
def test_damaged_shards_are_refused(tmp_path: Path, what: str) -> None:
    change, kind, message = DAMAGED_SHARDS[what]
    folder = sharded(tmp_path / "model")
    change(folder)
    with pytest.raises(kind, match=message) as raised:
        Checkpoint(folder)
    assert str(folder) in str(raised.value)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"but got 'meta-llama/Llama', which does not exist \(a model of a hub"):
        Checkpoint("meta-llama/Llama")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="but got the file"):
        Checkpoint(tmp_path / "file")


def test_json_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST_JSON", 10)
    (tmp_path / "x.json").write_text('{"a": 1, "b": 2}')
    with pytest.raises(ValueError, match="expected at most 10 bytes of JSON, but got more"):
        read_json(tmp_path / "x.json")


# Fuzzing: nothing but the errors that are promised, and never more than safetensors takes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SIZES = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64]) | st.booleans() | st.floats(0, 3)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPES, "F4", "f32", ""]),
        "shape": st.lists(SIZES, max_size=3),
        "data_offsets": st.lists(SIZES, max_size=3),
    }
)


def is_read(path: Path) -> bool:
    """Whether a file is read, which must end in nothing but a ValueError of ours."""
    message = "expected"
    try:
        header = read_header(path)
        for stored in header.tensors.values():
            read_tensor(stored)
    except ValueError as error:
        message = str(error)
    assert "expected" in message
    return message == "expected"


def is_read_by_safetensors(path: Path) -> bool:
    try:
        deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except SafetensorError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=3), st.binary(max_size=40), st.integers(-3, 3))
def test_fuzzed_headers(values: dict[str, Any], data: bytes, off: int) -> None:
    text = json.dumps(values)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "x.safetensors")
        path.write_bytes(raw(text, data, max(0, len(text.encode()) + off)))
        if is_read(path):
            assert is_read_by_safetensors(path)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=4), st.sampled_from(["replace", "insert", "cut"]))
def test_fuzzed_bytes(place: int, change: bytes, how: str) -> None:
    """A good file with some bytes changed anywhere."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "x.safetensors")
        save_file({"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)}, path, metadata={"format": "pt"})
        content = path.read_bytes()
        behind = {"replace": place + len(change), "insert": place, "cut": len(content)}[how]
        path.write_bytes(content[:place] + (b"" if how == "cut" else change) + content[behind:])
        if is_read(path):
            assert is_read_by_safetensors(path)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("abcdef"),
        st.sampled_from([FIRST, SECOND, "x.safetensors", "..", "", "../" + FIRST, FIRST + "/"]) | JSON,
    )
    | JSON
)
def test_fuzzed_indexes(weight_map: Any) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = sharded(Path(name, "model"))
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        try:
            found: dict[str, str] | str = {
                name: stored.file.name for name, stored in Checkpoint(folder).tensors.items()
            }
        except (ValueError, FileNotFoundError) as error:
            found = str(error)
        assert "expected" in found if isinstance(found, str) else found == weight_map == MAP


# Writing


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    with CheckpointWriter(folder, **options) as writer:
        writer.write_json("config.json", CONFIG)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    """Every dtype, of strides of any kind, in one file whose tensors are all aligned."""
    tensors = {**every_dtype(), "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "größe.重み": torch.ones(2)}
    tensors["transposed"] = torch.arange(6.0).reshape(2, 3).T
    tensors["part"] = torch.arange(20, dtype=torch.int8)[1::3]
    tensors["conjugate"] = torch.tensor([1 + 2j, 3 - 4j]).conj()
    tensors["parameter"] = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    folder = write(tmp_path / "model", tensors)
    assert names_in(folder) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            if name != "F8_E8M0":  # the package cannot read it into torch
                assert_same_bits(file.get_tensor(name), tensor.detach().resolve_conj())
    checkpoint = Checkpoint(folder)
    for name, tensor in tensors.items():
        assert_same_bits(checkpoint.read(name), tensor.detach().resolve_conj())
        assert checkpoint.tensors[name].offset % tensor.element_size() == 0


def test_shards_are_as_large_as_asked_for(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.full((100 + number,), float(number)) for number in range(12)}
    tensors["large"] = torch.ones(1000)
    tensors["small"] = torch.ones(3, dtype=torch.int8)
    folder = write(tmp_path / "model", tensors, max_shard_bytes=2000)
    index = json.loads((folder / INDEX).read_text())
    files = sorted({*index["weight_map"].values()})
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    large = index["weight_map"]["large"]
    assert [name for name, file in index["weight_map"].items() if file == large] == ["large"]
    sizes = {file: (folder / file).stat().st_size for file in files}
    assert all(size <= 2000 for file, size in sizes.items() if file != large)
    # A shard is closed only where the next tensor would not fit: each holds as many as can be.
    full = [size for file, size in sizes.items() if file not in (large, files[-1])]
    assert min(full[:-1]) > 2000 - 4 * 112 - 100
    together = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    assert set(together) == set(tensors)
    assert all(torch.equal(together[name], tensors[name]) for name in tensors)
    assert set(Checkpoint(folder).tensors) == set(tensors)


def test_transformers_loads_what_is_written(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    with CheckpointWriter(tmp_path / "model", max_shard_bytes=8000) as writer:
        writer.write_json("config.json", config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
        for name, tensor in model.state_dict().items():
            writer.add(name, tensor)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {**every_dtype(), **tensors_of("a b c")}
    first = contents(write(tmp_path / "1", tensors, max_shard_bytes=900))
    assert first == contents(write(tmp_path / "2", tensors, max_shard_bytes=900))
    assert len(first) > 3


def test_other_files_are_copied(tmp_path: Path) -> None:
    source = plain(tmp_path / "source")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("pooling")
    (tmp_path / "blob").write_text("tokens")
    (source / "tokenizer.json").symlink_to(tmp_path / "blob")
    checkpoint = Checkpoint(source)
    with CheckpointWriter(tmp_path / "model") as writer:
        writer.write_json("config.json", {"größe": [1.5, float("inf")]})
        for file in checkpoint.other_files():
            writer.copy(file, checkpoint.folder)
        writer.add("a", torch.ones(1))
    copied = contents(tmp_path / "model")
    assert copied["tokenizer.json"] == b"tokens"
    assert not (tmp_path / "model" / "tokenizer.json").is_symlink()
    assert copied["1_Pooling/config.json"] == b"pooling"
    assert read_json(tmp_path / "model" / "config.json") == {"größe": [1.5, float("inf")]}


def test_bad_arguments_of_add(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model") as writer:
        writer.add("a", torch.ones(2))
        for name, tensor, message in [
            ("a", torch.ones(2), "tensor 'a': expected every name once, but got it again"),
            ("", torch.ones(2), "expected name to be that of a tensor, but got ''"),
            ("__metadata__", torch.ones(2), "expected name to be that of a tensor"),
            ("b", torch.ones(2, device="meta"), "expected a tensor with values, but got one on the device meta"),
            ("b", torch.ones(2, dtype=torch.complex128), "expected dtype and layout .* but got complex128, strided"),
            ("b", torch.ones(2, 2).to_sparse(), "expected dtype and layout .* but got float32, sparse_coo"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.add(name, tensor)
        with pytest.raises(TypeError, match="tensor 'b': expected a tensor, but got list"):
            writer.add("b", [1.0])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected name to be a str, but got int"):
            writer.add(3, torch.ones(2))  # type: ignore[arg-type]
    assert set(Checkpoint(write_config(tmp_path / "model")).tensors) == {"a"}


def write_config(folder: Path) -> Path:
    (folder / "config.json").write_text("{}")
    return folder


def test_bad_arguments_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("x")
    source = plain(tmp_path / "source")
    with CheckpointWriter(tmp_path / "model") as writer:
        writer.write_json("config.json", {})
        writer.copy(source / "config.json", tmp_path)
        for name, message in [
            ("../x.json", "expected name to be that of a file, but got '../x.json'"),
            ("a/b.json", "expected name to be that of a file"),
            ("..", "expected name to be that of a file"),
            ("config.json", "expected every file once, and weights by add"),
            ("model.safetensors", "expected every file once, and weights by add"),
            (INDEX, "expected every file once, and weights by add"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write_json(name, {})
        with pytest.raises(TypeError, match=r"expected values of y\.json that JSON can hold, but got"):
            writer.write_json("y.json", {"a": torch.ones(1)})
        circle: list[Any] = []
        circle.append(circle)
        with pytest.raises(ValueError, match=r"expected values of z\.json that JSON can hold, but got"):
            writer.write_json("z.json", circle)
        for file in (tmp_path / "outside", source / ".." / "outside", source):
            with pytest.raises(ValueError, match=r"expected a file below .* to copy, but got"):
                writer.copy(file, source)
        with pytest.raises(ValueError, match="expected every file once"):
            writer.copy(source / "config.json", source)
        with pytest.raises(FileNotFoundError):
            writer.copy(source / "nothing", source)
    with pytest.raises(RuntimeError, match="expected to be entered"):
        writer.add("a", torch.ones(1))
    for size in (0, -1, True, 1.5, "5GB"):
        with pytest.raises(ValueError, match="expected max_shard_bytes to be a positive integer"):
            CheckpointWriter(tmp_path / "other", max_shard_bytes=size)  # type: ignore[arg-type]


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    partial = tmp_path / "a" / "b" / ".model.writing"

    def interrupted(error: type[BaseException]) -> None:
        with CheckpointWriter(tmp_path / "a" / "b" / "model", max_shard_bytes=300) as writer:
            writer.write_json("config.json", CONFIG)
            for name, tensor in tensors_of("a b c d e f").items():
                writer.add(name, tensor)
            assert partial.is_dir()
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            interrupted(error)
        assert sorted(tmp_path.rglob("*")) == before
    write(tmp_path / "a" / "b" / "model", tensors_of("a"))
    assert names_in(tmp_path / "a" / "b") == ["model"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(stream: object, view: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write_all", full)
    with pytest.raises(OSError, match=r"CheckpointWriter: No space left on device: '.*\.model\.writing") as raised:
        write(tmp_path / "model", tensors_of("a"))
    assert raised.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == []


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    before = contents(folder)
    with pytest.raises(FileExistsError, match=r"expected folder to be new or empty, but got .*overwrite=True"):
        CheckpointWriter(folder)
    with pytest.raises(TypeError), CheckpointWriter(folder, overwrite=True) as writer:
        writer.add("a", None)  # type: ignore[arg-type]
    assert contents(folder) == before
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match=r"expected a folder to overwrite to be a model's, with a config\.json"):
        CheckpointWriter(tmp_path / "home", overwrite=True)
    for bad in (tmp_path / "home" / "thesis.txt", tmp_path / "home" / "thesis.txt" / "model"):
        with pytest.raises(NotADirectoryError, match="expected folder to be the path of a folder, but got"):
            check_output_folder(bad)


def test_an_existing_model_is_replaced_where_asked(tmp_path: Path) -> None:
    folder = plain(tmp_path / "model")
    (folder / "old.txt").write_text("x")
    write(folder, tensors_of("c"), overwrite=True)
    assert set(Checkpoint(folder).tensors) == {"c"}
    assert names_in(folder) == ["config.json", "model.safetensors"]
    assert names_in(tmp_path) == ["model"]


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write(tmp_path / "link", tensors_of("a"))
    assert (tmp_path / "link").is_symlink()
    assert set(Checkpoint(tmp_path / "empty").tensors) == {"a"}


def test_a_folder_that_was_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    def filled_meanwhile() -> None:
        with CheckpointWriter(tmp_path / "model") as writer:
            writer.add("a", torch.ones(1))
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "x").write_text("x")

    with pytest.raises(FileExistsError):
        filled_meanwhile()
    assert contents(tmp_path) == {"model/x": b"x"}


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "model") as writer:
        writer.add("a", torch.ones(1))
        with (
            pytest.raises(BlockingIOError, match="but another process writes to it"),
            CheckpointWriter(tmp_path / "model"),
        ):
            pass
        writer.add("b", torch.ones(1))
    assert set(Checkpoint(write_config(tmp_path / "model")).tensors) == {"a", "b"}


def killed_while_writing(folder: str) -> None:
    """In a process of its own."""
    with CheckpointWriter(folder, max_shard_bytes=300) as writer:
        for name, tensor in tensors_of("a b c d e f").items():
            writer.add(name, tensor)
        os.kill(os.getpid(), 9)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=killed_while_writing, args=(str(tmp_path / "model"),))
    process.start()
    process.join()
    assert process.exitcode == -9
    assert names_in(tmp_path) == [".model.writing"]
    assert contents(tmp_path)
    write(tmp_path / "model", tensors_of("c"))
    assert names_in(tmp_path) == ["model"]
    assert set(Checkpoint(tmp_path / "model").tensors) == {"c"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([name for name in DTYPES if name != "BOOL"]), st.lists(st.integers(0, 4), max_size=3)
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 600),
)
def test_any_tensors_come_back(kinds: list[tuple[str, list[int]]], max_shard_bytes: int) -> None:
    tensors = {}
    for number, (name, shape) in enumerate(kinds):
        size = DTYPES[name].itemsize * int(torch.tensor(shape, dtype=torch.int64).prod())
        values = (torch.arange(size) * 37 + number).to(torch.uint8)
        tensors[f"t{number}"] = values.view(DTYPES[name]).reshape(shape)
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name, "model"), tensors, max_shard_bytes=max_shard_bytes)
        checkpoint = Checkpoint(folder)
        assert set(checkpoint.tensors) == set(tensors)
        for key, tensor in tensors.items():
            assert_same_bits(checkpoint.read(key), tensor)
        for file in checkpoint.files:
            assert is_read_by_safetensors(file)
            alone = sum(stored.file == file for stored in checkpoint.tensors.values()) == 1
            assert alone or file.stat().st_size <= max_shard_bytes

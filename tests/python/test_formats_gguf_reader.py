"""GGUF files that are read: what the package gguf reads, and made ones that are damaged."""

from __future__ import annotations

import importlib.metadata
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import miniquant
from format_layers import random_layer, same
from miniquant.formats import Gguf
from miniquant.formats.gguf_reader import read_gguf


def file_of(path: Path) -> Path:
    """A small file that the package wrote, with every type of entry and of tensor."""
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{name}")(f"number.{name}", 7)
    writer.add_float32("number.float32", 0.5)
    writer.add_float64("number.float64", 0.25)
    writer.add_bool("yes", val=True)
    writer.add_array("texts", ["a", "b\u00e9", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind if data.dtype == np.uint8 else None)
    writer.add_tensor("vector.weight", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_reads_alike(path: Path) -> None:
    """Metadata and tensors are what the package reads."""
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    entries = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == entries
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.kind, list(mine.shape)) == (tensor.tensor_type.name, tensor.shape.tolist()[::-1])
        assert np.array_equal(mine.data, np.asarray(tensor.data).view(np.uint8).ravel())


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    path = file_of(tmp_path / "model.gguf")
    assert_reads_alike(path)
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32))
    tensors = read_gguf(path).tensors
    for name, tensor in tensors.items():
        expected = values[0] if name.startswith("vector") else values
        step = {"Q4": 0.5, "Q5": 0.25}.get(name[:2], 0.05)
        assert torch.allclose(tensor.values(), expected, atol=step)
    assert torch.equal(tensors["F32.weight"].values(), values)
    assert torch.equal(tensors["F16.weight"].values(), values.half().float())
    quantized = tensors["Q5_0.weight"].quantized()
    assert torch.equal(miniquant.dequantize(quantized, dtype=torch.float32), tensors["Q5_0.weight"].values())
    with pytest.raises(ValueError, match=r"gguf: expected tensor 'F16.weight' to be a matrix of Q4_0, .* but got F16"):
        tensors["F16.weight"].quantized()


@pytest.mark.nightly
def test_a_file_that_others_wrote() -> None:
    path = importlib.import_module("scripts.smollm2").gguf_file()
    contents = read_gguf(path)
    assert len(contents.tensors) == 272
    assert contents.metadata["llama.block_count"] == 30
    assert len(contents.metadata["tokenizer.ggml.merges"]) == 48900
    tensor = contents.tensors["blk.3.attn_k.weight"]
    reader = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert np.array_equal(
        tensor.values().numpy(), gguf.dequantize(reader[tensor.name].data, reader[tensor.name].tensor_type)
    )


def test_codes_come_back_from_a_file(tmp_path: Path) -> None:
    quantized = random_layer(6, 96, kind="asymmetric")
    blocks, kind = Gguf().blocks("fc", quantized)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("fc.weight", blocks.numpy(), raw_dtype=gguf.GGMLQuantizationType[kind.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert same(read_gguf(tmp_path / "model.gguf").tensors["fc.weight"].quantized(), quantized)


def text(value: str) -> bytes:
    """A string as the file has it."""
    return struct.pack("<Q", len(value)) + value.encode()


def made(
    *, entries: list[bytes] | None = None, tensors: list[bytes] | None = None, data: bytes = b"", **header: Any
) -> bytes:
    """A file from its parts."""
    entries, tensors = entries or [], tensors or []
    head: bytes = header.get("magic", b"GGUF") + struct.pack("<I", header.get("version", 3))
    head += struct.pack("<QQ", header.get("tensor_count", len(tensors)), header.get("entry_count", len(entries)))
    body = head + b"".join(entries) + b"".join(tensors)
    return body + bytes(-len(body) % 32) + data


def info(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """A tensor's entry."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ENTRY = text("key") + struct.pack("<I", 4) + struct.pack("<I", 1)
HUGE = 2**62
BROKEN: list[tuple[bytes, str]] = [
    (b"", "to be a GGUF file, but got 0 bytes"),
    (b"GGUF", "to be a GGUF file, but got 4 bytes"),
    (made(magic=b"GGML"), "to begin with 'GGUF', but got b'GGML'"),
    (made(version=1), "to be of version 2 or 3, little-endian, but got version 1"),
    (made(version=0x03000000), "little-endian, but got version 50331648"),
    (made(entry_count=HUGE), f"to have room for its entries, but got {HUGE}"),
    (made(tensor_count=HUGE), f"to have room for its tensors, but got {HUGE}"),
    (made(entries=[struct.pack("<Q", HUGE)], entry_count=1), "to have room for its entries"),
    (made(entries=[struct.pack("<Q", HUGE) + bytes(16)]), "to have room for its bytes of a key"),
    (made(entries=[struct.pack("<Q", 2) + b"\xff\xfe" + bytes(16)]), "to have a key in UTF-8, but got b'\\xff\\xfe'"),
    (
        made(entries=[text("key") + struct.pack("<I", 13)], data=bytes(8)),
        "to have a type of 0 to 12 for 'key', but got 13",
    ),
    (made(entries=[text("key") + struct.pack("<IIQ", 9, 9, 1)]), "numbers or texts in the array 'key', but got type 9"),
    (made(entries=[text("key") + struct.pack("<IIQ", 9, 4, HUGE)]), "to have room for its 'key'"),
    (made(entries=[text("key") + struct.pack("<IIQ", 9, 8, HUGE)]), "to have room for its 'key'"),
    (made(entries=[ENTRY, ENTRY]), "to have every key once, but got 'key' twice"),
    (made(entries=[text("general.alignment") + struct.pack("<II", 4, 0)]), "general.alignment that is a multiple of 8"),
    (
        made(entries=[text("general.alignment") + struct.pack("<If", 6, 8.0)]),
        "general.alignment that is a multiple of 8",
    ),
    (made(tensors=[info("a", [1] * 5)]), "at most 4 dimensions for 'a', but got 5"),
    (made(tensors=[info("a", [4], kind=99)]), "a type that the package gguf knows for 'a', but got 99"),
    (made(tensors=[info("a", [33, 2], kind=2)]), "to have columns of 'a' in multiples of 32 for Q4_0, but got 33"),
    (made(tensors=[info("a", [4])]), "to have 16 bytes of tensor 'a' at a multiple of 32, but got offset 0"),
    (made(tensors=[info("a", [HUGE, 4])]), "of tensor 'a' at a multiple of 32, but got offset 0"),
    (made(tensors=[info("a", [4], offset=1)], data=bytes(64)), "at a multiple of 32, but got offset 1"),
    (made(tensors=[info("a", [4], offset=HUGE)], data=bytes(64)), f"at a multiple of 32, but got offset {HUGE}"),
    (made(tensors=[info("a", [4]), info("a", [4])], data=bytes(64)), "to have every tensor once, but got 'a' twice"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=[message[:50] for _, message in BROKEN])
def test_damaged_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared below)
        read_gguf(path)
    assert str(caught.value).startswith(f"gguf: expected {path} ")
    assert message in str(caught.value)


def test_a_made_file_is_read(tmp_path: Path) -> None:
    """The parts of which the damaged files are made are right."""
    path = tmp_path / "model.gguf"
    path.write_bytes(made(entries=[ENTRY], tensors=[info("a", [4, 2])], data=np.arange(8, dtype=np.float32).tobytes()))
    contents = read_gguf(path)
    assert contents.metadata == {"key": 1}
    assert contents.tensors["a"].values().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "missing.gguf")


def test_files_with_random_damage_are_read_or_refused(tmp_path: Path) -> None:
    """No other error, no long time and no memory that the file does not have."""
    whole = file_of(tmp_path / "whole.gguf").read_bytes()
    head = len(whole) - 6 * 64 * 12
    generator = random.Random(0)  # noqa: S311  (no secrets here)
    path, messages = tmp_path / "damaged.gguf", []
    for round_ in range(1500):
        damaged = bytearray(whole)
        if round_ % 3 == 0:
            del damaged[generator.randrange(len(damaged)) :]
        for _ in range(generator.choice([1, 1, 2, 8])):
            if damaged:
                damaged[generator.randrange(min(head, len(damaged)))] = generator.choice(
                    [0, 1, 255, generator.randrange(256)]
                )
        path.write_bytes(damaged)
        try:
            for tensor in read_gguf(path).tensors.values():
                assert tensor.data.nbytes <= len(whole)
        except ValueError as error:
            messages.append(str(error))
    assert 300 < len(messages) < 1500
    assert all(message.startswith(f"gguf: expected {path} ") for message in messages)

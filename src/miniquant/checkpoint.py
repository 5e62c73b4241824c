"""A model's folder: config.json and safetensors files, read tensor by tensor, and written in shards.

Reading takes nothing on trust. The headers of all files are read and held against each other, against the index and
against the files' sizes when a :class:`Checkpoint` is made; tensors are read when they are asked for, and nothing stays
mapped or open. What a header may hold is what safetensors says: entries that cover the data without holes or overlaps.

Writing is streamed and atomic: :class:`CheckpointWriter` holds one tensor at a time, and the folder appears whole or
not at all.
"""

import ctypes
import fcntl
import hashlib
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType, TracebackType
from typing import IO, Any

import torch
from torch import Tensor

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
MAX_SHARD_BYTES = 5_000_000_000
# No JSON file of a model is larger, and safetensors allows no larger header.
LARGEST_JSON = 100_000_000
_LARGE = 1 << 16  # bytes of a tensor that has pages of its own
_PIECE = 1 << 22  # bytes that are copied or compared at once
# Objects within objects: no file of a model comes near, and what takes more apart may run out of stack.
DEEPEST_JSON = 64

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "C64": torch.complex64,
    }
)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What holds weights, in any form, and pickles, which may.
_WEIGHT_SUFFIXES = (
    *(".bin", ".ckpt", ".data", ".ggml", ".gguf", ".h5", ".joblib", ".keras", ".llamafile", ".mlmodel", ".msgpack"),
    *(".nemo", ".npy", ".npz", ".onnx", ".onnx_data", ".ort", ".ot", ".pb", ".pickle", ".pkl", ".pt", ".pt2", ".pte"),
    *(".pth", ".safetensors", ".tflite"),
)
# Written anew by whoever writes weights.
_REPLACED = frozenset((CONFIG, "quantize_config.json", "report.json", "report.html"))


# Reading


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: of the tensor.
        file: that holds it.
        dtype: of its values.
        shape: of the tensor.
        nbytes: of its values.
        offset: of its first byte in the file.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    offset: int


class Checkpoint:
    """The tensors and the configuration of a folder as transformers saves it.

    Weights are in ``model.safetensors``, or in shards that ``model.safetensors.index.json`` lists. Files may be
    symbolic links.

    Args:
        folder: path of the folder.

    Raises:
        FileNotFoundError, NotADirectoryError: where the folder, config.json, the weights or a shard is missing.
        ValueError: for a damaged file; an index that disagrees with the files; weights that are pickles only.
        OSError: where a file cannot be read.

    Attributes:
        folder: path of the folder.
        config: of config.json.
        tensors: by name, in order of files and of their places there.
        files: that hold weights, in order of their names.

    Example:
        >>> checkpoint = Checkpoint("SmolLM2-135M")
        >>> checkpoint.tensors["model.norm.weight"].shape
        (576,)
        >>> weight = checkpoint.read("model.norm.weight")
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.exists():
            raise FileNotFoundError(
                f"Checkpoint: expected folder to be that of a model on this machine, but got {os.fspath(folder)!r}, "
                "which does not exist (a model of a hub is downloaded first)"
            )
        if not self.folder.is_dir():
            raise NotADirectoryError(
                f"Checkpoint: expected folder to be a folder with {CONFIG} and safetensors files, but got the file "
                f"{self.folder}"
            )
        if not (self.folder / CONFIG).is_file():
            raise FileNotFoundError(f"Checkpoint: {self.folder}: expected a file {CONFIG}, but got none")
        self.config = read_json(self.folder / CONFIG)
        index = _index(self.folder)
        self.files = (self.folder / WEIGHTS,) if index is None else _shards(self.folder, index)
        headers = {file: read_header(file) for file in self.files}
        tensors: dict[str, StoredTensor] = {}
        for header in headers.values():
            for name, tensor in header.tensors.items():
                if name in tensors:
                    raise ValueError(
                        f"Checkpoint: {header.file}: expected every tensor in one file, but got {name!r}, which "
                        f"{tensors[name].file.name} has too"
                    )
                tensors[name] = tensor
        if index is not None:
            _check_index(self.folder / INDEX, index, tensors)
        self.tensors: Mapping[str, StoredTensor] = MappingProxyType(tensors)
        self._digests = {file.name: (header.digest, header.size) for file, header in headers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, name: str) -> Tensor:
        """A tensor on the CPU, in memory of its own.

        Raises:
            KeyError: where there is no tensor of that name.
            ValueError: where the file has changed since its header was read.
            OSError: where it cannot be read.
        """
        return read_tensor(self._stored(name))

    def read_dtype(self, name: str) -> torch.dtype:
        """Of what :meth:`read` gives: that of the file.

        Raises:
            KeyError: where there is no tensor of that name.
        """
        return self._stored(name).dtype

    def meta(self) -> dict[str, Tensor]:
        """All tensors on the device "meta": what :meth:`miniquant.formats.Format.layers` takes."""
        return {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in self.tensors.items()
        }

    def values(self, suffixes: Iterable[str]) -> dict[str, Tensor]:
        """As :meth:`meta`, but with the values of those tensors whose names end in one of some suffixes.

        Args:
            suffixes: as :attr:`miniquant.formats.Format.value_suffixes`.
        """
        ends = tuple(suffixes)
        return {name: self.read(name) if name.endswith(ends) else meta for name, meta in self.meta().items()}

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of config.json, and of the names, sizes and headers of the files of weights.

        It takes no time, and tells any two checkpoints apart but those that differ in nothing but values.
        """
        parts = {"config": self.config, "files": self._digests}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def other_files(self, *, code: bool = False) -> list[Path]:
        """What a saved model has beside weights and config.json, in order of names.

        Such are the tokenizer, the generation config, the chat template, the license, and the parts of a
        sentence-transformers model, whose own weights (of modules that modules.json names) count here. Weights in any
        other form do not, nor hidden files, nor links to folders.

        Args:
            code: whether Python files count, which transformers runs where it is told to trust them.
        """
        parts = _modules_of_sentence_transformers(self.folder)
        found = []
        for folder, folders, names in os.walk(self.folder):
            place = Path(folder)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
            in_part = place in parts
            for name in sorted(names):
                file = place / name
                if name.startswith(".") or not file.is_file() or (place == self.folder and name in _REPLACED):
                    continue
                if (file.suffix == ".py" and not code) or (_holds_weights(name) and not in_part):
                    continue
                if in_part and name == "pytorch_model.bin" and WEIGHTS in names:
                    continue  # the same once more
                found.append(file)
        return found

    def _stored(self, name: str) -> StoredTensor:
        stored = self.tensors.get(name)
        if stored is None:
            raise KeyError(f"Checkpoint: {self.folder}: expected the name of a tensor, but got {name!r}")
        return stored


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: for anything else: no UTF-8, no JSON, no object, one that is nested too deeply or too large.
        OSError: where the file cannot be read.
    """
    where = f"read_json: {file}"
    with file.open("rb") as stream:
        content = stream.read(LARGEST_JSON + 1)
    if len(content) > LARGEST_JSON:
        raise ValueError(f"{where}: expected at most {LARGEST_JSON} bytes of JSON, but got more")
    return _object(where, content)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        file: the file.
        tensors: by name, in order of their places in the file.
        metadata: texts by name.
        size: of the file in bytes.
        digest: SHA-256 of the header, hexadecimal.
    """

    file: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    size: int
    digest: str


def read_header(file: Path) -> Header:
    """The header of a safetensors file, held against the file's size.

    Raises:
        ValueError: where it is damaged, or has a dtype that torch lacks.
        OSError: where the file cannot be read.
    """
    where = f"read_header: {file}"
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{where}: expected a safetensors file of at least 8 bytes, but got {size} bytes")
        length = int.from_bytes(prefix, "little")
        if prefix[:7] == b"version":
            raise ValueError(
                f"{where}: expected a safetensors file, but got a pointer of Git LFS (`git lfs pull` gets the file)"
            )
        if length > min(LARGEST_JSON, size - 8):
            raise ValueError(
                f"{where}: expected a header of at most {min(LARGEST_JSON, size - 8)} bytes, but got one of {length} "
                "(no safetensors file, or one that was cut off)"
            )
        content = stream.read(length)
    if len(content) < length:
        raise ValueError(f"{where}: expected a header of {length} bytes, but got {len(content)}")
    if not content.startswith(b"{"):
        raise ValueError(f"{where}: expected a header that starts with '{{', but got {content[:1]!r}")
    entries = _object(where, content, no_duplicates=True)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{where}: expected __metadata__ to be an object of texts, but got {_short(metadata)}")
    start = 8 + length
    stored = [_entry(where, file, start, name, entry) for name, entry in entries.items()]
    stored.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = start
    for tensor in stored:
        if tensor.offset != end:
            raise ValueError(
                f"{where}: expected the values of tensor {tensor.name!r} to begin where those before end, at byte "
                f"{end - start}, but got {tensor.offset - start}"
            )
        end += tensor.nbytes
    if end != size:
        raise ValueError(f"{where}: expected a file of {end} bytes, as its header says, but got {size} bytes")
    return Header(file, {tensor.name: tensor for tensor in stored}, metadata, size, hashlib.sha256(content).hexdigest())


def read_tensor(stored: StoredTensor) -> Tensor:
    """A tensor on the CPU, in memory of its own.

    Raises:
        ValueError: where the file is shorter than when its header was read, or has a bool that is none.
        OSError: where it cannot be read.
    """
    where = f"read_tensor: {stored.file}: tensor {stored.name!r}"
    tensor = empty_tensor(stored.shape, stored.dtype)
    if stored.nbytes:
        view = memory_of(tensor)
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.offset)
            filled = 0
            while filled < stored.nbytes:  # one call reads at most 2 GB
                count = stream.readinto(view[filled:])
                if not count:
                    raise ValueError(
                        f"{where}: expected {stored.nbytes} bytes, but got {filled}: the file has changed since its "
                        "header was read"
                    )
                filled += count
    if stored.dtype == torch.bool and tensor.numel() and int(tensor.view(torch.uint8).max()) > 1:
        raise ValueError(f"{where}: expected bytes of 0 and 1 for dtype bool, but got others")
    return tensor


def empty_tensor(shape: Iterable[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU, not initialized, whose memory goes back to the system when it is freed.

    The allocator of the C library keeps what is freed between other tensors: where weights come and go, a process would
    take more and more. Small tensors are left to it.
    """
    shape = tuple(shape)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return torch.empty(shape, dtype=dtype)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a process may have so many maps; without memory, torch says so
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(pages, dtype=dtype).reshape(shape)


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two tensors are equal bit for bit, compared piece by piece."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with first.file.open("rb") as one, second.file.open("rb") as other:
        one.seek(first.offset)
        other.seek(second.offset)
        left = first.nbytes
        while left:
            piece = one.read(min(left, _PIECE))
            if not piece or piece != other.read(len(piece)):
                return False
            left -= len(piece)
    return True


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU that has some; valid as long as the tensor is."""
    nbytes = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


def _index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, by the index; None where there is one file and no index."""
    file = folder / INDEX
    if not file.is_file():
        if not (folder / WEIGHTS).is_file():
            raise FileNotFoundError(f"Checkpoint: {folder}: {_no_weights(folder)}")
        return None
    where = f"Checkpoint: {file}"
    names = read_json(file).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{where}: expected weight_map to be an object with tensors, but got {_short(names)}")
    for name, shard in names.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or not _is_file_name(shard):
            raise ValueError(
                f"{where}: expected the file of tensor {name!r} to be the name of a safetensors file in the folder, "
                f"but got {_short(shard)}"
            )
    if (folder / WEIGHTS).is_file() and WEIGHTS not in names.values():
        raise ValueError(
            f"Checkpoint: {folder}: expected {WEIGHTS} or an index of shards, but got both (remove the one that is not "
            "meant)"
        )
    return names


def _no_weights(folder: Path) -> str:
    """What is there in place of weights, and what to do."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    expected = f"expected {WEIGHTS}, or {INDEX} and its shards"
    if shards := [name for name in names if SHARD.fullmatch(name)]:
        return f"{expected}, but got {shards[0]} without an index"
    if others := [name for name in names if name.endswith(".safetensors")]:
        return f"{expected}, but got {others[0]} (rename it where it is the model's)"
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return (
            f"{expected}, but got {pickles[0]}, a pickle, which can run code when it is loaded (convert it to "
            "safetensors, with save_pretrained() of transformers on a machine where you trust the file)"
        )
    if others := [name for name in names if _holds_weights(name)]:
        return f"{expected}, but got {others[0]} (convert it to safetensors)"
    return f"{expected}, but got neither"


def _shards(folder: Path, index: Mapping[str, str]) -> tuple[Path, ...]:
    """The files that an index names; each has to be there, and no other shard."""
    named = sorted(set(index.values()))
    for shard in named:
        if not (folder / shard).is_file():
            name = next(name for name, file in index.items() if file == shard)
            raise FileNotFoundError(
                f"Checkpoint: {folder}: expected the file {shard} that {INDEX} names, with tensor {name!r} among "
                "others, but got none (a download that was not finished?)"
            )
    for path in sorted(folder.iterdir()):
        if SHARD.fullmatch(path.name) and path.name not in named:
            raise ValueError(
                f"Checkpoint: {folder}: expected {INDEX} to name every shard, but got {path.name}, which it does not "
                "name (remove the file, or repair the index)"
            )
    return tuple(folder / shard for shard in named)


def _check_index(file: Path, index: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    """Holds the index against the files."""
    for name, shard in index.items():
        if name not in tensors:
            raise ValueError(
                f"Checkpoint: {file}: expected tensor {name!r} in {shard}, but that file has none so named"
            )
        if tensors[name].file.name != shard:
            raise ValueError(
                f"Checkpoint: {file}: expected tensor {name!r} in {shard}, but got it in {tensors[name].file.name}"
            )
    for name, tensor in tensors.items():
        if name not in index:
            raise ValueError(
                f"Checkpoint: {file}: expected weight_map to name every tensor, but got {name!r} in "
                f"{tensor.file.name}, which it does not name"
            )


def _object(where: str, content: bytes, *, no_duplicates: bool = False) -> dict[str, Any]:
    """A JSON object out of bytes."""

    def of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if no_duplicates and len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"expected every name once, but got {_short(twice)} twice")
        return values

    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=of_pairs)
    except RecursionError:
        raise ValueError(f"{where}: expected a JSON object, but got one that is nested too deeply") from None
    except ValueError as error:  # of UTF-8, of JSON, of numbers with too many digits, of names
        raise ValueError(f"{where}: expected a JSON object, but got: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a JSON object, but got {_short(values)}")  # noqa: TRY004  (a bad file)
    if _is_deeper(values, DEEPEST_JSON):
        raise ValueError(f"{where}: expected a JSON object, but got one that is nested more than {DEEPEST_JSON} deep")
    return values


def _is_deeper(value: object, depth: int) -> bool:
    """Whether lists and objects are nested more than `depth` deep."""
    level: list[object] = [value]
    for _ in range(depth):
        below: list[object] = []
        for one in level:
            below += one.values() if isinstance(one, dict) else one if isinstance(one, list) else ()
        level = [one for one in below if isinstance(one, (dict, list))]
        if not level:
            return False
    return True


def _entry(where: str, file: Path, start: int, name: str, entry: object) -> StoredTensor:
    """A tensor of a header."""
    what = f"{where}: tensor {_short(name)}"
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what}: expected a name of characters, but got half a character") from None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what}: expected an object with dtype, shape and data_offsets, but got {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what}: expected dtype to be one of {', '.join(DTYPES)}, but got {_short(dtype)}")
    if not _are_counts(shape) or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"{what}: expected shape to be a list of sizes, but got {_short(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{what}: expected data_offsets to be begin and end, but got {_short(offsets)}")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{what}: expected data_offsets {nbytes} bytes apart for {dtype} of shape {_short(shape)}, but got "
            f"{_short(offsets)}"
        )
    return StoredTensor(name, file, DTYPES[dtype], tuple(shape), nbytes, start + offsets[0])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _short(value: object) -> str:
    """A value of a file as a message shows it."""
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_file_name(name: str) -> bool:
    """Whether a text is the name of a file, and no path that leads elsewhere."""
    return PurePosixPath(name).name == name and name not in (".", "..") and not set(name) & {"\\", "\0"}


def _holds_weights(name: str) -> bool:
    """Whether the name is one of a file with weights, or of an index of such files."""
    if name.endswith(".index.json"):
        return True
    suffixes = PurePosixPath(name).suffixes
    return any(suffix.lower() in _WEIGHT_SUFFIXES for suffix in suffixes[-2:])


def _modules_of_sentence_transformers(folder: Path) -> set[Path]:
    """Folders of those modules of a sentence-transformers model that have a folder of their own."""
    file = folder / "modules.json"
    if not file.is_file():
        return set()
    try:
        modules = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Checkpoint: {file}: expected a JSON list of modules, but got: {error}") from None
    if not isinstance(modules, list):
        raise ValueError(f"Checkpoint: {file}: expected a JSON list of modules, but got {_short(modules)}")  # noqa: TRY004
    paths = [module.get("path") for module in modules if isinstance(module, dict)]
    return {folder / path for path in paths if isinstance(path, str) and path and _is_file_name(path)}


# Writing


@dataclass
class _Shard:
    """A file that is being written: its values lie in one file for each size of element until all are there.

    The tensors with the largest elements come first, so that each is aligned in the file.
    """

    number: int
    data_bytes: int = 0
    header_bytes: int = 0
    entries: dict[int, list[tuple[str, str, list[int], int]]] = field(default_factory=dict)
    spools: dict[int, IO[bytes]] = field(default_factory=dict)


class CheckpointWriter:
    """Writes a folder with safetensors files and what lies beside them; it appears whole or not at all.

    Everything is written to a folder beside it, ``.<name>.writing``, which is renamed at the end and removed after an
    error. Of a process that was killed it stays, and the next one that writes the same folder removes it. The same
    tensors in the same order give the same bytes. One tensor is in memory at a time; on the disk there has to be room
    for the whole, for one shard more, and for a folder that is replaced.

    Args:
        folder: path of the folder. Where it exists, it has to be empty, or a model's folder with `overwrite`.
        max_shard_bytes: of a file; only one whose single tensor is larger is larger.
        overwrite: whether a model's folder (with a config.json) is replaced.

    Raises:
        FileExistsError: where the folder has something in it, at once.
        ValueError: for another bad argument.
        BlockingIOError: when entered, while another process writes the same folder.
        OSError: where something cannot be written; the message names the file.

    Example:
        >>> with CheckpointWriter("quantized") as writer:
        ...     writer.write_json("config.json", config)
        ...     for name in checkpoint.tensors:
        ...         writer.add(name, checkpoint.read(name))
        ...     for file in checkpoint.other_files():
        ...         writer.copy(file, checkpoint.folder)
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False
    ) -> None:
        if type(max_shard_bytes) is not int or max_shard_bytes < 1:
            raise ValueError(
                f"CheckpointWriter: expected max_shard_bytes to be a positive integer, but got {max_shard_bytes!r}"
            )
        check_output_folder(folder, overwrite=overwrite)
        self.folder = Path(folder)
        self._target = self.folder.resolve()
        self._partial = self._target.with_name(f".{self._target.name}.writing")
        self._max_shard_bytes = max_shard_bytes
        self._overwrite = overwrite
        self._lock: int | None = None
        self._made: list[Path] = []
        self._shards: list[_Shard] = []
        self._of_shard: dict[str, int] = {}
        self._files: set[PurePosixPath] = set()
        self._tensor_bytes = 0

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the values of all tensors so far."""
        return self._tensor_bytes

    def __enter__(self) -> "CheckpointWriter":  # noqa: PYI034  (Self is of Python 3.11)
        if self._lock is not None:
            raise RuntimeError("CheckpointWriter: expected to be entered once, but got entered again")
        try:
            for parent in reversed(self._partial.parents):
                if not parent.exists():
                    parent.mkdir()
                    self._made.append(parent)
            self._lock = _locked(self._partial)
            _empty(self._partial)
        except BaseException:
            self._leave(remove=self._lock is not None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        done = False
        try:
            if error is None:
                self._finish()
                done = True
        finally:
            self._leave(remove=not done)

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor.

        Args:
            name: of the tensor; another one each time.
            tensor: of a dtype that safetensors has, on any device but "meta".

        Raises:
            ValueError, TypeError: for a bad argument.
            OSError: where it cannot be written.
        """
        self._check_entered()
        what = f"CheckpointWriter: {self.folder}: tensor {name!r}"
        if not isinstance(name, str):
            raise TypeError(f"CheckpointWriter: expected name to be a str, but got {type(name).__name__}")
        if name in ("", "__metadata__"):
            raise ValueError(f"CheckpointWriter: expected name to be that of a tensor, but got {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}: expected a tensor, but got {type(tensor).__name__}")
        if name in self._of_shard:
            raise ValueError(f"{what}: expected every name once, but got it again")
        if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
            raise ValueError(f"{what}: expected dtype and layout that safetensors has, but got {_kind(tensor)}")
        if tensor.device.type == "meta":
            raise ValueError(f"{what}: expected a tensor with values, but got one on the device meta")
        values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        nbytes = values.numel() * values.element_size()
        entry = (name, _NAMES[tensor.dtype], list(tensor.shape), nbytes)
        header_bytes = len(_json_entry(*entry[:3], self._max_shard_bytes, self._max_shard_bytes + nbytes)) + 1
        shard = self._shards[-1] if self._shards else None
        if shard is not None and not self._fits(shard, header_bytes + nbytes):
            self._close(shard)
            shard = None
        if shard is None:
            shard = _Shard(len(self._shards) + 1)
            self._shards.append(shard)
        size = values.element_size()
        file = self._spool(shard.number, size)
        with _naming(file):
            if size not in shard.spools:
                shard.spools[size] = file.open("w+b", buffering=0)
            if nbytes:
                _write_all(shard.spools[size], memory_of(values))
        shard.entries.setdefault(size, []).append(entry)
        shard.header_bytes += header_bytes
        shard.data_bytes += nbytes
        self._of_shard[name] = shard.number
        self._tensor_bytes += nbytes

    def write_json(self, name: str, values: Any) -> None:
        """Writes a JSON file, with keys in their order.

        Args:
            name: of a file in the folder.
            values: what JSON can hold; infinities and NaN as transformers writes them.

        Raises:
            ValueError, TypeError: for a name that is none or was there before, and for values that JSON cannot hold.
            OSError: where it cannot be written.
        """
        self._check_entered()
        if not _is_file_name(name):
            raise ValueError(f"CheckpointWriter: {self.folder}: expected name to be that of a file, but got {name!r}")
        file = self._claim(PurePosixPath(name))
        try:
            text = json.dumps(values, indent=2, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"CheckpointWriter: {self.folder}: expected values of {name} that JSON can hold, but got: {error}"
            ) from error
        with _naming(file):
            file.write_text(f"{text}\n", encoding="utf-8")

    def copy(self, file: Path, relative_to: Path) -> None:
        """Copies a file, or what a link points to, to the same place below the folder.

        Args:
            file: path of the file.
            relative_to: path of the folder whose place this folder takes.

        Raises:
            ValueError: for a file that is not below that folder, or was there before.
            OSError: where it cannot be read or written.
        """
        self._check_entered()
        try:
            place = PurePosixPath(file.relative_to(relative_to).as_posix())
        except ValueError:
            place = PurePosixPath("..")
        if ".." in place.parts or not place.name:
            raise ValueError(
                f"CheckpointWriter: {self.folder}: expected a file below {relative_to} to copy, but got {file}"
            )
        target = self._claim(place)
        with _naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    def _check_entered(self) -> None:
        if self._lock is None:
            raise RuntimeError("CheckpointWriter: expected to be entered (with CheckpointWriter(...) as writer)")

    def _claim(self, place: PurePosixPath) -> Path:
        """Where a file goes that is not there yet."""
        if place in self._files or place.name == INDEX or (place.suffix == ".safetensors" and len(place.parts) == 1):
            raise ValueError(
                f"CheckpointWriter: {self.folder}: expected every file once, and weights by add(), but got {place}"
            )
        self._files.add(place)
        return self._partial / place

    def _spool(self, number: int, size: int) -> Path:
        return self._partial / f".{number}.{size}"

    def _fits(self, shard: _Shard, nbytes: int) -> bool:
        fixed = 8 + len(_header_text([])) + 8  # length, braces and metadata, padding
        return fixed + shard.header_bytes + shard.data_bytes + nbytes <= self._max_shard_bytes

    def _close(self, shard: _Shard) -> None:
        """Joins the values of a shard behind its header."""
        texts, begin = [], 0
        for size in sorted(shard.entries, reverse=True):
            for name, dtype, shape, nbytes in shard.entries[size]:
                texts.append(_json_entry(name, dtype, shape, begin, begin + nbytes))
                begin += nbytes
        header = _header_text(texts)
        header += b" " * (-len(header) % 8)
        file = self._provisional(shard.number)
        with _naming(file), file.open("wb", buffering=0) as stream:
            _write_all(stream, memoryview(len(header).to_bytes(8, "little") + header))
            for size in sorted(shard.spools, reverse=True):
                spool = shard.spools.pop(size)
                spool.seek(0)
                shutil.copyfileobj(spool, stream, _PIECE)
                spool.close()
                self._spool(shard.number, size).unlink()

    def _provisional(self, number: int) -> Path:
        """Of a shard while it is not known how many there are."""
        return self._partial / f".{number}.safetensors"

    def _finish(self) -> None:
        """Gives shards their names, writes the index, and moves the folder to its place."""
        if self._shards:
            self._close(self._shards[-1])
        count = len(self._shards)
        names = {
            shard.number: WEIGHTS if count == 1 else f"model-{shard.number:05}-of-{count:05}.safetensors"
            for shard in self._shards
        }
        for number, name in names.items():
            self._provisional(number).rename(self._partial / name)
        if count > 1:
            index = {
                "metadata": {"total_size": self._tensor_bytes},
                "weight_map": {name: names[number] for name, number in sorted(self._of_shard.items())},
            }
            with _naming(self._partial / INDEX):
                (self._partial / INDEX).write_text(f"{json.dumps(index, indent=2, ensure_ascii=False)}\n", "utf-8")
        _sync(self._partial)
        check_output_folder(self._target, overwrite=self._overwrite)  # once more: hours may have passed
        replaced = self._target.with_name(f".{self._target.name}.replaced")
        if self._target.exists() and any(self._target.iterdir()):
            _remove(replaced)
            self._target.rename(replaced)
        try:
            self._partial.rename(self._target)
        except BaseException:
            if replaced.exists():
                replaced.rename(self._target)
            raise
        _sync_folder(self._target.parent)
        _remove(replaced)

    def _leave(self, *, remove: bool) -> None:
        """Lets go of files and of the lock."""
        for shard in self._shards:
            for spool in shard.spools.values():
                spool.close()
            shard.spools.clear()
        if remove:
            shutil.rmtree(self._partial, ignore_errors=True)
            for parent in reversed(self._made):
                if any(parent.iterdir()):
                    break
                parent.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_output_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Whether :class:`CheckpointWriter` may write a folder.

    Args:
        folder: path of the folder.
        overwrite: whether a model's folder (with a config.json) may be replaced.

    Raises:
        FileExistsError: where it has something in it.
        NotADirectoryError: where it is a file, or one of its parents is.
    """
    path = Path(folder)
    for parent in (path, *path.parents):
        if parent.exists():
            if not parent.is_dir():
                raise NotADirectoryError(
                    f"CheckpointWriter: expected folder to be the path of a folder, but got {path}: {parent} is a file"
                )
            break
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"CheckpointWriter: expected folder to be new or empty, but got {path} (choose another, or overwrite "
                "it with overwrite=True)"
            )
        if not (path / CONFIG).is_file():
            raise FileExistsError(
                f"CheckpointWriter: expected a folder to overwrite to be a model's, with a {CONFIG}, but got {path} "
                "(remove it yourself, or choose another)"
            )


def _json_entry(name: str, dtype: str, shape: list[int], begin: int, end: int) -> bytes:
    """A tensor's part of a header."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return f"{json.dumps(name, ensure_ascii=False)}:{json.dumps(entry, separators=(',', ':'))}".encode()


def _header_text(entries: Iterable[bytes]) -> bytes:
    """A header; transformers loads no file whose metadata do not say that it is PyTorch's."""
    return b"{" + b",".join([b'"__metadata__":{"format":"pt"}', *entries]) + b"}"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}, {str(tensor.layout).removeprefix('torch.')}"


def _write_all(stream: IO[bytes], view: memoryview) -> None:
    written = 0
    while written < len(view):  # one call writes at most 2 GB
        written += stream.write(view[written:])


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of writing name the file; those of write() do not by themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"CheckpointWriter: {os.strerror(error.errno or 0)}", os.fspath(file)) from error


def _locked(folder: Path) -> int:
    """A folder, made where it is missing, that no other process has; the open folder, which holds the lock."""
    while True:
        folder.mkdir(exist_ok=True)
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(opened), folder.stat()):
                return opened
        except BlockingIOError:
            os.close(opened)
            raise BlockingIOError(
                f"CheckpointWriter: expected to be alone with {folder}, but another process writes to it"
            ) from None
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)  # the one that had it moved or removed it meanwhile


def _empty(folder: Path) -> None:
    """Removes what is in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _remove(folder: Path) -> None:
    """Removes a folder, where there is one."""
    if folder.exists():
        shutil.rmtree(folder)


def _sync(folder: Path) -> None:
    """Waits until all of a folder is on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            with (Path(place) / name).open("rb") as file, _naming(Path(place) / name):
                os.fsync(file.fileno())
        _sync_folder(Path(place))


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

"""Texts and token ids out of files and folders; :mod:`miniquant.calibration` says which kinds there are.

Everything is read from its start and only as far as it is asked for. No pickle is loaded.
"""

import codecs
import importlib
import io
import json
import re
import reprlib
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 18  # characters that are tokenized at once
_BLOCK = 1 << 20  # bytes that are read at once
_ROWS = 256  # of a table or a matrix that are read at once
TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow")
TENSOR_SUFFIXES = (".safetensors", ".npy")
SUFFIXES = (*TEXT_SUFFIXES, *LINE_SUFFIXES, *TABLE_SUFFIXES, *TENSOR_SUFFIXES)
_ARROW_FILE = b"ARROW1"
_OLDEST_PYARROW = 15  # before 14.0.1 a file could name a pickled type
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".npz")
PREFIX = "load_calibration"  # of errors

Row = tuple[Tensor, Tensor]  # token ids and mask, [L] each


def pieces(file: Path) -> Iterator[tuple[str, bool]]:
    """The text of a file in pieces that end with a line, or at a space where a line is longer; True with the last."""
    where = f"{PREFIX}: {file}"
    held = ""
    is_empty = True
    for block in _decoded(file):
        held += block
        is_empty = is_empty and not block.strip()
        while len(held) > _PIECE:
            end = 1 + held.rfind("\n", 0, _PIECE) or 1 + held.rfind(" ", 0, _PIECE) or _PIECE
            yield held[:end], False
            held = held[end:]
    if is_empty:
        raise ValueError(f"{where}: expected some text, but got none")
    yield held, True


def _decoded(file: Path) -> Iterator[str]:
    r"""Blocks of a file's text, with \n at the ends of lines."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = io.IncrementalNewlineDecoder(None, translate=True)
    where = f"{PREFIX}: {file}"
    with file.open("rb") as stream:
        offset = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        stream.seek(offset)
        while True:
            block = stream.read(_BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{where}: expected text in UTF-8, but got byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset - pending + error.start}"
                ) from error
            if "\0" in text:
                raise ValueError(f"{where}: expected text in UTF-8, but got a NUL, as binary files and UTF-16 have")
            yield lines.decode(text, final=not block)
            if not block:
                return
            offset += len(block)


def lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a file with one a line, and where each stands."""
    is_empty = True
    for number, line in enumerate(_split(_decoded(file)), start=1):
        if not line.strip():
            continue
        is_empty = False
        where = f"{PREFIX}: {file}: line {number}"
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise ValueError(f"{where}: expected a JSON object, but got JSON that is nested too deeply") from error
        except ValueError as error:
            raise ValueError(f"{where}: expected a JSON object, but got: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, but got {reprlib.repr(row)}")  # noqa: TRY004
        yield where, row
    if is_empty:
        raise ValueError(f"{PREFIX}: {file}: expected a line with a JSON object, but got none")


def _split(blocks: Iterable[str]) -> Iterator[str]:
    """Lines; str.splitlines would also split at characters that a JSON string may have."""
    held: list[str] = []
    for block in blocks:
        first, *lines = block.split("\n")
        held.append(first)
        for line in lines:
            yield "".join(held)
            held = [line]
    yield "".join(held)


def _needed(name: str, file: Path) -> ModuleType:
    """A package that only some sources need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f"{PREFIX}: {file}: expected the package {package}, which reads such files, to be installed: "
            f"pip install {package}"
        ) from error


def table_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a Parquet or Arrow file, and where each stands; of the columns only the one that is looked at."""
    where = f"{PREFIX}: {file}"
    arrow: Any = _needed("pyarrow", file)
    if int(arrow.__version__.partition(".")[0]) < _OLDEST_PYARROW:
        raise ImportError(
            f"{where}: expected pyarrow {_OLDEST_PYARROW} or newer, as older ones may run code from a file, but got "
            f"{arrow.__version__}: pip install --upgrade pyarrow"
        )
    kind = "a Parquet file" if file.suffix.lower() == ".parquet" else "an Arrow file"
    rows = _parquet_batches(file, where) if file.suffix.lower() == ".parquet" else _arrow_batches(file, where)
    number = 0
    try:
        for batch in rows:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, _ROWS):
                for row in batch.slice(start, _ROWS).to_pylist():
                    number += 1
                    yield f"{where}: row {number}", {name: _without_nulls(value) for name, value in row.items()}
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: expected {kind}, but got: {error}") from error
    if not number:
        raise ValueError(f"{where}: expected a row, but got none")


def _column(names: Sequence[str], where: str) -> str:
    """The one column of a table that is looked at."""
    columns = [name for name in ("text", "messages") if name in names]
    if len(columns) != 1:
        got = "both" if columns else ", ".join(map(repr, names[:20])) or "no column"
        raise ValueError(f"{where}: expected either a column text or messages, but got {got}")
    return columns[0]


def _parquet_batches(file: Path, where: str) -> Iterator[Any]:
    parquet: Any = _needed("pyarrow.parquet", file)
    with parquet.ParquetFile(file) as table:
        yield from table.iter_batches(batch_size=_ROWS, columns=[_column(table.schema_arrow.names, where)])


def _arrow_batches(file: Path, where: str) -> Iterator[Any]:
    """Batches of a stream, as the package datasets writes it, or of a file with a footer."""
    arrow: Any = _needed("pyarrow", file)
    with arrow.memory_map(str(file)) as source:
        if source.read(len(_ARROW_FILE)) == _ARROW_FILE:
            table = arrow.ipc.open_file(source)
            batches: Iterable[Any] = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            source.seek(0)
            batches = table = arrow.ipc.open_stream(source)
        column = _column(table.schema.names, where)
        for batch in batches:
            yield batch.select([column])


def _without_nulls(value: Any) -> Any:
    """Messages without the keys that a table adds because other messages have them."""
    if not isinstance(value, list):
        return value
    return [
        {key: entry for key, entry in message.items() if entry is not None or key == "content"}
        if isinstance(message, dict)
        else message
        for message in value
    ]


def data_files(folder: Path) -> list[Path]:
    """The files of a data set's folder, of its split train where it has several."""
    where = f"{PREFIX}: {folder}"
    if (folder / "dataset_dict.json").is_file():
        splits = _json_list(folder / "dataset_dict.json", "splits")
        if "train" not in splits and len(splits) != 1:
            raise ValueError(
                f"{where}: expected a split train or only one, but got {', '.join(splits)}; name the folder of one"
            )
        folder /= "train" if "train" in splits else splits[0]
    state = folder / "state.json"
    if state.is_file():
        if _json_list(state, "_indices_data_files", missing=True):
            raise ValueError(
                f"{where}: expected a data set without indices; call flatten_indices() before save_to_disk()"
            )
        return [folder / name for name in _json_list(state, "_data_files", "filename")]

    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    for suffixes in (*((suffix,) for suffix in TABLE_SUFFIXES), LINE_SUFFIXES, (".txt",)):
        files = [path for path in found if path.suffix.lower() in suffixes]
        if files:
            break
    else:
        kinds = ", ".join(sorted({path.suffix or path.name for path in found})) or "no files"
        expected = ", ".join((*TABLE_SUFFIXES, *LINE_SUFFIXES, ".txt"))
        raise ValueError(f"{where}: expected files that end in {expected}, but got {kinds}")
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    files = by_split.get("train") or by_split.get("", [])
    if not files:
        raise ValueError(
            f"{where}: expected files of a split train, but got {', '.join(by_split)}; name one of its files"
        )
    parents = sorted({str(path.parent.relative_to(folder)) for path in files})
    if len(parents) > 1:
        raise ValueError(f"{where}: expected the files of one folder, but got files in {', '.join(parents)}; name one")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split_of(path: Path) -> str:
    """Of which split a file is by its name, as the package datasets takes it; "" where the name says nothing."""
    for split, words in (
        ("train", "train|training"),
        ("validation", "validation|valid|val|dev"),
        ("test", "test|eval"),
    ):
        if re.search(rf"(?<![a-z])({words})(?![a-z])", path.as_posix().lower()):
            return split
    return ""


def _json_list(file: Path, key: str, inner: str | None = None, *, missing: bool = False) -> list[str]:
    """The names of files or folders that a JSON file of a data set lists; each is in the folder itself."""
    where = f"{PREFIX}: {file}"
    try:
        document = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, but got: {error}") from error
    listed = document.get(key) if isinstance(document, dict) else None
    if listed is None and missing:
        return []
    names = listed if isinstance(listed, list) else []
    if inner is not None:
        names = [entry.get(inner) if isinstance(entry, dict) else None for entry in names]
    if (not names and not missing) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(f"{where}: expected {key} to name files beside it, but got {reprlib.repr(listed)}")
    return names


def _rows(shape: Sequence[int], read: Callable[[slice], Row], where: str, length: int) -> Iterator[Row]:
    """Ids and mask of each row of a matrix; of a vector, pieces of a length."""
    if len(shape) not in (1, 2) or 0 in shape:
        raise ValueError(f"{where}: expected token ids [windows, L] or [tokens], but got shape {list(shape)}")
    step = _ROWS if len(shape) == 2 else length
    for start in range(0, shape[0], step):
        ids, mask = read(slice(start, min(start + step, shape[0])))
        yield from zip(ids, mask, strict=True) if len(shape) == 2 else [(ids, mask)]


def safetensors_rows(file: Path, length: int) -> Iterator[Row]:
    """The rows of a safetensors file."""
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415  (not for whoever reads no tensors)

    where = f"{PREFIX}: {file}"
    try:
        with safe_open(str(file), framework="pt") as tensors:
            names = list(tensors.keys())
            if "input_ids" not in names:
                got = ", ".join(map(repr, names[:20])) or "no tensor"
                raise ValueError(f"{where}: expected a tensor 'input_ids', but got {got}")
            ids = tensors.get_slice("input_ids")
            mask = tensors.get_slice("attention_mask") if "attention_mask" in names else None
            if mask is not None and mask.get_shape() != ids.get_shape():
                raise ValueError(
                    f"{where}: expected attention_mask to have shape {ids.get_shape()}, as input_ids, but got shape "
                    f"{mask.get_shape()}"
                )

            def read(part: slice) -> Row:
                of_ids = ids[part]
                return of_ids, torch.ones(of_ids.shape, dtype=torch.int64) if mask is None else mask[part]

            yield from _rows(ids.get_shape(), read, where, length)
    except SafetensorError as error:
        raise ValueError(f"{where}: expected a safetensors file, but got: {error}") from error


def npy_rows(file: Path, length: int) -> Iterator[Row]:
    """The rows of an array's file."""
    where = f"{PREFIX}: {file}"
    numpy: Any = _needed("numpy", file)
    try:
        array = numpy.lib.format.open_memmap(file, mode="r")  # no pickle, other than numpy.load
    except (ValueError, OSError, OverflowError, TypeError, tokenize.TokenError) as error:
        raise ValueError(f"{where}: expected an array in .npy format, but got: {error}") from error
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: expected token ids to be integers, but got {array.dtype}")

    def read(part: slice) -> Row:
        ids = torch.from_numpy(array[part].astype("int64"))
        return ids, torch.ones_like(ids)

    yield from _rows(array.shape, read, where, length)

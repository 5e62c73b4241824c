"""What a run over a folder keeps on the disk until it is finished: what was asked, and every layer that is done.

    <output>.partial/
        run.json                    what was asked: recipe, source, calibration, format
        layers/00007.safetensors    a finished layer in our own format (:mod:`miniquant.formats.native`); its metadata
                                    have what the run says of it

Each file appears whole or not at all, so a run may end at any time, with kill -9 or on a full disk, and the next one
goes on from what is there. Layers are numbered as the plan has them.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from miniquant.checkpoint import read_header, read_json, read_tensor
from miniquant.formats import LayerGrid, Native
from miniquant.formats.gguf_file import GGUF_FILE
from miniquant.grid import QuantizedWeight
from miniquant.layer_file import replacing
from miniquant.modules import Site
from miniquant.ranks import Ranks
from miniquant.recipe import LayerOptions, Recipe
from miniquant.results import FinishedLayer, LayerResult

RUN = "run.json"
_LAYERS = "layers"
_FORMAT = "miniquant.finished-layer"
_VERSION = "2"
# What a file says of a layer beside its weight.
_FIGURES = ("tokens", "held_out_tokens", "ridge", "loss", "rtn_loss", "held_out_loss", "held_out_rtn_loss", "seconds")


def state_folder(output: Path) -> Path:
    """Where a run to a folder or file keeps what is done."""
    return output.with_name(f"{output.name}.partial")


def _finished_folder(folder: Path) -> Path:
    """Where a finished run's folder is while it is removed."""
    return folder.with_name(f".{folder.name}.done")


def remove_finished(folder: Path) -> None:
    """Removes what a run left that was killed while it removed its folder; its output is there, and whole."""
    shutil.rmtree(_finished_folder(folder), ignore_errors=True)


def read_asked(folder: Path) -> dict[str, Any] | None:
    """What was asked of the run that a folder is of; None where there is none.

    Raises:
        ValueError: where its file is damaged.
    """
    return read_json(folder / RUN) if (folder / RUN).is_file() else None


def check_state_folder(folder: Path) -> None:
    """Whether a folder may be a run's: it is not there, or has nothing else in it than a run writes.

    Raises:
        FileExistsError: where it has; it is not touched.
        NotADirectoryError: where it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(
            f"quantize_folder: expected {folder} to be a folder for finished layers, but got a file"
        )
    others = sorted(path.name for path in folder.iterdir() if not _is_ours(path)) if folder.is_dir() else []
    if others:
        raise FileExistsError(
            f"quantize_folder: expected {folder} to be free for finished layers, but got {others[0]} there (move it, "
            "or choose another output)"
        )


def _is_ours(path: Path) -> bool:
    """Whether a run may have written a file of its folder, before it was killed perhaps."""
    return (
        path.name in (RUN, _LAYERS, GGUF_FILE) or re.fullmatch(r"\.(run\.json|model\.gguf)\.\w+", path.name) is not None
    )


def kept_layers(folder: Path) -> set[int]:
    """The numbers of the layers that a run has finished."""
    return {int(file.stem) for file in (folder / _LAYERS).glob("[0-9]*.safetensors") if file.stem.isdecimal()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What was asked of an earlier run and is not now, a line each; empty where the same is asked."""
    lines = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key == "recipe" and isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"recipe: {line}" for line in Recipe.from_dict(new).differences(Recipe.from_dict(old))]
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            names = [name for name in dict.fromkeys((*old, *new)) if old.get(name) != new.get(name)]
            lines += [f"{key}.{name}: {_shown(new.get(name))}, before {_shown(old.get(name))}" for name in names]
        else:
            lines.append(f"{key}: {_shown(new)}, before {_shown(old)}")
    return lines


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class RunState:
    """The folder of a run: a :class:`miniquant.results.LayerStore`. While entered, no other process may use it.

    A layer is written, and its bytes waited for, while the run goes on with the next one: a thread does that for one
    layer at a time.

    Args:
        folder: path of it; made where it is missing.
        names: of all layers of the plan.

    Raises:
        BlockingIOError: when entered, where another process uses it.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self._files = {name: folder / _LAYERS / f"{number:05}.safetensors" for number, name in enumerate(names)}
        self._kept: set[str] = set()
        self._lock: int | None = None
        self._writer = ThreadPoolExecutor(1, "miniquant-state")
        self._writing: tuple[str, Future[None]] | None = None  # a layer's name, and when it is done

    def __enter__(self) -> "RunState":  # noqa: PYI034  (Self is of Python 3.11)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise BlockingIOError(
                f"quantize_folder: expected to be alone with {self.folder}, but another process works on it"
            ) from None
        for left in (*filter(_is_ours, self.folder.glob(".*")), *(self.folder / _LAYERS).glob(".*")):
            left.unlink()  # what a process was writing that was killed
        self._kept = {name for name, file in self._files.items() if file.is_file()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.shutdown()
        if self._lock is not None and self.folder.exists() and not (self.folder / RUN).is_file():
            self._remove_all()  # nothing was begun
            with suppress(OSError):
                self.folder.rmdir()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def begin(self, asked: Mapping[str, Any]) -> None:
        """Starts anew: removes what is there, and writes what is asked."""
        self._remove_all()
        self._kept.clear()
        with _naming("what is asked", self.folder / RUN):
            (self.folder / _LAYERS).mkdir()
        self.note(asked)

    def note(self, asked: Mapping[str, Any]) -> None:
        """Writes what is asked, in place of what was."""
        with _naming("what is asked", self.folder / RUN), replacing(self.folder / RUN) as new:
            new.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")

    def _remove_all(self) -> None:
        for path in filter(_is_ours, self.folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def settle(self) -> None:
        """Waits until the last layer that was saved is on the disk.

        Raises:
            OSError: where it cannot be written; the message names the layer.
        """
        if self._writing is not None:
            name, written = self._writing
            self._writing = None
            try:
                written.result()
            except BaseException:
                self._kept.discard(name)
                raise

    def finish(self) -> None:
        """Removes the folder: at one moment it is there, and whole, at the next it is not."""
        self.settle()
        remove_finished(self.folder)
        self.folder.rename(_finished_folder(self.folder))
        remove_finished(self.folder)

    def __len__(self) -> int:
        """How many layers are done."""
        return len(self._kept)

    def __contains__(self, name: object) -> bool:
        return name in self._kept

    def kept(self) -> set[str]:
        """The names of the layers that are done."""
        return set(self._kept)

    def save(self, layer: FinishedLayer) -> None:
        """Begins to write a layer's file, when the one before is written.

        Raises:
            OSError: where that one cannot be written; the message names its layer.
        """
        content = self._content(layer)
        self.settle()
        name = layer.result.name
        self._writing = name, self._writer.submit(self._write, name, content)
        self._kept.add(name)

    def _content(self, layer: FinishedLayer) -> bytes:
        """Of a layer's file."""
        from safetensors.torch import save  # noqa: PLC0415  (not for whoever saves no layers)

        done, form = layer.result, Native()
        grid = LayerGrid.of(done.quantized)
        said = {
            "name": done.name,
            "options": done.options.to_dict(),
            "config": form.config({done.name: grid}),
            "method": done.method,
            **{figure: getattr(done, figure) for figure in _FIGURES},
            "notes": list(done.notes),
            "found_ridge": layer.found_ridge,
            "searched": layer.searched,
            "waited": layer.waited,
        }
        metadata = {"format": _FORMAT, "version": _VERSION, "layer": json.dumps(said)}
        content: bytes = save(form.tensors(done.name, done.quantized), metadata=metadata)
        return content

    def _write(self, name: str, content: bytes) -> None:
        file = self._files[name]
        with _naming(f"layer {name!r}", file):
            file.parent.mkdir(exist_ok=True)
            with replacing(file) as new:
                new.write_bytes(content)

    def load(self, site: Site, options: LayerOptions) -> FinishedLayer:
        """A layer from its file.

        Raises:
            ValueError: where the file is damaged, or of another layer.
            OSError: where it cannot be read.
        """
        said, quantized = self._read(site.name)
        stated = said.get("options")
        if isinstance(stated, dict) and stated.get("unseen") == "error":  # it saw enough, whatever is asked now
            stated = {**stated, "unseen": options.unseen}
        if stated != options.to_dict() or tuple(quantized.codes.shape) != (site.rows, site.columns):
            raise self._damaged(site.name, f"one of shape {[site.rows, site.columns]} with options {options}")
        try:
            result = LayerResult(
                name=site.name,
                site=site,
                options=options,
                quantized=quantized,
                method=said["method"],
                notes=tuple(said["notes"]),
                **{figure: said[figure] for figure in _FIGURES},
            )
            return FinishedLayer(result, said["found_ridge"], said["searched"], said["waited"])
        except KeyError as error:
            raise self._damaged(site.name, f"with {error.args[0]!r} in its metadata") from None

    def quantized(self, name: str) -> QuantizedWeight:
        """The weight of a finished layer.

        Raises:
            ValueError, OSError: as of :meth:`load`.
        """
        return self._read(name)[1]

    def _read(self, name: str) -> tuple[dict[str, Any], QuantizedWeight]:
        self.settle()
        try:
            header = read_header(self._files[name])
            said = json.loads(header.metadata.get("layer", "null"))
        except (ValueError, RecursionError) as error:
            raise self._damaged(name, "as a run writes it", str(error)) from error
        identity = (header.metadata.get("format"), header.metadata.get("version"))
        if identity != (_FORMAT, _VERSION) or not isinstance(said, dict) or said.get("name") != name:
            raise self._damaged(name, "as a run writes it")
        form = Native()
        try:
            tensors = {key: read_tensor(stored) for key, stored in header.tensors.items()}
            grid = form.layers(said.get("config", {}), tensors)[name]
            return said, form.read(name, tensors, grid)
        except (ValueError, KeyError) as error:
            raise self._damaged(name, "as a run writes it", str(error)) from error

    def _damaged(self, name: str, expected: str, why: str = "another file") -> ValueError:
        return ValueError(
            f"quantize_folder: {self._files[name]}: expected layer {name!r} {expected}, but got: {why} (remove the "
            "file, and resume=True quantizes the layer again)"
        )


class SharedState:
    """Layers of a run of several ranks: those that rank 0 has from an earlier one are given to all.

    Args:
        state: of this rank: the run's of rank 0, of any other a folder of its own for as long as the run takes.
        ranks: of the run.
    """

    def __init__(self, state: RunState, ranks: Ranks) -> None:
        self._state, self._ranks = state, ranks
        self._earlier: set[str] = ranks.from_first(state.kept)

    def __contains__(self, name: object) -> bool:
        return name in self._earlier

    def load(self, site: Site, options: LayerOptions) -> FinishedLayer:
        """A layer that rank 0 has."""

        def loaded() -> FinishedLayer:
            layer = self._state.load(site, options)
            return replace(layer, result=replace(layer.result, site=None))  # type: ignore[arg-type]  # modules stay

        layer = self._ranks.from_first(loaded)
        layer = replace(layer, result=replace(layer.result, site=site))
        if self._ranks.rank != 0:
            self._state.save(layer)
        return layer

    def save(self, layer: FinishedLayer) -> None:
        """Keeps a layer on this rank's disk, as of :meth:`RunState.save`."""
        self._state.save(layer)


@contextmanager
def _naming(what: str, file: Path) -> Iterator[None]:
    """Errors of writing say what was to be kept, and where."""
    try:
        yield
    except OSError as error:
        message = f"quantize_folder: cannot keep {what}: {os.strerror(error.errno or 0)}"
        raise OSError(error.errno, message, str(file)) from error

"""From a model's folder to a folder or file that engines load: quantized, or resumed where a run ended.

Everything is checked before the first forward pass: recipe, format, tokenizer of a GGUF file, room on the disk. What is
done is kept in ``<output>.partial`` (:mod:`miniquant.state`), a file for each layer, until the output is there, whole,
beside it. So a run may end in any way, by Ctrl-C, kill -9 or a full disk, and with ``resume=True`` goes on from the
last finished layer to the same bytes.
"""

import copy
import errno
import hashlib
import json
import logging
import math
import os
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from miniquant import units
from miniquant.architecture import transformers_package
from miniquant.batches import HELD_OUT, held_out_of
from miniquant.calibration import Calibration, load_calibration, needs_tokenizer
from miniquant.calibration import Source as CalibrationSource
from miniquant.checkpoint import (
    CONFIG,
    MAX_SHARD_BYTES,
    Checkpoint,
    CheckpointWriter,
    check_output_folder,
    read_json,
)
from miniquant.errors import foreign
from miniquant.float_models import load_tokenizer, longest_window, vocabulary_of
from miniquant.formats import (
    Format,
    Gguf,
    LayerFormat,
    Native,
    format_named,
    layer_format,
)
from miniquant.formats.gguf_file import GGUF_FILE, write_gguf
from miniquant.grid import QuantizedWeight, dequantize
from miniquant.layer_file import SCALE_DTYPES, dtype_names
from miniquant.lazy import LazyModel
from miniquant.modules import Site
from miniquant.output import (
    FileLayer,
    GgufOptions,
    OutputPlan,
    Source,
    check_apart,
    check_output,
    holds_a_gguf_file,
    plan_output,
    stored_weight,
    write_folder,
)
from miniquant.plan import as_recipe, plan_model
from miniquant.quantize import quantize_planned
from miniquant.ranks import Ranks
from miniquant.recipe import FormatName, LayerOptions, Recipe
from miniquant.report import Report, as_dict
from miniquant.report_page import write_report
from miniquant.results import LayerResult, ModelResult, Stopped, TooFewTokensError
from miniquant.rotated import RotatedCheckpoint, check_predictions
from miniquant.state import (
    RUN,
    RunState,
    SharedState,
    check_state_folder,
    differences,
    kept_layers,
    read_asked,
    remove_finished,
    state_folder,
)

# bfloat16 is chosen where a product takes at most this part of the time that it takes in float32.
_FASTER = 0.8
_VERSION = 2
_SAMPLE = 4096  # bytes of each tensor that tell one source from another

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FolderResult:
    """A quantized model on the disk.

    Attributes:
        result: of the layers; their weights are in the files.
        folder: that was written.
        format: of the files.
        dtype: in which the model ran.
        bytes_before: of the source's files of weights.
        bytes_after: of the files of weights that were written.
        notes: on the run: what readers of the format will not do, what a resumed run took from the one before.
    """

    result: ModelResult
    folder: Path
    format: str
    dtype: torch.dtype
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]


def quantize_folder(
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    recipe: Recipe | LayerOptions | Mapping[str, Any] | None = None,
    *,
    format: FormatName | None = None,  # noqa: A002  (what users call it)
    calibration: CalibrationSource | Calibration | None = None,
    tokens: int = 32768,
    sequence_length: int = 2048,
    held_out: float | None = None,
    output_embeddings: bool = False,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    lazy: bool = True,
    trust_remote_code: bool = False,
    gguf: GgufOptions | None = None,
    report: bool = True,
    progress: Callable[[LayerResult, int, int], None] | None = None,
    stop: threading.Event | Callable[[], bool] | None = None,
    ranks: Ranks | None = None,
) -> FolderResult:
    """Quantizes the model of a folder and writes it in a format that engines load.

    Layers that the format cannot hold are left as they are and listed with the reason (:mod:`miniquant.output`).

    Args:
        model_dir: a folder as transformers saves it, with safetensors files.
        output_dir: path of the folder to write, that does not exist or is empty. A GGUF file is ``model.gguf`` in it.
        recipe: as of :func:`miniquant.quantize_model`.
        format: "compressed-tensors", "gptq", "gptq_v2", "gguf" or "miniquant"; None is the recipe's, or else
            "compressed-tensors".
        calibration: a source of :func:`miniquant.load_calibration`, or what it gave; None is the text that ships with
            the package.
        tokens: of such a source, for calibration.
        sequence_length: of such a source; at most what the model takes.
        held_out: the part of the tokens that is only used to judge, beside those for calibration; None is 0.05, or what
            a calibration has.
        output_embeddings: whether the layer that gives the logits is quantized.
        dtype: in which the model runs; "auto" or None is what is fast here, float32 or bfloat16. Weights are quantized
            as they are stored.
        device: on which it runs.
        resume: whether to go on where a run to the same folder ended, if one did.
        overwrite: whether a model's folder that is there is replaced, and an unfinished run to it forgotten.
        max_shard_bytes: of a file of weights.
        lazy: whether a block is in memory at a time; otherwise the whole model is.
        trust_remote_code: whether code from the folder may run, and is copied.
        gguf: of a GGUF file.
        report: whether report.json and report.html (:mod:`miniquant.report`) are written beside the model.
        progress: called as ``progress(layer, number, of)`` after each layer.
        stop: an event, or a function that says True: ends the run at the boundary of a layer, with what is done kept.
        ranks: the processes of the run (:meth:`miniquant.ranks.Ranks.joined`), which all call this with equal
            arguments; rank 0 keeps finished layers and writes. None is this one alone.

    Raises:
        ValueError, TypeError: for a bad argument, a model or recipe that does not fit the format, and a run to resume
            of which something else was asked; before the first forward pass.
        FileExistsError: where the output or an unfinished run is there.
        OSError: where a file cannot be read or written; what is done is kept.
        miniquant.results.Stopped: where `stop` said so.
        miniquant.ranks.RankError: where ranks differ in version, recipe, model or tokens, or cannot share this model.
        miniquant.QuantizationError, miniquant.walk.WalkError: as of :func:`miniquant.quantize_model`.
        ImportError: without the packages transformers, or gguf where it is needed.

    Example:
        >>> quantize_folder("SmolLM2-135M", "SmolLM2-135M-4bit", LayerOptions(bits=4, group_size=64))
    """
    plan = plan_folder(
        model_dir,
        output_dir,
        recipe,
        format=format,
        calibration=calibration,
        tokens=tokens,
        sequence_length=sequence_length,
        held_out=held_out,
        output_embeddings=output_embeddings,
        dtype=dtype,
        device=device,
        resume=resume,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        lazy=lazy,
        trust_remote_code=trust_remote_code,
        gguf=gguf,
        ranks=ranks,
    )
    for note in plan.notes if plan.is_first else ():
        logger.warning("%s", note)
    return plan.run(progress, stop.is_set if isinstance(stop, threading.Event) else stop, report=report)


def plan_folder(
    model_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    recipe: Recipe | LayerOptions | Mapping[str, Any] | None = None,
    *,
    format: FormatName | None = None,  # noqa: A002  (as of quantize_folder)
    calibration: CalibrationSource | Calibration | None = None,
    tokens: int = 32768,
    sequence_length: int = 2048,
    held_out: float | None = None,
    output_embeddings: bool = False,
    dtype: torch.dtype | Literal["auto"] | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    lazy: bool = True,
    trust_remote_code: bool = False,
    gguf: GgufOptions | None = None,
    ranks: Ranks | None = None,
) -> "FolderPlan":
    """All checks of :func:`quantize_folder`, whose arguments these are, and what it would do. Nothing is written."""
    recipe = as_recipe(recipe)
    form, options = _form(format or recipe.format or "compressed-tensors", gguf)
    part, _ = held_out_of(HELD_OUT if held_out is None else held_out)
    checkpoint, output = Checkpoint(model_dir), Path(output_dir)
    _check_float(checkpoint)
    check_apart("quantize_folder", checkpoint.folder, output)
    is_first = ranks is None or ranks.rank == 0
    before = _unfinished(output, resume=resume, overwrite=overwrite) if is_first else None
    if before is None and is_first:
        check_output(output, form, overwrite=overwrite)
    place = available_device(device)
    software = _software()  # imports what building the model needs, before ranks wait for the first one

    def choose() -> torch.dtype:
        return _dtype(dtype, checkpoint, place, before)

    chosen = choose() if ranks is None else ranks.from_first(choose)
    if recipe.rotation:
        checkpoint = RotatedCheckpoint(checkpoint.folder, trust_remote_code=trust_remote_code)
    source = LazyModel(checkpoint, chosen, place, trust_remote_code=trust_remote_code, keep=not lazy)
    layers = plan_model(source.model, recipe, output_embeddings=output_embeddings)
    planned = plan_output(source, layers, recipe, form, options)
    if not isinstance(calibration, Calibration):
        calibration = _calibration(
            calibration, source, tokens, sequence_length, part, trust_remote_code=trust_remote_code
        )
        held_out = None if calibration.held_out else part
    asked = {
        "version": _VERSION,
        "format": form.name,
        "gguf": vars(options) if isinstance(form, Gguf) else None,
        "recipe": replace(recipe, format=None).to_dict(),
        "output_embeddings": output_embeddings,
        "dtype": dtype_names(chosen),
        "device": place.type,
        "source": _fingerprint(checkpoint),
        "calibration": _identity(calibration, held_out),
        "software": software,
    }
    if ranks is not None:
        _check_ranks(ranks, asked)
    note = checkpoint.note if isinstance(checkpoint, RotatedCheckpoint) and not output_embeddings else None
    notes = (*planned.warnings, *(() if note is None else (note,)), *_check_same(output, before, asked))
    if before is not None:
        asked["software"] = before.get("software")
    plan = FolderPlan(
        source, output, form, planned, recipe, calibration, held_out, chosen, asked, before is not None, notes,
        max_shard_bytes, overwrite, trust_remote_code, ranks,
    )  # fmt: skip
    if plan.is_first:
        plan.check_room()
    return plan


@dataclass(frozen=True, eq=False)
class FolderPlan:
    """A run of :func:`quantize_folder` that is checked, and not started.

    Attributes:
        source: the model, of which nothing is in memory yet.
        output: path of the folder to write.
        form: of the files.
        planned: what is quantized, and what the files will have.
        recipe: that was asked for.
        calibration: batches of tokens.
        held_out: the part of these that is held out; None: what the calibration has.
        dtype: in which the model will run.
        asked: what tells this run from another; the software is that of the run's beginning.
        resumed: whether it goes on with finished layers of an earlier one.
        notes: what readers of the format will not do, and what may change bytes of a resumed run.
        max_shard_bytes: of a file of weights.
        overwrite: whether a model's folder that is there is replaced.
        trust_remote_code: whether Python files are copied.
        ranks: the processes of the run; None is this one alone.
    """

    source: LazyModel
    output: Path
    form: LayerFormat
    planned: OutputPlan
    recipe: Recipe
    calibration: Calibration
    held_out: float | None
    dtype: torch.dtype
    asked: Mapping[str, Any]
    resumed: bool
    notes: tuple[str, ...]
    max_shard_bytes: int
    overwrite: bool
    trust_remote_code: bool
    ranks: Ranks | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process keeps finished layers and writes the output."""
        return self.ranks is None or self.ranks.rank == 0

    @property
    def bytes_before(self) -> int:
        """Of the source's tensors."""
        return self.source.checkpoint.nbytes

    @property
    def bytes_after(self) -> int:
        """Of the output's tensors, about."""
        return self.planned.contents.nbytes(self.form)

    @contextmanager
    def state(self) -> Iterator[RunState]:
        """What is kept of the run on the disk until it is finished; by a rank other than the first for itself."""
        names = [site.name for site, _ in self.planned.plan.layers]
        if self.is_first:
            with RunState(state_folder(self.output), names) as state:
                yield state
            return
        with (
            tempfile.TemporaryDirectory(prefix="miniquant-rank-") as folder,
            RunState(Path(folder), names) as state,
        ):
            yield state

    def check_room(self) -> None:
        """Refuses to start where the disk has no room for finished layers and for the output.

        Raises:
            OSError: then.
        """
        kept = kept_layers(state_folder(self.output)) if self.resumed else set()
        numbers = {site.name: number for number, (site, _) in enumerate(self.planned.plan.layers)}
        native = Native()
        layers = sum(
            native.nbytes(name, grid)
            for name, grid in self.planned.contents.grids.items()
            if numbers[self.planned.layers[name].site] not in kept
        )
        needed = layers + self.bytes_after
        if not isinstance(self.form, Gguf):
            needed += min(self.bytes_after, self.max_shard_bytes)  # a shard is joined from parts
        place = next(parent for parent in (self.output.resolve(), *self.output.resolve().parents) if parent.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"quantize_folder: expected {needed / 1e9:.2f} GB of free space, {layers / 1e9:.2f} of them for "
                f"finished layers until the end, but got {free / 1e9:.2f} GB",
                str(place),
            )

    def run(
        self,
        progress: Callable[[LayerResult, int, int], None] | None = None,
        stop: Callable[[], bool] | None = None,
        *,
        report: bool = True,
    ) -> FolderResult:
        """Quantizes and writes; as of :func:`quantize_folder`."""
        planned, source = self.planned, self.source
        notes = list(self.notes)
        if isinstance(source.checkpoint, RotatedCheckpoint):
            self._check_rotation(source.checkpoint)
        with self.state() as state:
            if self.resumed:
                notes.append(f"{len(state)} of {len(planned.plan.layers)} layers are from a run that had ended before")
                state.note(self.asked)
            else:
                state.begin(self.asked)
            done = _Done(planned, state)
            source.restore = done.restore
            store = state if self.ranks is None else SharedState(state, self.ranks)

            def finished(layer: LayerResult, number: int, of: int) -> None:
                done.add(layer.name)
                if progress is not None:
                    progress(layer, number, of)

            with _saying_what_is_kept(state, planned):
                with source:
                    result = quantize_planned(
                        source.model,
                        self.calibration,
                        planned.plan,
                        held_out=self.held_out,
                        scale_dtype=planned.scale_dtype,
                        weights=_stored_weights(planned, source.checkpoint, self.dtype),
                        progress=finished,
                        store=store,
                        stop=stop,
                        ranks=self.ranks,
                    )
                if not self.is_first:
                    assert self.ranks is not None  # noqa: S101
                    self.ranks.wait()
                    size = self.bytes_after
                    return FolderResult(
                        result, self.output, self.form.name, self.dtype, self.bytes_before, size, tuple(notes)
                    )
                if self.ranks is not None:
                    sent = units.size(self.ranks.bytes_sent)
                    notes.append(f"{self.ranks.count} ranks shared the batches; rank 0 sent {sent} to the others")
                files = _Files(self.output, source.checkpoint, planned, self.form, state)
                size = files.write(self.max_shard_bytes, overwrite=self.overwrite, code=self.trust_remote_code)
                if report:
                    write_report(self.output, self._report(result, size, notes))
            state.finish()
            if self.ranks is not None:
                self.ranks.wait()
        said = tuple(dict.fromkeys(notes))
        return FolderResult(result, self.output, self.form.name, self.dtype, self.bytes_before, size, said)

    def _check_rotation(self, checkpoint: RotatedCheckpoint) -> None:
        """Checks on the first window that the turned model predicts what the model does."""
        input_ids = self.calibration.batches[0].get("input_ids")
        if input_ids is None:
            raise ValueError(
                "quantize_folder: expected a calibration with input_ids, on which a rotation is checked, but got none"
            )
        device = torch.device(str(self.asked["device"]))
        check_predictions(checkpoint.folder, checkpoint, input_ids, device, trust_remote_code=self.trust_remote_code)

    def _report(self, result: ModelResult, size: int, notes: Iterable[str]) -> Report:
        """The report of a run whose output is written."""
        return as_dict(
            result,
            model=self.output.resolve().name,
            format=self.form.name,
            recipe=self.recipe,
            calibration=self.calibration,
            settings={
                "source": self.source.checkpoint.folder.resolve().name,
                "dtype": dtype_names(self.dtype),
                "scale_dtype": dtype_names(self.planned.scale_dtype),
                "device": str(self.asked["device"]),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "output_embeddings": bool(self.asked["output_embeddings"]),
                "restored_layers": sum(layer.restored for layer in result.layers.values()),
            },
            bytes_before=self.bytes_before,
            bytes_after=size,
            peak_memory=peak_memory(),
            notes=notes,
        )


# What is asked


def _form(name: str, gguf: GgufOptions | None) -> tuple[LayerFormat, GgufOptions]:
    """The format, and what a GGUF file is told."""
    form = layer_format(name)
    if not isinstance(form, Gguf):
        if gguf is not None:
            raise ValueError(f"quantize_folder: expected gguf with the format gguf only, but got it with {name!r}")
        return form, GgufOptions()
    options = gguf or GgufOptions()
    return Gguf(exact=options.exact), options


def available_device(asked: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: where it is not.
    """
    try:
        device = torch.device(asked)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"quantize_folder: expected device to be one that torch has here, but got {asked!r} ({error})"
        ) from error
    return device


def _check_float(checkpoint: Checkpoint) -> None:
    """Refuses a model that is quantized already."""
    config = checkpoint.config.get("quantization_config")
    if config is not None:
        method = config.get("quant_method") if isinstance(config, Mapping) else None
        raise ValueError(
            f"quantize_folder: {checkpoint.folder / CONFIG}: expected a model that is not quantized, but got "
            f"quantization_config of {method!r} (convert_folder takes it to another format)"
        )


def _unfinished(output: Path, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """What was asked of the run to go on with; None where the run starts anew."""
    folder = state_folder(output)
    remove_finished(folder)
    check_state_folder(folder)
    asked = read_asked(folder)
    if asked is None or resume:
        return asked
    done = len(kept_layers(folder))
    if done and not overwrite:
        raise FileExistsError(
            f"quantize_folder: expected no unfinished run to {output}, but got {folder} with {done} finished layers "
            "(go on with resume=True, or forget it with overwrite=True)"
        )
    return None


def _check_same(output: Path, before: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> list[str]:
    """Refuses to go on with a run of which something else was asked.

    Where layers that see too few tokens were an error, so that none is done, they may be dealt with in another way.

    Returns:
        Notes: what may change bytes, as other versions of libraries do.
    """
    if before is None:
        return []
    known = {"software": before.get("software"), "recipe": _with_errors_of(asked["recipe"], before.get("recipe"))}
    lines = differences(before, {**asked, **known})
    if lines:
        listed = "".join(f"\n  {line}" for line in lines)
        raise ValueError(
            f"quantize_folder: {state_folder(output) / RUN}: expected the run to resume to be of the same recipe, "
            f"source and calibration, but got (ask for the same, or start anew with overwrite=True):{listed}"
        )
    software = differences({"software": before.get("software")}, {"software": asked["software"]})
    return [f"layers may differ from those of one run: {line}" for line in software]


def _with_errors_of(recipe: Mapping[str, Any], before: Any) -> Mapping[str, Any]:
    """A recipe with ``unseen = "error"`` wherever the one before, if it has the same rules, says that."""
    options = _options_of(before)
    if len(options) != len(_options_of(recipe)):
        return recipe
    recipe = copy.deepcopy(dict(recipe))
    for new, old in zip(_options_of(recipe), options, strict=True):
        if "unseen" in new and old.get("unseen") == "error":
            new["unseen"] = "error"
    return recipe


def _options_of(recipe: Any) -> list[dict[str, Any]]:
    """The parts of a recipe, as JSON has it, that state options; none where it is damaged."""
    parts = [recipe.get("defaults"), *recipe["rules"]] if isinstance(recipe, Mapping) and "rules" in recipe else []
    return parts if all(isinstance(part, dict) for part in parts) else []


def peak_memory() -> int:
    """The most bytes of memory that the process held so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _software() -> dict[str, Any]:
    """What decides bits beside what is asked."""
    return {
        "miniquant": str(torch.ops.miniquant.version()),
        "torch": torch.__version__,
        "transformers": transformers_package().__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _check_ranks(ranks: Ranks, asked: Mapping[str, Any]) -> None:
    """Refuses ranks of which another thing is asked, or that have other software."""
    of_machine = ("cpu", "threads")
    software = {name: value for name, value in asked["software"].items() if name not in of_machine}
    ranks.check_same({**{key: value for key, value in asked.items() if key != "software"}, **software})


def _fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    """What tells one source from another: headers of its files, and the first values of every tensor."""
    values = hashlib.sha256()
    for file in checkpoint.files:
        with file.open("rb", buffering=0) as stream:
            for tensor in checkpoint.tensors.values():
                if tensor.file == file:
                    stream.seek(tensor.offset)
                    values.update(stream.read(min(tensor.nbytes, _SAMPLE)))
    return {"headers": checkpoint.fingerprint(), "values": values.hexdigest()}


def _identity(calibration: Calibration, held_out: float | None) -> dict[str, Any]:
    """What tells one calibration from another."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in value:
                digest.update(f"{name}:".encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            digest.update(repr(value).encode())

    add(calibration.batches)
    add(calibration.held_out)
    return {
        "sha256": digest.hexdigest(),
        "tokens": calibration.tokens,
        "held_out_tokens": calibration.held_out_tokens,
        "held_out": held_out,
    }


# The dtype in which the model runs


def _dtype(
    asked: torch.dtype | str | None, checkpoint: Checkpoint, device: torch.device, before: Mapping[str, Any] | None
) -> torch.dtype:
    """What is asked for; that of the run to go on with; or what is fast."""
    named = {dtype_names(dtype): dtype for dtype in SCALE_DTYPES}
    if asked not in (None, "auto"):
        if asked not in SCALE_DTYPES:
            raise ValueError(
                f"quantize_folder: expected dtype to be {dtype_names(*SCALE_DTYPES)} or 'auto', but got {asked!r}"
            )
        return asked
    if before is not None and before.get("dtype") in named:
        return named[before["dtype"]]
    stored = {tensor.dtype for tensor in checkpoint.tensors.values()}
    return torch.float64 if torch.float64 in stored else fast_dtype(device)


def fast_dtype(device: torch.device) -> torch.dtype:
    """float32, or bfloat16 where products take less time in it on a device, which is measured."""
    seconds = {dtype: _seconds_of_product(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    chosen = torch.bfloat16 if seconds[torch.bfloat16] <= _FASTER * seconds[torch.float32] else torch.float32
    logger.info(
        "the model runs in %s: a product takes %.2f ms in float32, %.2f ms in bfloat16",
        *(dtype_names(chosen), 1e3 * seconds[torch.float32], 1e3 * seconds[torch.bfloat16]),
    )
    return chosen


def _seconds_of_product(dtype: torch.dtype, device: torch.device) -> float:
    """Of a product as a Linear has it: the least of five, after a first one."""
    inputs = torch.ones(512, 1024, dtype=dtype, device=device)
    weight = torch.ones(1024, 1024, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        float(nn.functional.linear(inputs, weight)[0, 0])  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _stored_weights(planned: OutputPlan, checkpoint: Checkpoint, dtype: torch.dtype) -> Callable[[Site], Tensor] | None:
    """Reads weights as they are stored, where the model holds them with fewer bits; None where it does not."""
    layers: dict[str, list[FileLayer]] = {}
    for layer in planned.layers.values():
        layers.setdefault(layer.site, []).append(layer)

    def is_wider(site: str) -> bool:
        stored = checkpoint.read_dtype(layers[site][0].source)
        return torch.promote_types(stored, dtype) != dtype

    if not any(map(is_wider, layers)):
        return None

    def read(site: Site) -> Tensor:
        if not is_wider(site.name) or layers[site.name][0].expert is not None:
            return site.read()
        return stored_weight(site, layers[site.name], checkpoint).float()

    return read


# The model and its calibration


class _Done:
    """The layers that a run has come past so far: what a parameter is to have that is read once more.

    Layers that an earlier run finished do not count until this one comes to them: the ones before them are calibrated
    on the weights as they were.
    """

    def __init__(self, planned: OutputPlan, state: RunState) -> None:
        self._state = state
        self._names: set[str] = set()
        self._sites: dict[str, list[Site]] = {}
        for site, _ in planned.plan.layers:
            self._sites.setdefault(site.parameter_name, []).append(site)

    def add(self, name: str) -> None:
        """Says that a layer is done."""
        self._names.add(name)

    def restore(self, parameter_name: str) -> None:
        """Writes the layers of a parameter that are done."""
        for site in self._sites.get(parameter_name, ()):
            if site.name in self._names:
                site.write(dequantize(self._state.quantized(site.name), dtype=site.dtype))


def _calibration(
    given: CalibrationSource | None,
    source: Source,
    tokens: int,
    sequence_length: int,
    part: float,
    *,
    trust_remote_code: bool,
) -> Calibration:
    """Batches of tokens, with those to judge by beside them."""
    longest = longest_window(source.model)
    notes: tuple[str, ...] = ()
    if longest is not None and longest < sequence_length:
        notes = (f"windows have {longest} tokens, as many as the model takes, instead of {sequence_length}",)
        sequence_length = longest
    found = load_calibration(
        given,
        _tokenizer(source.checkpoint.folder, given, trust_remote_code=trust_remote_code),
        tokens=tokens,
        sequence_length=sequence_length,
        held_out_tokens=math.ceil(part * tokens),
        vocabulary=vocabulary_of(source.model),
    )
    return replace(found, notes=(*notes, *found.notes))


def _tokenizer(folder: Path, given: CalibrationSource | None, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a folder; None where no text is read."""
    if not needs_tokenizer(given):
        return None
    try:
        return load_tokenizer((folder,), trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise ValueError(
            f"quantize_folder: {folder}: expected a tokenizer for calibration with texts, but got: "
            f"{foreign(error.__cause__ or error)} (calibrate on a tensor file of token ids)"
        ) from error


# What is written


@contextmanager
def _saying_what_is_kept(state: RunState, planned: OutputPlan) -> Iterator[None]:
    """What ends a run says how to go on."""
    try:
        yield
    except (OSError, Stopped, TooFewTokensError, KeyboardInterrupt) as error:
        with suppress(OSError):  # a layer that cannot be written is not counted
            state.settle()
        said = f"{len(state)} of {len(planned.plan.layers)} layers are kept in {state.folder}: go on with resume=True"
        if isinstance(error, TooFewTokensError):
            raise TooFewTokensError(f"{error} ({said} and another unseen)", error.layers, error.result) from error
        if isinstance(error, Stopped):
            raise Stopped(f"quantize_folder: stopped; {said}", error.result) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror} ({said})", error.filename) from error
        logger.warning("%s: %s", type(error).__name__, said)
        raise


@dataclass(frozen=True, eq=False)
class _Files:
    """The output of a run whose layers are done."""

    output: Path
    checkpoint: Checkpoint
    planned: OutputPlan
    form: LayerFormat
    state: RunState

    def write(self, max_shard_bytes: int, *, overwrite: bool, code: bool) -> int:
        """Writes the output, which appears whole; gives the bytes of its weights."""
        if isinstance(self.form, Gguf):
            return self._write_gguf(overwrite=overwrite)
        form = format_named(self.form.name)
        ours = self._is_ours(form)
        with CheckpointWriter(self.output, max_shard_bytes=max_shard_bytes, overwrite=overwrite or ours) as writer:
            write_folder(writer, form, self.planned.contents, self._layer, self._tensor, code=code)
            return writer.tensor_bytes

    def _is_ours(self, form: Format) -> bool:
        """Whether the output is there already, of a run that was killed before it could forget its layers."""
        config = self.output / CONFIG
        return config.is_file() and read_json(config) == json.loads(json.dumps(self.planned.contents.config(form)))

    def _write_gguf(self, *, overwrite: bool) -> int:
        if not holds_a_gguf_file(self.output):
            check_output_folder(self.output, overwrite=overwrite)
        assert self.planned.gguf is not None  # noqa: S101  (of this format)
        new = self.state.folder / GGUF_FILE
        write_gguf(new, self.planned.gguf, self._tensor, self._layer)
        self.output.mkdir(parents=True, exist_ok=True)
        new.replace(self.output / GGUF_FILE)
        return (self.output / GGUF_FILE).stat().st_size

    def _layer(self, name: str) -> QuantizedWeight:
        layer = self.planned.layers[name]
        return layer.of(self.state.quantized(layer.site))

    def _tensor(self, name: str) -> Tensor:
        """A tensor that is copied; an embedding with the values of the output embeddings that it is tied to."""
        dtype = self.checkpoint.tensors[name].dtype
        if name not in self.planned.tied:
            return self.checkpoint.read(name).to(dtype)
        return dequantize(self.state.quantized(self.planned.tied[name]), dtype=dtype)

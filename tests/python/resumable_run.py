"""A run over a small model's folder in a process of its own, which a test may kill."""

from __future__ import annotations

import multiprocessing
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import small_models
from miniquant import Calibration, LayerOptions, Recipe, Rule, load_calibration
from miniquant.run import quantize_folder

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

KIND = "mixtral"  # experts, shared inputs, tensors that are joined and split again
RECIPE = Recipe(
    LayerOptions(preset="fast", group_size=16, min_tokens=2),
    [Rule("*.experts.*", {"unseen": "siblings"}), Rule("*.o_proj", {"bits": 8})],
)


def save(folder: Path) -> Path:
    model: Any = small_models.MODELS[KIND][0]()
    model.save_pretrained(folder)
    return folder


def calibration() -> Calibration:
    return load_calibration([dict(batch) for batch in 3 * small_models.text_batches()], tokens=10**6)


def run(folder: Path, output: Path, **options: Any) -> Any:
    """The run that is killed, resumed or left to end; always on one thread, as bits depend on it."""
    torch.set_num_threads(1)
    given: dict[str, Any] = {
        "recipe": RECIPE,
        "calibration": calibration(),
        "dtype": torch.float32,
        "max_shard_bytes": 60_000,
        "report": False,
        **options,
    }
    return quantize_folder(folder, output, **given)


def run_with_small_files(folder: Path, output: Path, largest: int) -> None:
    """The same where no file may be larger: as on a full disk, a write fails in the middle."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        run(folder, output)
    except OSError as error:
        output.with_name("error.txt").write_text(str(error))


def started(function: Any, *arguments: Any) -> BaseProcess:
    """A process that runs a function of this module; the imports are done once, by the process it is forked from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["resumable_run"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    process = context.Process(target=function, args=arguments)
    process.start()
    return process

"""A run of several ranks over a small model's folder, each rank in a process of its own, which a test may kill."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import small_models
from miniquant import LayerOptions, load_calibration, quantize_folder, ranks
from miniquant.calibration import Calibration

if TYPE_CHECKING:
    from collections.abc import Sequence
    from multiprocessing.process import BaseProcess

BATCHES = 9
OPTIONS: dict[str, Any] = {"preset": "best", "group_size": 16, "min_tokens": 2, "bits": 3}


def save(folder: Path, model: Any = None, dtype: torch.dtype = torch.float64) -> Path:
    """A small model, by default a Llama; in float64 sums over ranks round so little that no code moves."""
    model = (small_models.MODELS["llama"][0]() if model is None else model).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return folder


def calibration(batches: int = BATCHES, shortest: int = 12) -> Calibration:
    """Windows of different lengths; the last ones are held out."""
    made = [{"input_ids": small_models.ids(2, shortest + seed, seed)} for seed in range(batches)]
    return load_calibration(made, tokens=10**6)


def run(folder: Path, output: Path, **options: Any) -> Any:
    """The run that is done by any number of ranks."""
    torch.set_num_threads(1)
    given: dict[str, Any] = {
        "recipe": LayerOptions(**OPTIONS),
        "calibration": calibration(),
        "format": "miniquant",
        "dtype": torch.float64,
        "held_out": 0.2,
        "report": False,
        **options,
    }
    return quantize_folder(folder, output, **given)


def rank(number: int, count: int, port: int, folder: Path, output: Path, options: dict[str, Any]) -> None:
    """One rank: says how it ended in <output>.rank<number>.txt; its standard error is <output>.rank<number>.err.

    `options` are those of :func:`run`, with ``slow``: seconds that every layer takes; ``silence``: as of
    :mod:`miniquant.ranks`, long enough for a busy machine; ``address`` of rank 0 and the network's ``interface``.
    """
    ranks.SILENCE, ranks._BEAT = options.pop("silence", 20.0), 0.2
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    os.environ["MASTER_ADDR"] = options.pop("address", "127.0.0.1")
    if interface := options.pop("interface", None):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    slow = options.pop("slow", 0.0)
    ending = output.with_name(f"{output.name}.rank{number}.txt")
    ending.unlink(missing_ok=True)
    errors = os.open(ending.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    joined = None
    try:
        joined = ranks.Ranks.joined()
        result = run(folder, output, ranks=joined, progress=lambda *_: time.sleep(slow), **options)
        ending.write_text(f"done: {len(result.result.layers)} layers")
        assert joined is not None
        joined.close()
    except BaseException as error:
        ending.write_text(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        if joined is not None:
            joined.close(str(error))
        raise


def free_port() -> int:
    """A port that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(
    count: int, folder: Path, output: Path, *, of_rank: dict[int, dict[str, Any]] | None = None, **options: Any
) -> list[BaseProcess]:
    """Processes of all ranks; `of_rank` has options that one of them has instead."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranked_run"])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    port = free_port()
    processes: list[BaseProcess] = []
    for number in range(count):
        given = {**options, **(of_rank or {}).get(number, {})}
        process = context.Process(target=rank, args=(number, count, port, folder, output, given))
        process.start()
        processes.append(process)
    return processes


def ended(processes: Sequence[BaseProcess], output: Path, seconds: float = 60) -> list[str]:
    """What ranks say once all have ended; fails where one has not after so many seconds."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    running = [number for number, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not running, f"ranks {running} have not ended after {seconds} seconds"
    return [said(output, number) for number in range(len(processes))]


def said(output: Path, number: int) -> str:
    """What a rank says of its end; where it was ended while it waited, the last line of its standard error."""
    file = output.with_name(f"{output.name}.rank{number}.txt")
    if file.exists() and (text := file.read_text()):  # a rank may be ended while it writes
        return text
    errors = file.with_suffix(".err").read_text().splitlines() if file.with_suffix(".err").exists() else []
    return next((line for line in reversed(errors) if line.startswith("miniquant: ")), "")

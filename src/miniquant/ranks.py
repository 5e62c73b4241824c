"""The processes of one run: ``torchrun --nproc-per-node N -m miniquant quantize ...``, on one machine or several.

Each process, a rank, has its share of the calibration batches and walks through the model with them; all come to the
same layers in the same order, also to those that no batch of theirs goes through, as an expert. What the layers' tokens
say is summed over all ranks before a layer is quantized; each rank then quantizes its share of the rows, which do not
depend on one another, and all get all rows. The rows that a layer is judged by are shared, too. Ridges are chosen by
rank 0, which also keeps finished layers and writes the output.

Messages go through torch.distributed with gloo. Beside that every rank says every few seconds that it is alive, in the
store that torchrun has for all. A rank that does not say so for `SILENCE` seconds, or that says why it failed, ends the
run on all ranks with a message that names it: a process that waits for another in gloo cannot be told otherwise.
"""

import json
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from miniquant.grid import QuantizedWeight

Value = TypeVar("Value")
Weight = TypeVar("Weight", bound=QuantizedWeight)

SILENCE = 45.0  # seconds after which a rank counts as lost
_BEAT = 3.0  # seconds between two signs of life
_LONGEST = timedelta(days=7)  # that a rank waits in gloo: others may be solving; the watch ends it if they are lost
_FAREWELL = 10.0  # seconds that rank 0, whose process may have the store, waits at most for the others to end
_FAILED = 1


class RankError(RuntimeError):
    """Ranks that do not go together: other versions, recipes, models or tokens."""


class Ranks:
    """This process among those of the run. :meth:`joined` makes it.

    Attributes:
        rank: its number, from 0.
        count: of ranks.
        bytes_sent: by this rank so far, about: what it gave to others.
    """

    def __init__(self, rank: int, count: int, store: Any, group: Any) -> None:
        self.rank, self.count = rank, count
        self.bytes_sent = 0
        self._store, self._group = store, group
        self._watch = _Watch(rank, count, store)

    @classmethod
    def joined(cls) -> "Ranks | None":
        """The ranks of torchrun; None where it did not start this process, or started it alone.

        Raises:
            RankError: where they do not all come within two minutes.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1 or "RANK" not in os.environ or not dist.is_available():
            return None
        try:
            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=timedelta(minutes=2))
            group = dist.new_group(backend="gloo", timeout=_LONGEST)
        except RuntimeError as error:
            raise RankError(f"expected {count} ranks to meet, but got: {str(error).splitlines()[0]}") from error
        store = dist.distributed_c10d._get_default_store()  # noqa: SLF001  (torchrun's; there is no public name)
        return cls(dist.get_rank(), count, store, group)

    def close(self, why: str | None = None) -> None:
        """Ends the watch; where it is said why the run failed here, the other ranks say that and end, too."""
        self._watch.end(why)
        with suppress(RuntimeError):
            dist.destroy_process_group()

    def check_same(self, said: Mapping[str, Any]) -> None:
        """Compares what ranks say of themselves.

        Raises:
            RankError: on all ranks, where one differs from rank 0; it is named, with the first entry that differs.
        """
        texts = self.gathered({key: json.dumps(value, sort_keys=True) for key, value in said.items()})
        for rank, other in enumerate(texts):
            for key, value in texts[0].items():
                if other.get(key) != value:
                    got = other.get(key, "nothing")
                    raise RankError(
                        f"expected rank {rank} to have the {key} of rank 0, {_short(value)}, but got {_short(got)}"
                    )

    def sum(self, *tensors: Tensor) -> None:
        """Adds the tensors of all ranks, in place: the same bits on all."""
        for tensor in tensors:
            with self._answered():
                dist.all_reduce(tensor, group=self._group)
            self.bytes_sent += 2 * tensor.nbytes * (self.count - 1) // self.count

    def on_all(self, *, holds: bool) -> bool:
        """Whether something holds on every rank."""
        failing = torch.tensor([not holds], dtype=torch.int32)
        self.sum(failing)
        return not int(failing)

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, on all ranks; or the error that it meets."""
        made: list[bytes] = [b""]
        if self.rank == 0:
            try:
                made = [pickle.dumps((make(), None))]
            except Exception as error:  # noqa: BLE001  (it is raised below, on all ranks)
                made = [pickle.dumps((None, error))]
            self.bytes_sent += len(made[0]) * (self.count - 1)
        with self._answered():
            dist.broadcast_object_list(made, src=0, group=self._group)
        value, failed = pickle.loads(made[0])  # noqa: S301  (of rank 0)
        if failed is not None:
            raise failed
        found: Value = value
        return found

    def by_rows(self, rows: int, make: Callable[[slice], Weight]) -> Weight:
        """A weight of which each rank makes a share of the rows, whole on all ranks.

        Args:
            rows: N, of all ranks together.
            make: gives the quantized rows of a slice.
        """
        share = -(-rows // self.count)
        begin = min(self.rank * share, rows)
        mine: Weight | None = None
        failed: Exception | None = None
        try:
            mine = make(slice(begin, min(begin + share, rows)))
        except Exception as error:  # noqa: BLE001  (it is raised below, on all ranks)
            failed = error
        self._raise_any(failed)
        assert mine is not None  # noqa: S101  (there was no error)
        tensors: list[Tensor] = []

        def noted(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        mine.map(noted)
        whole = iter(self._joined(tensors, rows, share))
        return cast("Weight", mine.map(lambda _: next(whole)))

    def wait(self) -> None:
        """Until all ranks are here."""
        with self._answered():
            dist.barrier(group=self._group)

    def _raise_any(self, failed: Exception | None) -> None:
        """Raises the error of the first rank that has one, on all ranks."""
        if not self.on_all(holds=failed is None):
            raise next(one for one in self.gathered(failed) if one is not None)

    def _joined(self, mine: Sequence[Tensor], rows: int, share: int) -> list[Tensor]:
        """Rows of all ranks one after the other, of each of some tensors: one message for all of them."""
        stored = [tensor.unsqueeze(-1).flatten(1).contiguous().view(torch.uint8) for tensor in mine]
        widths = [tensor.shape[1] for tensor in stored]
        sent = torch.zeros(share, sum(widths), dtype=torch.uint8)
        sent[: len(stored[0])] = torch.cat(stored, dim=1)
        parts = [torch.empty_like(sent) for _ in range(self.count)]
        with self._answered():
            dist.all_gather(parts, sent, group=self._group)
        self.bytes_sent += sent.nbytes * (self.count - 1)
        whole = torch.cat(parts)[:rows].split(widths, dim=1)
        return [
            joined.clone(memory_format=torch.contiguous_format).view(tensor.dtype).view(rows, *tensor.shape[1:])
            for joined, tensor in zip(whole, mine, strict=True)
        ]

    def gathered(self, value: Value) -> list[Value]:
        """A value of each rank, in their order, on all of them."""
        values: list[Any] = [None] * self.count
        with self._answered():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """An error of gloo, as of a rank that was killed, names the rank."""
        try:
            yield
        except RuntimeError as error:
            why = self._watch.lost() or str(error).splitlines()[0]
            raise RankError(f"expected all {self.count} ranks to answer, but got: {why}") from error


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


class _Watch:
    """Says that this rank is alive, and looks whether the others are."""

    def __init__(self, rank: int, count: int, store: Any) -> None:
        self._rank, self._others = rank, [other for other in range(count) if other != rank]
        self._store = store
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="miniquant-ranks", daemon=True)
        self._say("0")
        self._thread.start()

    def end(self, why: str | None) -> None:
        """Stops; other ranks are told why it failed, or that this one is done."""
        self._over.set()
        self._thread.join()
        with suppress(RuntimeError):
            self._say("done" if why is None else f"failed: {why}")
            until = time.monotonic() + (_FAREWELL if self._rank == 0 and why is None else 0.0)
            while not all(map(self._has_ended, self._others)) and time.monotonic() < until:
                time.sleep(0.01)

    def lost(self) -> str:
        """Which ranks say nothing any more, or why they failed; "" where all are alive."""
        try:
            before = {rank: self._said(rank) for rank in self._others}
            time.sleep(2 * _BEAT + 1)
            now = {rank: self._said(rank) for rank in self._others}
        except RuntimeError:
            return "nothing from the ranks' store"
        return "; ".join(
            f"rank {rank} {said}" if said.startswith("failed: ") else f"nothing from rank {rank}"
            for rank, said in now.items()
            if said == before[rank] or said.startswith("failed: ")
        )

    def _key(self, rank: int) -> str:
        return f"miniquant/rank{rank}"

    def _say(self, what: str) -> None:
        self._store.set(self._key(self._rank), what)

    def _run(self) -> None:
        heard = dict.fromkeys(self._others, "")
        since = dict.fromkeys(self._others, time.monotonic())
        beat = 0
        while not self._over.wait(_BEAT):
            beat += 1
            try:
                self._say(str(beat))
                for rank in self._others:
                    said = self._said(rank)
                    if said.startswith("failed: "):
                        self._leave(f"rank {rank} failed: {said.removeprefix('failed: ')}")
                    if said != heard[rank] or said == "done":
                        heard[rank], since[rank] = said, time.monotonic()
                    elif time.monotonic() - since[rank] > SILENCE:
                        self._leave(f"rank {rank} has not been heard of for {SILENCE:.0f} seconds")
            except RuntimeError as error:  # the store is gone, and with it whoever had it
                self._leave(f"the ranks' store has not been heard of ({str(error).splitlines()[0]})")

    def _said(self, rank: int) -> str:
        return str(self._store.get(self._key(rank)).decode()) if self._store.check([self._key(rank)]) else ""

    def _has_ended(self, rank: int) -> bool:
        return self._said(rank).startswith(("done", "failed: "))

    def _leave(self, why: str) -> NoReturn:
        """Ends this process: its main thread waits for a message that does not come."""
        if self._over.is_set():
            sys.exit()  # this thread
        print(f"miniquant: rank {self._rank} ends: {why}", file=sys.stderr, flush=True)
        os._exit(_FAILED)

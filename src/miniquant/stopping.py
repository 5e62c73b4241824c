"""Ctrl-C and SIGTERM during a run: it ends at the boundary of a layer, or within a second where none is near."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.text import Text

from miniquant.errors import INTERRUPTED, TERMINATED

CODES: Mapping[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
GRACE = 0.8  # seconds in which a run has to come to a layer's boundary


class Stop(threading.Event):
    """Set by a signal.

    Attributes:
        code: to exit with then.
    """

    code: int = INTERRUPTED


@contextmanager
def stop_when_asked(console: Console, kept: Callable[[], str]) -> Iterator[Stop]:
    """While entered, Ctrl-C and SIGTERM set an event, and end the process if that does not end the run soon.

    A process may be ended at any moment, as all that a run keeps appears whole or not at all.

    Args:
        console: to say that it stops.
        kept: says what is kept of the run, and how to go on.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield stop
        return

    def asked(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if stop.is_set():
            raise KeyboardInterrupt
        stop.code = CODES[number]
        stop.set()
        console.print(Text("stops; finished layers are kept", style="yellow"))

    ended = threading.Event()

    def watch() -> None:
        while number := os.read(reader, 1):  # empty when the other end is closed
            if number[0] in CODES:
                break
        else:
            return
        if not ended.wait(GRACE):
            console.show_cursor()
            print(f"stopped within a layer; {kept()}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(CODES[number[0]])

    # A handler written in Python waits until a kernel has computed, so a thread is told of signals by a pipe.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {number: signal.signal(number, asked) for number in CODES}
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        ended.set()
        signal.set_wakeup_fd(pipe_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)

"""Signals that end a run: Ctrl-C, SIGTERM (a scheduler, `timeout`, `kill`) and SIGHUP (its terminal has closed)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from vitprune.common.distributed import world_size
from vitprune.errors import Interrupted, Preempted

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SOON_S = 0.05
_WORDS = {
    "SIGINT": "stopped",
    "SIGTERM": "the run was terminated",
    "SIGHUP": "the run stopped, for its terminal was closed,",
}


class Stopped(KeyboardInterrupt):
    """One of these signals came; `number` says which. What cleans up after Ctrl-C cleans up after all of them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def stopped_error(error: KeyboardInterrupt, what: str, hint: str | None) -> Interrupted | Preempted:
    """The error that tells the user of it: "stopped after 3 steps" where `what` is " after 3 steps"."""
    number = getattr(error, "number", signal.SIGINT)
    message = _WORDS[signal.Signals(number).name] + what
    return Interrupted(message, hint) if number == signal.SIGINT else Preempted(message, hint, exit_code=128 + number)


@contextmanager
def raising() -> Iterator[None]:
    """In the block all of these signals raise, as Ctrl-C does; a moment later where that would be lost or do harm."""
    waiting: list[int] = []

    def again() -> None:
        signal.raise_signal(waiting.pop())

    def stop(number: int, frame: FrameType | None) -> None:
        if waiting:
            return
        if not _must_wait(frame):
            raise Stopped(number)
        waiting.append(number)
        timer = threading.Timer(_SOON_S, again)
        timer.daemon = True
        timer.start()

    with _handled(stop):
        yield


@contextmanager
def deferred(notice: str = "") -> Iterator[Callable[[], int]]:
    """In the block the first of these signals is only noted, and `notice` shown; another one raises at once.

    Gives a function that returns the signal's number, 0 before. At the end of the block a noted signal is raised.
    """
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if not noted:
            noted.append(number)
            with suppress(OSError):  # written past sys.stderr, which may just be writing
                os.write(2, notice.encode())
        elif world_size() == 1:  # a launcher of several passes on what its terminal has sent already
            raise Stopped(number)

    with _handled(note):
        yield lambda: noted[0] if noted else 0
    if noted:
        raise Stopped(noted[0])


def _must_wait(frame: FrameType | None) -> bool:
    """Whether Python or torch is where an exception cannot be.

    What a destructor raises is lost. A library that catches everything as it is imported goes on with half of itself.
    And torch does not clean up after half of the processes that read images.
    """
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name == "__del__" or file.startswith("<frozen importlib"):
            return True
        if name in ("__init__", "_shutdown_workers") and file.endswith("dataloader.py"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _handled(act: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals that the caller ignores (nohup, a shell's `&`) stay ignored."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    process = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # and not a process that reads images, and is just beginning
            act(number, frame)

    before = {number: signal.getsignal(number) for number in _ENDING}
    before = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handle)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

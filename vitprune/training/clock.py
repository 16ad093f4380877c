"""Where the time of training goes: to reading images, the teacher, the student, the way back, the update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PARTS = ("data", "teacher", "student", "backward", "update")


class Clock:
    """Adds up seconds by part of a step.

    A GPU works while the program goes on, so there its own time stamps are taken, and read when a step is done.

    Args:
        device: where the models run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, part: str, *, waiting: bool = False) -> Iterator[None]:
        """Count the block's time under `part`; `waiting`: the program's own time, whatever the device does."""
        if self.device.type != "cuda" or waiting:
            start = time.perf_counter()
            yield
            self.seconds[part] += time.perf_counter() - start
            return
        first, last = torch.cuda.Event(True), torch.cuda.Event(True)  # type: ignore[no-untyped-call]
        first.record()
        yield
        last.record()
        self._pending.append((part, first, last))

    def read(self) -> dict[str, float]:
        """Seconds since the last reading, by part."""
        for part, first, last in self._pending:
            last.synchronize()
            self.seconds[part] += first.elapsed_time(last) / 1e3
        self._pending.clear()
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

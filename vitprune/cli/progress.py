"""How a run goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from vitprune import processes
from vitprune.cli.output import stderr_console

_LINE_EVERY_S = 15.0
_SMOOTHING = 0.9


class RunProgress:
    """Shows every part of a run: loss components, kept ratio per stage against target, images/s and time left."""

    def __init__(self) -> None:
        self.console: Console = stderr_console()
        self.console.quiet = not processes.is_main()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            auto_refresh=False,
        )
        # The detail has lines of its own: beside the bar it would push the bar off a narrow terminal.
        self.detail = Text()
        self.display = Live(Group(self.bar, self.detail), console=Console(stderr=True, highlight=False))
        self.live = self.console.is_terminal and processes.is_main()
        self.task: TaskID | None = None
        self.part = ""
        self.total: int | None = 0
        self.done = 0
        self.last_line = 0.0
        self.started = 0.0
        self.rate: float | None = None

    def __enter__(self) -> RunProgress:
        if self.live:
            self.display.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detail.plain = ""
        if self.live:
            self.display.stop()

    def begin(self, what: str, total: int | None) -> None:
        """A part of the run begins: `total` pictures or steps, None where that is not known."""
        self.part, self.total, self.done = what, total, 0
        self.started = self.last_line = time.monotonic()
        if self.live:
            self.task = self.bar.add_task(what, total=total)
            self.detail.plain = ""
        else:
            self.console.print(what if total is None else f"{what} ({total})", markup=False)

    def advance(self, count: int) -> None:
        """`count` more of them are done."""
        self._advance(count, "")

    def step(self, record: Any) -> None:
        """A training step is done."""
        if record.step == 1 or self.part != "training":
            self.begin("training", record.num_steps)
        if not record.skipped:
            previous = record.images_per_s if self.rate is None else self.rate
            self.rate = _SMOOTHING * previous + (1 - _SMOOTHING) * record.images_per_s
        self._advance(1, self._detail(record))
        if record.restored:
            self.console.print(
                f"step {record.step}: the loss was not finite too often; an earlier state was put back, "
                "and the rate is a tenth of what it was",
                markup=False,
            )

    def _advance(self, count: int, detail: str) -> None:
        self.done += count
        if self.live and self.task is not None:
            self.bar.update(self.task, advance=count)
            self.detail.plain = detail
            return
        now = time.monotonic()
        if now - self.last_line >= _LINE_EVERY_S or (detail and self.done == self.total):
            self.last_line = now
            text = f"{self.part} {self.done} {detail}"
            if self.total is not None:
                left = (now - self.started) / self.done * (self.total - self.done)
                text = f"{self.part} {self.done}/{self.total} {detail} {left:.0f} s left"
            self.console.print(" ".join(text.split()), markup=False)

    def _detail(self, record: Any) -> str:
        losses = " ".join(f"{name} {value:.3g}" for name, value in record.losses.items())
        kept = "/".join(f"{ratio:.2f}" for ratio in record.kept_ratios)
        target = "/".join(f"{ratio:.2f}" for ratio in record.target_ratios)
        rate = "" if self.rate is None else f"{self.rate:.0f} images/s"
        return f"{record.phase}: {losses} | kept {kept} of {target} | {rate}"

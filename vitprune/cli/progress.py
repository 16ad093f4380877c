"""How a run goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from vitprune.cli.output import is_quiet, say, shows_progress, stderr_console
from vitprune.common.formatting import duration, plain
from vitprune.common.progress import Listener

_LINE_EVERY_S = 15.0
_LINE_EVERY_SHARE = 0.02
"""Of the time a part has taken: lines get rarer, so that a log of a night's run is no book."""
_WORTH_TELLING_S = 5.0
_LOSSES = {
    "rank": "ranking loss",
    "kl": "KL",
    "embedding": "1 - cosine",
    "error": "error",
    "tokens": "patch error",
    "pooled": "feature error",
    "token": "token error",
    "ratio": "ratio error",
    "ce": "cross-entropy",
}
"""What the losses are called while it trains; keys of `StepRecord.losses`."""
_SMOOTHING = 0.9
_BESIDE_BAR = 50
"""Characters that the names and numbers beside a bar take."""


class RunProgress(Listener):
    """Shows every part of a run: loss components, kept ratio per stage against target, images/s and time left.

    With -q nothing of it.
    """

    def __init__(self) -> None:
        self.console: Console = stderr_console()
        self.console.quiet = is_quiet()
        self.live = shows_progress() and not is_quiet()
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=max(5, min(30, self.console.width - _BESIDE_BAR))),
            TextColumn("{task.fields[count]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
            auto_refresh=False,
        )
        # The detail has lines of its own: beside the bar it would push the bar off a narrow terminal.
        self.detail = Text()
        self.display = Live(Group(self.bar, self.detail), console=self.console)
        self.task: TaskID | None = None
        self.part = ""
        self.total: int | None = 0
        self.done = self.done_before = 0
        self.last_line = 0.0
        self.started = 0.0
        self.rate: float | None = None

    def __enter__(self) -> RunProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end(broken=kind is not None)
        if self.live:
            self.display.stop()

    def begin(self, what: str, total: int | None) -> None:
        """A part of the run begins: `total` images or steps, None where that is not known."""
        self._end()
        self.part, self.total, self.done, self.done_before = what, total, 0, 0
        self.started = self.last_line = time.monotonic()
        if self.live:
            self.display.start()
            self.task = self.bar.add_task(plain(what), total=total, count=self._count())
        else:
            self._say(what if total is None else f"{what} ({total})")

    def advance(self, count: int = 1) -> None:
        """`count` more of them are done."""
        self._advance(count, "")

    def step(self, record: Any) -> None:
        """A training step is done."""
        if record.step == 1 or self.part != "training":
            self.begin("training", record.num_steps)
            self.done = self.done_before = record.step - 1  # of a resumed run
        if not record.skipped:
            previous = record.images_per_s if self.rate is None else self.rate
            self.rate = _SMOOTHING * previous + (1 - _SMOOTHING) * record.images_per_s
        self._advance(1, self._detail(record))

    def say(self, sentence: str) -> None:
        """A line of its own."""
        if self.part:
            self._say(sentence)
        else:
            say(sentence)

    def _advance(self, count: int, detail: str) -> None:
        self.done += count
        if self.live and self.task is not None:
            self.bar.update(self.task, completed=self.done, count=self._count())
            self.detail.plain = plain(detail)
            return
        now = time.monotonic()
        due = now - self.last_line >= max(_LINE_EVERY_S, _LINE_EVERY_SHARE * (now - self.started))
        if due or (detail and self.done == self.total):
            self.last_line = now
            left = ""
            if self.total is not None and self.done < self.total:
                pace = (now - self.started) / (self.done - self.done_before)
                left = f"{duration(pace * (self.total - self.done))} left"
            self._say(" ".join(f"{self.part} {self._count()} {detail} {left}".split()))

    def _end(self, broken: bool = False) -> None:
        """The part that went on is over; says what it took where that was long."""
        if not self.part:
            return
        seconds = time.monotonic() - self.started
        self.detail.plain = ""
        if self.live and self.task is not None:
            if not broken:  # so that the time it took stands there, also where the total was not known
                self.bar.update(self.task, completed=max(self.done, 1), total=max(self.done, 1), count=self._count())
        elif seconds >= _WORTH_TELLING_S and not broken:
            self._say(f"{self.part}: done in {duration(seconds)}")
        self.part = ""

    def _count(self) -> str:
        if self.total is None:
            return str(self.done) if self.done else ""
        return f"{self.done}/{self.total}"

    def _say(self, text: str) -> None:
        self.console.print(plain(text), markup=False, soft_wrap=True)

    def _detail(self, record: Any) -> str:
        losses = ", ".join(f"{_LOSSES.get(name, name)} {value:.3g}" for name, value in record.losses.items())
        kept, target = (
            "/".join(f"{100 * ratio:.0f}" for ratio in ratios) for ratios in (record.kept_ratios, record.target_ratios)
        )
        tokens = f"{kept} % of tokens kept" + (f" (target {target})" if kept != target else "")
        rate = "" if self.rate is None else f"{self.rate:.0f} images/s"
        return f"{record.phase}: {losses} | {tokens} | {rate}"

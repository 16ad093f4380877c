"""How anything that takes a while says how far it is: one interface, whatever shows it."""

from __future__ import annotations

from typing import Any


class Listener:
    """Hears how a job goes. This one shows nothing; a progress bar derives from it."""

    def begin(self, what: str, total: int | None) -> None:
        """A phase of the job begins: `total` images, steps or rows, None where that is not known."""

    def advance(self, count: int = 1) -> None:
        """`count` more of them are done."""

    def step(self, record: Any) -> None:
        """A training step is done, see `vitprune.training.StepRecord`."""

    def say(self, sentence: str) -> None:
        """Something worth a line of its own."""


SILENT = Listener()

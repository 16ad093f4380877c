"""How anything that takes a while says how far it is: one protocol, whoever shows it."""

from __future__ import annotations

from typing import Any, Protocol


class Listener(Protocol):
    """Whoever wants to know how a job goes, such as a progress bar."""

    def begin(self, what: str, total: int | None) -> None:
        """A phase of the job begins: `total` images, steps or rows, None where that is not known."""

    def advance(self, count: int = 1) -> None:
        """`count` more of them are done."""

    def step(self, record: Any) -> None:
        """A training step is done, see `vitprune.training.StepRecord`."""

    def say(self, sentence: str) -> None:
        """Something worth a line of its own."""


class Silent:
    """A listener that shows nothing."""

    def begin(self, what: str, total: int | None) -> None:
        """Show nothing."""

    def advance(self, count: int = 1) -> None:
        """Show nothing."""

    def step(self, record: Any) -> None:
        """Show nothing."""

    def say(self, sentence: str) -> None:
        """Show nothing."""


SILENT = Silent()

"""log.jsonl: one line a step."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TextIO

from vitprune.common.files import write_error
from vitprune.common.progress import Listener, Silent
from vitprune.training.progress import StepRecord


class StepLog(Silent):
    """Writes every step to a file and passes it on; a line is on disk as soon as its step is done.

    Args:
        path: log.jsonl.
        listener: who is told too.
        after: of a resumed run, the step it goes on after; what the log holds beyond it is dropped.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, listener: Listener, after: int = 0) -> None:
        self.path = path
        self.after = after
        self.listener = listener
        self._file: TextIO | None = None

    def __enter__(self) -> StepLog:
        try:
            kept = self._kept()
            self._file = self.path.open("w", encoding="utf-8")
            self._file.writelines(kept)
        except OSError as error:
            raise write_error(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _kept(self) -> list[str]:
        """The lines of the steps up to `after`; a last line that a killed process left unfinished is none.

        They need not begin with the first step: a warm start may have been done elsewhere.
        """
        if not self.after or not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.after]

    def step(self, record: StepRecord) -> None:
        """Write one line and pass the record on."""
        assert self._file is not None, "use StepLog in a with statement"
        try:
            self._file.write(json.dumps(record.as_json()) + "\n")
            self._file.flush()
        except OSError as error:
            raise write_error(self.path, error) from error
        self.listener.step(record)

"""A run's folder: which one it is, what its files are called, and that no other run writes there meanwhile."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count, takewhile
from pathlib import Path
from typing import IO

from vitprune.common.files import check_writable, write_error
from vitprune.errors import OutputError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
REPORT, PAGE, LOG, KEEP_MAPS, CARD = "report.json", "report.html", "log.jsonl", "keepmaps.json", "README.md"
ADAPTIVE = "adaptive.json"
"""Of a folder of programs that are a cascade together."""
RUNS = Path("runs")
"""Where runs go whose folder nobody names."""
CHECKPOINT = "step-[0-9]*.safetensors"
_LOCK = ".lock"
_MARKS = {
    **dict.fromkeys((WEIGHTS, CONFIG, REPORT, PAGE), b"vitprune"),
    **{LOG: b'"kept_ratios"', KEEP_MAPS: b'"kept"', "sweep.json": b'"by_throughput"', "sweep.html": b"vitprune"},
}
"""What a file of that name holds if vitprune wrote it."""
_SIGNATURE = "\n<!-- as vitprune wrote it: {} -->\n"
_SIGNED = re.compile(_SIGNATURE.format("([0-9a-f]{16})").encode() + rb"\Z")


class RunFolder:
    """The files of a run, in a folder that need not exist.

    The report, of every figure, is written when all else is done: a run that has one is complete. The page is the
    report for people, and `keep_maps` are its images and which of their tokens were kept.

    Args:
        path: the folder.
        name: of a folder that nobody named: where it is taken, the next number is.
        must_be_new: whether it may hold nothing yet.
        of_run: whether a run's files will be written there; False of a folder of images.
    """

    def __init__(self, path: Path, *, name: str | None = None, must_be_new: bool = False, of_run: bool = True) -> None:
        self.name = name
        self.must_be_new = must_be_new
        self.of_run = of_run
        self._at(path)

    def _at(self, path: Path) -> None:
        self.path = path
        self.weights = path / WEIGHTS
        self.config = path / CONFIG
        self.report = path / REPORT
        self.page = path / PAGE
        self.log = path / LOG
        self.keep_maps = path / KEEP_MAPS
        self.card = path / CARD
        self.checkpoints = path / "checkpoints"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def choose(
        cls, output: Path | None, name: str, *, overwrite: bool = False, resume: bool = False, of_run: bool = True
    ) -> RunFolder:
        """Where a run goes, without creating it: `output`, or runs/<name>, numbered when that exists.

        With `resume` it is the folder of the run to resume: `output`, or the last of runs/<name>.

        Raises:
            OutputError: `output` exists and may not be overwritten, is a file, holds others' files of a run's names, or
                cannot be written; or there is nothing to resume.
        """
        if resume:
            run = cls._to_resume(output, name)
        elif output is None:
            run = cls(next(folder for folder in _numbered(name) if not folder.exists()), name=name, of_run=of_run)
        else:
            run = cls(output, must_be_new=not overwrite, of_run=of_run)
        run._check()
        return run

    def _check(self) -> None:
        """Make sure that the folder may be written, and that what is replaced there is vitprune's."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise OutputError(f"the output '{self}' is a file, not a folder", "choose another --output", exit_code=2)
        check_writable(self.path)
        if self.must_be_new and self._contents():
            raise OutputError(
                f"the output folder '{self}' exists", "choose another --output or add --overwrite", exit_code=2
            )
        for name in sorted(_MARKS.keys() & set(self._contents())) if self.of_run else ():
            if not is_ours(self.path / name, _MARKS[name]):
                raise OutputError(
                    f"'{self.path / name}' is not of vitprune, and a run would replace it",
                    "choose another --output, or move it away",
                    exit_code=2,
                )

    def _contents(self) -> list[str]:
        """Names of what is in the folder beside a lock."""
        if not self.path.is_dir():
            return []
        return [path.name for path in self.path.iterdir() if not path.name.startswith(_LOCK)]

    @classmethod
    def _to_resume(cls, output: Path | None, name: str) -> RunFolder:
        numbered = _numbered(name)
        found = [output] if output is not None else [next(numbered), *takewhile(Path.exists, numbered)]
        existing = [folder for folder in found if folder.is_dir()]
        if not existing:
            raise OutputError(
                f"there is no run to resume in '{output or RUNS / name}'",
                "start one by leaving out --resume",
                exit_code=2,
            )
        run = cls(existing[-1])
        if run.is_complete:
            raise OutputError(f"the run in '{run}' is complete", "start another by leaving out --resume", exit_code=2)
        return run

    @staticmethod
    def weights_in(path: Path) -> Path:
        """The weight file that `path` is, or that lies in the run folder that it is."""
        return RunFolder(path).weights if path.is_dir() else path

    @staticmethod
    def of(path: Path) -> Path:
        """The run folder that `path` is, or that the weight file `path` lies in."""
        return path.parent if path.name == WEIGHTS and path.is_file() else path

    @property
    def is_complete(self) -> bool:
        """Whether the run came to its end."""
        return self.report.is_file()

    def create(self, needed_bytes: int) -> None:
        """Create the folder and make sure, before hours are spent, that the results can be written there.

        Raises:
            OutputError: it cannot be created or written, or too little space is left.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise write_error(self.path, error) from error
        if free < needed_bytes:
            raise OutputError(
                f"'{self}' has {free / 2**20:.0f} MiB of free space and the results need {needed_bytes / 2**20:.0f}",
                "free some space or choose another --output",
            )
        check_writable(self.path)

    @contextmanager
    def claimed(self, needed_bytes: int) -> Iterator[RunFolder]:
        """Create the folder as `create` does, and keep other runs out of it while the block lasts.

        Of several runs at once whose folder nobody named each gets one of its own: `path` may change. Where the file
        system knows no locks, only that is sure. A folder that stays empty is removed.

        Raises:
            OutputError: another run writes there, or since `choose` has written there; and what `create` raises.
        """
        made = self._make()
        lock = _lock(self.path / _LOCK)
        try:
            self._check()
            self.create(needed_bytes)
            yield self
        finally:
            if lock is not None:
                (self.path / _LOCK).unlink(missing_ok=True)  # still held: who finds it gone makes it anew
                lock.close()
            if made:
                with suppress(OSError):  # it holds something
                    self.path.rmdir()

    def _make(self) -> bool:
        """Whether the folder was made now."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for path in [self.path] if self.name is None else _numbered(self.name):
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                self._at(path)
                return True
        except OSError as error:
            raise write_error(self.path, error) from error
        return False

    def forget(self) -> list[str]:
        """Remove what an earlier run wrote and would be taken for the next one's; its weights are replaced later.

        Its README.md too, whose figures would be wrong, unless somebody has edited it. Gives what `forget_checkpoints`
        gives.
        """
        if self.card.is_file() and _is_unedited(self.card.read_bytes()):
            self.card.unlink()
        for path in (self.report, self.page, self.log, self.keep_maps):
            path.unlink(missing_ok=True)
        return self.forget_checkpoints()

    def forget_checkpoints(self) -> list[str]:
        """Remove the training checkpoints and the unfinished files of a killed process; gives names of what stays."""
        for pattern in (CHECKPOINT, ".step-[0-9]*.tmp"):
            for path in self.checkpoints.glob(pattern):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or holds something of others
            self.checkpoints.rmdir()
        return sorted(path.name for path in self.checkpoints.iterdir()) if self.checkpoints.is_dir() else []


def signed(text: str) -> str:
    """A text that shows whether somebody has edited it since."""
    return text + _SIGNATURE.format(_digest(text.encode()))


def unsigned(content: bytes) -> bytes:
    """The same without what `signed` added."""
    return _SIGNED.sub(b"", content)


def _is_unedited(content: bytes) -> bool:
    found = _SIGNED.search(content)
    return found is not None and found[1].decode() == _digest(content[: found.start()])


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def is_ours(path: Path, mark: bytes = b"vitprune") -> bool:
    """Whether vitprune wrote a file, which then holds `mark`; an empty file is nobody's."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            content = file.read(2**22)  # of weights more than the header
    except OSError as error:
        raise write_error(path, error) from error
    return not content or mark in content


def _lock(path: Path) -> IO[str] | None:
    """Hold a lock, which the system takes back when the process ends, however it ends; None where it has none.

    Raises:
        OutputError: another process holds it, or the file cannot be written.
    """
    if fcntl is None:
        return None
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise write_error(path, error) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which processes that read images would share
            if os.fstat(file.fileno()).st_nlink:  # else another run has just ended and removed it
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                return file
            file.close()
        except OSError as error:
            file.seek(0)
            holder = re.sub(r"\D", "", file.read(20))
            file.close()
            if isinstance(error, (BlockingIOError, PermissionError)):
                raise OutputError(
                    f"another run{f' (process {holder})' if holder else ''} is writing to '{path.parent}'",
                    "wait for it, or choose another --output",
                    exit_code=2,
                ) from error
            return None


def check_file_is_new(path: Path, *, overwrite: bool) -> None:
    """Make sure that a model may be written to `path`, and its config.json beside it.

    Raises:
        OutputError: `path` does not end in .safetensors or is a folder, or a file exists and may not be overwritten.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        raise OutputError(f"the output '{path}' is not the name of a .safetensors file", f"-o {WEIGHTS}", exit_code=2)
    for file in (path, path.parent / CONFIG):
        if file.exists() and not overwrite:
            raise OutputError(f"the output '{file}' exists", "choose another --output or add --overwrite", exit_code=2)


def _numbered(name: str) -> Iterator[Path]:
    """runs/<name>, runs/<name>-2 and so on."""
    yield RUNS / name
    yield from (RUNS / f"{name}-{number}" for number in count(2))

"""A run's folder: which one it is, and what its files are called."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path

from vitprune.common.files import replacing, write_error
from vitprune.errors import OutputError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
REPORT, PAGE, LOG, KEEP_MAPS, CARD = "report.json", "report.html", "log.jsonl", "keepmaps.json", "README.md"
RUNS = Path("runs")
"""Where runs go whose folder nobody names."""


class RunFolder:
    """The files of a run.

    Args:
        path: the folder; it need not exist.

    Attributes:
        weights: model.safetensors, the sparse model.
        config: what the header of `weights` says, as a file of its own.
        report: every figure; it is written when all else is done, so a run that has one is complete.
        page: the report for people.
        log: a line a training step.
        keep_maps: the images of the page, and which of their tokens were kept.
        card: README.md, the model card.
        checkpoints: folder of the training checkpoints.
    """

    def __init__(self, path: Path) -> None:
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
    def choose(cls, output: Path | None, name: str, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
        """Where a run goes, without creating it: `output`, or runs/<name>, numbered when that exists.

        With `resume` it is the folder of the run to resume: `output`, or the last of runs/<name>.

        Raises:
            OutputError: `output` exists and may not be overwritten, or is a file; or there is nothing to resume.
        """
        if resume:
            return cls._to_resume(output, name)
        if output is None:
            return cls(next(folder for folder in _numbered(name) if not folder.exists()))
        if output.exists() and not output.is_dir():
            raise OutputError(f"the output '{output}' is a file, not a folder", "choose another --output", exit_code=2)
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise OutputError(
                f"the output folder '{output}' exists", "choose another --output or add --overwrite", exit_code=2
            )
        return cls(output)

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
        with replacing(self.path / ".probe"):
            pass
        (self.path / ".probe").unlink()

    def forget(self) -> None:
        """Remove what an earlier run wrote and would be taken for the next one's; its weights are replaced later.

        Its README.md too, whose figures would be wrong; but not that of a folder without a complete run.
        """
        if self.is_complete and self.card.is_file():
            self.card.unlink()
        for path in (self.report, self.page, self.log, self.keep_maps):
            path.unlink(missing_ok=True)
        if self.checkpoints.is_dir():
            shutil.rmtree(self.checkpoints)


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

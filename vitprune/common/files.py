"""Writing results: run folders, and files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitprune.errors import CheckpointError, OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well and vanishes when it does not.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
        temporary.replace(path)
    except Exception as error:
        if _is_write_failure(error):
            raise write_error(path, error) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, whole or not at all.

    Raises:
        OutputError: see `replacing`.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        CheckpointError: it is missing, damaged, or no object.
    """
    if not path.is_file():
        raise CheckpointError(f"folder '{path.parent}' holds no {path.name}, so it is no saved model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}", "copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds no object")
    return content


def choose_run_folder(output: Path | None, name: str, *, overwrite: bool, resume: bool = False) -> Path:
    """Where a run goes, without creating it: `output`, or runs/<name>, numbered when that exists.

    With `resume` it is the folder of the run to go on with: `output`, or the last of runs/<name>.

    Raises:
        OutputError: `output` exists and may not be overwritten, or is a file; or there is nothing to resume.
    """
    if resume:
        return _resumable(output, name)
    if output is not None:
        if output.exists() and not output.is_dir():
            raise OutputError(f"the output '{output}' is a file, not a folder", "choose another --output")
        if output.is_dir() and any(output.iterdir()) and not overwrite:
            raise OutputError(f"the output folder '{output}' exists", "choose another --output or add --overwrite")
        return output
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def _resumable(output: Path | None, name: str) -> Path:
    found = [output] if output is not None else _numbered(name)
    folder = next((folder for folder in reversed(found) if folder.is_dir()), None)
    if folder is None:
        raise OutputError(
            f"there is no run to resume in '{output or Path('runs') / name}'", "start one by leaving out --resume"
        )
    if (folder / "report.json").is_file():
        raise OutputError(f"the run in '{folder}' is complete", "start another by leaving out --resume")
    return folder


def _numbered(name: str) -> list[Path]:
    """runs/<name>, runs/<name>-2 and so on, as far as they exist."""
    found, number = [Path("runs") / name], 2
    while (folder := Path("runs") / f"{name}-{number}").exists():
        found, number = [*found, folder], number + 1
    return found


def check_file_is_new(path: Path, *, overwrite: bool) -> None:
    """Make sure that a model may be written to `path`, and its config.json beside it.

    Raises:
        OutputError: `path` does not end in .safetensors or is a folder, or a file is there and may not be overwritten.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        raise OutputError(f"the output '{path}' is not the name of a .safetensors file", "-o model.safetensors")
    for file in (path, path.parent / "config.json"):
        if file.exists() and not overwrite:
            raise OutputError(f"the output '{file}' exists", "choose another --output or add --overwrite")


def create_run_folder(folder: Path, needed_bytes: int) -> None:
    """Create a run folder and make sure, before hours are spent, that the results can be written there.

    Raises:
        OutputError: it cannot be created or written, or too little space is left.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise write_error(folder, error) from error
    if free < needed_bytes:
        raise OutputError(
            f"'{folder}' has {free / 2**20:.0f} MiB of free space and the results need {needed_bytes / 2**20:.0f}",
            "free some space or choose another --output",
        )
    with replacing(folder / ".probe"):
        pass
    (folder / ".probe").unlink()


def write_error(path: Path, error: Exception) -> OutputError:
    """What to tell the user about a failed write."""
    if "space" in str(error).lower() or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return OutputError(f"the disk is full: cannot write '{path}'", "free some space or choose another --output")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"cannot write '{path}': {reason}", "choose another --output")


def _is_write_failure(error: Exception) -> bool:
    # safetensors reports system errors as its own type, with the system's text.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

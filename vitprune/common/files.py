"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        with suppress(OSError):  # not every file system has modes
            temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
        temporary.replace(path)
    except Exception as error:
        # safetensors reports system errors as its own type, with the system's text.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise write_error(path, error) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Make sure, before the work, that a file or folder `path` can be made; leaves nothing behind.

    Raises:
        OutputError: its folder cannot be written, or is none.
    """
    here = path.absolute()
    folder = next(each for each in (here, *here.parents) if each.is_dir() or (each != here and os.path.lexists(each)))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise write_error(path, error) from error


def check_new_file(path: Path, *, overwrite: bool) -> None:
    """Make sure, before the work, that a file can be written where none is, or `overwrite` allows it.

    Raises:
        OutputError: it exists, its folder does not, or cannot be written.
    """
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise OutputError(f"the output '{path}' exists", "choose another --output or add --overwrite", exit_code=2)
    if not path.parent.is_dir():
        raise OutputError(f"there is no folder '{path.parent}' to write to", "make it first", exit_code=2)
    check_writable(path)


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all; raises what `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as readable JSON, whole or not at all; raises what `replacing` does."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """`content` as readable JSON."""
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        CheckpointError: it is missing, damaged, or no object.
    """
    if not path.is_file():
        raise CheckpointError(f"folder '{path.parent}' holds no {path.name}, so it is no saved model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is damaged: {error}", "copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' holds no object")
    return content


def write_error(path: Path, error: Exception) -> OutputError:
    """The error for a failed write."""
    if "space" in str(error).lower() or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return OutputError(f"the disk is full: cannot write '{path}'", "free some space or choose another --output")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"cannot write '{path}': {reason}", "choose another --output")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Data sets of the Hugging Face Hub and shards on disk, through `datasets`."""

from __future__ import annotations

import errno
import glob
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from vitprune.data.classes import ModelClasses, shown
from vitprune.data.files import SPLIT_WORDS, is_image, words
from vitprune.data.options import DataOptions
from vitprune.data.tables import Images, read_table
from vitprune.errors import DataError, HubError

HUB_SETS: dict[str, tuple[str, str | None]] = {
    "imagenet": ("ILSVRC/imagenet-1k", None),
    "imagenette": ("frgfm/imagenette", "320px"),
}
"""Repository and configuration of the data sets that have a name of their own."""
OFFLINE = "HF_HUB_OFFLINE is set"
_TIMEOUT_S = 10.0
_IMAGENET_CLASSES = 1000
_MOST_SHARDS = 100_000
_SHARDS = {".parquet": "parquet", ".tar": "webdataset", ".tar.gz": "webdataset", ".tgz": "webdataset"}
_OF_THE_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
_PREFIXES = ("hf:", "hf-hub:", "hfds/")
"""Ours, that of models, and timm's."""


def hub_name(spec: str) -> str | None:
    """The data set of the Hub whose images a DATA argument names, `owner/name`; None of any other argument."""
    return _hub_set(spec)[0] if spec in HUB_SETS or spec.startswith(_PREFIXES) else None


def _hub_set(spec: str) -> tuple[str, str | None]:
    """Repository and configuration of a data set of the Hub."""
    prefix = next((prefix for prefix in _PREFIXES if spec.startswith(prefix)), "")
    name, _, config = spec.removeprefix(prefix).partition(":")
    return HUB_SETS.get(spec, (name, config or None))


def read_hub(spec: str, classes: ModelClasses | None, options: DataOptions) -> tuple[Images | None, Images | None]:
    """Training and validation images of a Hub data set; downloads what is not cached.

    It is one of HUB_SETS, or `hf:owner/name`, or `hf:owner/name:config` where it has several configurations. Without
    classes, the model's, images are unlabelled.

    Raises:
        HubError: the Hub is out of reach, or the data set is gated or absent.
        DataError: the data set has no such split or no images, or its classes do not fit the model.
    """
    from datasets import DownloadConfig, load_dataset
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError

    repository, config = _hub_set(spec)
    by_class = classes if classes is not None and classes.kind == "class" else None
    if repository == HUB_SETS["imagenet"][0] and by_class and by_class.num_classes < _IMAGENET_CLASSES:
        count = by_class.num_classes
        raise DataError(
            f"the model has {count} classes{shown(by_class.names)}, but '{spec}' has {_IMAGENET_CLASSES}",
            "use data with the model's classes, or train without labels: vitprune sparsify ... --no-labels",
        )
    if Path(repository).exists():  # load_dataset would read it instead
        raise DataError(
            f"'{spec}' names a data set of the Hub, and there is a folder '{repository}' here",
            f"./{repository} is the folder; for the data set run vitprune elsewhere",
            exit_code=2,
        )
    unreachable = _why_unreachable(repository)
    try:
        # Never `trust_remote_code`: a data set is data.
        once = DownloadConfig(max_retries=1)
        with _offline() if unreachable else nullcontext():  # what is cached is read all the same
            tables = load_dataset(repository, config, download_config=once, streaming=options.streaming)
    except (DatasetNotFoundError, GatedRepoError) as error:
        if "gated" in str(error).lower():
            raise HubError(
                f"the data set '{repository}' is gated",
                f"accept its terms on https://huggingface.co/datasets/{repository}, then run: hf auth login; "
                "or pass a local folder as DATA",
            ) from error
        raise HubError(
            f"there is no data set '{repository}' on the Hugging Face Hub", "check the name, or pass a folder"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # no connection, offline mode, HTTP errors
        offline = unreachable == OFFLINE
        raise HubError(
            f"cannot load '{repository}' from the Hugging Face Hub: {unreachable or str(error).splitlines()[0]}",
            f"{'unset it' if offline else 'check the connection'}, or pass a local folder as DATA (for ImageNet also "
            "by $VITPRUNE_IMAGENET)",
        ) from error
    return _read_splits(tables, classes, repository, options)


def _why_unreachable(repository: str) -> str | None:
    """Why the Hub cannot be asked, found in one short try: `load_dataset` retries for half a minute; None if it can."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    if is_offline_mode():
        return OFFLINE
    try:
        HfApi().dataset_info(repository, timeout=_TIMEOUT_S)
    except HfHubHTTPError:  # it answers, and load_dataset says what is wrong
        return None
    except Exception as error:  # the system's, or one of whichever HTTP client it uses
        return f"it is out of reach ({type(error).__name__})"
    return None


@contextmanager
def _offline() -> Iterator[None]:
    """In the block, `datasets` takes what is cached and asks no network."""
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def find_shards(spec: str) -> list[Path]:
    """The parquet or tar files that a DATA argument names: one, a pattern, or a folder that holds such files alone.

    Raises:
        DataError: the folder holds images too.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        folders = any(entry.is_dir() for entry in path.iterdir())
        shards = [] if folders else [file for file in files if _ending(file)]
        if shards and (image := next((file for file in files if is_image(file)), None)):
            raise DataError(
                f"'{spec}' holds images, such as '{image.name}', and '{shards[0].name}': either may be meant",
                f"name the shards, '{path / '*'}{_ending(shards[0])}', or move them elsewhere",
                exit_code=2,
            )
        return shards
    if not _ending(path):
        return []
    return [path] if path.is_file() else sorted(path.parent.glob(path.name))


def _ending(path: Path) -> str | None:
    return next((ending for ending in _SHARDS if path.name.endswith(ending)), None)


def missing_shards(shards: list[Path]) -> list[str]:
    """Names of the files missing from series such as train-00000-of-00010.parquet."""
    missing = []
    numbered = [match for match in (re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(.*)", path.name) for path in shards) if match]
    for before, of, total, after in sorted({match.group(1, 3, 4, 5) for match in numbered}):
        present = {int(match[2]) for match in numbered if match.group(1, 3, 4, 5) == (before, of, total, after)}
        absent = sorted(set(range(min(int(total), _MOST_SHARDS))) - present)
        missing += [f"{before}{number:0{len(total)}d}{of}{total}{after}" for number in absent]
    return missing


def read_shards(
    shards: list[Path], classes: ModelClasses | None, options: DataOptions, source: str
) -> tuple[Images | None, Images | None]:
    """Training and validation images of parquet files or of webdataset tar files, by the files' names.

    tar files can only be read one row after another; so are parquet files with `options.streaming`, or else they are
    unpacked into the cache of `datasets` so that rows can be chosen. Without classes, the model's, images are
    unlabelled. Errors call the data `source`.

    Raises:
        DataError: files of two kinds, a damaged one, or none of a split that is named.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    endings = {str(_ending(shard)) for shard in shards}
    if len({_SHARDS[ending] for ending in endings}) > 1:
        raise DataError(
            f"'{source}' holds both {' and '.join(sorted(endings))} files", "give one kind: 'folder/*.parquet'"
        )
    kind = _SHARDS[endings.pop()]
    for shard in shards:
        if "::" in str(shard):
            raise DataError(f"the path '{shard}' holds '::', which datasets takes for two addresses", "rename it")
        if _ending(shard) == ".tar":
            _check_tar(shard)
    streaming = options.streaming or kind == "webdataset"
    files = _by_split(shards, options.splits)
    try:
        tables = load_dataset(
            kind,
            data_files={name: [glob.escape(str(p)) for p in paths] for name, paths in files.items()},
            streaming=streaming,
        )
    except (OSError, ValueError, EOFError, tarfile.TarError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            raise _disk_error(cause, shards) from error
        raise DataError(f"'{source}' cannot be read: {str(cause).splitlines()[0]}", "copy the files again") from error
    except TypeError as error:  # pyarrow's
        raise DataError(
            f"the rows of '{source}' differ in kind: {str(error).splitlines()[0]}",
            "write a number in the same way in all rows, such as 1.0",
        ) from error
    return _read_splits(tables, classes, source, options)


def _disk_error(error: OSError, shards: list[Path]) -> DataError:
    """What to say of a disk that is full or may not be used: it is no fault of the data."""
    why = error.strerror or str(error)
    if error.filename and Path(str(error.filename)) in shards:
        return DataError(f"'{error.filename}' cannot be read: {why}", "check its permissions")
    from datasets.config import HF_DATASETS_CACHE

    return DataError(
        f"the cache of datasets cannot be written: {why} ({error.filename or HF_DATASETS_CACHE})",
        "set HF_DATASETS_CACHE to a folder that can be written and has room, or use --streaming",
    )


def _check_tar(path: Path) -> None:
    """A tar file ends in a block of zeros; one that was cut off would be read as if it were all."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        whole = size % tarfile.BLOCKSIZE == 0 and size > 0 and not file.read().strip(b"\0")
    if not whole:
        raise DataError(f"'{path}' is damaged: it does not end as a tar file does", "copy it again")


def _by_split(shards: list[Path], splits: tuple[str | None, str | None]) -> dict[str, list[Path]]:
    """Files by split: those whose name has one of its words, as in imagenet-train-00000.tar; without any, all val."""
    found: dict[str, list[Path]] = {}
    for groups, given in zip(SPLIT_WORDS, splits, strict=True):
        if given is not None:
            chosen = [shard for shard in shards if shard.name.startswith(given)]
            if not chosen:
                raise DataError(f"no file's name begins with '{given}'", f"the first is {shards[0].name}")
        else:
            by_group = ([shard for shard in shards if words(shard) & {*alike}] for alike in groups)
            chosen = next(filter(None, by_group), [])
        if chosen:
            found[given or groups[0][0]] = chosen
    if splits == (None, None) and found:
        counts = Counter(chain(*found.values()))
        tested = {shard for shard in shards if words(shard) & set(chain(*SPLIT_WORDS[1]))}
        if odd := [shard for shard in shards if counts[shard] != 1 and not (counts[shard] == 0 and shard in tested)]:
            raise DataError(
                f"'{odd[0].name}' is of {'both splits' if counts[odd[0]] else 'no split'} by its name",
                "say what the names of each split's files begin with: --train-split TRAIN --val-split VAL",
            )
    return found or {SPLIT_WORDS[1][0][0]: shards}


def _read_splits(
    tables: Mapping[str, Any], classes: ModelClasses | None, source: str, options: DataOptions
) -> tuple[Images | None, Images | None]:
    found = []
    for groups, given in zip(SPLIT_WORDS, options.splits, strict=True):
        if given is not None and given not in tables:
            raise DataError(f"'{source}' has no split '{given}'", f"its splits are {', '.join(map(str, tables))}")
        name = given or next((split for alike in groups for split in tables if str(split).lower() in alike), None)
        found.append(None if name is None else read_table(tables[name], classes, source, options))
    if found == [None, None]:
        raise DataError(
            f"'{source}' has no split that is called train or val, only {', '.join(map(str, tables))}",
            "name them: --train-split TRAIN --val-split VAL",
        )
    return found[0], found[1]

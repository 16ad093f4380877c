"""A finished run to the Hugging Face Hub: what would go where, and the one commit that brings it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import read_metadata
from vitprune.common.files import json_text
from vitprune.common.formatting import one_line
from vitprune.common.run_folder import CARD, CONFIG, PAGE, REPORT, WEIGHTS, RunFolder, unsigned
from vitprune.errors import CheckpointError, HubError, UsageError
from vitprune.loading.hub import HUB_TIMEOUT_S
from vitprune.report.card import PLACEHOLDER, is_repository, render_card
from vitprune.report.page import render_page
from vitprune.report.publishable import publishable
from vitprune.report.runs import FinishedRun, read_run

_NEW_TOKEN = "make one that may write on https://huggingface.co/settings/tokens, then run hf auth login or set HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """The files of a run as they leave this machine, without its paths."""

    repository: str
    files: Mapping[str, bytes | Path]
    """Content, or the file that holds it, by name in the repository."""
    num_images: int
    """Images of the data set that report.html shows."""
    message: str

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }


@dataclass(frozen=True)
class Target:
    """The repository as it is before the commit."""

    url: str
    user: str
    """Who the token belongs to."""
    private: bool
    """Whether it is, or will be."""
    exists: bool = False
    there: frozenset[str] = frozenset()
    """Names of the files it holds."""
    commit: str | None = None
    """Its last one."""


def prepare(folder: Path, repository: str, *, images: bool = True) -> Upload:
    """What of a complete run would go to `owner/name`, with images of the data set or without; asks no network.

    README.md goes as it is, but for the repository's name.

    Raises:
        UsageError: no such name is possible, or the folder is no complete run.
        CheckpointError: a file of the run is damaged, or of another run.
    """
    if not is_repository(repository):
        raise UsageError(
            f"'{repository}' is an invalid repository name",
            "it is OWNER/NAME, your name there or an organisation's first, of letters, digits, '-', '_' and '.'",
        )
    run, folder = read_run(folder), RunFolder.of(folder)
    weights, card = folder / WEIGHTS, folder / CARD
    if not weights.is_file():
        raise UsageError(f"'{folder}' holds no {WEIGHTS}, so there is no model to upload", "give a whole run folder")
    metadata = read_metadata(weights)
    _check_one_run(run, metadata, folder)
    text = unsigned(card.read_bytes()) if card.is_file() else render_card(run, metadata).encode()
    files: dict[str, bytes | Path] = {
        WEIGHTS: weights,
        CONFIG: json_text(metadata.model_dump(mode="json")).encode(),
        CARD: text.replace(PLACEHOLDER.encode(), repository.encode()),
        PAGE: render_page(run, images=images).encode(),
        REPORT: json_text(run.report.as_json()).encode(),
    }
    num_images = run.keep_maps.num_images if run.keep_maps is not None and images else 0
    return Upload(repository, files, num_images, f"{run.report.model}, {run.report.label}, by vitprune")


def look_up(repository: str, *, private: bool) -> Target:
    """Ask the Hub who we are and whether the repository exists; changes nothing.

    Raises:
        UsageError: the repository is public and `private` was asked for.
        HubError: no token, one that is not accepted, or no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _explained(repository):
        url, user = f"{api.endpoint}/{repository}", str(api.whoami().get("name"))
        try:
            found = api.model_info(repository, timeout=HUB_TIMEOUT_S)
        except RepositoryNotFoundError:
            return Target(url, user, private)
    if private and not found.private:
        raise UsageError(
            f"'{repository}' exists and is public, so nothing in it would be private",
            f"choose another name, or make it private first: {url}/settings",
        )
    there = frozenset(sibling.rfilename for sibling in found.siblings or [])
    return Target(url, user, bool(found.private), exists=True, there=there, commit=found.sha)


def upload(prepared: Upload, target: Target) -> str:
    """Make the repository if need be, and commit all files at once: all of them are there afterwards, or none.

    Returns:
        The address of the commit.

    Raises:
        HubError: the token may not write, no connection, or somebody has changed the repository since `look_up`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _explained(prepared.repository):
        operations = [CommitOperationAdd(name, content) for name, content in prepared.files.items()]
        if not target.exists:
            api.create_repo(prepared.repository, private=target.private, repo_type="model")
        commit = api.create_commit(
            prepared.repository,
            operations,
            commit_message=prepared.message,
            repo_type="model",
            parent_commit=target.commit,
        )
    return str(commit.commit_url)


def _check_one_run(run: FinishedRun, metadata: Metadata, folder: Path) -> None:
    """A report of another model would state false figures; and no path of this machine goes out."""
    about = {"accuracy": metadata.accuracy, "origin": metadata.origin}
    if publishable(about) != about:
        raise CheckpointError(
            f"the header of {WEIGHTS} in '{folder}' names a folder of this machine",
            "an older vitprune wrote it; run sparsify again",
        )
    said = (metadata.accuracy or {}).get("sparse")
    if metadata.model != run.report.model or metadata.label != run.report.label or said != run.report.sparse.as_json():
        raise CheckpointError(
            f"{REPORT} in '{folder}' is not of the {WEIGHTS} beside it: the file's header says something else",
            "one of them was replaced; push the folder as sparsify wrote it",
        )


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """In the block, whatever the Hub or the way to it raises becomes a sentence.

    Raises:
        HubError: instead.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError("there is no token of the Hugging Face Hub on this machine", _NEW_TOKEN) from error
    except OfflineModeIsEnabled as error:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset it") from error
    except (HfHubHTTPError, ValueError) as error:  # a ValueError where it does not take the YAML of README.md
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        said = one_line(getattr(error, "server_message", None) or str(error))
        if status == 401:
            raise HubError("the Hugging Face Hub does not accept the token", _NEW_TOKEN) from error
        if status in (403, 404):  # it says 404 where a token may not even know
            owner = repository.partition("/")[0]
            hint = f"'{owner}' has to be you or an organisation of yours; {_NEW_TOKEN}"
            raise HubError(f"the token may not write to '{repository}' ({said})", hint) from error
        raise HubError(f"the Hugging Face Hub refused it: {said}", "see https://status.huggingface.co") from error
    except Exception as error:  # the system's, or one of whichever HTTP client huggingface_hub uses
        what = f"{type(error).__name__}: {one_line(str(error))}"
        raise HubError(f"the Hugging Face Hub is out of reach ({what})", "check the connection") from error

"""A finished run to the Hugging Face Hub: what would go where, and the one commit that brings it there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitprune.checkpoint.metadata import Metadata
from vitprune.checkpoint.sparse_file import load_sparse, read_metadata
from vitprune.common.formatting import first_line
from vitprune.errors import CheckpointError, HubError, UsageError, VitpruneError
from vitprune.export.timm_folder import HUB_WEIGHTS, hub_backbone, timm_builds
from vitprune.loading.hub import HUB_PREFIX, HUB_TIMEOUT_S
from vitprune.report.card import PLACEHOLDER, card_is_ours, render_card
from vitprune.report.card_data import is_repository
from vitprune.report.page import render_page
from vitprune.report.publishable import publishable
from vitprune.report.runs import CARD, CONFIG, PAGE, REPORT, WEIGHTS, FinishedRun, read_run

_HTTP_CLIENTS = ("httpx", "requests", "urllib3")
"""What huggingface_hub uses, by version: their errors mean that there is no way to the Hub."""
_NEW_TOKEN = "make one that may write on https://huggingface.co/settings/tokens, then run hf auth login or set HF_TOKEN"
_WEB = ("https://huggingface.co/", "http://huggingface.co/", "huggingface.co/", HUB_PREFIX)


@dataclass(frozen=True)
class Upload:
    """The files of a run as they leave this machine, without its paths.

    Attributes:
        repository: `owner/name`.
        files: content, or the file that holds it, by name in the repository.
        num_images: how many images of the data set report.html shows.
        own_card: whether README.md is the user's own text.
        message: of the commit.
    """

    repository: str
    files: Mapping[str, bytes | Path]
    num_images: int
    own_card: bool
    message: str

    @property
    def for_timm(self) -> bool:
        """Whether one of the files is the backbone by itself, which timm opens without vitprune."""
        return HUB_WEIGHTS in self.files

    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {
            name: content.stat().st_size if isinstance(content, Path) else len(content)
            for name, content in self.files.items()
        }


@dataclass(frozen=True)
class Target:
    """The repository as it is before the commit.

    Attributes:
        url: of its page.
        user: who the token belongs to.
        exists: whether it is there already.
        private: whether it is, or will be.
        there: names of the files it holds.
        commit: its last one; None of a new repository.
    """

    url: str
    user: str
    exists: bool
    private: bool
    there: frozenset[str]
    commit: str | None


def push_run(
    folder: Path, repository: str, *, private: bool = False, images: bool = True, message: str | None = None
) -> str:
    """Upload a run in one commit, without asking.

    Args:
        folder: of a complete run.
        repository: `owner/name`; made if it is not there.
        private: whether nobody else may see a new repository.
        images: also show images of the data set in report.html.
        message: of the commit; None for one that names the model.

    Returns:
        The address of the commit.

    Raises:
        UsageError: no such name is possible, the folder is no complete run, or the repository is public and `private`.
        CheckpointError: a file of the run is damaged, or of another run.
        ExportError: timm cannot open the backbone that it would be given.
        HubError: no token, one that may not write, or no connection.
    """
    prepared = prepare(folder, repository, images=images, message=message)
    return upload(prepared, look_up(repository, private=private))


def prepare(folder: Path, repository: str, *, images: bool = True, message: str | None = None) -> Upload:
    """What of a run would be uploaded; asks nothing of the network.

    Raises:
        UsageError, CheckpointError, ExportError: see `push_run`.
    """
    _check_name(repository)
    if message is not None and not message.strip():
        raise UsageError("the message of the commit is empty", "leave --message out for one that names the model")
    run = read_run(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise UsageError(f"'{folder}' holds no {WEIGHTS}, so there is no model to upload", "give a whole run folder")
    metadata = read_metadata(weights)
    _check_one_run(run, metadata, folder)
    shown = 0 if run.keep_maps is None or not images else len(run.keep_maps.images)
    own = not card_is_ours(folder / CARD)
    card = _own_card(folder / CARD, repository) if own else render_card(run, metadata, repository).encode()
    backbone, timm_config = _for_timm(weights, metadata)
    files: dict[str, bytes | Path] = {
        WEIGHTS: weights,
        **backbone,
        CONFIG: _json(metadata.model_dump(mode="json") | timm_config),
        CARD: card,
        PAGE: render_page(run, images=images).encode(),
        REPORT: _json(run.report.as_json()),
    }
    return Upload(repository, files, shown, own, message or f"{run.report.model}, {run.report.label}, by vitprune")


def look_up(repository: str, *, private: bool) -> Target:
    """Ask the Hub who we are and whether the repository is there; changes nothing.

    Raises:
        UsageError: the repository is public and `private` was asked for.
        HubError: see `push_run`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi()
    with _explained(repository):
        me = api.whoami()
        _check_may_write(me)
        url, user = f"{api.endpoint}/{repository}", str(me.get("name"))
        try:
            found = api.model_info(repository, timeout=HUB_TIMEOUT_S)
        except RepositoryNotFoundError:
            return Target(url, user, exists=False, private=private, there=frozenset(), commit=None)
    if private and not found.private:
        raise UsageError(
            f"'{repository}' is there already and public, so nothing in it would be private",
            f"choose another name, or make it private first: {url}/settings",
        )
    there = frozenset(sibling.rfilename for sibling in found.siblings or [])
    return Target(url, user, exists=True, private=bool(found.private), there=there, commit=found.sha)


def upload(prepared: Upload, target: Target) -> str:
    """Make the repository if need be, and commit all files at once: all of them are there afterwards, or none.

    Returns:
        The address of the commit.

    Raises:
        HubError: see `push_run`; also if somebody has changed the repository since `look_up`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository = HfApi(), prepared.repository
    with _explained(repository):
        operations = [
            CommitOperationAdd(
                path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content)
            )
            for name, content in prepared.files.items()
        ]
        if not target.exists:
            api.create_repo(repository, private=target.private, repo_type="model")
    with _explained(repository, after="" if target.exists else "; the repository was made and is empty"):
        commit = api.create_commit(
            repository,
            operations,
            commit_message=prepared.message,
            repo_type="model",
            parent_commit=target.commit,
        )
    return str(commit.commit_url)


def _check_name(repository: str) -> None:
    if is_repository(repository):
        return
    for before in _WEB:
        rest = repository.removeprefix(before).strip("/")
        if rest != repository and is_repository(rest):
            raise UsageError(f"'{repository}' is no name of a repository", f"leave out '{before}': {rest}")
    raise UsageError(
        f"'{repository}' is no name of a repository on the Hub",
        "it is OWNER/NAME, your name there or an organisation's first, of letters, digits, '-', '_' and '.'",
    )


def _check_one_run(run: FinishedRun, metadata: Metadata, folder: Path) -> None:
    """A report beside a file that it is not of would be a false promise; and no path of this machine goes out."""
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


def _for_timm(weights: Path, metadata: Metadata) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The backbone by itself as a file by name, and timm's part of config.json; nothing where timm cannot build it."""
    if not timm_builds(metadata.architecture):
        return {}, {}
    sparse, _ = load_sparse(weights)
    backbone, config = hub_backbone(sparse.model, metadata)
    return {HUB_WEIGHTS: backbone}, config


def _own_card(path: Path, repository: str) -> bytes:
    """The user's own text, with the name of the repository where our card has a place for it."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        text = path.read_text(encoding="utf-8")
        ModelCard(text)
    except (OSError, ValueError, TypeError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"'{path}' is no model card: {reason}", "put it right, or remove it to have one written"
        ) from error
    return text.replace(PLACEHOLDER, repository).encode()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _check_may_write(me: Mapping[str, Any]) -> None:
    """Say before anything is asked that a token may only read; what a fine-grained one may is only known later."""
    token = (me.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError(f"the token '{token.get('displayName', '')}' of {me.get('name')} may only read", _NEW_TOKEN)


@contextmanager
def _explained(repository: str, after: str = "") -> Iterator[None]:
    """In the block, whatever the Hub or the way to it raises becomes a sentence.

    Args:
        repository: that is written to.
        after: what has already happened, for the sentence.
    """
    try:
        yield
    except VitpruneError:
        raise
    except Exception as error:  # the Hub's own, the system's, or one of whichever HTTP client it uses
        message, hint = _sentence(repository, error)
        raise HubError(message + after, hint) from error


def _sentence(repository: str, error: Exception) -> tuple[str, str]:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token of the Hugging Face Hub on this machine", _NEW_TOKEN
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded", "unset it: HF_HUB_OFFLINE=0 vitprune push ..."
    if status == 401:
        return "the Hugging Face Hub does not accept the token", _NEW_TOKEN
    if status in (403, 404):  # the Hub says 404 where a token may not even know
        owner, said = repository.partition("/")[0], getattr(error, "server_message", None)
        return (
            f"the token may not write to '{repository}'" + (f" ({' '.join(said.split())})" if said else ""),
            f"'{owner}' has to be you or an organisation of yours; {_NEW_TOKEN}",
        )
    if status == 409:
        return f"'{repository}' is there already, and this token may not see it", "choose another name"
    if status == 412:
        return f"'{repository}' was changed while this was about to be uploaded", "look at it, and push again"
    if status == 429:
        return "the Hugging Face Hub has had too many requests from here", "wait a few minutes"
    if status is not None:
        return f"the Hugging Face Hub refused it ({status}): {first_line(error)}", "see https://status.huggingface.co"
    if isinstance(error, ValueError) and CARD in str(error):
        return f"the Hugging Face Hub refused {CARD}: {' '.join(str(error).split())}", "put the YAML at its top right"
    what = f"({type(error).__name__}: {first_line(error)})"
    if isinstance(error, OSError) or type(error).__module__.startswith(_HTTP_CLIENTS):
        return f"the Hugging Face Hub is out of reach {what}", "check the connection"
    return f"the upload to the Hugging Face Hub failed {what}", "VITPRUNE_DEBUG=1 shows where"

"""Models from the Hugging Face Hub, and what to say when it cannot be reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitprune.checkpoint.sparse_file import load_sparse
from vitprune.common.devices import check_compiler, pick_device
from vitprune.common.files import read_json
from vitprune.common.run_folder import CONFIG, RunFolder
from vitprune.errors import CheckpointError, HubError, UsageError
from vitprune.loading.saved_folder import FOLDER_FILES
from vitprune.model import SparseViT

HUB_PREFIX = "hf-hub:"
HUB_TIMEOUT_S = 10.0
_NOT_WRITTEN = (
    "vitprune.load reads what vitprune wrote; a dense model comes from timm.create_model, and vitprune.sparsify makes "
    "it sparse"
)


def fetch(repository: str, revision: str | None) -> Path | None:
    """The folder of a repository that is not of timm's layout, downloaded; None of one that timm reads itself.

    Raises:
        CheckpointError: the repository holds no model.
        HubError: it cannot be had.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    check_hub(repository, revision)
    try:
        config = read_json(Path(hf_hub_download(repository, CONFIG, revision=revision)))
        if "architecture" in config and "stages" not in config:
            return None
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FOLDER_FILES)))
    except LocalEntryNotFoundError as error:  # a kind of the next, but it means that there is no connection
        raise _hub_error(repository, error) from error
    except EntryNotFoundError as error:
        raise CheckpointError(
            f"'{repository}' on the Hub holds no config.json, so it is no saved model", "check the name"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise _hub_error(repository, error) from error


def load(
    path: str | Path, device: str | torch.device = "cpu", *, keep: float | None = None, compile: bool = False
) -> SparseViT:
    """Load a sparse model that vitprune wrote; of a file on this machine without any network.

    Example:
        sparse = vitprune.load("runs/deit_small_patch16_224-keep0.7", device="cuda")
        logits = sparse(images)  # (B, 3, 224, 224) to (B, num_classes)

    Args:
        path: model.safetensors, its run folder, or `hf-hub:owner/name` (with `@revision`), which is downloaded once.
        device: where to put it: "cpu", "cuda", "cuda:N", "mps" or "auto".
        keep: at which keep ratio it opens, of a model that was trained for a range; None for the one in the file. It
            can be set later too: `sparse.keep = 0.6`.
        compile: whether calling it runs code of torch.compile: the whole pass, made at the first image and again at the
            first batch of several, about a minute each, which then serves batches of every size.

    Returns:
        The model in eval mode.

    Raises:
        CheckpointError: the file is missing, damaged, not ours, or does not fit its own metadata.
        UsageError: the model was trained for one keep ratio, or for others than `keep`.
        DeviceError: there is no such device, or torch.compile does not work there.
        HubError: the repository cannot be had.
    """
    if not isinstance(path, (str, Path)):
        raise UsageError(f"a {type(path).__name__} is no path", "vitprune.load reads files that vitprune wrote")
    where = pick_device(device) if isinstance(device, str) else device
    folder: Path | None = Path(path)
    if str(path).startswith(HUB_PREFIX):
        repository, _, revision = str(path).removeprefix(HUB_PREFIX).partition("@")
        folder = fetch(repository, revision or None)
    if folder is None:
        raise CheckpointError(
            f"'{path}' is a dense model of timm, and none that vitprune made sparse",
            f"timm.create_model('{path}', pretrained=True)",
        )
    if not folder.exists():
        raise CheckpointError(f"file '{path}' not found", _NOT_WRITTEN, exit_code=2)
    if folder.is_dir() and not RunFolder(folder).weights.is_file():
        raise CheckpointError(f"the folder '{path}' holds no {RunFolder(folder).weights.name}", _NOT_WRITTEN)
    if compile:
        check_compiler(torch.device(where))
    model, _ = load_sparse(RunFolder.weights_in(folder))
    if keep is not None:
        model.keep = keep
    if compile:
        model.compile(fullgraph=True, dynamic=True)
    return model.to(where)


def from_hub(name: str, sizes: dict[str, Any]) -> nn.Module:
    """A timm model with its weights from the Hub, by timm's own loader.

    Raises:
        HubError: they cannot be had.
        CheckpointError: they do not fit.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **sizes)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _hub_error(name, error) from error
    except RuntimeError as error:
        raise CheckpointError(f"the weights of '{name}' do not fit: {first_mismatch(error)}") from error
    return model


def check_hub(repository: str, revision: str | None = None, names: Sequence[str] = (CONFIG,)) -> None:
    """Ask the Hub for a repository, briefly, unless one of the files of these `names` is cached: the download itself
    retries for a minute before it says that there is no connection.

    Raises:
        HubError: the repository cannot be had.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    for name in names:
        for cached in (name, name.replace("pytorch_model.bin", "model.safetensors")):  # timm prefers the latter
            if isinstance(try_to_load_from_cache(repository, cached, revision=revision), str):
                return
    try:
        HfApi().model_info(repository, timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the Hub's own, the system's, or one of whichever HTTP client it uses
        raise _hub_error(repository, error) from error


def _hub_error(name: str, error: Exception) -> HubError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return HubError(
            f"'{name}' is gated on the Hugging Face Hub", "accept its terms on its page, then run: hf auth login"
        )
    if isinstance(error, RepositoryNotFoundError):
        return HubError(f"there is no '{name}' on the Hugging Face Hub", "check the name")
    from huggingface_hub.constants import is_offline_mode

    offline = is_offline_mode()
    why = "HF_HUB_OFFLINE is set" if offline else f"the Hugging Face Hub is out of reach ({type(error).__name__})"
    way_out = "unset it" if offline else "check the connection"
    return HubError(
        f"cannot get '{name}': {why}", f"{way_out}, or give a weight file that is already here: --checkpoint FILE"
    )


def first_mismatch(error: Exception) -> str:
    """The first of the lines in which torch lists what is missing, unexpected or of another shape."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[1] if len(lines) > 1 and lines[0].startswith("Error(s) in loading") else (lines or [repr(error)])[0]
    return text if len(text) <= 240 else text[:240] + " ..."

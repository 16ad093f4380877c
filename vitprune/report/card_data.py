"""What the Hub reads of a model card: the YAML before its text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is there for all that

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.formatting import one_line
from vitprune.export.timm_folder import timm_builds
from vitprune.report.publishable import publishable
from vitprune.report.runs import FinishedRun

_TAGS = ["vision-transformer", "token-pruning", "dynamicvit"]
_HUB_LICENCES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "openrail", "gemma", "apple-ascl", "apple-amlr"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    }
)
"""Those of timm's models that the Hub has a name for; another one is 'other' there, with its own name beside it."""
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt", ".npz")


@dataclass(frozen=True)
class Origin:
    """Where the dense weights come from, as the file's header says it.

    Attributes:
        base: their repository on the Hub; None where that is not known.
        source: what the header calls them, without a path.
        licence: of the weights; None where timm does not know it, or nobody knows what file they came from.
    """

    base: str | None
    source: str
    licence: str | None


def origin_of(metadata: Metadata) -> Origin:
    """Where the weights of a sparse model come from."""
    said = publishable({"origin": metadata.origin})["origin"]
    source = one_line(str(said.get("source") or metadata.model))
    repository = source.removeprefix("hf-hub:").partition("@")[0]
    licence = one_line(str(said.get("license") or "")).lower()
    # Of a file's weights, timm's configuration says what the weights of that name have, not these.
    known = licence not in ("", "unknown") and PurePath(source).suffix not in _WEIGHT_FILES
    return Origin(repository if is_repository(repository) else None, source, licence if known else None)


def is_repository(name: str) -> bool:
    """Whether the Hub could have a repository of that name, `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def card_data(run: FinishedRun, metadata: Metadata) -> ModelCardData:
    """Licence, base model, data and results of a finished run."""
    origin, report = origin_of(metadata), run.report
    # The Hub tells people to load a model of timm's library with timm.create_model, so that has to work.
    libraries = ["timm", "vitprune"] if timm_builds(metadata.architecture) else ["vitprune"]
    more: dict[str, Any] = _licence(origin) | ({} if origin.base is None else {"base_model_relation": "finetune"})
    return ModelCardData(
        **more,
        library_name=libraries[0],
        pipeline_tag="image-classification",
        base_model=origin.base,
        datasets=_datasets(run),
        tags=[*libraries, *_TAGS],
        metrics=None if report.sparse.top1_pct is None else ["accuracy"],
        model_name=f"{one_line(report.model)}, {one_line(report.label)}",
        eval_results=_results(run),
    )


def _licence(origin: Origin) -> dict[str, Any]:
    if origin.licence is None:
        return {}
    if origin.licence in _HUB_LICENCES:
        return {"license": origin.licence}
    link = {} if origin.base is None else {"license_link": f"https://huggingface.co/{origin.base}"}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", origin.licence), **link}


def _datasets(run: FinishedRun) -> list[str] | None:
    return [run.hub_data] if run.hub_data is not None and is_repository(run.hub_data) else None


def _results(run: FinishedRun) -> list[EvalResult] | None:
    """Top-1 and top-5 of the sparse model in percent; None without labels."""
    side, data = run.report.sparse, run.report.data
    values = {"Top-1 accuracy (%)": side.top1_pct, "Top-5 accuracy (%)": side.top5_pct}
    name = one_line(data.name)
    found = [
        EvalResult(
            task_type="image-classification",
            dataset_type=(_datasets(run) or [re.sub(r"[^A-Za-z0-9_.-]+", "-", name)])[0],
            dataset_name=f"{name}, {side.num_images} images",  # seldom the whole set: the name must not say so
            metric_type="accuracy",
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in values.items()
        if value is not None
    ]
    return found or None

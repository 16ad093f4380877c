"""README.md of a run folder: the model card, from report.json and the header of model.safetensors."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is there for all that
from markupsafe import Markup

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import write_text
from vitprune.common.formatting import one_line, plain
from vitprune.common.run_folder import CARD, signed
from vitprune.report.page import templates
from vitprune.report.publishable import publishable
from vitprune.report.runs import FinishedRun
from vitprune.report.schema import Report
from vitprune.report.tables import (
    figure_rows,
    headline,
    likeness,
    plain_figures,
    plan_rows,
    plan_sentence,
    random_said,
    ratio_rows,
    speed_rows,
    verdict,
)
from vitprune.tasks import task_named

PLACEHOLDER = "OWNER/NAME"
"""Stands where the name of the repository will be."""
KEPT_CARD = "'{}' exists and is kept as it is; remove it to have the model card written"

_MOST_CLASSES = 20
_HARMLESS = re.compile(r"(?<=\w)[_.](?=\w)|[-,'/%()+=]|:(?!//)")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")
_TAGS = ["vitprune", "vision-transformer", "token-pruning", "dynamicvit"]
_HUB_LICENCES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "openrail", "gemma", "apple-ascl", "apple-amlr"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
    }
)
"""Those of timm's models that the Hub has a name for; another one is 'other' there, with its own name beside it."""
_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt", ".npz")


def write_card(folder: Path, run: FinishedRun, metadata: Metadata) -> bool:
    """Write README.md, unless there is one: it may hold the user's own words. Returns whether it was written.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / CARD
    if os.path.lexists(path):
        return False
    write_text(path, signed(render_card(run, metadata)))
    return True


def render_card(run: FinishedRun, metadata: Metadata) -> str:
    """The model card as Markdown with its YAML, for the repository `PLACEHOLDER`; `metadata` heads the run's weights.

    Everything that comes from the run is escaped.
    """
    environment = templates().overlay(trim_blocks=True)
    environment.filters |= {"md": markdown, "code": code}
    origin = _origin(metadata)
    body = environment.get_template("card.md.j2").render(_content(run, metadata, origin))
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return str(ModelCard(f"---\n{_card_data(run, origin).to_yaml()}\n---\n\n{body}"))


def markdown(text: str) -> Markup:
    """A text of elsewhere as one line of Markdown that shows it as it is: no markup, no HTML, no end of a cell."""
    line = one_line(text)
    harmless = {found.start() for found in _HARMLESS.finditer(line)}
    return Markup(_PUNCTUATION.sub(lambda at: at[0] if at.start() in harmless else f"&#{ord(at[0])};", line))


def code(text: str, language: str) -> Markup:
    """A block of code that `text` cannot end."""
    text = plain(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return Markup(f"{fence}{language}\n{text}\n{fence}")


def is_repository(name: str) -> bool:
    """Whether the Hub could have a repository of that name, `owner/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


class _Origin(NamedTuple):
    """Where the dense weights come from, as the file's header says it."""

    base: str | None  # their repository on the Hub
    source: str  # what the header calls them, without a path
    licence: str | None


def _origin(metadata: Metadata) -> _Origin:
    said = publishable({"origin": metadata.origin})["origin"]
    source = one_line(str(said.get("source") or metadata.model))
    repository = source.removeprefix("hf-hub:").partition("@")[0]
    licence = one_line(str(said.get("license") or "")).lower()
    # Of a file's weights, timm's configuration says what the weights of that name have, not these.
    known = licence not in ("", "unknown") and PurePath(source).suffix not in _WEIGHT_FILES
    return _Origin(repository if is_repository(repository) else None, source, licence if known else None)


def _card_data(run: FinishedRun, origin: _Origin) -> ModelCardData:
    """What the Hub reads: licence, base model, data and results."""
    report = run.report
    more: dict[str, Any] = {} if origin.base is None else {"base_model_relation": "finetune"}
    if origin.licence in _HUB_LICENCES:
        more["license"] = origin.licence
    elif origin.licence is not None:
        more |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.-]+", "-", origin.licence)}
        more |= {} if origin.base is None else {"license_link": f"https://huggingface.co/{origin.base}"}
    datasets = [run.hub_data] if run.hub_data is not None and is_repository(run.hub_data) else None
    name = one_line(report.data.name)
    task = task_named(report.task)
    measured, kind = _of_hub(report), "accuracy" if report.task == "classification" else None
    results = [
        EvalResult(
            task_type=task.pipeline,
            dataset_type=(datasets or [re.sub(r"[^A-Za-z0-9_.-]+", "-", name)])[0],
            dataset_name=f"{name}, {report.sparse.num_images} images",  # seldom the whole set: the name must not say so
            metric_type=kind or re.sub(r"[^a-z0-9]+", "-", metric.lower()).strip("-"),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in measured.items()
        if value is not None
    ]
    return ModelCardData(
        **more,
        library_name="vitprune",
        pipeline_tag=task.pipeline,
        base_model=origin.base,
        datasets=datasets,
        tags=_TAGS,
        metrics=["accuracy"] if results and report.task == "classification" else None,
        model_name=f"{one_line(report.model)}, {one_line(report.label)}",
        eval_results=results or None,
    )


def _of_hub(report: Report) -> dict[str, float | None]:
    """What was measured of the sparse model, by the Hub's words: accuracy, or without labels likeness to dense."""
    if report.task == "classification":
        return {"Top-1 accuracy (%)": report.sparse.top1_pct, "Top-5 accuracy (%)": report.sparse.top5_pct}
    task = task_named(report.task)
    found = {each.text: getattr(report.sparse, each.key) for each in task.accuracy}
    return found | {each.text: getattr(report.delta, each.key) for each in task.fidelity[:1]}


def _content(run: FinishedRun, metadata: Metadata, origin: _Origin) -> dict[str, Any]:
    """What the template fills in."""
    report, fig = run.report, plain_figures(run.report)
    names = metadata.class_names or []
    recipe, environment = report.training.recipe, report.environment
    weights = recipe.get("weights") or {}
    packages = [f"{name} {environment[name]}" for name in ("vitprune", "torch", "timm") if name in environment]
    return {
        "report": report,
        "training": report.training,
        "title": f"{report.model}, {report.label}",
        "plan": Markup(plan_sentence(report) or ""),  # ours, so nothing in it needs escaping
        "verdict": Markup(verdict(report)),
        "origin": origin,
        "task": task_named(report.task),
        "headline": headline(report),
        "explanation": Markup(task_named(report.task).explanation(report.sparse.as_json())),
        "likeness": likeness(report, fig),
        "random": random_said(report, fig),
        "classes": ", ".join(names) if len(names) <= _MOST_CLASSES and report.task == "classification" else "",
        "fig": fig,
        "figure_rows": figure_rows(report, fig),
        "ratio_rows": ratio_rows(report, fig, lambda said: Markup(f"**{said}**")),
        "speed_rows": speed_rows(report, fig, lambda said: Markup(f"**{said}**")),
        "plan_rows": plan_rows(report, fig, report.num_patches or metadata.num_patches),
        "device": _device(report),
        "slower": " and ".join(str(row.batch_size) for row in report.delta.speedup if row.slower),
        "command": report.commands.get("sparsify") or report.commands.get("sweep"),
        "labels": bool(weights.get("ce") and recipe.get("labels", True)),
        "versions": ", ".join(packages),
        "repository": PLACEHOLDER,
        "input_size": ", ".join(map(str, metadata.preprocessing.input_size)),
    }


def _device(report: Report) -> str:
    """The device and what it is called."""
    kind, _, place = report.device.partition(":")
    environment = report.environment
    if kind == "cpu":
        cores = f"threads: {environment['num_threads']}" if "num_threads" in environment else None
        known = [str(part) for part in (environment.get("cpu"), cores) if part]
    else:
        gpus, index = environment.get("gpus"), int(place) if place.isdecimal() else 0
        some = gpus[index : index + 1] if isinstance(gpus, list) else []
        known = [str(gpu["name"]) for gpu in some if isinstance(gpu, dict) and "name" in gpu]
    return f"{report.device} ({', '.join(known)})" if known else report.device

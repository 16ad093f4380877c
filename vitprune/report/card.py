"""README.md of a run folder: the model card, from report.json and the header of model.safetensors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vitprune.checkpoint.metadata import Metadata
from vitprune.common.files import replacing
from vitprune.common.formatting import number, one_line, plain
from vitprune.export.timm_folder import HUB_WEIGHTS, timm_builds
from vitprune.report.card_data import card_data, origin_of
from vitprune.report.runs import CARD, FinishedRun
from vitprune.report.schema import Report
from vitprune.report.tables import figure_rows, plain_figures, plan_rows, speed_rows
from vitprune.report.verdict import verdict

PLACEHOLDER = "OWNER/NAME"
"""Stands where the name of the repository will be."""
_MOST_CLASSES = 20
_MARK = "<!-- written by vitprune, checksum {}; change a word and the file is yours, never written over -->\n"
_MARKED = re.compile(_MARK.format("([0-9a-f]{20})"))
_HARMLESS = re.compile(r"(?<=\w)[_.](?=\w)|[-,'/%()+=]|:(?!//)")
_PUNCTUATION = re.compile(r"[!-/:-@\[-`{-~]")


def write_card(folder: Path, run: FinishedRun, metadata: Metadata) -> bool:
    """Write README.md, unless there is one that vitprune did not write or that was changed since.

    Args:
        folder: of the run.
        run: what it did.
        metadata: header of its model.safetensors.

    Returns:
        Whether it was written; if not, the one that is there is the user's own.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / CARD
    if not card_is_ours(path):
        return False
    text = render_card(run, metadata)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True


def card_is_ours(path: Path) -> bool:
    """Whether README.md may be written over: there is none, or it is word for word what vitprune wrote."""
    if not path.exists():
        return not path.is_symlink()
    try:
        text = path.read_text(encoding="utf-8")  # line ends in any style: git may have changed them
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARKED.search(text)
    return mark is not None and mark[1] == _checksum(_MARKED.sub("", text, count=1))


def render_card(run: FinishedRun, metadata: Metadata, repository: str = PLACEHOLDER) -> str:
    """The model card as Markdown with its YAML. Everything that comes from the run is escaped.

    Args:
        run: what to tell of.
        metadata: header of the run's model.safetensors.
        repository: on the Hub, `owner/name`.
    """
    body = _templates().get_template("card.md.j2").render(_content(run, metadata, repository))
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    text = str(ModelCard(f"---\n{card_data(run, metadata).to_yaml()}\n---\n\n{body}"))
    before, rule, after = text.partition("\n---\n")  # names are one line each, so no other line of the YAML is this
    return before + rule + _MARK.format(_checksum(text)) + after


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


def _content(run: FinishedRun, metadata: Metadata, repository: str) -> dict[str, Any]:
    report = run.report
    fig = plain_figures(report)
    names = metadata.class_names or []
    environment = report.environment
    packages = [f"{name} {environment[name]}" for name in ("vitprune", "torch", "timm") if name in environment]
    return {
        "report": report,
        "training": report.training,
        "title": f"{report.model}, {report.label}",
        "verdict": verdict(report),
        "origin": origin_of(metadata),
        "classes": ", ".join(names) if len(names) <= _MOST_CLASSES else "",
        "fig": fig,
        "figure_rows": figure_rows(fig),
        "speed_rows": speed_rows(report, fig, Markup(" **SLOWER**")),
        "plan_rows": plan_rows(report, fig, report.num_patches or metadata.num_patches),
        "device": _device(report),
        "slower": " and ".join(str(row.batch_size) for row in report.delta.speedup if row.slower),
        "command": report.commands.get("sparsify") or report.commands.get("sweep"),
        "labels": _labels(report.training.recipe),
        "versions": ", ".join(packages),
        "use_python": _use_python(repository, metadata),
        "use_timm": _use_timm(repository) if timm_builds(metadata.architecture) else None,
        "timm_file": HUB_WEIGHTS,
        "pushed": repository != PLACEHOLDER,
        "use_shell": f"vitprune eval hf-hub:{repository} path/to/images\n"
        f"vitprune bench hf-hub:{repository}\n"
        f"vitprune export hf-hub:{repository} --format onnx -o model.onnx",
    }


def _use_python(repository: str, metadata: Metadata) -> str:
    size = ", ".join(map(str, metadata.preprocessing.input_size))
    return f"""import timm
import vitprune
from PIL import Image

model = vitprune.load("hf-hub:{repository}")  # a torch.nn.Module in eval mode
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))  # an image as ({size})
probabilities = model(transform(Image.open("image.jpg").convert("RGB"))[None]).softmax(-1)"""


def _use_timm(repository: str) -> str:
    return f"""import timm

dense = timm.create_model("hf-hub:{repository}", pretrained=True).eval()"""


def _labels(recipe: Mapping[str, Any]) -> bool:
    """Whether labels were trained on."""
    weights = recipe.get("weights")
    return bool(isinstance(weights, dict) and weights.get("ce") and recipe.get("labels", True))


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


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # so that what has not been through a filter of ours cannot be markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": markdown, "code": code, "number": number}
    return environment

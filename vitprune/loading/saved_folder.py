"""Model folders that are not ours: what timm's `save_for_hf` and transformers' `save_pretrained` write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from timm.models._hub import load_model_config_from_path
from torch import nn

from vitprune.checkpoint.weight_file import FOLDER_WEIGHTS, WeightFile, open_weights, weights_in
from vitprune.common.files import read_json
from vitprune.common.formatting import first_line
from vitprune.common.run_folder import CONFIG, WEIGHTS
from vitprune.errors import CheckpointError, VitpruneError
from vitprune.loading.adapted import adaptations, resampled
from vitprune.loading.structure import structure
from vitprune.loading.task import PROBLEM_TYPES, TASK_KEY
from vitprune.loading.transformers import read_config
from vitprune.loading.transformers_weights import convert_state
from vitprune.loading.weight_sets import choose_weights

_PREPROCESSOR = "preprocessor_config.json"
FOLDER_FILES = (CONFIG, _PREPROCESSOR, *FOLDER_WEIGHTS, "*-of-*.safetensors", "*-of-*.bin")
"""What is read of a folder."""


def build_from_folder(folder: Path, given: dict[str, Any], *, headless: bool = False) -> tuple[nn.Module, list[str]]:
    """The timm model that a folder's config.json describes, with the weights beside it, and what was understood.

    timm's `save_for_hf` or transformers' `save_pretrained` wrote it. Arguments that are given for timm.create_model win
    over the folder's. If `headless`, a head that timm cannot build is left out.

    Raises:
        CheckpointError: no config.json or weights, or not of a kind that can be read; names the folder.
    """
    runs = [] if (folder / CONFIG).exists() else sorted(path.parent for path in folder.glob(f"*/{WEIGHTS}"))
    if runs:
        names = ", ".join(str(each) for each in runs[:3])
        raise CheckpointError(
            f"folder '{folder}' is no model, but holds some", f"name one of them: {names}", exit_code=2
        )
    config = read_json(folder / CONFIG)
    try:
        if "architectures" in config:
            preprocessor = read_json(folder / _PREPROCESSOR) if (folder / _PREPROCESSOR).is_file() else None
            theirs = read_config(config, preprocessor, headless=headless, img_size=given.get("img_size"))
            architecture, arguments, overlay = theirs.architecture, theirs.arguments, theirs.overlay
            weights = choose_weights(_opened(folder), (theirs.anchor,))
            state = convert_state(weights.tensors, headless=headless, grid=theirs.grid)
            task, said = theirs.task, theirs.said
        elif "architecture" in config:
            overlay, architecture, arguments = load_model_config_from_path(folder)
            file = _opened(folder)
            expected = tuple(structure(architecture, arguments | given, given).state_dict())
            weights = choose_weights(file, expected)
            state, task, said = weights.tensors, PROBLEM_TYPES.get(str(config.get("problem_type"))), []
        else:
            raise CheckpointError("its config.json is neither timm's nor transformers'")
        overlay = {**overlay, "source": None, "file": None, "state_dict": state, "custom_load": False}
        with adaptations("its weights") as adapted:
            model: nn.Module = timm.create_model(
                architecture, pretrained=True, pretrained_cfg_overlay=overlay, **{**arguments, **given}
            )
    except CheckpointError as error:
        where = "" if str(folder) in error.message else f"folder '{folder}': "
        raise CheckpointError(f"{where}{error.message}", error.hint) from error
    except VitpruneError:
        raise
    except Exception as error:  # configurations and tensors from anywhere: timm may stumble over them in any way
        raise CheckpointError(f"folder '{folder}' holds no model that timm can build: {first_line(error)}") from error
    config = getattr(model, "pretrained_cfg", {})
    config.pop("state_dict", None)  # or every copy of the model drags the weights along
    config |= {} if task is None else {TASK_KEY: task}
    return model, [*said, *weights.said, *adapted, *resampled(model, state)]


def _opened(folder: Path) -> WeightFile:
    return open_weights(weights_in(folder))

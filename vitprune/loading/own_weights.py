"""A weight file of one's own, for an architecture of timm's."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from vitprune.checkpoint.sparse_file import written_by_vitprune
from vitprune.checkpoint.weight_file import check_npz, open_weights, weights_in
from vitprune.errors import CheckpointError, UsageError
from vitprune.loading.adapted import adaptations, resampled
from vitprune.loading.hub import first_mismatch
from vitprune.loading.structure import structure
from vitprune.loading.training_args import TrainingArguments
from vitprune.loading.transformers_weights import convert_state, is_transformers_state
from vitprune.loading.weight_sets import choose_weights

_MOST_CHANGE = 1.0
"""How far fine-tuning moves weights at most, in norms of the weights; two models that have nothing in common are 1.4
apart, and sparsify's short recipe moves them by hundredths."""


def check_made_from(sparse: nn.Module, dense: nn.Module, source: str, file: str) -> None:
    """Make sure that a sparse model's backbone is a fine-tuned copy of a dense model, and not of other weights.

    Raises:
        UsageError: their weights are as far from each other as those of two models that were trained apart; calls them
            `source`, of the dense model, and `file`.
    """
    theirs = dense.state_dict()
    distance = norm = 0.0
    for name, tensor in sparse.state_dict().items():
        other = theirs.get(name)
        if tensor.ndim >= 2 and other is not None and other.shape == tensor.shape:
            distance += (tensor.float() - other.float()).pow(2).sum().item()
            norm += other.float().pow(2).sum().item()
    if distance > _MOST_CHANGE**2 * norm:
        raise UsageError(
            f"'{source}' does not hold the weights that '{file}' was made from, but those of another model",
            "--checkpoint takes the dense weights that sparsify started from; "
            f"`vitprune info {shlex.quote(str(file))}` names them",
        )


@dataclass(frozen=True)
class OwnWeights:
    """A timm model made of a weight file, which of several sets in it that is, and what was understood, a line each."""

    model: nn.Module
    key: str | None
    said: list[str]


def build_with_weights(
    name: str,
    path: Path,
    arguments: dict[str, Any],
    *,
    key: str | None = None,
    any_tag: bool = False,
    headless: bool = False,
) -> OwnWeights:
    """A timm model with the weights of a file, through timm's own conversion of foreign layouts.

    The file, an index of several, or a folder with one, says how many classes and channels there are, and where a
    training script of timm's wrote it, how images are prepared; `arguments` for timm.create_model win over that. `key`
    is the set of weights to take. With `any_tag`, `name` has a tag because timm has one, and the file may say another.
    If `headless`, the file may lack a classifier; one that has it is built with it.

    Raises:
        UsageError: the file is a sparse model of ours, was trained as another model, or an argument is wrong.
        CheckpointError: it is missing, damaged, or does not fit.
    """
    path = weights_in(path)
    if path.suffix == ".safetensors" and path.is_file() and written_by_vitprune(path):
        raise UsageError(f"'{path}' is a sparse model already", f"give it as MODEL: {path}")
    if path.suffix == ".npz":
        check_npz(path)
        with adaptations(f"the weights in '{path}'") as said:
            overlay = {"file": str(path), "custom_load": True}
            return OwnWeights(_create(name, path, arguments, overlay), None, said)
    file = open_weights(path)
    training = TrainingArguments.of(file, name, any_tag=any_tag)
    arguments = training.model_kwargs | arguments
    try:
        expected = structure(training.name, arguments, arguments).state_dict()
    except UsageError as error:
        if not training.model_kwargs:
            raise
        raise CheckpointError(f"'{path}' says how its model was built: {error.message}", error.hint) from error
    chosen = choose_weights(file, expected, key)
    state = chosen.tensors
    said = [*chosen.said, *training.said]
    if is_transformers_state(state):
        state = convert_state(state)
        said.append(f"'{path.name}' is transformers' and read as {name}; its folder as MODEL reads its config.json too")
    _refuse_whole_numbers(state, expected, path)
    found = _shapes_of(state, name) | arguments
    if "num_classes" not in found and _lacks_classifier_alone(state, expected, name):
        if not headless:
            raise CheckpointError(
                f"the weights in '{path}' do not fit {name}: {_classifiers(name)[0]}.weight is missing",
                "to read them as an encoder that gives an embedding: --model-kwargs num_classes=0",
            )
        found["num_classes"] = 0
    overlay = {"state_dict": state, "custom_load": False, **training.preprocessing}
    overlay |= {"num_classes": found["num_classes"]} if "num_classes" in found else {}
    with adaptations(f"the weights in '{path}'") as adapted:
        model = _create(training.name, path, found, overlay)
    return OwnWeights(model, chosen.key if chosen.chosen else None, [*said, *adapted, *resampled(model, state)])


def _create(name: str, path: Path, arguments: dict[str, Any], overlay: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    except Exception as error:  # tensors of any names and shapes: timm may stumble over them in any way
        mismatch = first_mismatch(error)
        raise CheckpointError(f"the weights in '{path}' do not fit {name}: {mismatch}", _way_out(mismatch)) from error
    config: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    config.pop("state_dict", None)  # or every copy of the model drags the weights along
    return model


def _shapes_of(state: dict[str, Tensor], name: str) -> dict[str, Any]:
    """The class count and channels of a file: a fine-tuned model has its own."""
    config = timm.get_pretrained_cfg(name)
    weight = state.get(f"{_classifiers(name)[0]}.weight")
    found = {} if weight is None or weight.ndim != 2 else {"num_classes": int(weight.shape[0])}
    first = state.get(f"{config.first_conv if config is not None else ''}.weight")
    if first is not None and first.ndim == 4 and first.shape[1] != 3:
        found["in_chans"] = int(first.shape[1])
    return found


def _lacks_classifier_alone(state: dict[str, Tensor], expected: dict[str, Tensor], name: str) -> bool:
    """Whether a file is that of an encoder: all of the model's tensors but those of its classifier."""
    missing = expected.keys() - state.keys()
    heads = tuple(f"{head}." for head in _classifiers(name))
    return bool(missing) and missing == {each for each in expected if each.startswith(heads)}


def _classifiers(name: str) -> tuple[str, ...]:
    """What timm calls the layers that give classes."""
    config = timm.get_pretrained_cfg(name)
    heads = (config.classifier if config is not None else None) or "head"
    return (heads,) if isinstance(heads, str) else tuple(heads)


def _refuse_whole_numbers(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if name in expected and expected[name].is_floating_point() and not tensor.is_floating_point():
            raise CheckpointError(
                f"'{path}' holds '{name}' in {str(tensor.dtype).removeprefix('torch.')}, not in floating-point numbers",
                "if its weights are quantised, give the file that they were made from",
            )


def _way_out(mismatch: str) -> str:
    """What to try where torch says what is missing or unexpected."""
    if any(name in mismatch for name in ("fc_norm.", "attn_pool.", '"norm.')):
        return (
            "the file pools its tokens in another way: say which, such as --model-kwargs global_pool=avg, "
            "--model-kwargs global_pool=token or --model-kwargs fc_norm=False"
        )
    return "check that MODEL is the architecture the file was saved from"

"""`vitprune.promise`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from vitprune.adaptive import AdaptiveViT
from vitprune.api.arguments import Images, Model, ProgressShown, known, opened
from vitprune.cli.promise_options import check_sparse, refuse_beside
from vitprune.common.devices import pick_device, pick_precision
from vitprune.common.wrappers import unwrapped
from vitprune.errors import UsageError
from vitprune.jobs.promise import Asked, How, as_promised, check_outputs, keep_promise, read_promise, write_outputs
from vitprune.loading.load import Loaded
from vitprune.tasks import task_named
from vitprune.training.recipe import Recipe


def promise(
    model: Model,
    data: Images | None = None,
    *,
    fidelity: float | None = None,
    max_kl: float | None = None,
    confidence: float = Asked.confidence,
    calibrate: int = Asked.num_images,
    keep: float | None = None,
    dense: nn.Module | None = None,
    kept: str | Path | None = None,
    device: str = "auto",
    num_workers: int | None = None,
    bench_seconds: float = How.bench_seconds,
    output: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> AdaptiveViT:
    """Send images that a sparse model is not sure of on through the dense one, and promise that one's answers.

    Example:
        sparse = vitprune.load("runs/elastic")
        adaptive = vitprune.promise(sparse, "path/to/images", fidelity=99, output="promise.json")
        again = vitprune.promise(sparse, kept="promise.json")

    Args:
        model: a SparseViT, or its file or run folder.
        data: images as in `vitprune.sparsify`, of the kind that is promised for; labels are not needed.
        fidelity: promise the dense model's answer on so many percent of images like these; or
        max_kl: promise this mean KL divergence from it at most, each image's counted as 1 at most.
        confidence: with which the promise is to hold.
        calibrate: images, chosen at random, to choose passes and threshold by; the others measure.
        keep: ratio of the first pass, of a model for a range; None for the one that costs least.
        dense: the dense model that `model` was made from; one that was trained for a range holds it.
        kept: the file of an earlier promise, also of `vitprune eval --fidelity`, to be opened again, instead of `data`.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        num_workers: processes that read images; None for what the machine has.
        bench_seconds: how long each model is timed at each batch size.
        output: a .json file for the figures, which `kept` and `vitprune export --adaptive` read, or a page, .html.
        overwrite: whether it may exist.
        progress: whether to show how far it is, on stderr.

    Returns:
        The passes in eval mode; `promise` has the figures. Its "threshold" is None where all images have to go on.

    Raises:
        VitpruneError: see `vitprune.errors`.
    """
    loaded, where = known(model, progress=progress), pick_device(device)
    check_sparse(loaded, "a promise")
    behind = _behind(loaded, dense)
    if kept is not None:
        beside = {"data": data, "fidelity": fidelity, "max_kl": max_kl, "keep": keep, "output": output}
        refuse_beside("kept, which is a promise already", {name: each is not None for name, each in beside.items()})
        assert loaded.sparse is not None
        return as_promised(read_promise(Path(kept)), loaded.sparse, behind).to(where).eval()
    if data is None:
        raise UsageError(
            "there are no images to make a promise by", "give data, or kept, the file of an earlier promise"
        )
    asked = Asked(fidelity, max_kl, confidence, calibrate, keep)
    outputs = [] if output is None else [Path(output)]
    check_outputs(outputs, overwrite=overwrite)
    number_format = pick_precision("auto", where, training=False)
    workers = Recipe(num_workers=num_workers).workers()
    how = How(where, number_format, 64, workers, bench_seconds=bench_seconds)
    images = opened(data, loaded, None, None, training=False, labels=False)
    with ProgressShown(progress) as listener:
        adaptive, routed = keep_promise(loaded, behind, images, task_named(loaded.task), asked, how, listener)
    write_outputs(outputs, loaded, images, adaptive, routed)
    return adaptive.eval()


def _behind(loaded: Loaded, dense: nn.Module | None) -> nn.Module:
    """The dense model that images go on to.

    Raises:
        UsageError: it is not known.
    """
    sparse = loaded.sparse
    if dense is not None:
        return unwrapped(dense)
    if sparse is None or sparse.blend is None:
        raise UsageError(
            f"{loaded.name} was trained for one keep ratio, so it does not hold the dense model that images go on to",
            "give it: dense=timm.create_model(...)",
        )
    return sparse.blend.dense_model(sparse.model)

"""What a model is worth, and how it is kept: `vitprune.evaluate`, `benchmark`, `visualize`, `save`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from vitprune.adaptive import AdaptiveViT
from vitprune.api.arguments import AskedTask, Images, Model, ProgressShown, keeps_mode, known, opened, subject_of
from vitprune.backbones import input_size
from vitprune.checkpoint.sparse_file import describe
from vitprune.checkpoint.sparse_file import save as write_file
from vitprune.common.devices import pick_device, pick_precision
from vitprune.common.run_folder import RunFolder
from vitprune.common.wrappers import is_compiled, unwrapped
from vitprune.data import DataOptions, count_images, eval_transform, readable_names
from vitprune.errors import UsageError
from vitprune.evaluation import predict as run_over
from vitprune.jobs.predict import ImagePrediction, image_set, predict_images
from vitprune.jobs.side_by_side import gallery_of
from vitprune.measure import BenchModel, Kind, check_mode, side_by_side
from vitprune.model import SparseViT
from vitprune.report.visualize import NUM_DRAWN, Subject, load_subject, open_images
from vitprune.report.visualize import visualize as draw
from vitprune.tasks import class_accuracy, task_named
from vitprune.training.recipe import Recipe


@keeps_mode
def evaluate(
    model: Model,
    data: Images,
    *,
    checkpoint: str | Path | None = None,
    checkpoint_key: str | None = None,
    img_size: int | tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    task: AskedTask = "auto",
    class_embeddings: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    limit: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    num_workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """How good a sparse or dense model is at its task, with timm's preprocessing for it.

    Example:
        result = vitprune.evaluate(sparse, "path/to/imagenet")
        print(result["top1_pct"], result["num_images"])

    Args:
        model: a SparseViT, an AdaptiveViT, a timm model, or a name, file or run folder.
        data: as in `vitprune.sparsify`; of a folder with train and val folders, val. Labels are needed.
        checkpoint: weights for a model given by its name.
        checkpoint_key: which of several sets of weights in it, such as "state_dict"; None for the EMA.
        img_size: image size in pixels of a model given by its name.
        model_kwargs: more arguments for timm.create_model, of a model given by its name.
        task: what the model is for, as in `vitprune.sparsify`.
        class_embeddings: a .safetensors file with vectors of the classes by a text tower, for zero-shot figures.
        class_names: in output order, to match folders by name.
        limit: at most so many images, chosen at random, always the same.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "auto", "fp32", "bf16" or "fp16".
        batch_size: images per pass.
        num_workers: processes that read images; None for what the machine has.
        progress: whether to show how far it is, on stderr.

    Returns:
        What the task measures against labels, of a classifier `top1_pct` and `top5_pct` in percent (None without
        labels), `num_images`, and `classes`, a row for each.

    Raises:
        VitpruneError: see `vitprune.errors`.
    """
    loaded = known(
        model,
        checkpoint,
        img_size,
        class_names,
        checkpoint_key=checkpoint_key,
        model_kwargs=model_kwargs,
        task=task,
        class_embeddings=class_embeddings,
        progress=progress,
    )
    where = pick_device(device)
    number_format = pick_precision(precision, where, training=False)
    purpose = task_named(loaded.task, loaded.class_vectors)
    everything = opened(data, loaded, None, limit, training=False, labels=True)
    images, gallery, transform = everything.val, gallery_of(everything, purpose), eval_transform(loaded.model)
    for each in (images, gallery):
        if each is not None:
            each.transform = transform
    with ProgressShown(progress) as listener:
        listener.begin(f"evaluating {loaded.name}", count_images(images))
        found, _ = run_over(
            {"model": subject_of(model, loaded)[1]},
            images,
            where,
            number_format,
            task=purpose,
            gallery=gallery,
            batch_size=batch_size,
            num_workers=Recipe(num_workers=num_workers).workers(),
            listener=listener,
        )
    names = images.class_names | dict(enumerate(loaded.class_names or ()))
    return {**found["model"].summary(), "classes": class_accuracy(names, top1_pct=found["model"])}


@keeps_mode
def benchmark(
    models: Model | Mapping[str, nn.Module],
    batch_sizes: Sequence[int] = (1, 32),
    *,
    device: str = "auto",
    precision: str = "auto",
    mode: str = "eager",
    seconds: float = 2.0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Throughput and latency of models interleaved, on random images.

    Example:
        for row in vitprune.benchmark(sparse, (1, 8, 32)):
            print(row["label"], row["batch_size"], row["images_per_s"], row["speedup"])

    Args:
        models: a SparseViT, a run folder or its file, timed beside its backbone with all tokens; or several models of
            one input size by label, the first of which the others are compared with.
        batch_sizes: images per pass.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "auto", "fp32", "bf16" or "fp16".
        mode: "eager", "compile" or "cudagraphs".
        seconds: how long each row is timed.
        progress: whether to show how far it is, on stderr.

    Returns:
        Rows by size and model: `label`, `batch_size`, `images_per_s`, `gmacs`, `speedup` over the first, and more.

    Raises:
        VitpruneError: see `vitprune.errors`.
    """
    for each in models.values() if isinstance(models, Mapping) else [models]:
        if isinstance(each, nn.Module) and isinstance(unwrapped(each), AdaptiveViT):
            hint = "vitprune.promise times it on real ones"
            raise UsageError("random images do not say how fast an AdaptiveViT is", hint)
        if isinstance(each, nn.Module) and is_compiled(each):
            raise UsageError("a model to be timed is compiled", "give the one in it, and mode='compile'")
    where = pick_device(device)
    how, number_format = check_mode(mode, where), pick_precision(precision, where, training=False)
    if isinstance(models, Mapping):
        named = {label: unwrapped(model) for label, model in models.items()}
        if not named:
            raise UsageError("no models are given", "give a sparse model, or several by label")
    else:
        loaded = known(models, progress=progress)
        named = {"dense": loaded.model} | ({} if loaded.sparse is None else {"sparse": loaded.sparse})
    kinds: dict[bool, Kind] = {True: "sparse", False: "dense"}
    timed = {label: BenchModel(kinds[isinstance(each, SparseViT)], None, each) for label, each in named.items()}
    first = next(iter(named.values()))
    with ProgressShown(progress) as listener:
        listener.begin("measuring speed", len(timed) * len(batch_sizes))
        return side_by_side(
            "model",
            timed,
            input_size(first.model if isinstance(first, SparseViT) else first),
            batch_sizes,
            [how],
            baseline=next(iter(named)),
            device=where,
            precision=number_format,
            min_seconds=seconds,
            listener=listener,
        )


@keeps_mode
def predict(
    model: Model,
    images: str | Path | Image.Image | Sequence[str | Path | Image.Image],
    *,
    task: AskedTask = "auto",
    topk: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    progress: bool = True,
) -> list[ImagePrediction]:
    """What a model says of images without labels, by its task: classes, labels, values, an embedding or features.

    Example:
        for each in vitprune.predict(sparse, "path/to/images"):
            print(each.image, each.classes["sparse"][0].text)
        vectors = torch.stack([each.vectors["sparse"] for each in vitprune.predict(encoder, "path/to/images")])

    Args:
        model: a SparseViT, an AdaptiveViT, a timm model, or a name, file or run folder.
        images: an image file, a folder of them, an image of PIL's, or a list of these.
        task: what the model is for, as in `vitprune.evaluate`; a SparseViT says it itself.
        topk: the likeliest classes or labels, so many; None for 5 classes, or all labels above 50 %.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "auto", "fp32", "bf16" or "fp16".
        batch_size: images per pass.
        progress: whether to show how far it is, on stderr.

    Returns:
        An entry per image that could be read: `image`, and by "sparse", "dense" or "adaptive" the `classes` or labels,
        best first, each with `index`, `name` and `probability_pct`, or the `vectors`: values (num_values,), an
        embedding (D,) or features of all patches (N, C), in fp32 on the CPU.

    Raises:
        VitpruneError: see `vitprune.errors`.
    """
    loaded, where = known(model, task=task, progress=progress), pick_device(device)
    found = image_set([images] if isinstance(images, (str, Path, Image.Image)) else list(images))
    names = readable_names(dict(enumerate(loaded.class_names or ())), getattr(loaded.model, "num_classes", 0))
    kind, subject = subject_of(model, loaded)
    with ProgressShown(progress) as listener:
        listener.begin(f"predicting with {loaded.name}", len(found))
        number_format = pick_precision(precision, where, training=False)
        rows, *_ = predict_images(
            {kind: subject},
            found,
            names,
            where,
            number_format,
            task=task_named(loaded.task),
            topk=topk,
            batch_size=batch_size,
            listener=listener,
        )
    return rows


def visualize(
    model: SparseViT | str | Path,
    images: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    heatmap: bool = False,
    mean: bool = False,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Draw which tokens are kept, stage by stage: a PNG per image, with the likeliest classes.

    Example:
        drawn = vitprune.visualize(sparse, ["cat.jpg", "dog.jpg"], "keepmaps")
        IPython.display.Image(drawn["files"][0])

    Args:
        model: a SparseViT, or its file or run folder; it runs on the device it is on.
        images: an image file, a folder of them, a list of these, or a data set's name such as "demo".
        output: folder for the PNGs.
        heatmap: add heat maps of importance and, of a model that merges, redundancy.
        mean: draw how often each position is kept, over all images, instead of a PNG for each.
        limit: at most so many images, chosen at random; None for 16, or with `mean` for all.
        overwrite: whether `output` may exist.
        progress: whether to show how far it is, on stderr.

    Returns:
        `files`, the PNGs, and for each image what was kept and predicted.

    Raises:
        VitpruneError: see `vitprune.errors`.
    """
    subject = _subject(model)
    given = [images] if isinstance(images, (str, Path)) else list(images)
    is_name = isinstance(images, str) and not Path(images).exists()
    found, many = open_images(
        subject, [] if is_name else [Path(each) for each in given], str(images) if is_name else None, DataOptions()
    )
    folder = RunFolder.choose(Path(output), "", overwrite=overwrite, of_run=False)
    limit = NUM_DRAWN if limit is None and many and not mean else limit
    with ProgressShown(progress) as listener:
        return draw(subject, found, folder, listener, heat=heatmap, mean=mean, limit=limit)


def save(model: nn.Module, path: str | Path, class_names: Sequence[str] | None = None) -> Path:
    """Write a sparse model to a file that `vitprune.load` and every command read, and config.json beside it.

    What the file of a model from `vitprune.load` says of origin and licence is kept, and of accuracy while its weights
    are the same; likewise of a model from `vitprune.sparsify`.

    Example:
        vitprune.save(sparse, "model.safetensors")
        sparse = vitprune.load("model.safetensors", device="cuda")

    Args:
        model: the sparse model, or one that is compiled, data-parallel or an average of it; made by timm.create_model.
        path: `*.safetensors`, or a folder, for model.safetensors in it. Folders are made, and a file is replaced.
        class_names: in output order; None for the model's own.

    Returns:
        The file.

    Raises:
        UsageError: another ending, no SparseViT, or layers that adapters or quantisation replaced.
        CheckpointError: the model could not be loaded again.
        OutputError: the file cannot be written.
    """
    model = unwrapped(model)
    if not isinstance(model, SparseViT):
        raise UsageError(
            f"a {type(model).__name__} cannot be saved, only a SparseViT",
            "of an Objective it is .student; a dense one is timm's to save",
        )
    file = Path(path)
    if not file.suffix or file.is_dir():
        file = RunFolder(file).weights
    if file.suffix != ".safetensors":
        raise UsageError(f"the output '{path}' does not end in .safetensors", "name it so, or give a folder")
    metadata = describe(model, class_names=tuple(class_names) if class_names else None)
    RunFolder(file.parent).create(needed_bytes=0)
    write_file(model, file, metadata)
    return file


def _subject(model: nn.Module | str | Path) -> Subject:
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    if isinstance(model, nn.Module) and not isinstance(model, SparseViT):
        raise UsageError(
            f"the {type(model).__name__} keeps all its tokens, so there is nothing to show", "attach prunes"
        )
    if not isinstance(model, SparseViT):
        return load_subject(str(model), None)
    if not model.schedule.stages:
        raise UsageError("the model keeps all its tokens (keep 1), so there is nothing to show")
    loaded = known(model)
    return Subject(loaded, model, describe(model), model.model, is_dense=False)

"""What models say of images that need no labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from vitprune.common.devices import Precision
from vitprune.common.formatting import writable
from vitprune.common.progress import SILENT, Listener
from vitprune.data import Faults, ImageSet, batches, eval_transform, image_files, make_loader, open_image, to_rgb
from vitprune.evaluation import autocast
from vitprune.tasks import NamedClass, likeliest


@dataclass(frozen=True)
class ImagePrediction:
    """What the models say of one image.

    Attributes:
        image: its path; of an image without one its number.
        classes: the likeliest classes, best first, by the name of the model.
    """

    image: str
    classes: dict[str, list[NamedClass]]

    @property
    def agree(self) -> bool:
        """Whether all models name the same class first."""
        return len({each[0].index for each in self.classes.values()}) == 1

    def as_json(self) -> dict[str, Any]:
        """In JSON's types."""
        return {"image": self.image} | {
            model: [each.model_dump() for each in classes] for model, classes in self.classes.items()
        }


def image_set(images: Sequence[str | Path | Image.Image]) -> ImageSet:
    """Image files, all images in folders, or images of PIL's, without labels.

    Raises:
        DataError: a path does not exist, or a folder holds no image.
    """
    items: list[Any] = []
    for each in images:
        if isinstance(each, Image.Image):
            items.append((len(items), to_rgb(each)))
        else:
            items += image_files(Path(each).expanduser())

    def read(item: Any) -> Image.Image:
        return item[1] if isinstance(item, tuple) else open_image(item)

    def name(item: Any) -> str:
        return writable(item[0] if isinstance(item, tuple) else item)

    return ImageSet(items, range(len(items)), read, name)  # numbers in the place of labels


@torch.inference_mode()
def predict_images(
    models: Mapping[str, nn.Module],
    images: ImageSet,
    names: Mapping[int, str],
    device: torch.device,
    precision: Precision = "fp32",
    *,
    topk: int = 5,
    batch_size: int = 64,
    num_workers: int = 0,
    listener: Listener = SILENT,
) -> tuple[list[ImagePrediction], Faults]:
    """The likeliest classes of each image by every model, images prepared as the first model needs them.

    Args:
        models: by name; moved to the device and left in eval mode.
        images: of `image_set`.
        names: of the classes, by index, where known.
        device: where to run.
        precision: of the passes.
        topk: how many classes.
        batch_size: images per pass.
        num_workers: processes that read images.
        listener: hears how far it is.

    Returns:
        One entry per image that could be read, in order, and what could not.

    Raises:
        DataError: no image could be read.
    """
    images.transform = eval_transform(getattr(first := next(iter(models.values())), "model", first))
    faults, found = Faults(allowed_share=1.0), []
    for model in models.values():
        model.to(device).eval()
    for batch, numbers in batches(make_loader(images, batch_size, num_workers=num_workers), faults):
        with autocast(device, precision):
            logits = {name: model(batch.to(device)) for name, model in models.items()}
        shares = {name: each.float().log_softmax(dim=-1).cpu() for name, each in logits.items()}
        for row, number in enumerate(numbers.tolist()):
            classes = {name: likeliest(each[row], names, topk) for name, each in shares.items()}
            found.append(ImagePrediction(images.name(images.items[number]), classes))
        listener.advance(len(numbers))
    if not found:
        raise faults.none_read()
    return found, faults

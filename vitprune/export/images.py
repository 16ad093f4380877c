"""The images that an exported file is compared on, and calibrated by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from vitprune.data import Data, Images, batches, count_images, eval_transform, make_loader
from vitprune.export.int8 import MIN_AGREEMENT_PCT, NUM_CALIBRATED, Quantisation


def images_to_compare(data: Data, model: nn.Module) -> tuple[Iterable[Tensor], int | None]:
    """Those to evaluate on, (C, H, W) each, and how many they are, where that is known."""
    return _Prepared(data.val, model), count_images(data.val)


def quantisation_by(
    data: Data, model: nn.Module, calibrate: int | None = None, min_agreement: float | None = None
) -> Quantisation:
    """INT8 calibrated by so many images to train on, keeping so many decisions, in percent; None for the usual."""
    assert data.train is not None, "opened to train on"
    images = _Prepared(data.train.sample(calibrate or NUM_CALIBRATED), model)
    return Quantisation(images, MIN_AGREEMENT_PCT if min_agreement is None else min_agreement)


class _Prepared:
    """Images as a model takes them, (C, H, W) each; read anew each time."""

    def __init__(self, images: Images, model: nn.Module) -> None:
        self.images = images
        images.transform = eval_transform(model)

    def __iter__(self) -> Iterator[Tensor]:
        return (image for batch, _ in batches(make_loader(self.images, 1)) for image in batch)

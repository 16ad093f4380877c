"""From a DATA argument to picture sets and loaders; the embedded demo set."""

from vitprune.data.classes import ModelClasses, match_classes
from vitprune.data.pictures import UNLABELLED, PictureSet, Unreadable, open_picture
from vitprune.data.source import Data, batches, make_loader, open_data
from vitprune.data.transforms import Augmentation, eval_transform, train_transform

__all__ = [
    "UNLABELLED",
    "Augmentation",
    "Data",
    "ModelClasses",
    "PictureSet",
    "Unreadable",
    "batches",
    "eval_transform",
    "make_loader",
    "match_classes",
    "open_data",
    "open_picture",
    "train_transform",
]

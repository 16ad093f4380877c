"""From a DATA argument to picture sets and loaders; the embedded demo set."""

from vitprune.data.classes import ModelClasses, match_classes, readable_names
from vitprune.data.folder import read_folder
from vitprune.data.hub import Pictures
from vitprune.data.loading import Faults, batches, dead_workers_told, make_loader, training_loader
from vitprune.data.options import DataOptions
from vitprune.data.pictures import UNLABELLED, PictureSet, Unreadable, open_picture
from vitprune.data.source import Data, count_pictures, open_data
from vitprune.data.tables import PictureStream
from vitprune.data.transforms import Augmentation, eval_transform, train_transform

__all__ = [
    "UNLABELLED",
    "Augmentation",
    "Data",
    "DataOptions",
    "Faults",
    "ModelClasses",
    "PictureSet",
    "PictureStream",
    "Pictures",
    "Unreadable",
    "batches",
    "count_pictures",
    "dead_workers_told",
    "eval_transform",
    "make_loader",
    "match_classes",
    "open_data",
    "open_picture",
    "read_folder",
    "readable_names",
    "train_transform",
    "training_loader",
]

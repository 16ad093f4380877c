"""From a DATA argument to image sets and loaders; the embedded demo set."""

from vitprune.data.classes import ModelClasses, TargetKind, match_classes, readable_names
from vitprune.data.files import image_files
from vitprune.data.folder import Unlabelled, read_folder
from vitprune.data.images import ImageSet, Unreadable, open_image, to_rgb
from vitprune.data.loading import Faults, batches, explain_worker_crash, make_loader, training_loader
from vitprune.data.options import DataOptions
from vitprune.data.source import Data, count_classes, count_images, open_data, open_torch
from vitprune.data.tables import Images, ImageStream
from vitprune.data.targets import UNLABELLED, OtherTask
from vitprune.data.transforms import Augmentation, eval_transform, train_transform

__all__ = [
    "UNLABELLED",
    "Augmentation",
    "Data",
    "DataOptions",
    "Faults",
    "ImageSet",
    "ImageStream",
    "Images",
    "ModelClasses",
    "OtherTask",
    "TargetKind",
    "Unlabelled",
    "Unreadable",
    "batches",
    "count_classes",
    "count_images",
    "eval_transform",
    "explain_worker_crash",
    "image_files",
    "make_loader",
    "match_classes",
    "open_data",
    "open_image",
    "open_torch",
    "read_folder",
    "readable_names",
    "to_rgb",
    "train_transform",
    "training_loader",
]

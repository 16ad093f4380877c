"""Images as parquet and webdataset tar files, written for a test."""

import io
import tarfile

import datasets
from PIL import Image


def png(shade=0, size=(8, 8)):
    """The bytes of a grey image."""
    content = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(content, "PNG")
    return content.getvalue()


def write_tar(path, rows):
    """Each row holds contents by ending: {"png": bytes, "cls": bytes}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            for ending, content in row.items():
                member = tarfile.TarInfo(f"{number:05d}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def make_table(images, labels, kind, columns=("image", "label")):
    """The bytes of images beside their labels."""
    features = datasets.Features(dict(zip(columns, (datasets.Image(), kind), strict=True)))
    cells = [{"bytes": content, "path": None} for content in images]
    return datasets.Dataset.from_dict(dict(zip(columns, (cells, list(labels)), strict=True)), features=features)


def write_parquet(path, images, labels, kind, columns=("image", "label")):
    path.parent.mkdir(parents=True, exist_ok=True)
    make_table(images, labels, kind, columns).to_parquet(path)

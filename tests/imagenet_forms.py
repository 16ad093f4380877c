"""The same images of ImageNet classes in every form in which people have them."""

import json
from pathlib import Path

import datasets
from shards import write_parquet, write_tar
from timm.data import ImageNetInfo

IDS = ImageNetInfo().label_names()


def _linked(by_class):
    def write(root, pairs):
        for number, (path, index) in enumerate(pairs):
            place = root / "val" / by_class(index) / f"{number:05d}{path.suffix}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())

    return write


def _flat(root, pairs):
    (root / "val").mkdir(parents=True)
    rows = ["ImageId,PredictionString"]
    for number, (path, index) in enumerate(pairs):
        (root / "val" / f"{number:05d}{path.suffix}").symlink_to(path.resolve())
        rows.append(f"{number:05d},{IDS[index]} 1 2 3 4")
    (root / "LOC_val_solution.csv").write_text("\n".join(rows))


def _parquet(as_class):
    def write(root, pairs):
        names = sorted({IDS[index] for _, index in pairs}, reverse=True)  # not in ImageNet's order
        kind = datasets.ClassLabel(names=names) if as_class else datasets.Value("string")
        labels = [names.index(IDS[index]) if as_class else IDS[index] for _, index in pairs]
        write_parquet(root / "val-0.parquet", [path.read_bytes() for path, _ in pairs], labels, kind)

    return write


def _tar(suffix, text):
    def write(root, pairs):
        write_tar(
            root / "val-0.tar", [{"jpg": path.read_bytes(), suffix: text(index).encode()} for path, index in pairs]
        )

    return write


FORMS = {
    "folders by WordNet id": _linked(lambda index: IDS[index]),
    "folders by index": _linked(str),
    "folders by name": _linked(lambda index: _name(index)),
    "flat with a CSV": _flat,
    "parquet with ClassLabels": _parquet(True),
    "parquet with strings": _parquet(False),
    "tar with .cls": _tar("cls", str),
    "tar with .json": _tar("json", lambda index: json.dumps({"label": index})),
}


def write_form(form: str, root: Path, pairs: list[tuple[Path, int]]) -> None:
    """Write images and their output indices of ImageNet-1k as `form` into the new folder `root`."""
    FORMS[form](root, pairs)


def _name(index):
    """As people name folders: the first of a class' names; where two classes share it, all of them."""
    about = ImageNetInfo()
    whole = [about.label_name_to_description(label) for label in IDS]
    first = whole[index].split(",")[0]
    shared = sum(first in [each.strip() for each in other.split(",")] for other in whole) > 1
    return (whole[index] if shared else first).replace("/", " ")

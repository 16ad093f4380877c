"""Which images a report shows, and what may leave the machine with it."""

import base64
import io

import pytest
import torch
from PIL import Image

from vitprune.data import Data, ModelClasses, eval_transform, open_data
from vitprune.report.keepmaps import KeepMap
from vitprune.report.publishable import command_line, data_name, publishable
from vitprune.report.samples import choose_images, group_of
from vitprune.tasks import NamedClass


def _map(label, dense, sparse):
    blank = Image.new("RGB", (8, 8))
    answers = [[NamedClass(index=index, probability_pct=50.0)] for index in (dense, sparse)]
    return KeepMap(blank, (2, 2), [[0]], [[0.0] * 4], *answers, distance=0.0, label=label)


@pytest.mark.parametrize(
    ("label", "dense", "sparse", "group"),
    [
        (1, 1, 1, "both right"),
        (1, 1, 0, "dense right, sparse wrong"),
        (1, 0, 1, "dense wrong, sparse right"),
        (1, 0, 2, "both wrong"),
        (1, 0, 0, "both wrong"),
        (None, 0, 0, "same prediction"),
        (None, 0, 1, "another prediction"),
    ],
)
def test_groups(label, dense, sparse, group):
    assert group_of(_map(label, dense, sparse)) == group


def test_chosen_images_are_the_models_and_the_extremes_of_their_group(make_sparse, image_folder):
    sparse = make_sparse(num_classes=2, keep=0.4, prune_at=[1, 2])
    data = open_data(str(image_folder), ModelClasses(2, ("cat", "dog")))
    data.val.transform = eval_transform(sparse.model)
    found = choose_images(sparse, sparse.model, data, {0: "cat", 1: "dog"}, torch.device("cpu"))
    assert found.num_seen == 6
    assert found.grid_size == (10, 10)
    images = torch.stack([image for image, _ in data.val])
    with torch.no_grad():
        dense, ours = sparse.model(images).log_softmax(-1), sparse(images).log_softmax(-1)
    kl = (dense.exp() * (dense - ours)).sum(-1)
    labels = torch.tensor(data.val.labels)
    right = torch.stack([dense.argmax(-1) == labels, ours.argmax(-1) == labels], dim=1)
    groups = {
        "both right": (True, True),
        "dense right, sparse wrong": (True, False),
        "dense wrong, sparse right": (False, True),
        "both wrong": (False, False),
    }
    for name, pattern in groups.items():
        members = kl[(right == torch.tensor(pattern)).all(dim=1)]
        rows = [row for row in found.images if row.group == name]
        assert len(rows) == min(len(members), 3 if name == "both right" else 2)
        if len(rows) > 1:
            assert rows[0].place == "nearest"
            assert rows[0].distance == pytest.approx(members.min().item(), rel=1e-3, abs=1e-6)
            assert rows[-1].place == "farthest"
            assert rows[-1].distance == pytest.approx(members.max().item(), rel=1e-3, abs=1e-6)
    for row in found.images:
        with Image.open(io.BytesIO(base64.b64decode(row.jpeg))) as image:
            assert image.format == "JPEG"
            assert image.size == (row.width, row.height)
        assert [len(kept) for kept in row.kept] == [stage.num_tokens for stage in sparse.schedule.stages]
        assert row.label in ("cat", "dog")


def test_an_image_that_cannot_be_read_is_left_out(make_sparse, image_folder):
    (image_folder / "val" / "dog" / "1.png").write_bytes(b"no image")
    sparse = make_sparse(num_classes=2, prune_at=[2])
    data: Data = open_data(str(image_folder), ModelClasses(2))
    data.val.transform = eval_transform(sparse.model)
    assert choose_images(sparse, sparse.model, data, {}, torch.device("cpu")).num_seen == 5


def test_nothing_to_show_where_everything_stays(make_vit, image_folder):
    from vitprune.model import attach

    sparse = attach(make_vit(num_classes=2), 1.0)
    data = open_data(str(image_folder), ModelClasses(2))
    assert choose_images(sparse, sparse.model, data, {}, torch.device("cpu")) is None


def test_publishable_reports_name_no_folder_of_this_machine():
    report = {
        "model": "vit.tag",
        "data": {"name": "/home/me/pets/", "unreadable_val": ["/home/me/pets/val/a.jpg", "/etc/b.jpg", "rel/c.jpg"]},
        "training": {"unreadable": ["~/d.jpg", "../../e.jpg", "C:\\Users\\me\\f.jpg", "/home/me/pets-2/g.jpg"]},
        "gmacs": 1.5,
    }
    before = str(report)
    result = publishable(report)
    assert result["data"] == {"name": "pets", "unreadable_val": ["val/a.jpg", "b.jpg", "rel/c.jpg"]}
    assert result["training"]["unreadable"] == ["d.jpg", "e.jpg", "f.jpg", "g.jpg"]
    assert (result["model"], result["gmacs"]) == ("vit.tag", 1.5)
    assert str(report) == before, "a copy"
    assert data_name("hf:owner/name") == "hf:owner/name"
    assert data_name("demo") == "demo"


def test_commands_to_repeat_name_no_folder_either():
    given = [
        "sparsify",
        "deit_tiny",
        "--data=/home/me/my pets",
        "--checkpoint",
        "../x.pth",
        "-o",
        "runs/a",
        "--keep",
        "0.7",
    ]
    assert command_line(given) == (
        "vitprune sparsify deit_tiny '--data=path/to/my pets' --checkpoint path/to/x.pth -o runs/a --keep 0.7"
    )
    also = ["sweep", "--also", "a=/b/c/x.safetensors,b=../y.pth,c", "--data=~/a=b/d,e"]
    assert command_line(also) == "vitprune sweep --also a=path/to/x.safetensors,b=path/to/y.pth,c --data=path/to/d,e"

"""Keep maps against what the model itself says, images against their pixels, coverage against known objects."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitprune.baselines import RandomPredictor
from vitprune.data import UNLABELLED, eval_transform, open_data
from vitprune.loading.load import load_model
from vitprune.model import SparseViT, attach
from vitprune.report.drawing import Legend, dim_pruned, draw_mean, draw_montage, fill_merged, heat_map, mean_colours
from vitprune.report.keepmaps import as_seen, keep_maps, kept_shares, object_coverage
from vitprune.schedule import Stage

LEGEND = Legend("a model, keep 0.5", [Stage(block=2, ratio=0.5, num_tokens=8)], True, "dense")


def test_keep_maps_say_what_the_models_say(make_sparse, make_images):
    sparse = make_sparse(keep=0.6, prune_at=[2, 4], num_classes=7)
    images = make_images(sparse, count=3)
    maps, _ = keep_maps(sparse, sparse.model, images, torch.tensor([1, UNLABELLED, 6]), {1: "cat"})
    with torch.no_grad():
        selection, dense = sparse.select(images), sparse.model(images).log_softmax(-1)
        ours = selection.logits.log_softmax(-1)
    kl = (dense.exp() * (dense - ours)).sum(-1)
    for i, each in enumerate(maps):
        for stage in range(2):
            assert list(each.kept[stage]) == selection.indices[stage][i].tolist()
            torch.testing.assert_close(torch.tensor(each.scores[stage]), selection.scores[stage][i])
            assert len(each.reached(stage)) == len(each.scores[stage])
        assert set(each.kept[1]) <= set(each.reached(1)) == set(each.kept[0])
        assert each.kept_pct == [100 * len(kept) / 100 for kept in each.kept], "a grid of 10 x 10"
        for side, answer in ((each.dense, dense[i]), (each.sparse, ours[i])):
            best = answer.exp().topk(3)
            assert [a.index for a in side] == best.indices.tolist()
            assert [a.probability_pct for a in side] == pytest.approx((100 * best.values).tolist(), rel=1e-5)
        assert each.distance == pytest.approx(kl[i].item(), rel=1e-3, abs=1e-6)
    assert [each.label for each in maps] == [1, None, 6]
    assert {a.name for each in maps for a in each.dense if a.index == 1} <= {"cat"}
    assert all(a.name is None for each in maps for a in each.dense if a.index != 1)
    # The higher scores are the ones that stay.
    first = maps[0]
    scores = dict(zip(first.reached(0), first.scores[0], strict=True))
    pruned = set(scores) - set(first.kept[0])
    assert min(scores[p] for p in first.kept[0]) >= max(scores[p] for p in pruned)


@pytest.mark.parametrize("settings", [{}, {"in_chans": 1}, {"img_size": (96, 160)}])
def test_seen_is_the_image_the_model_saw(make_vit, settings):
    """Cropped and resized by timm's transform, and back from its normalisation."""
    model = make_vit(**settings)
    generator = np.random.default_rng(0)
    original = Image.fromarray(generator.integers(0, 256, (170, 230, 3), dtype=np.uint8))
    image = eval_transform(model)(original)
    shown = as_seen(model, image)
    assert shown.size == (image.shape[2], image.shape[1])
    again = torch.from_numpy(np.asarray(shown).copy()).permute(2, 0, 1) / 255
    config = model.pretrained_cfg
    mean, std = (torch.tensor(config[key])[: image.shape[0], None, None] for key in ("mean", "std"))
    if image.shape[0] == 1:
        mean, std = (torch.tensor(config[key]).mean() for key in ("mean", "std"))
        again = again[:1]
    assert (again - (image * std + mean)).abs().max() < 1 / 255


def test_kept_patches_are_untouched_and_pruned_ones_fade_behind_a_line():
    pixels = np.zeros((40, 80, 3), dtype=np.uint8)
    pixels[..., 0] = 250
    drawn = np.asarray(dim_pruned(Image.fromarray(pixels), [0, 5], (2, 4))).astype(int)
    inner = [
        drawn[20 * row + 2 : 20 * row + 18, 20 * column + 2 : 20 * column + 18]
        for row in range(2)
        for column in range(4)
    ]
    for number, cell in enumerate(inner):
        if number in (0, 5):
            assert (cell == [250, 0, 0]).all()
        else:
            assert (cell == cell[..., :1]).all(), "grey"
            assert abs(cell.mean() - 200) < 40
    plain = np.asarray(dim_pruned(Image.new("RGB", (40, 40), (200, 200, 200)), [0], (2, 2)))
    assert len({tuple(pixel) for pixel in plain.reshape(-1, 3)}) == 2, "a line tells kept grey from pruned grey"


def test_heat_map_orders_colours_by_score():
    image = Image.new("RGB", (40, 10), (128, 128, 128))
    drawn = np.asarray(heat_map(image, [0, 1, 3], [-2.0, 0.5, 9.0], (1, 4))).astype(float)
    bright = drawn.mean(axis=2)
    assert bright[5, 5] < bright[5, 15] < bright[5, 35]
    heat_map(image, [2], [1.0], (1, 4))  # one score has no range


def test_shares_count_images():
    images = [[[0, 1, 2], [1]], [[1, 2, 3], [3]]]
    assert kept_shares(images, 4) == [[50, 100, 100, 50], [0, 50, 0, 50]]


def test_hostile_and_long_names_are_drawn(make_sparse, make_images, tmp_path):
    sparse = make_sparse(keep=0.5, prune_at=[2], num_classes=3)
    names = {0: "\x1b[31m$x^" + "long " * 100, 1: "<b>", 2: "木"}
    (one, other), _ = keep_maps(sparse, sparse.model, make_images(sparse), torch.tensor([0, UNLABELLED]), names)
    draw_montage(tmp_path / "plain.png", one, "\n\x00name" * 50, LEGEND)
    draw_montage(tmp_path / "heat.png", other, "b", LEGEND, heat=True)
    draw_mean(tmp_path / "mean.png", [[50.0] * 100], (10, 10), 3, Legend("$a_{b$ \x1b", LEGEND.stages, False, "dense"))
    sizes = {}
    for path in tmp_path.iterdir():
        with Image.open(path) as drawn:
            assert drawn.format == "PNG"
            sizes[path.stem] = drawn.size
    assert sizes["heat"][0] == sizes["plain"][0]
    assert sizes["heat"][1] > 1.5 * sizes["plain"][1], "a second row"


def test_legend_says_merged_or_gone():
    assert "merged" in LEGEND.dimmed
    assert "left the network" in Legend("m", LEGEND.stages, False, "dense").dimmed


class _Oracle(nn.Module):
    """Scores every patch by a map (B, N) that is set from outside."""

    scores = None

    def forward(self, x, kept=None):
        score = self.scores
        if x.shape[1] != score.shape[1]:  # later stages: the tokens that are left are those of highest score
            score = score.sort(dim=1, descending=True).values[:, : x.shape[1]]
        return score


def test_oracle_covers_the_object_and_its_opposite_none_of_it(monkeypatch):
    """On the images that are drawn by lot."""
    monkeypatch.setattr("vitprune.report.keepmaps._NUM_COVERED", 8)
    model = load_model("demo").model
    data = open_data("demo", None)
    data.val = data.val.sample(20)
    data.val.transform = eval_transform(model)
    masks = torch.stack([torch.from_numpy(data.object_mask(item)) for item in data.val.sample(8).items])
    shares = masks.float().reshape(8, 14, 8, 14, 8).mean(dim=(2, 4)).reshape(8, 196)

    schedule = attach(model, keep=0.5, prune_at=[3]).schedule
    oracle, opposite = _Oracle(), _Oracle()
    oracle.scores, opposite.scores = shares, 1 - shares
    sparse = {
        "oracle": SparseViT(model, schedule, [oracle], "drop"),
        "opposite": SparseViT(model, schedule, [opposite], "drop"),
        "random": SparseViT(model, schedule, [RandomPredictor()], "drop"),
        "dense": model,
    }
    coverage = object_coverage(sparse, data, torch.device("cpu"))
    assert coverage == {
        "oracle": 100.0,
        "opposite": 0.0,
        "random": pytest.approx(50, abs=20),
    }


def test_owners_are_the_kept_patches_that_others_were_merged_into(make_vit, make_images):
    sparse = attach(make_vit(), keep=0.6, prune_at=[2, 4]).eval()
    images = make_images(sparse, count=2)
    maps, _ = keep_maps(sparse, sparse.model, images, torch.tensor([UNLABELLED] * 2), {})
    with torch.no_grad():
        selection = sparse.select(images)
    for i, each in enumerate(maps):
        present = {patch: patch for patch in range(100)}  # patch to the one it is part of
        for stage, choice in enumerate(selection.choices):
            reached = list(each.reached(stage))
            moved = {reached[kept]: reached[kept] for kept in choice.kept[i].tolist()}
            for pruned, row in zip(choice.pruned[i].tolist(), choice.nearest[i].tolist(), strict=True):
                moved[reached[pruned]] = reached[choice.kept[i, row]]
            present = {patch: moved[owner] for patch, owner in present.items()}
            assert each.owners[stage] == [present[patch] for patch in range(100)]
            assert set(each.owners[stage]) == set(each.kept[stage])
            (none,) = [row for row, r in enumerate(each.redundancy[stage]) if r is None]
            assert none == max(range(len(reached)), key=lambda row: each.scores[stage][row]), "the most important"


def test_merged_patches_take_their_mean_colour_within_lines_and_others_stay():
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :20], pixels[20:, 40:], pixels[:20, 20:40] = (200, 0, 0), (100, 40, 0), (9, 9, 9)
    owners = [0, 1, 2, 3, 4, 0]  # the last patch is part of the first
    drawn = np.asarray(fill_merged(Image.fromarray(pixels), owners, (2, 3))).astype(int)
    for row, column in ((10, 10), (30, 50)):
        assert drawn[row, column].tolist() == [150, 20, 0]
    assert drawn[10, 30].tolist() == [9, 9, 9]
    assert drawn[10, 20].tolist() != [9, 9, 9], "a line beside the merged patch"
    assert drawn[30, 20].tolist() == [0, 0, 0], "and none between two that stand alone"
    colours, merged = mean_colours(Image.fromarray(pixels), owners, (2, 3))
    assert merged == {0}
    assert colours[0].tolist() == [150, 20, 0]

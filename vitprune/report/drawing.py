"""Keep maps as images: a montage of one image, heat maps, the mean over a data set."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitprune.common.formatting import one_line
from vitprune.report.keepmaps import KeepMap
from vitprune.schedule import Stage
from vitprune.tasks import in_words

_SIDE = 2.9
"""Longest side of a tile, in inches."""
_FONT_SIZE = 9
_GREY, _EDGE = 200, (220, 30, 90)
_VEIL = 0.8
"""How far a pruned patch fades to a grey on which it can still be made out."""


@dataclass(frozen=True)
class Legend:
    """What captions say of a model: its name and how much it keeps, its stages, whether pruned patches are merged.

    And what they call the predictions beside its own, and what is known to be right.
    """

    model: str
    stages: Sequence[Stage]
    merged: bool
    dense: str
    truth: str = "true class"

    @property
    def dimmed(self) -> str:
        """What a dimmed patch means."""
        if self.merged:
            return "patches of one colour within lines are one token: merged into the most similar kept one"
        return "dimmed patches have left the network"


def dim_pruned(image: Image.Image, kept: Sequence[int], grid_size: tuple[int, int]) -> Image.Image:
    """The image, RGB, with all but the kept patches faded, and a line where the two meet: white fades to little else.

    Patches of a grid (rows, columns) are numbered in raster order.
    """
    patches = np.zeros(grid_size, dtype=np.uint8)
    patches.flat[list(kept)] = 1
    is_kept = np.asarray(Image.fromarray(patches).resize(image.size, Image.Resampling.NEAREST))  # (H, W)
    faded = (1 - _VEIL) * np.asarray(image.convert("L").convert("RGB")) + _VEIL * _GREY
    pixels = np.where(is_kept[..., None], np.asarray(image), faded.astype(np.uint8))
    edge = np.diff(is_kept, axis=1, prepend=is_kept[:, :1]) | np.diff(is_kept, axis=0, prepend=is_kept[:1])
    pixels[edge != 0] = _EDGE
    return Image.fromarray(pixels)


def fill_merged(image: Image.Image, owners: Sequence[int], grid_size: tuple[int, int]) -> Image.Image:
    """The image, RGB, with the patches of each merged token in their mean colour, and a line around them.

    Patches of a grid (rows, columns) are numbered in raster order; `owners` has for each the kept one it is part of.
    """
    numbers = Image.fromarray(np.array(owners, dtype=np.int32).reshape(grid_size))
    of_pixel = np.asarray(numbers.resize(image.size, Image.Resampling.NEAREST))  # (H, W)
    colours, merged = mean_colours(image, owners, grid_size)
    is_merged = np.isin(of_pixel, list(merged))
    pixels = np.where(is_merged[..., None], colours[of_pixel], np.asarray(image)).astype(np.uint8)
    for axis in (0, 1):
        other = np.diff(of_pixel, axis=axis, prepend=of_pixel.take([0], axis=axis)) != 0
        pixels[other & (is_merged | np.roll(is_merged, 1, axis=axis))] = _EDGE
    return Image.fromarray(pixels)


def mean_colours(
    image: Image.Image, owners: Sequence[int], grid_size: tuple[int, int]
) -> tuple[NDArray[np.float64], set[int]]:
    """Mean colour of the patches that are part of each kept one, (N, 3), and which of these stand for several."""
    rows, columns = grid_size
    patches = np.asarray(image.resize((columns, rows), Image.Resampling.BOX), dtype=np.float64).reshape(-1, 3)
    sizes = np.bincount(owners, minlength=rows * columns)
    sums = np.stack([np.bincount(owners, patches[:, c], minlength=rows * columns) for c in range(3)], axis=1)
    return sums / np.maximum(sizes, 1)[:, None], {int(number) for number in np.flatnonzero(sizes > 1)}


def heat_map(
    image: Image.Image, where: Sequence[int], scores: Sequence[float], grid_size: tuple[int, int]
) -> Image.Image:
    """The image in grey under the colours of its patches' scores, dark blue for the lowest, yellow for the highest.

    Patches other than `where`, which have no score, fade.
    """
    import matplotlib

    low, high = min(scores), max(scores)
    colours: NDArray[np.float64] = np.zeros((grid_size[0] * grid_size[1], 3))
    colours[list(where)] = matplotlib.colormaps["viridis"]((np.array(scores) - low) / (high - low or 1.0))[:, :3]
    patches = Image.fromarray((255 * colours).astype(np.uint8).reshape(*grid_size, 3))
    grey = image.convert("L").convert("RGB")
    over = Image.blend(grey, patches.resize(image.size, Image.Resampling.NEAREST), 0.65)
    return dim_pruned(over, where, grid_size)


def draw_montage(path: Path, keep_map: KeepMap, title: str, legend: Legend, heat: bool = False) -> None:
    """Write a PNG of one image: itself and every stage side by side, `heat` scores below, then predictions."""
    image, grid_size, total = keep_map.image, keep_map.grid_size, keep_map.num_patches
    tiles = [(image, f"as the model sees it\n{grid_size[0]} x {grid_size[1]} = {total} patches")]
    for number, (stage, kept) in enumerate(zip(legend.stages, keep_map.kept, strict=True)):
        share = f"{len(kept)} of {total} kept, {keep_map.kept_pct[number]:.1f} %"
        said = f"stage {number + 1}, before block {stage.block}\n{share}"
        if keep_map.owners:
            tiles.append((fill_merged(image, keep_map.owners[number], grid_size), said))
        else:
            tiles.append((dim_pruned(image, kept, grid_size), said))
    num_columns = len(tiles)
    if heat:
        tiles += _heat_tiles(keep_map, keep_map.scores, "importance")
    if heat and keep_map.redundancy:
        # Of the most important patch, which is compared with none: as little as of any.
        rows = [[min(filter(None, row)) if r is None else r for r in row] for row in keep_map.redundancy]
        tiles += _heat_tiles(keep_map, rows, "redundancy")
    scale = _SIDE / max(image.size)
    figure, places = _figure(len(tiles) // num_columns, num_columns, image.width * scale, image.height * scale + 0.5)
    for axes, (tile, said) in zip(places, tiles, strict=True):
        axes.imshow(tile)
        axes.set_title(said, loc="left", y=0, pad=-2, verticalalignment="top", fontsize=_FONT_SIZE)
    answers = {legend.dense: in_words(keep_map.dense), "sparse": in_words(keep_map.sparse)}
    lines = {legend.truth: keep_map.label_name} | answers
    below = [f"{who}: {what}" for who, what in lines.items() if what]
    _write(figure, path, f"{title} - {legend.model}", [*below, legend.dimmed])


def _heat_tiles(keep_map: KeepMap, stages: Sequence[Sequence[float]], what: str) -> list[tuple[Image.Image, str]]:
    """A row of heat maps, one a stage."""
    image = keep_map.image
    tiles = [(Image.new("RGB", image.size, "white"), f"{what}:\ndark low, bright high")]
    for number, values in enumerate(stages):
        said = f"{what} at stage {number + 1}\n{min(values):+.2f} to {max(values):+.2f}"
        tiles.append((heat_map(image, keep_map.reached(number), values, keep_map.grid_size), said))
    return tiles


def draw_mean(
    path: Path, kept_pct: Sequence[Sequence[float]], grid_size: tuple[int, int], num_images: int, legend: Legend
) -> None:
    """Write a PNG of how often each position is kept at each stage, `kept_pct` by stage and position, in percent."""
    figure, places = _figure(1, len(kept_pct), _SIDE, 3.2)
    for number, (axes, shares, stage) in enumerate(zip(places, kept_pct, legend.stages, strict=True)):
        image = axes.imshow(np.array(shares).reshape(grid_size), vmin=0, vmax=100, cmap="viridis")
        mean = sum(shares) / len(shares)
        said = f"stage {number + 1}, before block {stage.block}\n{mean:.1f} % of patches kept"
        axes.set_title(said, fontsize=_FONT_SIZE)
    figure.colorbar(image, ax=list(places), label="kept on % of the images", shrink=0.8)
    _write(figure, path, f"{legend.model}, {num_images} images", [])


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row; width and height of one, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width + 0.2, rows * height + 1.2), dpi=100, layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in places:
        axes.set_axis_off()
    return figure, places


def _write(figure: Any, path: Path, title: str, below: Sequence[str]) -> None:
    """Save a figure with a title and lines of text below it, each cut at its width; a $ in them is no formula."""
    num_letters = int(figure.get_figwidth() * 72 / (0.55 * _FONT_SIZE))
    title, *below = (
        line if len(line) <= num_letters else f"{line[: num_letters - 3]}..." for line in map(one_line, [title, *below])
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=_FONT_SIZE, parse_math=False)
    figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=_FONT_SIZE, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font lacks: they are drawn as boxes
        figure.savefig(path, format="png", metadata={"Software": "vitprune"})

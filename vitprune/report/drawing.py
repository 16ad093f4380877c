"""Keep maps as images: a montage of one image, a sheet of several, heat maps, the mean over a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from vitprune.common.formatting import plain
from vitprune.report.keepmaps import KeepMap
from vitprune.schedule import Stage

_LEAST_SIDE, _LARGEST_SIDE = 280, 640
"""Longest side of a tile in pixels: below, images are shown larger by a whole factor; above, smaller."""
_GAP, _LINE, _FONT_SIZE = 12, 20, 14
_PAPER, _INK, _EDGE = (255, 255, 255), (20, 20, 20), (220, 30, 90)
_VEIL = 0.8
"""How far a patch that has left fades to a grey on which it can still be made out."""


@dataclass(frozen=True)
class Legend:
    """What captions say of the model.

    Attributes:
        model: its name and how much it keeps.
        stages: of the model.
        folded: whether patches that leave are folded into others.
        dense: what the answers called dense are of.
    """

    model: str
    stages: Sequence[Stage]
    folded: bool
    dense: str

    @property
    def dimmed(self) -> str:
        """What a dimmed patch means."""
        if self.folded:
            return "dimmed patches are folded: each is averaged into the most similar one that stays"
        return "dimmed patches have left the network"


def dim_dropped(image: Image.Image, kept: Sequence[int], grid_size: tuple[int, int]) -> Image.Image:
    """The image with all but the kept patches faded, and a line where the two meet.

    Args:
        image: RGB.
        kept: numbers of patches, in raster order.
        grid_size: patches (rows, columns).
    """
    stays = _mask(kept, grid_size)
    grey = image.convert("L").convert("RGB")
    veiled = Image.blend(grey, Image.new("RGB", image.size, (200, 200, 200)), _VEIL)
    mask = Image.fromarray(255 * stays.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    result = Image.composite(image, veiled, mask)
    _outline(result, stays)
    return result


def heat_map(image: Image.Image, where: Sequence[int], scores: Sequence[float], grid_size: tuple[int, int]) -> Any:
    """The image in grey under the colours of its patches' scores, dark blue for the lowest, yellow for the highest.

    Args:
        image: RGB.
        where: numbers of the patches that have a score; others stay grey and crossed out.
        scores: one for each of them.
        grid_size: patches (rows, columns).
    """
    import matplotlib

    rows, columns = grid_size
    low, high = min(scores), max(scores)
    share = np.zeros(rows * columns)
    share[list(where)] = (np.array(scores) - low) / (high - low or 1.0)
    colours = (255 * matplotlib.colormaps["viridis"](share.reshape(grid_size))[..., :3]).astype(np.uint8)
    grey = image.convert("L").convert("RGB")
    over = Image.fromarray(colours).resize(image.size, Image.Resampling.NEAREST)
    scored = _mask(where, grid_size)
    mask = Image.fromarray(255 * scored.astype(np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    faded = Image.blend(grey, Image.new("RGB", image.size, (200, 200, 200)), _VEIL)
    result = Image.composite(Image.blend(grey, over, 0.65), faded, mask)
    draw = ImageDraw.Draw(result)
    height, width = image.height / rows, image.width / columns
    for row, column in zip(*np.nonzero(~scored), strict=True):
        corners = (column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1)
        draw.line(corners, fill=(150, 150, 150))
    return result


def montage(keep_map: KeepMap, title: str, legend: Legend, label: str | None, heat: bool = False) -> Image.Image:
    """One image: the original and every stage side by side, the predictors' scores below, answers under them.

    Args:
        keep_map: of the image.
        title: its name.
        legend: what captions say of the model.
        label: name of the true class; None where not known.
        heat: add heat maps of the predictors' keep scores.
    """
    rows, columns = keep_map.grid_size
    image = _resized(keep_map.image)
    tiles = [(image, ["as the model sees it", f"{rows} x {columns} = {keep_map.num_patches} patches"])]
    for number, (stage, kept) in enumerate(zip(legend.stages, keep_map.kept, strict=True)):
        share = f"{len(kept)} of {keep_map.num_patches} stay, {keep_map.kept_pct[number]:.1f} %"
        tiles.append(
            (dim_dropped(image, kept, keep_map.grid_size), [f"stage {number + 1}, before block {stage.block}", share])
        )
    strips = [_strip(tiles)]
    if heat:
        tiles = [(Image.new("RGB", image.size, _PAPER), ["keep scores (log-odds)", "dark low, bright high"])]
        for number, scores in enumerate(keep_map.scores):
            drawn = heat_map(image, keep_map.reached(number), scores, keep_map.grid_size)
            tiles.append((drawn, [f"scores of stage {number + 1}", f"{min(scores):+.2f} to {max(scores):+.2f}"]))
        strips.append(_strip(tiles))
    truth = [] if label is None else [f"true class: {label}"]
    below = [
        *truth,
        f"{legend.dense}: {'; '.join(answer.text for answer in keep_map.dense)}",
        f"sparse: {'; '.join(answer.text for answer in keep_map.sparse)}",
        legend.dimmed,
    ]
    return _page([f"{title} - {legend.model}"], strips, below)


def sheet(montages: Sequence[Image.Image]) -> Image.Image:
    """Montages under each other."""
    width = max(each.width for each in montages)
    result = Image.new("RGB", (width, sum(each.height for each in montages)), _PAPER)
    top = 0
    for each in montages:
        result.paste(each, (0, top))
        top += each.height
    return result


def draw_mean(
    path: Path, kept_pct: Sequence[Sequence[float]], grid_size: tuple[int, int], num_images: int, legend: Legend
) -> None:
    """Write a PNG of how often each position stays at each stage.

    Args:
        path: where.
        kept_pct: by stage and position, in percent.
        grid_size: patches (rows, columns).
        num_images: images that were counted.
        legend: what captions say of the model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 3.2 * len(kept_pct), 3.8), dpi=150, layout="constrained")
    places = figure.subplots(1, len(kept_pct), squeeze=False)[0]
    for number, (axes, shares, stage) in enumerate(zip(places, kept_pct, legend.stages, strict=True)):
        image = axes.imshow(np.array(shares).reshape(grid_size), vmin=0, vmax=100, cmap="viridis")
        mean = sum(shares) / len(shares)
        axes.set_title(f"stage {number + 1}, before block {stage.block}\n{mean:.1f} % of patches stay", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(image, ax=list(places), label="stays on % of the images", shrink=0.8)
    # As plain text: a $ in a name is no formula.
    figure.suptitle(f"{plain(legend.model)}, {num_images} images", fontsize=10, parse_math=False)
    figure.savefig(path, format="png")


def _mask(patches: Sequence[int], grid_size: tuple[int, int]) -> NDArray[np.bool_]:
    mask = np.zeros(grid_size[0] * grid_size[1], dtype=bool)
    mask[list(patches)] = True
    return mask.reshape(grid_size)


def _outline(image: Image.Image, stays: NDArray[np.bool_]) -> None:
    """Draw a line between patches of which one stays and one does not: white images fade to little else."""
    draw = ImageDraw.Draw(image)
    rows, columns = stays.shape
    height, width = image.height / rows, image.width / columns
    for row, column in zip(*np.nonzero(stays[:, 1:] != stays[:, :-1]), strict=True):
        x = round((column + 1) * width)
        draw.line((x, round(row * height), x, round((row + 1) * height)), fill=_EDGE)
    for row, column in zip(*np.nonzero(stays[1:] != stays[:-1]), strict=True):
        y = round((row + 1) * height)
        draw.line((round(column * width), y, round((column + 1) * width), y), fill=_EDGE)


def _resized(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest < _LEAST_SIDE:
        factor = math.ceil(_LEAST_SIDE / longest)
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
    if longest > _LARGEST_SIDE:
        scale = _LARGEST_SIDE / longest
        size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def _strip(tiles: Sequence[tuple[Image.Image, Sequence[str]]]) -> Image.Image:
    """Tiles side by side, each with its lines under it."""
    width, height = tiles[0][0].size
    lines = max(len(text) for _, text in tiles)
    column = max(width, 200)  # so that a caption fits
    result = Image.new("RGB", (len(tiles) * (column + _GAP) - _GAP, height + lines * _LINE + 6), _PAPER)
    for index, (tile, text) in enumerate(tiles):
        left = index * (column + _GAP)
        result.paste(tile, (left, 0))
        _write(result, text, (left, height + 4), column)
    return result


def _page(above: Sequence[str], strips: Sequence[Image.Image], below: Sequence[str]) -> Image.Image:
    width = max(strip.width for strip in strips)
    height = sum(strip.height + _GAP for strip in strips) + (len(above) + len(below)) * _LINE + _GAP
    result = Image.new("RGB", (width + 2 * _GAP, height + 2 * _GAP), _PAPER)
    _write(result, above, (_GAP, _GAP), width)
    top = 2 * _GAP + len(above) * _LINE
    for strip in strips:
        result.paste(strip, (_GAP, top))
        top += strip.height + _GAP
    _write(result, below, (_GAP, top), width)
    return result


def _write(image: Image.Image, lines: Sequence[str], at: tuple[int, int], width: int) -> None:
    draw, font = ImageDraw.Draw(image), _font()
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * _LINE), _fitting(plain(line), font, width), fill=_INK, font=font)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, cut where it is wider than `width` pixels."""
    text = " ".join(text.split())[:1000]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which knows more alphabets than Pillow's own font; matplotlib brings it along."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", _FONT_SIZE)

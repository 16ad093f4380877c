"""What lies over an image where patches have left, as SVG paths in units of patches."""

from __future__ import annotations

from collections.abc import Sequence


def cover(kept: Sequence[int], grid_size: tuple[int, int]) -> str:
    """Rectangles over all patches but the kept ones, neighbours of a row as one.

    Args:
        kept: numbers of patches, in raster order.
        grid_size: patches (rows, columns).
    """
    rows, columns = grid_size
    stays, parts = set(kept), []
    for row in range(rows):
        start: int | None = None
        for column in range(columns + 1):
            gone = column < columns and row * columns + column not in stays
            if gone and start is None:
                start = column
            elif not gone and start is not None:
                parts.append(f"M{start} {row}h{column - start}v1h-{column - start}z")
                start = None
    return "".join(parts)


def edges(kept: Sequence[int], grid_size: tuple[int, int]) -> str:
    """Lines between patches of which one stays and one does not."""
    rows, columns = grid_size
    stays, parts = set(kept), []
    for row in range(rows):
        for column in range(columns):
            here = row * columns + column
            if column + 1 < columns and (here in stays) != (here + 1 in stays):
                parts.append(f"M{column + 1} {row}v1")
            if row + 1 < rows and (here in stays) != (here + columns in stays):
                parts.append(f"M{column} {row + 1}h1")
    return "".join(parts)

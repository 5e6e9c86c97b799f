"""A matrix as blocks, without a copy: views for reductions over blocks and for filling them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks of ``block`` rows and columns a matrix has each way, ragged ones included."""
    return (-(-shape[0] // block[0]), -(-shape[1] // block[1]))


def block_views(
    matrix: Tensor, block: tuple[int, int]
) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
    """The parts of a matrix whose blocks have one size each: one, or up to four where it is ragged.

    Args:
        matrix: [N, K], of any strides.
        block: rows and columns of a block.

    Yields:
        a view [block rows, rows of a block, block columns, columns of a block], and where its
        blocks lie in the grid of all blocks.
    """
    for top, height, rows in _runs(matrix.shape[0], block[0]):
        for left, width, cols in _runs(matrix.shape[1], block[1]):
            part = matrix[
                top * block[0] : top * block[0] + rows * height,
                left * block[1] : left * block[1] + cols * width,
            ]
            view = part.unflatten(0, (rows, height)).unflatten(2, (cols, width))
            yield view, (slice(top, top + rows), slice(left, left + cols))


def _runs(size: int, block: int) -> Iterator[tuple[int, int, int]]:
    """``(first block, its size, how many of that size)``: the whole blocks, then a ragged one."""
    whole, rest = divmod(size, block)
    if whole:
        yield 0, block, whole
    if rest:
        yield whole, rest, 1

"""Block patterns: which weights of a linear layer go together, written as a short text.

``N`` counts outputs (rows of the weight) and ``M`` inputs (columns), as in Intel Neural Compressor:

- ``NxM``: blocks of N outputs x M inputs (``1x1``: single weights);
- ``channelxM``: M inputs with all outputs; ``Nxchannel``: N outputs with all inputs;
- ``N:M``: N weights of every M neighbours along the inputs go, or none of them.

``channelx1`` (whole FFN channels) and ``mha`` (whole heads) are units that are removed for good,
and none of these.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_BLOCK = re.compile(r"(\d+|channel)x(\d+|channel)")
_RATIO = re.compile(r"(\d+):(\d+)")
_DENOMINATOR = 10**9


@dataclass(frozen=True)
class BlockPattern:
    """A pattern that leaves the shape of a weight as it is.

    Attributes:
        text: as it is written, ``4x1``.
        rows: outputs of a block; ``None``: all.
        cols: inputs of a block; ``None``: all.
        zeros, of: N and M of ``N:M``, whose blocks are single weights; 0 for the other patterns.
    """

    text: str
    rows: int | None
    cols: int | None
    zeros: int = 0
    of: int = 0

    @property
    def limit(self) -> float:
        """The highest sparsity that the pattern can express."""
        return self.zeros / self.of if self.of else 1.0

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a block in a weight of ``shape`` [outputs, inputs]."""
        return (self.rows or shape[0], self.cols or shape[1])

    def items(self, sparsity: float, items: int) -> int:
        """How many of ``items`` go at ``sparsity`` of the weights: rounded down, never one short.

        An item is a block; for ``N:M`` a group of M, which loses N.
        """
        share = sparsity / self.limit
        # The nearest short fraction: 0.29 is 29/100, which 100 blocks must give 29 of.
        exact = Fraction(share).limit_denominator(_DENOMINATOR)
        return min(items, int(exact * items))


def block_pattern(text: str) -> BlockPattern:
    """Read a block pattern.

    Raises:
        ValueError: the text is no block pattern, a size is 0, or N:M does not leave a weight.
    """
    ratio, block = _RATIO.fullmatch(text), _BLOCK.fullmatch(text)
    if ratio:
        zeros, of = int(ratio[1]), int(ratio[2])
        if not 0 < zeros < of:
            raise ValueError(f"{text!r}: N zeros of every M need 0 < N < M")
        return BlockPattern(text, 1, 1, zeros, of)
    if not block:
        raise ValueError(f"{text!r} is no block pattern; accepted: NxM, channelxM, Nxchannel, N:M")
    rows, cols = (None if side == "channel" else int(side) for side in block.groups())
    if rows is None and cols is None:
        raise ValueError(f"{text!r}: a block of all outputs and all inputs is the whole layer")
    if rows == 0 or cols == 0:
        raise ValueError(f"{text!r}: a block has at least one output and one input")
    return BlockPattern(text, rows, cols)

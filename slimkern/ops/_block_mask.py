"""Which blocks of a weight are kept: one bit per block, for every pattern.

============ ====================================================
pattern      block
============ ====================================================
``NxM``      (N, M)
``1x1``      (1, 1)
``N:M``      (1, 1): what is kept differs, not how it is written down
``channelxM``  (rows of the weight, M)
``Nxchannel``  (N, columns of the weight)
============ ====================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The kept blocks of a weight [N, K] (N outputs, K inputs).

    The last block of a row or column of blocks may be ragged: it is what is left of the weight.

    Attributes:
        bits: uint8 [ceil(N / bn), ceil(ceil(K / bk) / 8)]; bit j (of value ``1 << j``) of byte i is
            block column 8 i + j; 1: kept. Bits beyond the last block column mean nothing.
        block: (bn, bk), rows and columns of the weight in a block.
        shape: (N, K).

    Raises:
        TypeError: bits are no uint8 tensor.
        ValueError: a block has no element, or bits are not of the shape above.
    """

    bits: Tensor
    block: tuple[int, int]
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Checks what later code relies on."""
        if not isinstance(self.bits, Tensor) or self.bits.dtype != torch.uint8:
            what = self.bits.dtype if isinstance(self.bits, Tensor) else type(self.bits).__name__
            raise TypeError(f"bits is {what}; accepted: a tensor of torch.uint8")
        rows, columns = _grid(self.block, self.shape)
        wanted = (rows, _ceil_div(columns, 8))
        if tuple(self.bits.shape) != wanted:
            raise ValueError(
                f"bits has shape {tuple(self.bits.shape)}; accepted: {wanted}, for blocks "
                f"{tuple(self.block)} of a weight {tuple(self.shape)}"
            )

    @classmethod
    def from_blocks(cls, kept: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> BlockMask:
        """The mask that keeps the blocks that are true.

        Args:
            kept: bool [ceil(N / bn), ceil(K / bk)].
            block: (bn, bk).
            shape: (N, K) of the weight.

        Raises:
            TypeError: ``kept`` is not bool.
            ValueError: ``kept`` has another shape, or a block has no element.
        """
        if kept.dtype != torch.bool:
            raise TypeError(f"kept has dtype {kept.dtype}; accepted: torch.bool")
        wanted = _grid(block, shape)
        if tuple(kept.shape) != wanted:
            raise ValueError(
                f"kept has shape {tuple(kept.shape)}; accepted: {wanted}, for blocks "
                f"{tuple(block)} of a weight {tuple(shape)}"
            )
        rows, columns = wanted
        padded = kept.new_zeros((rows, _ceil_div(columns, 8), 8), dtype=torch.uint8)
        padded.flatten(1)[:, :columns] = kept
        bits = (padded << _places(kept.device)).sum(2, dtype=torch.uint8)
        return cls(bits, (int(block[0]), int(block[1])), (int(shape[0]), int(shape[1])))

    def blocks(self) -> Tensor:
        """Which blocks are kept: bool [ceil(N / bn), ceil(K / bk)]."""
        rows, columns = _grid(self.block, self.shape)
        # Eight blocks at a time: one look-up for each byte is far faster than shifting every bit.
        device = self.bits.device
        bytes_ = torch.arange(256, dtype=torch.uint8, device=device)
        table = (bytes_.unsqueeze(1) >> _places(device) & 1).view(torch.int64).flatten()
        eights = table.index_select(0, self.bits.flatten().int())
        every = eights.view(torch.bool).view(rows, self.bits.shape[1] * 8)
        return every[:, :columns].contiguous()

    def dense(self) -> Tensor:
        """Which elements of the weight are kept: bool [N, K]."""
        (bn, bk), (N, K) = self.block, self.shape
        blocks = self.blocks()
        # A block longer than the weight would make more copies than are used.
        rows = blocks.repeat_interleave(min(bn, N), 0) if bn > 1 else blocks
        return (rows[:N].repeat_interleave(min(bk, K), 1) if bk > 1 else rows[:N])[:, :K]

    @property
    def density(self) -> float:
        """The kept share of the weight's elements; 1 where it has none. Waits for the device."""
        N, K = self.shape
        return 1.0 if N * K == 0 else int(self.dense().sum()) / (N * K)

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask with its bits on ``device``; itself where they are."""
        bits = self.bits.to(device)
        return self if bits is self.bits else BlockMask(bits, self.block, self.shape)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _grid(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of blocks."""
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block is {tuple(block)}; accepted: (bn, bk), at least 1 each")
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape is {tuple(shape)}; accepted: (N, K) of the weight")
    return _ceil_div(shape[0], block[0]), _ceil_div(shape[1], block[1])


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)

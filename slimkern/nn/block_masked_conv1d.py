"""The masked state for block patterns of transformers' ``Conv1D``, whose weight is [in, out].

In a file of its own, as it imports transformers; whoever has such a layer has imported it already.
"""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from slimkern.nn.block_masked import BlockMasked


class BlockMaskedConv1D(BlockMasked, Conv1D):
    """A ``Conv1D`` (GPT-2's linear) whose weight is masked in blocks of outputs x inputs."""

    plain = Conv1D
    transposed = True

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [..., nx] -> [..., nf]."""
        return self.masked_product(x)

    def __repr__(self) -> str:
        rows, cols = self.block
        return f"BlockMaskedConv1D(nf={self.nf}, nx={self.nx}, block={rows}x{cols})"

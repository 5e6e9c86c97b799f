"""Masked and fused modules: own parameters and buffers, compute through ops."""

from slimkern.nn import masked_blocks  # noqa: F401  (its classes enter themselves)
from slimkern.nn.block_masked import BlockMasked, BlockMaskedLinear
from slimkern.nn.fused import FusedModule, plain_class
from slimkern.nn.masked import MaskedLinear
from slimkern.nn.masked_block import MaskedBlock, install_block, release_unmasked_blocks

__all__ = [
    "BlockMasked",
    "BlockMaskedLinear",
    "FusedModule",
    "MaskedBlock",
    "MaskedLinear",
    "install_block",
    "plain_class",
    "release_unmasked_blocks",
]

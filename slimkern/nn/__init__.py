"""Masked and fused modules: own parameters and buffers, compute through ops."""

from slimkern.nn.block_masked import BlockMasked, BlockMaskedLinear
from slimkern.nn.fused import FusedModule, plain_class
from slimkern.nn.masked import MaskedLinear

__all__ = ["BlockMasked", "BlockMaskedLinear", "FusedModule", "MaskedLinear", "plain_class"]

"""Masked and fused modules: own parameters and buffers, compute through ops."""

from slimkern.nn.fused import FusedModule
from slimkern.nn.masked import MaskedLinear

__all__ = ["FusedModule", "MaskedLinear"]

"""The operations: one op is one folder, with an equation, its kernels and its validation.

Importing this package loads the C++ module and raises where it is missing or broken. An op's
function hides its folder of the same name: ``slimkern.ops.indexed_linear`` is the function.
"""

from __future__ import annotations

from slimkern.ops import _native  # noqa: F401  (fails here, with the build command)
from slimkern.ops._block_mask import BlockMask
from slimkern.ops._math import available_maths, choose_math, current_precision
from slimkern.ops._pack import (
    pack_attention_block,
    pack_encoder_layer,
    pack_ffn,
    pack_linear,
)
from slimkern.ops._packed import Packed
from slimkern.ops._weights import (
    AttentionWeights,
    EncoderLayerWeights,
    FfnWeights,
    LinearWeights,
    NormWeights,
)
from slimkern.ops.attention_block import attention_block
from slimkern.ops.block_masked_linear import block_masked_linear
from slimkern.ops.common_slice import common_slice
from slimkern.ops.embeddings import embeddings
from slimkern.ops.encoder_layer import encoder_layer
from slimkern.ops.encoder_stack import encoder_stack
from slimkern.ops.ffn import ffn
from slimkern.ops.indexed_linear import check_index, indexed_linear
from slimkern.ops.masked_attention import masked_attention
from slimkern.ops.masked_ffn import masked_ffn
from slimkern.ops.packed_linear import packed_linear

__all__ = [
    "AttentionWeights",
    "BlockMask",
    "EncoderLayerWeights",
    "FfnWeights",
    "LinearWeights",
    "NormWeights",
    "Packed",
    "attention_block",
    "available_maths",
    "block_masked_linear",
    "check_index",
    "choose_math",
    "common_slice",
    "current_precision",
    "embeddings",
    "encoder_layer",
    "encoder_stack",
    "ffn",
    "indexed_linear",
    "masked_attention",
    "masked_ffn",
    "pack_attention_block",
    "pack_encoder_layer",
    "pack_ffn",
    "pack_linear",
    "packed_linear",
]

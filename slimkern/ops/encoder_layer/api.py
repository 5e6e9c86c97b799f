"""``encoder_layer``: the registered op and the function to call."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._packed import Packed, check_call
from slimkern.ops._registry import Backends, define_op

BACKENDS = Backends(__package__, default={"cpu": "cpu", "cuda": "triton"}, units="products")


def _fake(
    x: Tensor, packed: list[Tensor], spec: str, mask: Tensor | None, head_bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape)


_op = define_op(
    "encoder_layer",
    "Tensor x, Tensor[] packed, str spec, Tensor? mask, Tensor? head_bias",
    _fake,
    BACKENDS,
)


def encoder_layer(
    x: Tensor, packed: Packed, mask: Tensor | None = None, head_bias: Tensor | None = None
) -> Tensor:
    """``y = ffn(attention_block(x))`` on packed weights, in one call, for inference.

    Args:
        x: [B, T, hidden], float32 or bfloat16, on a GPU also float16; any strides.
        packed: what `slimkern.ops.pack_encoder_layer` returned.
        mask, head_bias: as in `slimkern.ops.attention_block`; rows that the mask takes out at the
            end of a sequence are zeros in the result.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError, TypeError, RuntimeError: as `slimkern.ops.attention_block`.
    """
    check_call("encoder_layer", "encoder_layer", x, packed, mask, head_bias)
    return _op(x, packed.tensors, packed.spec, mask, head_bias, packed.backend)

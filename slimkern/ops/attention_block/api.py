"""``attention_block``: the registered op and the function to call."""

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
    "attention_block",
    "Tensor x, Tensor[] packed, str spec, Tensor? mask, Tensor? head_bias",
    _fake,
    BACKENDS,
)


def attention_block(
    x: Tensor, packed: Packed, mask: Tensor | None = None, head_bias: Tensor | None = None
) -> Tensor:
    """``y = post(x + output(softmax(scale q kᵀ + masks) v))`` on packed weights, for inference.

    Keys at the end of a sequence that ``mask`` removes cost nothing: they are skipped, and so are
    the rows there, which are zeros in the result. A query that is left no key attends to nothing
    (zeros, where torch's softmax of such scores has NaN or a uniform distribution).

    Args:
        x: [B, T, hidden], float32 or bfloat16, on a GPU also float16; any strides.
        packed: what `slimkern.ops.pack_attention_block` returned.
        mask: which keys count. int64 [B]: the first so many of each sequence. bool [B, T]: where
            True. Floating [B, T]: added to the scores; a value of -1e30 or less, or float16's
            least, removes the key.
        head_bias: floating [heads, T, T], added to the scores of every sequence; or None.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: a shape, a length or a device does not fit, or the pack is for another
            instruction set.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is asked for.
    """
    check_call("attention_block", "attention_block", x, packed, mask, head_bias)
    return _op(x, packed.tensors, packed.spec, mask, head_bias, packed.backend)

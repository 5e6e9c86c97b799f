"""``ffn``: the registered op and the function to call."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._pack import Packed, check_call
from slimkern.ops._registry import Backends, define_op

BACKENDS = Backends(__package__, default={"cpu": "cpu"}, units="products")


def _fake(x: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_op = define_op("ffn", "Tensor x, Tensor packed", _fake, BACKENDS)


def ffn(x: Tensor, packed: Packed) -> Tensor:
    """``y = post(x + fc2(a(fc1(pre(x)))))`` on packed weights, for inference.

    Args:
        x: [..., hidden], float32 or bfloat16, any strides.
        packed: what `slimkern.ops.pack_ffn` returned.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: a shape or device does not fit, or the pack is for another instruction set.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is asked for.
    """
    check_call("ffn", "ffn", x, packed)
    if x.dim() == 2:
        return _op(x, packed.data, "cpu")
    return _op(x.reshape(-1, packed.in_features), packed.data, "cpu").reshape(x.shape)

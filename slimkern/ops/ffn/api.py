"""``ffn``: the registered op and the function to call."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._packed import Packed, check_call
from slimkern.ops._registry import Backends, define_op

BACKENDS = Backends(__package__, default={"cpu": "cpu", "cuda": "triton"}, units="products")


def _fake(x: Tensor, packed: list[Tensor], spec: str) -> Tensor:
    return x.new_empty(x.shape)


_op = define_op("ffn", "Tensor x, Tensor[] packed, str spec", _fake, BACKENDS)


def ffn(x: Tensor, packed: Packed) -> Tensor:
    """``y = post(x + fc2(a(fc1(pre(x)))))`` on packed weights, for inference.

    Args:
        x: [..., hidden], float32 or bfloat16, on a GPU also float16; any strides.
        packed: what `slimkern.ops.pack_ffn` returned.

    Returns:
        The shape and dtype of x.

    Raises:
        ValueError: a shape or device does not fit, or the pack is for another instruction set.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is asked for.
    """
    check_call("ffn", "ffn", x, packed)
    how = (packed.tensors, packed.spec, packed.backend)
    if x.dim() == 2:
        return _op(x, *how)
    return _op(x.reshape(-1, packed.in_features), *how).reshape(x.shape)

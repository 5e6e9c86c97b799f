"""``packed_linear``: the registered op and the function to call."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._packed import Packed, check_call
from slimkern.ops._registry import Backends, define_op

BACKENDS = Backends(__package__, default={"cpu": "cpu", "cuda": "triton"}, units="products")


def _fake(x: Tensor, packed: list[Tensor], spec: str, N: int) -> Tensor:
    return x.new_empty(x.shape[0], N)


_op = define_op("packed_linear", "Tensor x, Tensor[] packed, str spec, SymInt N", _fake, BACKENDS)


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """``y = x @ Wᵀ + b`` on a packed weight, for inference.

    Args:
        x: [..., K], float32 or bfloat16, on a GPU also float16; any strides.
        packed: what `slimkern.ops.pack_linear` returned.

    Returns:
        [..., N], in the dtype of x.

    Raises:
        ValueError: a shape or device does not fit, or the pack is for another instruction set.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is asked for.
    """
    check_call("packed_linear", "linear", x, packed)
    N = packed.out_features
    how = (packed.tensors, packed.spec, N, packed.backend)
    if x.dim() == 2:
        return _op(x, *how)
    return _op(x.reshape(-1, packed.in_features), *how).reshape(*x.shape[:-1], N)

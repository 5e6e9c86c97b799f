"""``common_slice``: the registered op and the function to call."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._registry import Backends, define_op

BACKENDS = Backends(
    __package__,
    default={"cpu": "cpu", "cuda": "reference", "meta": "reference"},
    units="none",
)


def _fake(x: Tensor, dim: int, otherwise: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] = 1
    return x.new_empty(shape)


_op = define_op("common_slice", "Tensor x, int dim, str otherwise", _fake, BACKENDS)


def common_slice(x: Tensor, dim: int, otherwise: str) -> Tensor:
    """``x[0]`` along a dimension, where ``x[i] == x[0]`` for every i.

    An op of its own, so that a compiled graph holds the comparison too.

    Args:
        x: any shape, with at least one slice along ``dim``.
        dim: the dimension.
        otherwise: what the error says where slices differ.

    Returns:
        a copy of the first slice; the dimension stays, with size 1.

    Raises:
        ValueError: slices differ, or there is none. While a CUDA graph is captured nothing can be
            looked at: slices that differ fail on the device, when the graph is replayed.
    """
    if x.shape[dim] == 1:
        return x
    if x.shape[dim] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: a slice along dimension {dim}")
    return _op(x, dim, otherwise, BACKENDS.choose(None, x.device))

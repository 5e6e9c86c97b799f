"""``dropout``: the registered op, and its gradient, which is the same op with the same seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimkern.ops._registry import TRITON_DTYPES, Backends, define_op

BACKENDS = Backends(
    __package__,
    default={"cpu": "cpu", "cuda": "triton", "meta": "reference"},
    dtypes={"cpu": (torch.float32, torch.bfloat16), "triton": TRITON_DTYPES},
)


def _fake(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


seeded_dropout = define_op(
    "seeded_dropout",
    "Tensor x, Tensor seed, float p",
    _fake,
    BACKENDS,
    passes=("forward", "backward"),
)


class SeededDropoutFn(torch.autograd.Function):
    """Saves the seed alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float, backend: str) -> Tensor:
        """x of any shape -> the same."""
        ctx.save_for_backward(seed)
        ctx.p, ctx.backend = p, backend
        return seeded_dropout(x, seed, p, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dy -> dx."""
        (seed,) = ctx.saved_tensors
        return seeded_dropout(grad, seed, ctx.p, ctx.backend), None, None, None


def draw_seed(device: torch.device | None = None) -> Tensor:
    """A seed, int64 [1], of torch's generator of the device, the CPU's by default.

    A GPU draws its own: nothing waits for it, and each replay of a CUDA graph draws anew.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), device=device)


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero with probability ``p``, else x / (1 - p); independent choices, as `F.dropout` has them.

    The seed is drawn from torch's generator of x's device. What is dropped is not stored, but made
    again in the backward.

    Args:
        x: floating, any shape.
        p: 0 to 1.

    Returns:
        The shape and dtype of x; x itself where p is 0.
    """
    if p == 0.0:
        return x
    backend = BACKENDS.choose(None, x.device, x.dtype)
    y: Tensor = SeededDropoutFn.apply(x, draw_seed(x.device), p, backend)
    return y

"""How far an output may be from what exact arithmetic gives: derived for each model, never tuned.

A bound that holds for every model would have to assume how much a model amplifies rounding errors.
Here it is measured: the model runs in float64, and each number that a lower precision would round
is moved by that precision's unit roundoff, up or down by chance (Vignes, A stochastic arithmetic
for reliable scientific computation, 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Unit roundoff: half a unit in the last place, relative.
UNIT_FP32, UNIT_BF16, UNIT_FP16 = 2.0**-24, 2.0**-8, 2.0**-11
# precision -> of the operands of matrix products, of what is stored. ``high`` is allowed what it
# promises: TF32, with 10 bits, or sums of two bfloat16, which are closer.
_UNITS = {
    "fp32": (0.0, UNIT_FP32),
    "fp32-high": (2.0**-11, UNIT_FP32),
    "fp32-medium": (UNIT_BF16, UNIT_FP32),
    "bf16": (UNIT_BF16, UNIT_BF16),
    "fp16": (UNIT_FP16, UNIT_FP16),
}
_SIGMAS = 4  # a normal error is larger once in 16,000 outputs
_NUMBERS = 256  # that an estimate rests on at least, as far as _DRAWS reach
_DRAWS = 16

_aten = torch.ops.aten
# Where the left factor stands among an operation's arguments; the right one follows it.
_FACTORS = {_aten.mm: 0, _aten.bmm: 0, _aten.addmm: 1, _aten.baddbmm: 1}


def relative_error(output: Tensor, reference: Tensor) -> float:
    """rms(output - reference) / rms(reference); infinite where the output is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(
            f"output has shape {tuple(output.shape)}, expected {tuple(reference.shape)}"
        )
    if not bool(output.isfinite().all()):
        return float("inf")
    want = reference.double()
    difference = _rms(output.detach().to(want.device).double() - want)
    return difference / _rms(want) if difference else 0.0


def reference(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The output of a call of a float64 model, and the operations of its matrix products.

    Attention is computed as plain products, so that these are counted as well; 2 operations per
    multiply-add.
    """
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        output = call()
    return output, float(counter.get_total_flops())


def rounding_bound(call: Callable[[], Tensor], reference: Tensor, precision: str) -> float:
    """What :func:`relative_error` of plain PyTorch may be in a precision.

    Every operation's result is moved by the unit roundoff u of what it is stored in, and operands
    of matrix products by that of what they are rounded to. A product of reduction length K, summed
    in float32, is moved by sqrt(K) 2^-24 besides: adding up n products of variance s^2 one after
    the other, the worst order, rounds partial sums of sqrt(k) s, which is off by at most
    sqrt(1 + ... + n) s 2^-24 of a result of sqrt(n) s. The signs are drawn (always the same), the
    magnitudes are the largest that can be. What this does to the output is a standard deviation;
    four of them are the bound.

    Args:
        call: the forward of the float64 model.
        reference: its output.
        precision: ``fp32``, ``fp32-high``, ``fp32-medium``, ``bf16`` or ``fp16``.
    """
    draws = max(1, min(_DRAWS, -(-_NUMBERS // max(1, reference.numel()))))
    random = torch.Generator(reference.device).manual_seed(0)
    squares = 0.0
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for _ in range(draws):
            with _Rounding(*_UNITS[precision], random):
                moved = call()
            squares += relative_error(moved, reference) ** 2
    return _SIGMAS * (squares / draws) ** 0.5


class _Rounding(TorchDispatchMode):
    """Moves the results of floating operations, and the operands of products, by chance."""

    def __init__(self, operand: float, stored: float, random: torch.Generator) -> None:
        super().__init__()
        self._operand, self._stored, self._random = operand, stored, random

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        place = _FACTORS.get(func.overloadpacket)
        if place is None:
            # What is made of other operations (a linear, attention) is looked into.
            with self:
                parts = func.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        own, unit = _storages(args), self._stored
        if place is not None:
            left, right = args[place : place + 2]
            unit = (unit**2 + left.shape[-1] * UNIT_FP32**2) ** 0.5
            args = (*args[:place], *map(self._moved_operand, (left, right)), *args[place + 2 :])
        result: Any = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if isinstance(first, Tensor) and first.is_floating_point() and _storages([first]) - own:
            self._move_(first, unit)
        return result

    def _moved_operand(self, operand: Tensor) -> Tensor:
        return self._move_(operand.clone(), self._operand) if self._operand else operand

    def _move_(self, tensor: Tensor, unit: float) -> Tensor:
        signs = torch.rand(tensor.shape, generator=self._random, device=tensor.device) < 0.5
        return tensor.mul_(torch.where(signs, 1.0 - unit, 1.0 + unit).to(tensor.dtype))


def _storages(values: Any) -> set[int]:
    """Where tensors among these arguments lie: a result that lies there is a view, or in place."""
    return {v.untyped_storage().data_ptr() for v in values if isinstance(v, Tensor)}


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())

"""Is an output right? The fp64 reference, the error against it, and what it may be at most.

Nothing is timed before it has passed here. The bound is derived, never tuned: an implementation may
be as wrong as plain PyTorch is in the same precision, plus the rounding errors that it may make at
other places than PyTorch does (:func:`bound`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from bench.work import Outputs, Work
from slimkern.report.speed_schema import PRECISIONS, Precision

# Unit roundoff: half a unit in the last place, relative. A float32 held as the sum of two bfloat16
# keeps 2^-16 of it: the second takes what the first left (at most 2^-8) and rounds it (2^-8).
UNIT_FP32, UNIT_BF16, UNIT_BF16X2 = 2.0**-24, 2.0**-8, 2.0**-16
UNIT_TF32 = 2.0**-11  # ten bits are kept
# A reference below this fraction of the largest of its outputs is zero but for fp64's rounding.
_VANISHING = 2.0**-40

Device = Literal["cpu", "cuda"]


class WrongOutput(AssertionError):  # noqa: N818 - what it says in a table of results
    """An output is not what was asked for; the message says which one and how."""


def seed_of(text: str) -> int:
    """A seed that is the same in every process."""
    return zlib.crc32(text.encode())


def output_gradient(work: Work, like: Tensor) -> Tensor:
    """The gradient g of the output that a backward of ``work`` starts from.

    Normal, the same float32 numbers at every call, in the shape, dtype and device of ``like``.
    """
    generator = torch.Generator().manual_seed(seed_of(f"{work.case} gradient"))
    return torch.randn(like.shape, generator=generator).to(device=like.device, dtype=like.dtype)


def cast(inputs: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The inputs with the floating ones in ``dtype``."""
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in inputs)


def run_module(
    work: Work, module: nn.Module, inputs: tuple[Tensor, ...], gradient: Tensor | None = None
) -> Outputs:
    """The work once, in plain PyTorch: (y,), or (y, dx of floating inputs, parameters' gradients).

    Gradients are those of ``sum(y * g)``; they are made anew at each call and add up nowhere.

    Args:
        work: says whether there is a backward.
        module: of ``work``, in any dtype.
        inputs: its positional arguments, floating ones in the module's dtype.
        gradient: g; ``None`` makes it (which costs time: make it once where time is measured).
    """
    if not work.backward:
        with torch.inference_mode():
            return (module(*inputs),)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
        y = module(*leaves)
        g = output_gradient(work, y) if gradient is None else gradient
        wanted = [t for t in leaves if t.requires_grad] + list(module.parameters())
        return (y.detach(), *torch.autograd.grad(y, wanted, g))


def reference(work: Work) -> Outputs:
    """The outputs in fp64: of the same weights and inputs, which are float32 numbers."""
    if work.reference is not None:
        return work.reference()
    return run_module(work, work.build().double(), cast(work.inputs(), torch.float64))


def error_of(work: Work, outputs: Outputs, reference: Outputs) -> float:
    """The :func:`error` of a work's outputs, in the rows that have to be right."""
    if work.attended is None:
        return error(outputs, reference)
    errors(outputs, reference)  # shapes, and nothing that is not finite anywhere
    rows = work.attended()
    return error(tuple(y[rows] for y in outputs), tuple(y[rows] for y in reference))


def error(outputs: Outputs, reference: Outputs) -> float:
    """The worst of :func:`errors`."""
    return max(errors(outputs, reference))


def errors(outputs: Outputs, reference: Outputs) -> tuple[float, ...]:
    """Of each output rms(output - reference) / rms(reference).

    An output that is zero in exact arithmetic (the gradient of a key's bias, which a softmax does
    not see) has no relative error; it is held against the largest of the outputs instead.

    Raises:
        WrongOutput: the number of outputs or a shape differs, an output is not floating, or it has
            a NaN or an infinity.
    """
    if len(outputs) != len(reference):
        raise WrongOutput(f"{len(outputs)} outputs, expected {len(reference)}")
    scales = [_rms(want) for want in reference]
    largest = max(scales)
    found = []
    for index, (got, want, scale) in enumerate(zip(outputs, reference, scales)):
        name = f"output {index}"
        if got.shape != want.shape:
            raise WrongOutput(f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        if not got.is_floating_point():
            raise WrongOutput(f"{name} has dtype {got.dtype}, expected a floating one")
        got = got.detach().to(device=want.device, dtype=torch.float64)
        if not bool(got.isfinite().all()):
            bad = int((~got.isfinite()).sum())
            raise WrongOutput(f"{name}: {bad} of {got.numel()} numbers are NaN or infinite")
        difference = _rms(got - want)
        scale = scale if scale > _VANISHING * largest else largest
        found.append(difference / scale if difference else 0.0)
    return tuple(found)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def bound(work: Work, precision: Precision, eager_error: float, device: Device = "cpu") -> float:
    """What :func:`error` of an implementation may be at most.

    ``eager_error`` (plain PyTorch in the same precision against the same reference) says how far
    this work's data amplify errors. To it is added what an implementation that computes in
    another order may add. Its rounding errors are independent of PyTorch's and of each other, so
    they add up as the root of their number, and each is at most a unit roundoff u of the tensor
    that it arises in:

    * Sums, in every precision: adding up n products in the worst order (one after the other, in
      float32) rounds n partial sums. Of independent products with variance s^2 the k-th partial
      sum is about sqrt(k) s, so all roundings together are at most sqrt(1 + 2 + ... + n) s u, about
      n s u / sqrt(2), of a result of sqrt(n) s: at most sqrt(n) u of it. With ``work.roundings``,
      the sum of n over all sums that follow each other: ``sqrt(roundings) * 2^-24``.
    * ``bf16`` and ``fp32-medium``: tensors (bf16), or both operands of each product
      (fp32-medium), are rounded to bfloat16 besides. Rounding every product's operand by u changes
      the sum by u of itself, however long it is, since the errors of its products are independent
      too: ``sqrt(stores) * 2^-8``.
    * ``fp32-high``: an operand is the sum of two bfloat16 numbers, which leaves 2^-16 of it, and of
      the four products of parts the smallest (2^-8 * 2^-8) is left out: three errors of 2^-16 for
      every two operands, ``sqrt(1.5 * stores) * 2^-16``; and three products, each with a rounding
      of its own, are added up in the place of one: ``sqrt(3 * roundings) * 2^-24``. On a GPU
      (``device``) it is TF32, which rounds both operands to 11 bits: ``sqrt(stores) * 2^-11``.

    ``work.stores`` counts tensors that are stored, among them all operands of products.

    Raises:
        ValueError: ``precision`` is unknown, or ``eager_error`` is no finite number of at least 0.
    """
    if not 0.0 <= eager_error < float("inf"):
        raise ValueError(f"eager_error is {eager_error}; accepted: a finite number, at least 0")
    found = _roundings(work, precision, device)
    return eager_error + sum(number**0.5 * unit for number, unit in found)


def worst_case(work: Work, precision: Precision, device: Device = "cpu") -> float:
    """What :func:`error` of plain PyTorch itself may be, which nothing else is held against.

    The rounding errors of :func:`bound`, but all of one sign, so that they add up in full. It is
    wide on purpose: it tells a broken reference or installation from rounding, no more.

    Raises:
        ValueError: ``precision`` is unknown.
    """
    return sum(number * unit for number, unit in _roundings(work, precision, device))


def _roundings(work: Work, precision: Precision, device: Device) -> tuple[tuple[float, float], ...]:
    """(number of independent rounding errors, what each is at most), as :func:`bound` derives."""
    if precision == "fp32":
        return ((work.roundings, UNIT_FP32),)
    if precision == "fp32-high" and device == "cuda":
        return ((work.roundings, UNIT_FP32), (work.stores, UNIT_TF32))
    if precision == "fp32-high":
        return ((3.0 * work.roundings, UNIT_FP32), (1.5 * work.stores, UNIT_BF16X2))
    if precision in ("fp32-medium", "bf16"):
        return ((work.roundings, UNIT_FP32), (work.stores, UNIT_BF16))
    raise ValueError(f"precision is {precision!r}; accepted: {', '.join(PRECISIONS)}")

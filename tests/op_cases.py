"""The tests' cases of the ops, and the measuring stick: what error a kernel may have.

The shapes stand in ``bench/op_cases.py``, which the benchmarks read too.

The inputs are rounded to the dtype under test first; then the equation is evaluated on them in
fp64 (exact, for the purpose), by eager torch in that dtype, and by the kernel. A kernel's error may
exceed eager's by the rounding of one sum of products, no more: nothing here is tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.op_cases import Case, cases

# Unit roundoff: half a unit in the last place, relative.
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

CASES = cases("test")
IDS = [case.id for case in CASES]


@dataclass(frozen=True)
class Inputs:
    """Arguments of the op and a gradient of its output; leaves that require gradients."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    grad_y: Tensor

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        """The same with ``f`` applied to each floating tensor; fresh leaves."""
        bias = None if self.bias is None else _leaf(f(self.bias.detach()))
        x, weight = _leaf(f(self.x.detach())), _leaf(f(self.weight.detach()))
        return replace(self, x=x, weight=weight, bias=bias, grad_y=f(self.grad_y))


@dataclass(frozen=True)
class Result:
    """The output and the gradients."""

    y: Tensor
    dx: Tensor
    dw: Tensor
    db: Tensor | None


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _index(kept: int | None, size: int, generator: torch.Generator) -> Tensor | None:
    if kept is None:
        return None
    return torch.randperm(size, generator=generator)[:kept].sort().values


def _normal(shape: tuple[int, ...], layout: str, generator: torch.Generator) -> Tensor:
    if layout == "transposed" and len(shape) >= 2:
        swapped = (*shape[:-2], shape[-1], shape[-2])
        return torch.randn(swapped, generator=generator, dtype=torch.float64).transpose(-1, -2)
    if layout == "sliced":
        wide = (*shape[:-1], 2 * shape[-1])
        return torch.randn(wide, generator=generator, dtype=torch.float64)[..., ::2]
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def make_inputs(
    case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Inputs:
    """Normal inputs of a case, rounded to ``dtype``; the layout survives."""
    g = torch.Generator().manual_seed(seed)
    rows, cols = _index(case.R, case.N, g), _index(case.C, case.K, g)
    C = case.K if case.C is None else case.C
    R = case.N if case.R is None else case.R

    def normal(shape: tuple[int, ...]) -> Tensor:
        made = _normal(shape, case.layout, g)
        return torch.empty_strided(made.shape, made.stride(), dtype=dtype, device=device).copy_(
            made
        )

    x, weight = _leaf(normal((*case.lead, C))), _leaf(normal((case.N, case.K)))
    bias = _leaf(normal((case.N,))) if case.bias else None
    grad_y = normal((*case.lead, R))
    rows = None if rows is None else rows.to(device)
    cols = None if cols is None else cols.to(device)
    return Inputs(x, weight, bias, rows, cols, grad_y)


def eager(x, weight, bias=None, rows=None, cols=None) -> Tensor:
    """The equation as a user would write it, differentiated by torch."""
    if rows is not None:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    if cols is not None:
        weight = weight[:, cols]
    return F.linear(x, weight, bias)


def run(op: Callable[..., Tensor], inputs: Inputs) -> Result:
    """Forward and backward of ``op(x, weight, bias, rows, cols)`` on fresh leaves."""
    i = inputs.map(lambda tensor: tensor)
    y = op(i.x, i.weight, i.bias, i.rows, i.cols)
    y.backward(i.grad_y)
    return Result(y.detach(), i.x.grad, i.weight.grad, None if i.bias is None else i.bias.grad)


def run_module(module: ModuleType, inputs: Inputs) -> Result:
    """The four functions of an implementation (``reference``, ``cpu``, ``triton``), folded x."""
    i = inputs
    N, K = i.weight.shape
    M = prod(i.x.shape[:-1])
    x = i.x.detach().reshape(M, i.x.shape[-1])
    grad_y = i.grad_y.reshape(M, i.grad_y.shape[-1])
    weight, bias = i.weight.detach(), None if i.bias is None else i.bias.detach()
    y = module.indexed_linear_fwd(x, weight, bias, i.rows, i.cols)
    dx = module.indexed_linear_dx(grad_y, weight, i.rows, i.cols)
    dw = module.indexed_linear_dw(grad_y, x, i.rows, i.cols, N, K)
    db = None if bias is None else module.indexed_linear_db(grad_y, i.rows, N)
    return Result(y.reshape(i.grad_y.shape), dx.reshape(i.x.shape), dw, db)


def assert_within_eager_error(
    result: Result, inputs: Inputs, equation: Callable[..., Tensor] = eager
) -> None:
    """Asserts shape, dtype and the measuring-stick bound of the output and of each gradient."""
    exact = run(equation, inputs.map(Tensor.double))
    stick = run(equation, inputs)
    magnitude = run(equation, inputs.map(lambda tensor: tensor.double().abs()))
    tokens = prod(inputs.x.shape[:-1])
    terms = {
        "y": inputs.x.shape[-1] + 1,
        "dx": inputs.grad_y.shape[-1],
        "dw": tokens,
        "db": tokens,
    }
    for name, n in terms.items():
        got, want = getattr(result, name), getattr(exact, name)
        if want is None:
            assert got is None, name
            continue
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}"
        assert got.dtype == inputs.x.dtype, f"{name}: dtype {got.dtype}"
        _assert_close(name, got, want, getattr(stick, name), getattr(magnitude, name), n)


def _assert_close(
    name: str, got: Tensor, want: Tensor, stick: Tensor, magnitude: Tensor, terms: int
) -> None:
    """|got - want| <= eager's worst error + terms * u * sum|a b| + the rounding of the result.

    The second term is the bound of a sum of ``terms`` products in the accumulator's precision; the
    means are held to its square root, which is how independent roundings add up.
    """
    if got.numel() == 0:
        return
    storage = ROUNDOFF[got.dtype]
    accumulator = min(storage, ROUNDOFF[torch.float32])
    error = (got.double() - want).abs()
    eager_error = (stick.double() - want).abs()
    rounding = storage * want.abs()
    bound = eager_error.max() + terms * accumulator * magnitude + rounding
    assert not error.isnan().any(), f"{name}: NaN"
    worst = (error - bound).max().item()
    assert worst <= 0, f"{name}: error {error.max():.3e} exceeds its bound by {worst:.3e}"
    mean_bound = eager_error + terms**0.5 * accumulator * magnitude + rounding
    assert error.mean() <= mean_bound.mean(), (
        f"{name}: mean error {error.mean():.3e}, bound {mean_bound.mean():.3e}"
    )

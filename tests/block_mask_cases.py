"""The tests' cases of block masks: patterns, densities and sizes that fit nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
import torch.nn.functional as F
from op_cases import Case, Inputs, Result, make_inputs
from torch import Tensor

from slimkern.ops import BlockMask, block_masked_linear


@dataclass(frozen=True)
class MaskCase:
    """A linear and how its weight is masked."""

    M: int
    N: int
    K: int
    block: tuple[int, int]
    density: float
    bias: bool = True
    layout: str = "contiguous"

    @property
    def id(self) -> str:
        """The name in a test's id."""
        extra = "" if self.bias else "-nobias"
        bn, bk = self.block
        return f"{self.M}-{self.N}-{self.K}-{bn}x{bk}-{self.density}{extra}-{self.layout}"


def _cases() -> list[MaskCase]:
    blocks = ((4, 1), (32, 32), (1, 16), (1, 1), (3, 5), (2, 200), (200, 1), (8, 24))
    cases = [MaskCase(17, 63, 130, block, 0.3) for block in blocks]
    cases += [MaskCase(130, 130, 63, block, 0.1, bias=False) for block in blocks[:4]]
    for density in (0.0, 1.0):
        cases += [MaskCase(33, 96, 64, block, density) for block in ((4, 1), (32, 32), (1, 1))]
    for layout in ("transposed", "sliced"):
        cases += [MaskCase(17, 63, 130, block, 0.5, layout=layout) for block in blocks[:5]]
    few = ((1, 1, 1), (0, 17, 17), (17, 0, 5), (17, 5, 0), (1, 130, 17))
    cases += [MaskCase(*sizes, (4, 1), 0.5) for sizes in few]
    cases += [MaskCase(300, 70, 600, block, 0.4) for block in ((4, 1), (16, 16))]
    return cases


CASES = _cases()
IDS = [case.id for case in CASES]


def make_mask(case: MaskCase, seed: int = 0) -> BlockMask:
    """Random blocks at the case's density."""
    g = torch.Generator().manual_seed(seed)
    (bn, bk), shape = case.block, (case.N, case.K)
    grid = (-(-case.N // bn), -(-case.K // bk))
    return BlockMask.from_blocks(torch.rand(grid, generator=g) < case.density, case.block, shape)


def make_case(case: MaskCase, dtype: torch.dtype) -> tuple[Inputs, BlockMask]:
    """Inputs of a linear, and the mask."""
    plain = Case((case.M,), case.N, case.K, bias=case.bias, layout=case.layout)
    return make_inputs(plain, dtype), make_mask(case)


def eager(mask: BlockMask) -> Callable[..., Tensor]:
    """The equation with a mask of numbers, differentiated by torch."""

    def op(x, weight, bias, rows=None, cols=None) -> Tensor:
        return F.linear(x, weight * mask.dense().to(weight.dtype), bias)

    return op


def op(mask: BlockMask, backend: str | None, dense: bool = False) -> Callable[..., Tensor]:
    """The op, in the form that `op_cases.run` takes."""

    def call(x, weight, bias, rows=None, cols=None) -> Tensor:
        return block_masked_linear(x, weight, bias, mask, dense_gradient=dense, backend=backend)

    return call


def run_module(module: ModuleType, inputs: Inputs, mask: BlockMask) -> Result:
    """The functions of an implementation; db is not among them."""
    x, weight, grad_y = inputs.x.detach(), inputs.weight.detach(), inputs.grad_y
    bias = None if inputs.bias is None else inputs.bias.detach()
    bits, (bn, bk) = mask.bits, mask.block
    return Result(
        module.block_masked_linear_fwd(x, weight, bias, bits, bn, bk),
        module.block_masked_linear_dx(grad_y, weight, bits, bn, bk),
        module.block_masked_linear_dw(grad_y, x, bits, bn, bk, *weight.shape),
        None if bias is None else grad_y.sum(0),
    )


def zeroed(inputs: Inputs, mask: BlockMask) -> Inputs:
    """The same with zeros in the weight where it is masked."""
    weight = inputs.weight.detach().masked_fill(~mask.dense(), 0).requires_grad_()
    return replace(inputs, weight=weight)

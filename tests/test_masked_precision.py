"""What `torch.set_float32_matmul_precision` does to masked linears, forward and backward.

A product of two rounded operands is off by two roundings and their product, relative to itself; the
sum of n of them by n roundings of float32. With u the roundoff of an operand:

    |got - exact| <= (2 u + u² + n 2**-24) sum |a b| + the rounding of the result
"""

from __future__ import annotations

import pytest
import torch
from block_mask_cases import MaskCase, make_mask
from block_mask_cases import eager as masked_eager
from block_mask_cases import op as masked_op
from op_cases import ROUNDOFF, Case, eager, make_inputs, run

from slimkern import cpu
from slimkern.ops import choose_math, indexed_linear

# Roundoff of an operand: of float32 none, of three parts what they leave out.
OPERAND = {"fp32": 0.0, "bf16": 2.0**-8, "bf16x3": 2.0**-16, "bf16x6": 2.0**-24}
CASE = Case((130,), 63, 97, R=33, C=65)
MASKED = MaskCase(130, 63, 97, (4, 1), 0.5)


@pytest.fixture
def setting():
    isa, precision = cpu.isa(), torch.get_float32_matmul_precision()
    yield
    cpu.set_isa(isa)
    torch.set_float32_matmul_precision(precision)


def cases():
    mask = make_mask(MASKED)
    yield make_inputs(CASE, torch.float32), eager, indexed_linear_on_cpu
    plain = make_inputs(Case((130,), 63, 97), torch.float32)
    yield plain, masked_eager(mask), masked_op(mask, "cpu")


def indexed_linear_on_cpu(*arguments):
    return indexed_linear(*arguments, backend="cpu")


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_errors_are_those_of_the_products(isa, precision, setting):
    cpu.set_isa(isa)
    torch.set_float32_matmul_precision(precision)
    u = OPERAND[choose_math(torch.float32)]
    for inputs, equation, op in cases():
        got = run(op, inputs)
        exact = run(equation, inputs.map(torch.Tensor.double))
        size = run(equation, inputs.map(lambda t: t.double().abs()))
        for name, n in (("y", 98), ("dx", 63), ("dw", 130), ("db", 130)):
            have, want = getattr(got, name).double(), getattr(exact, name)
            factor = 2 * u + u * u + n * ROUNDOFF[torch.float32]
            bound = factor * getattr(size, name) + ROUNDOFF[torch.float32] * want.abs()
            assert ((have - want).abs() <= bound).all(), name


def test_the_backward_follows_the_setting_of_its_own_call(setting):
    inputs = make_inputs(CASE, torch.float32)
    torch.set_float32_matmul_precision("medium")
    rough = run(indexed_linear_on_cpu, inputs)
    torch.set_float32_matmul_precision("highest")
    fine = run(indexed_linear_on_cpu, inputs)
    for name in ("y", "dx", "dw"):
        assert not torch.equal(getattr(rough, name), getattr(fine, name)), name
    i = inputs.map(lambda t: t)
    y = indexed_linear_on_cpu(i.x, i.weight, i.bias, i.rows, i.cols)
    torch.set_float32_matmul_precision("medium")
    y.backward(i.grad_y)
    assert torch.equal(y.detach(), fine.y)
    assert torch.equal(i.weight.grad, rough.dw)
    assert torch.equal(i.x.grad, rough.dx)

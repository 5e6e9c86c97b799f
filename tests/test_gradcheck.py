"""Numerical differentiation in double, through the reference and the C++ kernels."""

from __future__ import annotations

import pytest
import torch
from op_cases import Case, make_inputs

from slimkern import cpu
from slimkern.ops import indexed_linear


@pytest.fixture
def scalar():
    """The portable C++ path; the choice before is put back."""
    before = cpu.isa()
    cpu.set_isa("scalar")
    yield
    cpu.set_isa(before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "case",
    [
        Case((3,), 5, 6),
        Case((3,), 5, 6, R=2),
        Case((3,), 5, 6, C=4),
        Case((2, 3), 5, 6, R=3, C=2),
        Case((3,), 5, 6, R=3, C=2, bias=False),
        Case((3,), 5, 6, R=3, C=2, layout="transposed"),
        Case((3,), 5, 6, R=0, C=2),
        Case((3,), 5, 6, R=2, C=0),
    ],
    ids=lambda case: case.id,
)
def test_gradcheck(case, backend, scalar):
    i = make_inputs(case, torch.float64)

    def op(*leaves):
        bias = leaves[2] if len(leaves) == 3 else None
        return indexed_linear(*leaves[:2], bias, i.rows, i.cols, backend=backend)

    leaves = [leaf for leaf in (i.x, i.weight, i.bias) if leaf is not None]
    assert torch.autograd.gradcheck(op, leaves)

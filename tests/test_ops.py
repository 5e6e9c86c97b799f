"""indexed_linear against fp64, on every backend, dtype and shape; its errors; its gradients."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    CASES,
    IDS,
    Case,
    assert_within_eager_error,
    eager,
    make_inputs,
    run,
    run_module,
)

from slimkern.ops import check_index, indexed_linear
from slimkern.ops.indexed_linear import cpu, reference
from slimkern.ops.indexed_linear.api import BACKENDS

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DTYPE_IDS = ["fp32", "bf16", "fp64"]
MODULES = {"reference": reference, "cpu": cpu}


def op(backend):
    return lambda x, w, b, rows, cols: indexed_linear(x, w, b, rows, cols, backend=backend)


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_and_gradients(case, dtype, backend):
    inputs = make_inputs(case, dtype)
    assert_within_eager_error(run(op(backend), inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_output_is_written(case, dtype, poisoned):
    inputs = make_inputs(case, dtype)
    assert_within_eager_error(run_module(cpu, inputs), inputs)


@pytest.mark.parametrize("backend", MODULES)
def test_fp16_reference(backend):
    inputs = make_inputs(Case((17,), 63, 130, R=17, C=63), torch.float16)
    if backend == "reference":
        assert_within_eager_error(run(op(backend), inputs), inputs)
    else:
        with pytest.raises(TypeError, match=r"x has dtype torch\.float16; backend 'cpu' accepts"):
            run(op(backend), inputs)


@pytest.mark.parametrize("backend", MODULES)
def test_gradient_is_zero_outside_the_kept_part(backend):
    inputs = make_inputs(Case((17,), 63, 130, R=17, C=63), torch.float32)
    result = run(op(backend), inputs)
    kept = torch.zeros(63, 130, dtype=torch.bool)
    kept[inputs.rows[:, None], inputs.cols] = True
    assert (result.dw[~kept] == 0).all()
    assert (result.dw[kept] != 0).all()
    rows = torch.zeros(63, dtype=torch.bool)
    rows[inputs.rows] = True
    assert (result.db[~rows] == 0).all()


@pytest.mark.parametrize("backend", MODULES)
def test_expanded_gradient_and_retained_graph(backend):
    """``y.sum()`` sends a gradient whose strides are zero; nothing that is saved may change."""
    i = make_inputs(Case((17,), 63, 130, R=17, C=63), torch.float64)
    y = indexed_linear(i.x, i.weight, i.bias, i.rows, i.cols, backend=backend)
    y.sum().backward(retain_graph=True)
    first = [t.grad.clone() for t in (i.x, i.weight, i.bias)]
    y.sum().backward()
    for tensor, once in zip((i.x, i.weight, i.bias), first, strict=True):
        assert torch.equal(tensor.grad, 2 * once)
    want = run(eager, replace(i, grad_y=torch.ones_like(i.grad_y)))
    torch.testing.assert_close(first[1], want.dw)


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
@pytest.mark.parametrize("backend", MODULES)
def test_only_the_gradients_asked_for(backend, needed):
    i = make_inputs(Case((5,), 7, 9, R=3, C=4), torch.float32)
    for name in ("x", "weight", "bias"):
        getattr(i, name).requires_grad_(name == needed)
    y = indexed_linear(i.x, i.weight, i.bias, i.rows, i.cols, backend=backend)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.is_floating_point()]
    assert len(saved) == {"x": 1, "weight": 1, "bias": 0}[needed]
    y.backward(i.grad_y)
    for name in ("x", "weight", "bias"):
        assert (getattr(i, name).grad is not None) == (name == needed)


@pytest.mark.parametrize("needed", [("x", "weight"), ("x",)], ids=str)
def test_second_derivative_is_refused(needed):
    i = make_inputs(Case((5,), 7, 9), torch.float64)
    for name in ("x", "weight", "bias"):
        getattr(i, name).requires_grad_(name in needed)
    y = indexed_linear(i.x, i.weight, i.bias)
    with pytest.raises(RuntimeError, match="differentiable once; create_graph is True"):
        torch.autograd.grad(y.square().sum(), i.x, create_graph=True)


def test_no_index_is_a_plain_linear():
    i = make_inputs(Case((2, 17), 63, 130), torch.float32)
    assert torch.equal(indexed_linear(i.x, i.weight, i.bias), F.linear(i.x, i.weight, i.bias))


def test_a_full_index_is_no_index():
    i = make_inputs(Case((17,), 63, 130, R=63, C=130), torch.float32)
    full = indexed_linear(i.x, i.weight, i.bias, i.rows, i.cols)
    assert torch.equal(full, F.linear(i.x, i.weight, i.bias))


@pytest.mark.parametrize("backend", MODULES)
def test_autocast_is_that_of_a_linear(backend):
    i = make_inputs(Case((17,), 63, 130, R=17, C=63), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = indexed_linear(i.x, i.weight, i.bias, i.rows, i.cols, backend=backend)
        assert F.linear(i.x, i.weight[:, i.cols]).dtype == y.dtype == torch.bfloat16
    y.backward(i.grad_y.bfloat16())
    for tensor in (i.x, i.weight, i.bias):
        assert tensor.grad.dtype == torch.float32
    low = i.map(lambda t: t.bfloat16())
    want = run(op(backend), low)
    torch.testing.assert_close(y.detach(), want.y, rtol=0, atol=0)
    torch.testing.assert_close(i.weight.grad, want.dw.float(), rtol=0, atol=0)
    torch.testing.assert_close(i.bias.grad, want.db.float(), rtol=0, atol=0)


def test_autocast_leaves_double_alone():
    i = make_inputs(Case((17,), 63, 130), torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert indexed_linear(i.x, i.weight, i.bias).dtype == torch.float64


def test_infinity_and_nan_pass_through():
    x = torch.tensor([[1.0, float("inf")], [float("nan"), 1.0]])
    for dtype in (torch.float32, torch.bfloat16):
        got = indexed_linear(x.to(dtype), torch.ones(3, 2, dtype=dtype), backend="cpu")
        assert torch.isinf(got[0]).all()
        assert torch.isnan(got[1]).all()


def test_an_unselected_nan_does_not_leak():
    weight = torch.full((6, 5), float("nan"))
    rows, cols = torch.tensor([1, 4]), torch.tensor([0, 3])
    weight[rows[:, None], cols] = 1.0
    for backend in MODULES:
        y = indexed_linear(torch.ones(3, 2), weight, None, rows, cols, backend=backend)
        assert torch.equal(y, torch.full((3, 2), 2.0))


def test_threads_do_not_change_the_result():
    inputs = make_inputs(Case((300,), 700, 300, R=600, C=290), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(run_module(cpu, inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name in ("y", "dx", "dw", "db"):
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


def test_calls_from_several_threads():
    inputs = make_inputs(Case((130,), 300, 200, R=250, C=150), torch.float32)
    want = run_module(cpu, inputs).y
    got = [None] * 4

    def work(i):
        got[i] = run_module(cpu, inputs).y

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(want, y) for y in got)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_after_a_fork():
    """A pool's threads do not survive a fork: the child must not wait for them."""
    code = """
import os, sys, torch
from slimkern import cpu
from slimkern.ops import indexed_linear
torch.set_num_threads(2)
x, w = torch.randn(300, 200), torch.randn(700, 200)
y = indexed_linear(x, w, backend="cpu")
assert cpu.threads() == 2
pid = os.fork()
if pid == 0:
    again = indexed_linear(x, w, backend="cpu")
    same = cpu.threads() == 1 and bool((again.numpy() == y.numpy()).all())
    os._exit(0 if same else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


X, W, B = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5)
I3 = torch.tensor([0, 2, 4])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X, torch.zeros(5)), ValueError, r"weight has shape \(5,\); accepted: \[N, K\]"),
        ((torch.zeros(()), W), ValueError, r"x has no dimension; accepted"),
        ((X.long(), W), TypeError, r"x has dtype torch\.int64; accepted: a floating dtype"),
        ((torch.zeros(4, 7), W), ValueError, r"x has shape \(4, 7\); accepted: a last .* of 6"),
        ((X, W, None, None, I3), ValueError, r"x has shape \(4, 6\); accepted: .* of 3, .* cols"),
        ((X, W, torch.zeros(6)), ValueError, r"bias has shape \(6,\); accepted: \[5\]"),
        ((X, W.double()), TypeError, r"weight has dtype torch\.float64; accepted: torch\.float32"),
        ((X, W, B.bfloat16()), TypeError, r"bias has dtype torch\.bfloat16; accepted: .*float32"),
        ((X, W, B, I3.int()), TypeError, r"rows has dtype torch\.int32; accepted: torch\.int64"),
        ((X, W, B, I3[None]), ValueError, r"rows has shape \(1, 3\); accepted: one dimension"),
        ((X, W, B, torch.arange(6)), ValueError, r"rows has 6 entries; accepted: at most 5"),
        ((X, W.to("meta")), ValueError, r"weight is on meta; accepted: cpu"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        indexed_linear(*arguments)


def test_backend_errors():
    with pytest.raises(ValueError, match="backend is 'gpu'; accepted: None, reference, cpu"):
        indexed_linear(X, W, backend="gpu")
    with pytest.raises(ValueError, match="backend 'cpu' runs on cpu; x is on 'meta'"):
        indexed_linear(X.to("meta"), W.to("meta"), backend="cpu")
    with pytest.raises(ValueError, match="x is on device 'mps'; accepted: cpu, cuda, meta"):
        BACKENDS.choose(None, torch.device("mps"))


def test_meta_tensors_give_shapes():
    weight = torch.empty(5, 6, device="meta", requires_grad=True)
    y = indexed_linear(torch.empty(2, 4, 6, device="meta"), weight, None, I3.to("meta"))
    assert (y.shape, y.device.type) == ((2, 4, 3), "meta")
    y.sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("bad", [[0, 2, 9], [-1, 2, 3], [2, 2, 3], [3, 1, 2], [0, 1, 5]])
@pytest.mark.parametrize("which", ["rows", "cols"])
def test_cpp_checks_the_bounds(bad, which):
    index = torch.tensor(bad)
    weight = torch.zeros(5, 5)
    with pytest.raises(IndexError, match="is not strictly increasing within"):
        indexed_linear(
            torch.zeros(2, 3 if which == "cols" else 5), weight, backend="cpu", **{which: index}
        )


def test_check_index():
    assert check_index(I3, 5, "rows") is I3
    empty = torch.empty(0, dtype=torch.int64)
    assert check_index(empty, 0, "rows") is empty
    for bad, error, message in (
        (I3.float(), TypeError, r"keep has dtype torch\.float32; accepted: torch\.int64"),
        (I3[None], ValueError, r"keep has shape \(1, 3\); accepted: one dimension"),
        (torch.tensor([0, 5]), ValueError, "keep spans 0 to 5; accepted: 0 to 4"),
        (torch.tensor([-1, 0]), ValueError, "keep spans -1 to 0; accepted: 0 to 4"),
        (torch.tensor([1, 1]), ValueError, "keep is not sorted and unique"),
        (torch.tensor([2, 1]), ValueError, "keep is not sorted and unique"),
    ):
        with pytest.raises(error, match=message):
            check_index(bad, 5, "keep")

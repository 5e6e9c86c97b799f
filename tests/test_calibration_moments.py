"""Second moments against plain sums in fp64, and least squares against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimkern.calibration.moments import STRETCH, Moments
from slimkern.calibration.solve import as_it_was, least_squares

EPS = torch.finfo(torch.float32).eps


def data(
    rows: int, inputs: int, outputs: int, mean: float = 0.0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Correlated inputs about ``mean``, and targets that depend on them and on more."""
    generator = torch.Generator().manual_seed(rows + inputs)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(rows, inputs, generator=generator) @ mix + mean
    y = x @ torch.randn(inputs, outputs, generator=generator)
    y = y + torch.randn(rows, outputs, generator=generator) - 2 * mean
    return x.to(dtype), y.to(dtype)


def moments_of(x: Tensor, y: Tensor | None = None, parts: int = 3) -> Moments:
    moments = Moments(x.shape[1], 0 if y is None else y.shape[1])
    for index in torch.arange(len(x)).chunk(parts):
        moments.update(x[index], None if y is None else y[index])
    return moments


def rounding(x: Tensor, y: Tensor) -> Tensor:
    """What sums of fp32 products may be off by, per entry of the mean of ``x yᵀ``.

    A product of at most STRETCH rows has an error of STRETCH · eps/2 of the sum of magnitudes, the
    differences from the shift that enter one of eps/2 each; the means that are subtracted
    afterwards have as much again.
    """
    rows = min(len(x), STRETCH)
    x, y = (t.double() - t[:STRETCH].double().mean(0) for t in (x, y))
    magnitudes = x.abs().T @ y.abs() / len(x) + torch.outer(x.abs().mean(0), y.abs().mean(0))
    return (rows + 4) * EPS * magnitudes + 1e-300


def centred(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    return (x - x.mean(0)).T @ (y - y.mean(0)) / len(x)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("inputs", [1, 17, 63, 300])  # panels are 256 wide
@pytest.mark.parametrize("rows", [1, 50, 2100])
def test_moments_are_plain_sums(rows, inputs, mean):
    x, y = data(rows, inputs, 5, mean)
    moments = moments_of(x, y)
    assert moments.tokens == rows
    assert ((moments.covariance() - centred(x, x)).abs() <= rounding(x, x)).all()
    assert ((moments.cross() - centred(x, y)).abs() <= rounding(x, y)).all()
    assert moments.variance_y() == pytest.approx(
        float(centred(y, y).diagonal().sum()), abs=float(rounding(y, y).diagonal().sum())
    )
    # The differences from the shift are rounded when they are taken; nothing else is fp32.
    off = {id(t): (t.double() - t[:STRETCH].double().mean(0)).abs().mean(0) for t in (x, y)}
    for found, truth in ((moments.mean_x, x), (moments.mean_y, y)):
        bound = EPS * off[id(truth)] + 1e-13 * truth.abs().max()
        assert ((found - truth.double().mean(0)).abs() <= bound).all()
    second = x.double().T @ x.double() / rows
    means = 2 * torch.outer(x.double().mean(0).abs(), EPS * off[id(x)])
    bound = rounding(x, x) + means + means.T + 1e-13 * second.abs().max()
    assert ((moments.second() - second).abs() <= bound).all()


def test_symmetric_and_the_sums_may_be_spent():
    x, _ = data(700, 300, 1, 3.0)
    moments = moments_of(x)
    found = moments.covariance()
    assert torch.allclose(found, found.T, rtol=0, atol=1e-15 * float(found.abs().max()))
    assert torch.equal(moments.into_covariance(), found)


def test_doubles_stay_doubles():
    x, y = data(500, 17, 3, 1e4, torch.float64)
    moments = moments_of(x, y)
    scale = 2**-29  # fp64 against fp32
    assert ((moments.covariance() - centred(x, x)).abs() <= scale * rounding(x, x)).all()
    assert ((moments.cross() - centred(x, y)).abs() <= scale * rounding(x, y)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_up_in_fp32(dtype):
    x, y = data(500, 17, 3, 1.0, dtype)
    moments = moments_of(x, y)
    assert ((moments.covariance() - centred(x, x)).abs() <= rounding(x.float(), x.float())).all()


def test_the_order_of_parts_and_empty_parts_do_not_matter_beyond_rounding():
    x, y = data(900, 20, 4, 5.0)
    one, many = moments_of(x, y, parts=1), moments_of(x, y, parts=90)
    many.update(x[:0], y[:0])
    assert many.tokens == one.tokens
    assert ((one.covariance() - many.covariance()).abs() <= 2 * rounding(x, x)).all()


def test_select_is_what_would_have_been_seen():
    x, y = data(400, 30, 4, 2.0)
    columns = torch.tensor([29, 3, 4, 11])
    part, alone = moments_of(x, y).select(columns), moments_of(x[:, columns], y)
    bound = 2 * rounding(x[:, columns], x[:, columns])
    assert ((part.covariance() - alone.covariance()).abs() <= bound).all()
    bound = 2 * rounding(x[:, columns], y)
    assert ((part.cross() - alone.cross()).abs() <= bound).all()
    assert torch.equal(part.mean_x, moments_of(x, y).mean_x[columns])
    assert part.variance_y() == moments_of(x, y).variance_y()


def test_less_takes_a_constant_from_the_targets():
    x, y = data(400, 30, 4, 2.0)
    constant = torch.tensor([1.0, -2.0, 0.5, 8.0], dtype=torch.float64)
    moments = moments_of(x, y)
    less = moments.less(constant)
    assert torch.allclose(less.mean_y, moments.mean_y - constant, rtol=1e-14, atol=1e-14)
    assert torch.equal(less.cross(), moments.cross())
    assert torch.allclose(
        less.second_cross(), moments.second_cross() - torch.outer(moments.mean_x, constant)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_through_a_linear(bias):
    x, _ = data(400, 30, 4, 2.0, torch.float64)
    linear = torch.nn.Linear(30, 6, bias=bias, dtype=torch.float64)
    made, truth = (
        moments_of(x).through(linear.weight, linear.bias),
        moments_of(x, linear(x).detach()),
    )
    for name in ("covariance", "cross", "second_cross", "variance_y"):
        a, b = (torch.as_tensor(getattr(m, name)()) for m in (made, truth))
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name
    assert torch.allclose(made.mean_y, truth.mean_y, rtol=1e-12)


def by_hand(x: Tensor, y: Tensor, w0: Tensor, bias: bool, ridge: float) -> tuple[Tensor, Tensor]:
    """``torch.linalg.lstsq`` with a row of ones for the bias and the ridge as rows of their own."""
    t, n = x.shape
    spread = x - x.mean(0) if bias else x
    strength = (t * ridge * float(spread.square().mean())) ** 0.5
    ones = torch.ones(t, 1, dtype=x.dtype)
    a = torch.cat([torch.cat([x, ones], 1), strength * torch.eye(n + 1, dtype=x.dtype)[:n]])
    b = torch.cat([y, strength * w0.T])
    if not bias:
        a = a[:, :n]
    found = torch.linalg.lstsq(a, b, driver="gelsd").solution
    return found[:n].T, found[n] if bias else x.new_zeros(len(w0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ridge", [1e-3, 0.3])
@pytest.mark.parametrize(("rows", "inputs"), [(500, 30), (20, 30), (1, 30)])
def test_least_squares_is_lstsq(rows, inputs, ridge, bias):
    """Fewer tokens than channels included: the ridge rows hold the rest to what it was."""
    x, y = data(rows, inputs, 4, 3.0, torch.float64)
    w0 = torch.randn(4, inputs, generator=torch.Generator().manual_seed(3)).double()
    if rows == 1 and bias:  # no variance: nothing is known but the mean
        solution = least_squares(moments_of(x, y, 1), w0, ridge=ridge)
        assert torch.equal(solution.weight, w0)
        assert solution.error == 0
        assert torch.allclose(solution.bias, y[0] - w0 @ x[0])
        return
    solution = least_squares(moments_of(x, y), w0, bias=bias, ridge=ridge)
    weight, offset = by_hand(x, y, w0, bias, ridge)
    # Normal equations lose the condition number, at most 1/ridge times a factor for the spread of
    # the mean diagonal: inputs here.
    bound = 100 * inputs / ridge * torch.finfo(torch.float64).eps
    assert torch.allclose(solution.weight, weight, rtol=0, atol=bound * float(weight.abs().max()))
    if bias:
        assert torch.allclose(solution.bias, offset, rtol=0, atol=100 * bound)
    else:
        assert solution.bias is None
    missed = (x @ solution.weight.T + (offset if bias else 0) - y).square().sum(1).mean()
    varies = (y - y.mean(0)).square().sum(1).mean()
    if rows > 1:
        assert solution.error == pytest.approx(float(missed / varies), rel=1e-6, abs=1e-9)


def test_channels_that_say_nothing_keep_their_weights():
    x, y = data(200, 12, 3, 0.0, torch.float64)
    x[:, 4] = 0  # dead
    x[:, 7] = 2.5  # constant
    w0 = torch.randn(3, 12, generator=torch.Generator().manual_seed(3)).double()
    solution = least_squares(moments_of(x, y), w0)
    assert torch.equal(solution.weight[:, [4, 7]], w0[:, [4, 7]])
    assert not torch.allclose(solution.weight, w0)
    assert solution.weight.isfinite().all()


def test_nothing_varies():
    x, y = torch.ones(50, 8), torch.full((50, 3), 7.0)
    w0 = torch.ones(3, 8, dtype=torch.float64)
    for solution in (
        least_squares(moments_of(x, y), w0),
        as_it_was(moments_of(x, y), w0, None, bias=True),
    ):
        assert torch.equal(solution.weight, w0)
        assert solution.error == 0
        assert torch.allclose(solution.bias, torch.full((3,), -1.0).double())


def test_as_it_was_changes_the_bias_alone():
    x, y = data(300, 12, 3, 2.0, torch.float64)
    w0 = torch.randn(3, 12, generator=torch.Generator().manual_seed(3)).double()
    old = torch.tensor([0.5, -1.0, 2.0])
    varies = float((y - y.mean(0)).square().sum(1).mean())
    fitted = as_it_was(moments_of(x, y), w0, old, bias=True)
    assert torch.equal(fitted.weight, w0)
    assert torch.allclose(fitted.bias, y.mean(0) - w0 @ x.mean(0))
    missed = float((x @ w0.T + fitted.bias - y).square().sum(1).mean())
    assert fitted.error == pytest.approx(missed / varies, rel=1e-9)
    for bias in (old, None):
        kept = as_it_was(moments_of(x, y), w0, bias, bias=False)
        assert kept.bias is None
        off = x @ w0.T + (0 if bias is None else bias.double()) - y
        assert kept.error == pytest.approx(float(off.square().sum(1).mean()) / varies, rel=1e-9)


def test_refusals():
    w0 = torch.ones(3, 8)
    with pytest.raises(ValueError, match="no token was seen"):
        least_squares(Moments(8, 3), w0)
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        least_squares(moments_of(*data(9, 8, 3)), w0, ridge=0)
    x, y = data(9, 8, 3)
    y[3, 1] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        least_squares(moments_of(x, y), w0)

"""The check of benchmarked outputs: what is right passes, what is wrong does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import check
from bench.check import WrongOutput, bound, cast, error, errors, reference, run_module
from bench.counts import figures, linear
from bench.modules import Ffn, randomize
from bench.op_works import attention_works, ffn_works
from bench.work import Work
from slimkern.report.speed_schema import PRECISIONS

M, K, N = 12, 700, 30


def linear_work(backward: bool = False) -> Work:
    counted = figures(linear(M, K, N), M * (K + N), M if backward else 0)
    return Work("op", "linear", f"M={M}", _linear, _x, **counted, backward=backward)


def _linear() -> nn.Module:
    return randomize(nn.Linear(K, N))


def _x() -> tuple[Tensor, ...]:
    return (torch.randn(M, K, generator=torch.Generator().manual_seed(1)),)


def eager_error(work: Work) -> float:
    return error(run_module(work, work.build(), work.inputs()), reference(work))


def test_the_reference_is_the_equation_in_fp64():
    work, module, (x,) = linear_work(), _linear().double(), _x()
    (y,) = reference(work)
    assert y.dtype == torch.float64
    torch.testing.assert_close(
        y, x.double() @ module.weight.T + module.bias, atol=1e-12, rtol=1e-12
    )


def test_the_reference_of_a_backward_is_y_dx_and_the_parameters_gradients():
    work, module, (x,) = linear_work(backward=True), _linear().double(), _x()
    y, dx, dw, db = reference(work)
    g = check.output_gradient(work, y)
    expected = (x.double() @ module.weight.T + module.bias, g @ module.weight, g.T @ x.double())
    for got, want in zip((y, dx, dw, db), (*expected, g.sum(0))):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    assert not y.requires_grad


def test_the_output_gradient_is_the_same_float32_numbers_in_every_dtype():
    work, like = linear_work(backward=True), torch.empty(M, N)
    g = check.output_gradient(work, like)
    assert torch.equal(g, check.output_gradient(work, like))
    assert torch.equal(g.double(), check.output_gradient(work, like.double()))
    assert torch.equal(g.bfloat16(), check.output_gradient(work, like.bfloat16()))
    assert 0.8 < float(g.std()) < 1.2
    other = replace(work, shape="another")
    assert not torch.equal(g, check.output_gradient(other, like))


def test_the_error_is_relative_rms_of_the_worst_output():
    a, b = torch.full((4, 5), 2.0), torch.tensor([3.0, 4.0])
    found = errors((a + 0.5, b.bfloat16()), (a.double(), b.double()))
    assert found == pytest.approx((0.25, 0.0))
    assert error((a + 0.5, b), (a.double(), b.double())) == pytest.approx(0.25)


def test_an_output_that_is_zero_but_for_rounding_is_held_against_the_largest():
    large, zero = torch.full((3,), 8.0).double(), torch.full((3,), 1e-17).double()
    assert error((large, torch.full((3,), 8e-7)), (large, zero)) == pytest.approx(1e-7, rel=1e-3)
    assert error((torch.zeros(3),), (torch.zeros(3).double(),)) == 0.0


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ((), "0 outputs, expected 1"),
        ((torch.ones(3, 2),), r"shape \(3, 2\), expected \(2, 3\)"),
        ((torch.ones(2, 3, dtype=torch.int64),), "dtype torch.int64"),
        ((torch.ones(2, 3).index_fill(1, torch.tensor([1]), torch.nan),), "2 of 6 numbers are NaN"),
        ((torch.ones(2, 3).index_fill(0, torch.tensor([1]), torch.inf),), "3 of 6 numbers"),
    ],
)
def test_what_is_no_such_output_is_wrong(outputs, says):
    with pytest.raises(WrongOutput, match=says):
        error(outputs, (torch.ones(2, 3).double(),))


def test_bounds_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="accepted: fp32, fp32-high, fp32-medium, bf16"):
        bound(linear_work(), "fp16", 0.0)  # type: ignore[arg-type]
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match="eager_error is"):
            bound(linear_work(), "fp32", wrong)


def test_bounds_widen_with_the_precision_and_lie_below_the_worst_case():
    work = linear_work()
    for wide, narrow in zip(PRECISIONS[1:], PRECISIONS):
        assert bound(work, wide, 0.0) >= bound(work, narrow, 0.0)
    for precision in PRECISIONS:
        assert bound(work, precision, 0.0) < check.worst_case(work, precision)
        assert bound(work, precision, 0.5) == pytest.approx(0.5 + bound(work, precision, 0.0))


def test_adding_up_one_after_the_other_is_within_the_bound():
    work, module, (x,) = linear_work(), _linear(), _x()
    y = torch.zeros(M, N)
    for k in range(K):
        y += x[:, k, None] * module.weight[:, k]
    y += module.bias
    assert error((y,), reference(work)) < bound(work, "fp32", 0.0)


def _parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    high = tensor.bfloat16().float()
    return high, (tensor - high).bfloat16().float()


def test_each_way_of_rounding_operands_fits_its_own_precision_only():
    work, module, (x,) = linear_work(), _linear(), _x()
    exact = reference(work)
    (xh, xl), (wh, wl) = _parts(x), _parts(module.weight)
    three = xh @ wh.T + xh @ wl.T + xl @ wh.T + module.bias
    one = xh @ wh.T + module.bias
    eager = eager_error(work)
    assert error((three,), exact) <= bound(work, "fp32-high", eager)
    assert error((three,), exact) > bound(work, "fp32", eager)
    assert error((one,), exact) <= bound(work, "fp32-medium", eager)
    assert error((one,), exact) > bound(work, "fp32-high", eager)
    assert error((one.bfloat16(),), exact) <= bound(work, "bf16", eager)


class TanhFfn(Ffn):
    """The FFN with the approximate GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(x + self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


def test_a_dropped_bias_is_wrong_in_every_precision():
    work, module = linear_work(), _linear()
    module.bias.data.zero_()
    found = error(run_module(work, module, work.inputs()), reference(work))
    eager = eager_error(work)
    for precision in PRECISIONS:
        assert found > bound(work, precision, eager)


def test_another_activation_is_wrong():
    (work,) = ffn_works(384, 1536, None, (16,))
    module = work.build()
    module.__class__ = TanhFfn
    found = error(run_module(work, module, work.inputs()), reference(work))
    for precision in ("fp32", "fp32-high"):
        assert found > bound(work, precision, eager_error(work))


def test_swapped_heads_are_wrong():
    (work,) = attention_works(384, 12, None, ((2, 16),))
    module = work.build()
    query = module.attention.self.query.weight.data
    query[:64] = query[:64].roll(32, 0)
    found = error(run_module(work, module, work.inputs()), reference(work))
    for precision in PRECISIONS:
        assert found > bound(work, precision, eager_error(work))


def test_padding_that_is_not_masked_is_wrong():
    (work,) = attention_works(384, 12, None, ((2, 16),))
    x, mask = work.inputs()
    assert not mask.all()
    outputs = run_module(work, work.build(), (x, torch.ones_like(mask)))
    assert error(outputs, reference(work)) > bound(work, "bf16", eager_error(work))


def test_what_is_planted_in_a_whole_encoder_is_seen_in_fp32():
    pytest.importorskip("transformers", reason="the encoder is Hugging Face's")
    from bench.model_works import model_works

    work = model_works(smoke=True)[0]
    module = work.build()
    module.model.encoder.layer[0].intermediate.intermediate_act_fn = nn.GELU(approximate="tanh")
    found = error(run_module(work, module, work.inputs()), reference(work))
    assert found > bound(work, "fp32", eager_error(work))


def test_wrong_gradients_are_wrong():
    (_, work) = attention_works(384, 12, None, ((2, 16),), backward=((2, 16),))
    exact, eager = reference(work), run_module(work, work.build(), work.inputs())
    allowed = bound(work, "fp32", error(eager, exact))
    assert error(eager, exact) <= check.worst_case(work, "fp32")
    for index, name in enumerate(("y", "dx", *dict(work.build().named_parameters()))):
        planted = tuple(t * 1.001 if i == index else t for i, t in enumerate(eager))
        # Softmax does not see the key's bias: its gradient is zero, a thousandth more too.
        assert (error(planted, exact) > allowed) == (name != "attention.self.key.bias"), name


def test_inputs_are_cast_where_they_are_floating():
    x, ids = cast((torch.ones(2), torch.ones(2, dtype=torch.int64)), torch.bfloat16)
    assert (x.dtype, ids.dtype) == (torch.bfloat16, torch.int64)


def test_rows_that_nobody_attends_to_may_hold_anything_finite():
    rows = torch.tensor([[True, False], [True, True]])
    work = Work("op", "padded", "2x2", nn.Identity, tuple, 1, 1, 1, 1, attended=lambda: rows)
    want = torch.ones(2, 2, 3, dtype=torch.float64)
    got = want.masked_fill(~rows[..., None], 0.0)
    assert check.error_of(work, (got,), (want,)) == 0.0
    assert check.error((got,), (want,)) == 0.5
    assert check.error_of(work, (1.5 * got,), (want,)) == 0.5
    with pytest.raises(check.WrongOutput, match="NaN"):
        check.error_of(work, (got.masked_fill(~rows[..., None], float("nan")),), (want,))


def test_on_a_gpu_high_precision_is_tf32():
    """Operands of ten bits (and the one in front) pass there, and not where products are three."""
    work = linear_work()
    module, (x,) = _linear(), _x()

    def narrow(t: Tensor) -> Tensor:
        bits = t.detach().view(torch.int32)  # half a unit in the last place, then cut off
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)

    y = F.linear(narrow(x).double(), narrow(module.weight).double(), module.bias.double())
    found = error((y,), reference(work))
    assert bound(work, "fp32-high", 0.0) < found <= bound(work, "fp32-high", 0.0, "cuda")
    assert found <= check.worst_case(work, "fp32-high", "cuda")
    for precision in ("fp32", "bf16"):
        assert bound(work, precision, 0.0, "cuda") == bound(work, precision, 0.0)

"""A pruning run and its optimizer: which steps count, what is refused, training after the cut."""

from __future__ import annotations

import pytest
import torch
from pruning_cases import HIDDEN, make, rule, start, train

from slimkern.masks import is_masked
from slimkern.surgery import slim_


def test_micro_batches_do_not_count():
    model = make()
    pruning, optimizer = start(model)
    train(model, optimizer, 3, micro_batches=4)
    assert pruning.step == 3


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_does_not_count(fused):
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    pruning, _ = start(model, rule(end_step=4), optimizer=optimizer)
    plain = make()
    other, plain_optimizer = start(
        plain, rule(end_step=4),
        optimizer=torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=fused),
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, factor in enumerate([1.0, float("inf"), 1.0, 1.0]):
        x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(i))
        scaler.scale(model(x).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if factor == 1.0:
            plain(x).square().mean().backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    assert pruning.step == other.step == 3
    scores, expected = pruning.state_dict()["scores"], other.state_dict()["scores"]
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name])


def test_nothing_is_mounted_on_the_model_and_the_step_is_not_replaced():
    model = make()
    kinds = [type(m) for m in model.modules()]
    step = torch.optim.AdamW.step
    pruning, optimizer = start(model)
    assert [type(m) for m in model.modules()] == kinds
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert "step" not in vars(optimizer)
    assert type(optimizer).step is step
    pruning.remove()
    train(model, optimizer, 5)
    assert pruning.step == 0
    assert [type(m) for m in model.modules()] == kinds


def test_training_goes_on_with_the_optimizer_that_was_carried_over():
    model = make()
    pruning, optimizer = start(model)
    train(model, optimizer, 4)
    slim_(model, pruning.plan(), optimizer)
    before = model.get_parameter("0.fc2.weight").detach().clone()
    train(model, optimizer, 2, first=4)
    assert model.get_parameter("0.fc2.weight").shape == (HIDDEN, 32)
    assert not torch.equal(model.get_parameter("0.fc2.weight"), before)
    assert pruning.sparsity().ffn == 0.5


def test_an_optimizer_left_behind_by_slimming_raises_instead_of_training_nothing():
    model = make()
    pruning, optimizer = start(model)
    train(model, optimizer, 4)
    slim_(model, pruning.plan())
    with pytest.raises(RuntimeError, match=r"model_slim\(model, optimizer=optimizer\)"):
        train(model, optimizer, 1, first=4)


def test_a_wrapped_optimizer_is_unwrapped():
    class Wrapper:
        def __init__(self, inner):
            self.optimizer = inner

    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruning, _ = start(model, optimizer=Wrapper(inner))
    train(model, inner, 2)
    assert pruning.step == 2
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, got Wrapper"):
        start(model, optimizer=Wrapper(None))


def test_gradients_that_never_came_or_are_not_finite_stop_the_run():
    model = make()
    _pruning, optimizer = start(model, rule(end_step=1))
    with pytest.raises(RuntimeError, match=r"0\.fc2: no gradient has reached its weights"):
        optimizer.step()
    model = make()
    _pruning, optimizer = start(model, rule(end_step=1))
    (model(torch.randn(2, 5, HIDDEN)) * 0).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.fc2: all scores are zero"):
        optimizer.step()
    model = make()
    _pruning, optimizer = start(model, rule(end_step=1))
    (model(torch.randn(2, 5, HIDDEN)) * float("nan")).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.fc2: scores are not finite"):
        optimizer.step()
    assert not is_masked(model)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"end_step": None}, r"end_step .* or total_steps"),
        ({"end_step": 0}, "prune before the first optimizer step"),
    ],
)
def test_a_schedule_that_can_not_work_is_refused(values, words):
    with pytest.raises(ValueError, match=words):
        start(make(), rule(**values))


def test_an_optimizer_that_is_missing_or_of_another_model_and_frozen_weights_are_refused():
    with pytest.raises(ValueError, match="optimizer= is needed"):
        start(make(), optimizer=None)
    with pytest.raises(ValueError, match="holds none of the weights"):
        start(make(), optimizer=torch.optim.SGD(make().parameters(), lr=1.0))
    model = make()
    model.get_parameter("1.fc2.weight").requires_grad_(False)
    with pytest.raises(ValueError, match=r"these weights are frozen: 1\.fc2;"):
        start(model)
    start(model, rule(pruning_type="magnitude"))

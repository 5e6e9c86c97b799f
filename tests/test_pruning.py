"""Masks that follow an optimizer: when they move, which units they take, and how many."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_cases import (
    FFNS,
    HEADS,
    HIDDEN,
    LAYERS,
    WIDTH,
    make,
    rule,
    start,
    train,
    widths,
)

from slimkern.criteria import importance
from slimkern.masks import is_masked
from slimkern.plan import dead_units


def test_masks_grow_at_prune_steps_and_end_exactly_at_the_target():
    model = make()
    pruning, optimizer = start(
        model, rule(start_step=2, end_step=8, pruning_frequency=2, sparsity_decay_type="linear"),
        rule("mha", start_step=1, end_step=3),
    )  # fmt: skip
    seen = []
    for i in range(10):
        train(model, optimizer, 1, i)
        seen.append((pruning.step, widths(model)[0], widths(model)[-1], pruning.done))
    assert seen == [
        (1, 64, 4, False), (2, 64, 3, False), (3, 64, 2, False), (4, 54, 2, False),
        (5, 54, 2, False), (6, 43, 2, False), (7, 43, 2, False), (8, 32, 2, True),
        (9, 32, 2, True), (10, 32, 2, True),
    ]  # fmt: skip
    assert pruning.sparsity().ffn == pruning.sparsity().mha == 0.5
    assert set(pruning.sparsity().groups.values()) == {0.5}


@pytest.mark.parametrize("decay", ["exp", "cos", "linear", "cube"])
@pytest.mark.parametrize("steps", [2, 3, 7])
def test_every_decay_removes_exactly_k(decay, steps):
    model = make()
    pruning, optimizer = start(
        model, rule(end_step=steps, sparsity_decay_type=decay),
        rule("mha", end_step=steps, sparsity_decay_type=decay),
    )  # fmt: skip
    train(model, optimizer, steps)
    assert widths(model) == [32] * LAYERS + [2] * LAYERS
    assert pruning.done


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "snip", "snip_momentum"])
def test_what_goes_is_what_scores_lowest(criterion):
    model = make()
    pruning, optimizer = start(
        model, rule(pruning_type=criterion, start_step=1, end_step=1), optimizer="sgd"
    )
    before = copy.deepcopy(model)
    train(model, optimizer, 1)
    if criterion == "magnitude":  # of the weights after the step
        replay = copy.deepcopy(before)
        train(replay, torch.optim.SGD(replay.parameters(), lr=1e-2), 1)
        scores = importance(replay, FFNS)
    else:  # of weights and gradients before it
        x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
        scores = importance(
            before, FFNS, criterion, [x], lambda o, b: (o - b.flip(-1)).square().mean()
        )
    for name, score in scores.items():
        expected = tuple(sorted(torch.argsort(score, stable=True)[WIDTH // 2 :].tolist()))
        assert pruning.plan()[name].keep == expected


def test_snip_momentum_accumulates_before_every_optimizer_step_also_before_start():
    model = make()
    pruning, optimizer = start(model, rule(start_step=3, end_step=3))
    expected = torch.zeros(WIDTH)
    weight = model.get_parameter("0.fc2.weight")

    def record(*_):
        nonlocal expected
        expected = 0.9 * expected + (weight.detach() * weight.grad).abs().mean(0)

    optimizer.register_step_pre_hook(record)
    train(model, optimizer, 2)
    torch.testing.assert_close(pruning.state_dict()["scores"]["0.fc2"], expected)


def test_masked_columns_stay_zero_and_masks_are_monotone_under_momentum():
    model = make()
    pruning, optimizer = start(model, rule(end_step=12), rule("mha", end_step=12))
    before = pruning.plan()
    for i in range(20):
        train(model, optimizer, 1, i)
        now = pruning.plan()
        for entry in now:
            assert set(entry.keep) <= set(before[entry.group.name].keep)
            gone = set(range(entry.group.num_units)) - set(entry.keep)
            dead = set(torch.nonzero(dead_units(model, entry.group)).flatten().tolist())
            assert dead == gone, "every kept unit is live, every masked one is zero"
        before = now


def test_global_scope_takes_the_lowest_of_all_and_leaves_one_unit_everywhere():
    model = make()
    with torch.no_grad():
        for name in ("q", "k", "v", "o"):
            model.get_parameter(f"1.{name}.weight").mul_(1e-3)
        model.get_parameter("2.fc2.weight").mul_(1e-3)
    pruning, optimizer = start(
        model,
        rule(pruning_scope="global", pruning_type="magnitude"),
        rule("mha", pruning_scope="global", pruning_type="magnitude"),
    )
    train(model, optimizer, 4)
    kept = widths(model)
    assert sum(kept[:LAYERS]) == LAYERS * WIDTH // 2
    assert sum(kept[LAYERS:]) == LAYERS * HEADS // 2
    assert kept[2] == 2  # the default limit of 0.98: int(0.98 * 64) = 62 may go
    assert kept[4] == 1
    limited = make()
    pruning, optimizer = start(
        limited,
        rule(
            pruning_scope="global", pruning_type="magnitude", min_sparsity_ratio_per_op=0.4,
            max_sparsity_ratio_per_op=0.6,
        ),
    )  # fmt: skip
    train(limited, optimizer, 4)
    assert all(0.4 - 1 / WIDTH <= s <= 0.6 for s in pruning.sparsity().groups.values())


def test_widths_are_multiples_of_the_rounding_and_heads_are_not_rounded():
    model = make()
    pruning, optimizer = start(
        model, rule(target_sparsity=0.55, round_multiplier=8),
        rule("mha", target_sparsity=0.75, round_multiplier=8),
    )  # fmt: skip
    train(model, optimizer, 5)
    assert widths(model) == [32] * LAYERS + [1] * LAYERS  # 64 - 35 = 29, rounded up
    assert pruning.notes == ()


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_cut_that_rounding_cancels_is_reported(scope):
    model = make()
    pruning, optimizer = start(
        model, rule(target_sparsity=0.3, round_multiplier=64, pruning_scope=scope)
    )
    if scope == "local":
        assert len(pruning.notes) == LAYERS, "known before training"
    train(model, optimizer, 5)
    assert not is_masked(model)
    assert "0.fc2: rounding" in pruning.notes[0]
    assert "cancels the whole cut" in str(pruning.report())
    assert pruning.sparsity().total == 0


def test_one_shot_by_magnitude_needs_no_optimizer_and_cuts_at_once():
    model = make()
    pruning, _ = start(
        model, rule(pruning_type="magnitude", start_step=0, end_step=0), optimizer=None
    )
    assert widths(model)[:LAYERS] == [32] * LAYERS
    assert pruning.done


def test_one_shot_rules_cut_all_or_nothing():
    model = make()
    with torch.no_grad():
        model.get_parameter("2.o.weight")[0, 0] = float("nan")
    rules = (rule(p, pruning_type="magnitude", end_step=0) for p in ("channelx1", "mha"))
    with pytest.raises(RuntimeError, match=r"2\.o: scores are not finite"):
        start(model, *rules, optimizer=None)
    assert not is_masked(model)


def test_a_floor_for_each_layer_grows_with_the_schedule():
    model = make()
    pruning, optimizer = start(
        model, rule(pruning_scope="global", min_sparsity_ratio_per_op=0.4, end_step=5,
                    sparsity_decay_type="linear"),
    )  # fmt: skip
    for i in range(5):
        train(model, optimizer, 1, i)
        now = pruning.sparsity()
        assert now.ffn == pytest.approx(0.1 * (i + 1), abs=1 / (LAYERS * WIDTH))
        assert min(now.groups.values()) >= 0.08 * (i + 1) - 1 / WIDTH


def test_the_report_prints_what_is_kept_and_where_the_run_stands():
    model = make()
    pruning, optimizer = start(model, rule(), rule("mha"))
    train(model, optimizer, 4)
    report = pruning.report()
    assert (report.step, report.last_step) == (4, 4)
    assert [g.kept for g in report.groups] == [32] * LAYERS + [2] * LAYERS
    lines = str(report).splitlines()
    assert lines[0].split() == ["group", "kind", "kept", "of", "sparsity", "target"]
    assert lines[1].split() == ["0.fc2", "ffn", "32", "64", "0.5000", "0.5000"]
    assert lines[-1] == "step 4 (last cut at 4): 50.00% of the weights in these groups removed"

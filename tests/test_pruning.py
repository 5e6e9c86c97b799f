"""Masks that follow an optimizer: when they move, what they keep, and that a run can be resumed."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from slimkern.config import WeightPruningConfig
from slimkern.criteria import importance
from slimkern.discovery.groups import Attribute, Group, Member
from slimkern.masks import is_masked
from slimkern.nn import MaskedLinear
from slimkern.plan import dead_units
from slimkern.pruning import Pruning
from slimkern.surgery import slim_

LAYERS, HIDDEN, WIDTH, HEADS, HEAD_DIM = 3, 8, 64, 4, 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HEADS * HEAD_DIM) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))


def ffn(i):
    return Group(
        f"{i}.fc2", "ffn", WIDTH, (Member(f"{i}.fc1", 1, "producer"),),
        (Member(f"{i}.fc2", 1, "consumer"),),
    )  # fmt: skip


def mha(i):
    roles = (("q", "query"), ("k", "key"), ("v", "value"))
    return Group(
        f"{i}.o", "mha", HEADS, tuple(Member(f"{i}.{n}", HEAD_DIM, r) for n, r in roles),
        (Member(f"{i}.o", HEAD_DIM, "consumer"),), (), (Attribute(str(i), "heads", 1),),
    )  # fmt: skip


FFNS, MHAS = tuple(map(ffn, range(LAYERS))), tuple(map(mha, range(LAYERS)))


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


def rule(pattern="channelx1", **values):
    defaults = {"target_sparsity": 0.5, "end_step": 4, "pruning_scope": "local"}
    values = {"round_multiplier": 1, **defaults, **values}
    return WeightPruningConfig({"pattern": pattern, **values}).rules[0]


def start(model, *rules, optimizer="adamw", **values):
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    elif optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rules = rules or (rule(**values),)
    pairs = [(r, FFNS if r.pattern == "channelx1" else MHAS) for r in rules]
    return Pruning(model, pairs, optimizer), optimizer


def train(model, optimizer, steps, first=0, micro_batches=1):
    for i in range(first, first + steps):
        for j in range(micro_batches):
            generator = torch.Generator().manual_seed(1000 * i + j)
            x = torch.randn(2, 5, HIDDEN, generator=generator)
            (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def widths(model):
    kept = []
    for group in (*FFNS, *MHAS):
        cols = getattr(model.get_submodule(group.name), "cols", None)
        size = group.consumers[0].unit_size
        kept.append(group.num_units if cols is None else len(cols) // size)
    return kept


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


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "snip", "snip_momentum"])
@pytest.mark.parametrize("reduce_type", ["mean", "max"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(criterion, reduce_type):
    rules = [
        rule(p, pruning_type=criterion, criterion_reduce_type=reduce_type, end_step=9)
        for p in ("channelx1", "mha")
    ]
    whole = make()
    pruning, optimizer = start(whole, *rules)
    train(whole, optimizer, 12)

    first = make()
    early, optimizer = start(first, *rules)
    train(first, optimizer, 5)
    state = early.state_dict()
    tensors = {f"scores/{n}": s for n, s in state["scores"].items()}
    tensors |= {f"keep/{n}": k for n, k in state["keep"].items()}
    tensors = load_tensors(save_tensors(tensors))  # plain tensors and a number: safetensors, JSON
    weights, moments = io.BytesIO(), optimizer.state_dict()
    torch.save(first.state_dict(), weights)

    second = make(seed=5)
    second.load_state_dict(torch.load(io.BytesIO(weights.getvalue()), weights_only=True))
    late, optimizer = start(second, *rules)
    optimizer.load_state_dict(moments)
    late.load_state_dict(
        {
            "step": state["step"],
            "scores": {n[7:]: t for n, t in tensors.items() if n.startswith("scores/")},
            "keep": {n[5:]: t for n, t in tensors.items() if n.startswith("keep/")},
        }
    )
    assert late.step == 5
    train(second, optimizer, 7, first=5)
    assert late.plan() == pruning.plan()
    for (name, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items()):
        assert torch.equal(a, b), name
    for name, score in pruning.state_dict()["scores"].items():
        assert torch.equal(score, late.state_dict()["scores"][name])


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    model = make()
    pruning, optimizer = start(model)
    train(model, optimizer, 3)
    state = pruning.state_dict()
    plan, scores = pruning.plan(), pruning.state_dict()["scores"]
    wrong = [
        ({}, "not a state of a pruning run"),
        ({**state, "keep": {"other": torch.tensor([0])}}, "of other groups"),
        ({**state, "keep": {**state["keep"], "0.fc2": torch.tensor([WIDTH])}}, "0.fc2"),
        ({**state, "scores": {"other": torch.ones(3)}}, "that are not pruned"),
        ({**state, "scores": {"0.fc2": torch.ones(3)}}, r"have shape \(3,\), expected \(64,\)"),
    ]
    for bad, words in wrong:
        with pytest.raises(ValueError, match=words):
            pruning.load_state_dict(bad)
    assert pruning.plan() == plan
    assert torch.equal(pruning.state_dict()["scores"]["0.fc2"], scores["0.fc2"])


def test_a_model_in_training_is_copied_pickled_and_saved_like_any_other():
    model = make()
    _pruning, optimizer = start(model, rule(), rule("mha"))
    train(model, optimizer, 5)
    x = torch.randn(2, 5, HIDDEN)
    wanted = model(x)
    assert torch.equal(copy.deepcopy(model)(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), wanted)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(loaded(x), wanted)
    plain = make(seed=3)  # a plain save of a model in training is the masked model
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), wanted)


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


def test_masks_stay_when_pruning_is_removed():
    model = make()
    pruning, optimizer = start(model)
    train(model, optimizer, 4)
    pruning.remove()
    train(model, optimizer, 2, first=4)
    assert widths(model)[:LAYERS] == [32] * LAYERS
    assert isinstance(model.get_submodule("0.fc2"), MaskedLinear)
    assert pruning.step == 4


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


def test_masks_that_a_model_carries_are_continued():
    model = make()
    start(model, rule(pruning_type="magnitude", end_step=0, target_sparsity=0.25), optimizer=None)
    pruning, optimizer = start(model, rule())
    before = pruning.plan()
    assert pruning.sparsity().ffn == 0.25
    train(model, optimizer, 4)
    for entry in pruning.plan():
        assert set(entry.keep) < set(before[entry.group.name].keep)
    assert pruning.sparsity().ffn == 0.5


@pytest.mark.parametrize("scope", ["local", "global"])
def test_masks_beyond_the_ratio_of_the_moment_do_not_come_back(scope):
    model = make()
    start(model, rule(pruning_type="magnitude", end_step=0, target_sparsity=0.5), optimizer=None)
    pruning, optimizer = start(model, rule(target_sparsity=0.75, end_step=5, pruning_scope=scope))
    kept = {e.group.name: set(e.keep) for e in pruning.plan()}
    seen = []
    for i in range(5):
        train(model, optimizer, 1, i)
        seen.append(pruning.sparsity().ffn)
        for entry in pruning.plan():
            assert set(entry.keep) <= kept[entry.group.name]
            kept[entry.group.name] = set(entry.keep)
    assert seen[0] == 0.5
    assert seen == sorted(seen)
    assert seen[-1] == 0.75


def test_a_second_pruning_of_the_same_weights_gives_nothing_back():
    model = make()
    first, optimizer = start(model, rule(target_sparsity=0.25, end_step=3))
    second, _ = start(model, rule(target_sparsity=0.5, end_step=1), optimizer=optimizer)
    train(model, optimizer, 4)
    assert second.sparsity().ffn == first.sparsity().ffn == 0.5
    assert widths(model)[:LAYERS] == [WIDTH // 2] * LAYERS


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

"""What a pruning run keeps: resumed bit for bit, copied, and continued on masks that are there."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from pruning_cases import HIDDEN, LAYERS, WIDTH, make, rule, start, train, widths
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from slimkern.nn import MaskedLinear


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


def test_masks_stay_when_pruning_is_removed():
    model = make()
    pruning, optimizer = start(model)
    train(model, optimizer, 4)
    pruning.remove()
    train(model, optimizer, 2, first=4)
    assert widths(model)[:LAYERS] == [32] * LAYERS
    assert isinstance(model.get_submodule("0.fc2"), MaskedLinear)
    assert pruning.step == 4


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

"""Block patterns in a training run: exact targets, the masked training, resuming, growing back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from pattern_cases import PATTERNS, Net, batch, loss_of, one_shot, started, train
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import slimkern
from slimkern.masks import is_masked
from slimkern.nn import BlockMaskedLinear
from slimkern.patterns.masks import block_masked

CRITERIA = ["magnitude", "gradient", "snip", "snip_momentum"]


def masks_of(model):
    return {n: m.mask.dense() for n, m in block_masked(model).items()}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_target_is_met_to_the_block_and_stays(pattern, scope):
    model = Net()
    target = 0.4
    run, optimizer = started(model, pattern, target_sparsity=target, pruning_scope=scope)
    assert run.sparsity().blocks == run.sparsity().total == 0
    seen = []
    for step in range(7):
        train(model, optimizer, 1, step)
        seen.append(run.sparsity().total)
    rows = run.report().groups
    assert [r.name for r in rows] == ["fc1", "fc2"], "the head is left out"
    assert {r.kind for r in rows} == {pattern}
    # Items are blocks, or groups of M which lose N.
    zeros, of = map(int, pattern.split(":")) if ":" in pattern else (1, 1)
    items = [r.num_units // of for r in rows]
    gone = [(r.num_units - r.kept) // zeros for r in rows]
    share = target * of / zeros
    if scope == "local":
        assert gone == [int(share * n + 1e-9) for n in items]
    else:
        assert sum(gone) == int(share * sum(items) + 1e-9)
    assert seen == sorted(seen)
    assert seen[3] == seen[-1], "nothing moves after the last step"
    for name, module in block_masked(model).items():
        assert (module.weight[~module.mask.dense()] == 0).all(), name
    assert run.done


@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:4"])
def test_no_group_of_m_has_more_zeros_than_n_and_all_have_them_at_the_cap(pattern):
    zeros, of = map(int, pattern.split(":"))
    model = Net()
    run, optimizer = started(model, pattern, target_sparsity=zeros / of)
    for step in range(5):
        train(model, optimizer, 1, step)
        for mask in masks_of(model).values():
            assert set((~mask).view(-1, of).sum(1).tolist()) <= {0, zeros}
    assert run.sparsity().blocks == zeros / of
    assert all(r.kept * of == r.num_units * (of - zeros) for r in run.report().groups)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", ["4x1", "7x5", "2:4"])
def test_masked_training_is_dense_training_with_zeros(criterion, pattern):
    model = Net().double()
    run, optimizer = started(
        model, pattern, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        pruning_type=criterion,
    )  # fmt: skip
    dense = copy.deepcopy(model)
    other = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(8):
        masks = masks_of(model)
        train(model, optimizer, 1, step)
        loss_of(dense, step).backward()
        for name, mask in masks.items():
            dense.get_parameter(f"{name}.weight").grad.masked_fill_(~mask, 0)
        other.step()
        other.zero_grad()
        for name, mask in masks_of(model).items():
            dense.get_parameter(f"{name}.weight").data.masked_fill_(~mask, 0)
    assert run.sparsity().blocks > 0.35  # half of the blocks; ragged ones are small
    for (name, a), b in zip(model.named_parameters(), dense.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)
    x = torch.randn(5, 20, dtype=torch.float64)
    slim = slimkern.model_slim(copy.deepcopy(model), [x])
    torch.testing.assert_close(slim(x), model(x))
    torch.testing.assert_close(dense(x), model(x))


@pytest.mark.parametrize("regrow", [False, True])
def test_a_mask_change_allocates_no_weight_and_no_state_of_the_optimizer(regrow):
    model = Net()
    more = {"pruning_type": "gradient", "regrow": True} if regrow else {}
    _run, optimizer = started(model, end_step=6, **more)
    train(model, optimizer, 1)

    def places():
        state = {(id(p), k): v.data_ptr() for p, s in optimizer.state.items() for k, v in s.items()}
        return {n: p.data_ptr() for n, p in model.named_parameters()} | state

    before, bits = places(), []
    for step in range(1, 8):
        train(model, optimizer, 1, step)
        bits.append([m.mask_bits.data_ptr() for m in block_masked(model).values()])
        assert places() == before
    assert all(b == bits[0] for b in bits)


def test_no_gradient_is_dense_unless_blocks_may_come_back(monkeypatch):
    from slimkern.nn import block_masked as module

    real, asked = module.block_masked_linear, []

    def counted(*args, dense_gradient, **kwargs):
        asked.append(dense_gradient)
        return real(*args, dense_gradient=dense_gradient, **kwargs)

    monkeypatch.setattr(module, "block_masked_linear", counted)
    for criterion in CRITERIA:
        model = Net()
        _, optimizer = started(model, pruning_type=criterion)
        train(model, optimizer, 6)
    assert asked
    assert not any(asked)
    asked.clear()
    model = Net()
    _, optimizer = started(
        model, pruning_type="gradient", regrow=True, end_step=9, pruning_frequency=3
    )
    dense = []
    for step in range(12):
        train(model, optimizer, 1, step)
        dense.append(any(asked))
        asked.clear()
    # Masks come after steps 3, 6 and 9; nothing is masked before the first.
    assert [i for i, d in enumerate(dense) if d] == [5, 8], "once for each update of the masks"


def test_blocks_come_back_where_the_dense_gradient_is_larger():
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    _run, _ = started(
        model, "4x1", optimizer, pruning_type="gradient", regrow=True, end_step=8,
        op_names=["fc1"], target_sparsity=0.5, sparsity_decay_type="linear",
    )  # fmt: skip
    before = model.fc1.mask.blocks() if is_masked(model) else torch.ones(9, 20, dtype=torch.bool)
    back = 0
    for step in range(8):
        dense = copy.deepcopy(model)
        if is_masked(dense):
            slimkern.model_slim(dense, [batch(step, torch.float64)])
        loss_of(dense, step).backward()
        score = dense.fc1.weight.grad.abs().unflatten(0, (9, 4)).mean(1).flatten()
        train(model, optimizer, 1, step)
        now = model.fc1.mask.blocks()
        count = int((step + 1) / 8 * 0.5 * 180 + 1e-9)
        expected = sorted(range(180), key=lambda i: (score[i].item(), i))[:count]
        assert set((~now).flatten().nonzero().flatten().tolist()) == set(expected)
        grown = now & ~before
        assert (model.fc1.weight.unflatten(0, (9, 4)).amax(1)[grown] == 0).all(), "from zero"
        back += int(grown.sum())
        before = now
    assert back, "a block came back"


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("pattern", ["4x1", "2:4"])
@pytest.mark.parametrize("more", [{}, {"criterion_reduce_type": "max", "low_memory_usage": True}])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(criterion, pattern, more):
    more = {"pruning_type": criterion, "end_step": 9, **more}
    more |= {"regrow": True} if criterion == "gradient" else {}
    whole = Net()
    run, optimizer = started(whole, pattern, **more)
    train(whole, optimizer, 12)

    first = Net()
    early, optimizer = started(first, pattern, **more)
    train(first, optimizer, 5)
    state = early.state_dict()
    files = {
        part: save_tensors(state[part]) for part in ("scores", "blocks")
    }  # plain tensors and a number
    weights, moments = copy.deepcopy(first.state_dict()), copy.deepcopy(optimizer.state_dict())

    second = Net(seed=5)
    second.load_state_dict(weights)
    late, optimizer = started(second, pattern, **more)
    optimizer.load_state_dict(moments)
    late.load_state_dict(
        {"step": state["step"], "keep": {}, **{p: load_tensors(f) for p, f in files.items()}}
    )
    train(second, optimizer, 7, first=5)
    assert late.sparsity() == run.sparsity()
    for (name, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items()):
        assert torch.equal(a, b), name
    for name, bits in run.state_dict()["blocks"].items():
        assert torch.equal(bits, late.state_dict()["blocks"][name])


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    model = Net()
    run, optimizer = started(model)
    train(model, optimizer, 3)
    state, masks = run.state_dict(), masks_of(model)
    bits = state["blocks"]
    wrong = [
        ({"step": 1, "scores": {}, "keep": {}}, "of other block-masked layers"),
        ({**state, "blocks": {"fc1": bits["fc1"]}}, r"only one side has \['fc2'\]"),
        ({**state, "blocks": {**bits, "fc2": bits["fc2"][:1]}}, "mask of 'fc2' does not fit"),
        ({**state, "blocks": {**bits, "fc2": bits["fc2"].int()}}, "mask of 'fc2' does not fit"),
        ({**state, "scores": {"fc1": torch.ones(3)}}, r"have shape \(3,\), expected \(9, 20\)"),
    ]
    for bad, words in wrong:
        with pytest.raises(ValueError, match=words):
            run.load_state_dict(bad)
    now = masks_of(model)
    assert all(torch.equal(now[n], m) for n, m in masks.items())
    assert run.step == 3


def test_a_state_from_before_the_first_cut_takes_masks_off():
    model = Net()
    run, optimizer = started(model)
    state = run.state_dict()
    train(model, optimizer, 3)
    assert is_masked(model)
    run.load_state_dict(state)
    assert not is_masked(model)
    assert run.sparsity().total == 0


def test_masks_that_a_model_carries_are_continued():
    model = Net()
    one_shot(model, target_sparsity=0.25)
    before = masks_of(model)
    run, optimizer = started(model, target_sparsity=0.5, end_step=2)
    assert run.sparsity().blocks == 0.25
    train(model, optimizer, 2)
    assert run.sparsity().blocks == 0.5
    for name, mask in masks_of(model).items():
        assert (before[name] | ~mask).all()
    with pytest.raises(ValueError, match="carries masks of 4x1 blocks already"):
        started(model, "1x1")


def test_a_step_that_a_fused_grad_scaler_skips_is_no_step_and_scales_are_undone():
    def steps(scaled):
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        run, _ = started(model, optimizer=optimizer, pruning_type="gradient", regrow=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step, factor in enumerate([1.0, float("inf"), 1.0, 1.0, 1.0]):
            if factor == 1.0 or scaled:
                scaler.scale(loss_of(model, step) * factor).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        return run, model

    (run, model), (other, plain) = steps(True), steps(False)
    assert run.step == other.step == 4
    for name, mask in masks_of(model).items():
        assert torch.equal(mask, masks_of(plain)[name])


def test_micro_batches_add_up_to_a_dense_gradient_too():
    model, whole = Net().double(), Net().double()
    values = {"pruning_type": "gradient", "regrow": True, "end_step": 6}
    _, optimizer = started(model, **values)
    _, other = started(whole, **values)
    for step in range(6):
        for _ in range(2):
            (loss_of(model, step) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        train(whole, other, 1, step)
    for name, mask in masks_of(whole).items():
        assert torch.equal(masks_of(model)[name], mask)


def test_a_model_in_training_is_copied_saved_and_left_alone_after_removal():
    model = Net()
    run, optimizer = started(model, pruning_type="gradient", regrow=True)
    train(model, optimizer, 3)
    x = torch.randn(2, 20)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    plain = Net(seed=3)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), model(x))
    masks = masks_of(model)
    run.remove()
    assert not any(m.dense_gradient for m in block_masked(model).values())
    train(model, optimizer, 3, 3)
    assert all(torch.equal(m, masks[n]) for n, m in masks_of(model).items())


def test_after_slimming_the_run_is_over_and_zeros_are_weights_like_any():
    model = Net()
    run, optimizer = started(model, end_step=6)
    train(model, optimizer, 4)
    slimkern.model_slim(model, [batch(0)])
    assert type(model.fc1) is torch.nn.Linear
    train(model, optimizer, 4, 4)
    assert not is_masked(model)
    assert run.step == 4


def test_blocks_and_whole_units_go_in_one_run():
    from pruning_cases import make
    from pruning_cases import train as train_layers

    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    common = {"end_step": 4, "target_sparsity": 0.5, "pruning_scope": "local"}
    configs = [
        {"pattern": "channelx1", "op_names": ["fc2"], "round_multiplier": 1, **common},
        {"pattern": "2x2", "op_names": [r"\.[qkvo]$"], **common},
    ]
    loader = [torch.randn(2, 5, 8)]
    run = slimkern.prepare_pruning(model, configs, optimizer, loader)
    train_layers(model, optimizer, 5)
    reached = run.sparsity()
    assert (reached.ffn, reached.blocks) == (0.5, 0.5)
    assert reached.total == pytest.approx(0.5)
    assert len(run.report().groups) == 3 + 12
    assert isinstance(model[0].q, BlockMaskedLinear)
    expected = model(loader[0])
    slimkern.model_slim(model, loader, optimizer=optimizer)
    assert model[0].fc2.in_features == 32
    assert type(model[0].q) is torch.nn.Linear
    torch.testing.assert_close(model(loader[0]), expected)
    assert "12 linears with block masks" in model.slim_plan.notes[-1]
    train_layers(model, optimizer, 1, 5)

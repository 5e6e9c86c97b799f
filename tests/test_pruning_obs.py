"""``pruning_type="obs"``: masks and weights move together, and the masked model stays close."""

from __future__ import annotations

import copy

import pytest
import torch
from auto_slim_cases import assert_as_exact_as, outputs_of, train
from exactness import assert_deletion_is_exact, first_output
from tiny_models import FAMILIES, FFN, HEADS, LAYERS, VOCAB, Gated, text_inputs
from torch import nn

from slimkern.auto_slim import model_slim, parse_auto_slim_config, prepare_pruning
from slimkern.calibration.batches import read_batches
from slimkern.calibration.moments import Moments
from slimkern.calibration.obs import Layer, remove
from slimkern.config import WeightPruningConfig
from slimkern.discovery import discover
from slimkern.masks import carried_masks, is_masked
from slimkern.obs_step import CALIBRATION_TOKENS, first_batches

CUT = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "pruning_scope": "local", "round_multiplier": 8}
EPS = torch.finfo(torch.float64).eps


def loader(count=8):
    return [text_inputs(4, 12, seed) for seed in range(count)]


def correlated(family="bert", dtype=torch.float32, task="Model"):
    """A model whose channels and heads say much the same: producers of low rank."""
    model = FAMILIES[family](task, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for group in discover(model):
            for member in group.producers:
                if member.role in ("producer", "value"):
                    weight = model.get_submodule(member.name).weight
                    mix = torch.randn(len(weight), 10, generator=generator, dtype=dtype) / 4
                    weight.copy_(mix @ weight[:10] + 0.05 * weight)
    return model


def prune(model, pruning_type, *, optimizer=None, batches=None, **values):
    values = {"end_step": 0, **CUT, **values}
    config = parse_auto_slim_config(model, pruning_type=pruning_type, **values)
    return prepare_pruning(model, config, optimizer, loader() if batches is None else batches)


def distance(model, dense, batches=None):
    found = [outputs_of(m, **x) for x in batches or loader() for m in (model, dense)]
    return sum(float((a - b).square().sum()) for a, b in zip(found[::2], found[1::2]))


def test_moments_of_a_part_and_through_a_linear_are_those_of_what_is_computed():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator, dtype=torch.float64) + 2
    weight = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    bias = torch.randn(3, generator=generator, dtype=torch.float64)
    seen, wanted = Moments(7), Moments(3, 3)
    columns = torch.tensor([0, 3, 6])
    for part in x.split(25):
        seen.update(part)
        wanted.update(part[:, columns], part @ weight.T + bias)
    found = seen.through(weight, bias).select(columns)
    assert found.tokens == 60
    for name in ("covariance", "cross", "variance_y", "second", "second_cross"):
        a, b = (torch.as_tensor(getattr(m, name)()) for m in (found, wanted))
        assert (a - b).abs().max() <= 100 * 60 * EPS * b.abs().max(), name
    empty = Moments(7).through(weight, bias).select(columns)
    assert empty.tokens == 0
    assert not empty.cross().any()


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_model_is_closer_than_by_magnitude_at_the_same_widths(family):
    dense = correlated(family)
    by_size, by_obs = copy.deepcopy(dense), copy.deepcopy(dense)
    prune(by_size, "magnitude")
    pruning = prune(by_obs, "obs")
    assert pruning.done
    for entry in pruning.plan():
        assert len(entry.keep) == {"ffn": FFN // 2, "mha": HEADS // 2}[entry.group.kind]
    assert distance(by_obs, dense) < distance(by_size, dense) / 2
    unseen = [text_inputs(4, 12, seed) for seed in range(50, 54)]
    assert distance(by_obs, dense, unseen) < distance(by_size, dense, unseen) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_slim_is_masked(family, dtype):
    dense = FAMILIES[family]("ForSequenceClassification", dtype=dtype)
    model = copy.deepcopy(dense)
    prune(model, "obs")
    dense.load_state_dict(model.state_dict())
    masked = copy.deepcopy(model)
    slim = model_slim(model)
    assert not is_masked(slim)
    assert_as_exact_as(slim, masked, dense)


def test_slim_is_masked_in_fp64_by_slicing_that_is_not_ours():
    model = FAMILIES["bert"](dtype=torch.float64)
    groups = discover(model).groups
    inputs = text_inputs()
    pruning = prune(model, "obs")
    fresh = FAMILIES["bert"](dtype=torch.float64)
    fresh.load_state_dict(model.state_dict())
    masked = outputs_of(model, **inputs)
    scale = masked.abs().max()
    assert (outputs_of(fresh, **inputs) - masked).abs().max() <= 1e4 * EPS * scale
    slim = outputs_of(model_slim(model), **inputs)
    assert (slim - masked).abs().max() <= 1e4 * EPS * scale
    assert {e.group.name for e in pruning.plan()} <= {g.name for g in groups}
    assert_deletion_is_exact(model, discover(model), lambda m: first_output(m(**inputs)).detach())


def test_one_group_is_what_obs_and_least_squares_say():
    """Against plain sums: the order of OBS, then the normal equations of the dense outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 5)).double()
    batches = [torch.randn(40, 6, dtype=torch.float64) for _ in range(3)]
    dense = copy.deepcopy(model)
    x = dense[:2](torch.cat(batches)).detach()
    y = dense(torch.cat(batches)).detach()
    values = {"pattern": "channelx1", "op_names": ["2"], "target_sparsity": 0.4, "end_step": 0}
    config = WeightPruningConfig(
        values, pruning_type="obs", pruning_scope="local", round_multiplier=1
    )
    pruning = prepare_pruning(model, config, dataloader=batches)
    keep = list(pruning.plan()["2"].keep)
    deviations, targets = x - x.mean(0), y - y.mean(0)
    covariance = deviations.T @ deviations / len(x)
    order = remove([Layer(dense[2].weight.detach(), covariance)], [12], chunk=16)
    assert tuple(keep) == order.keep(20, 12)
    inputs = deviations[:, keep]
    gram = inputs.T @ inputs / len(x)
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    before = dense[2].weight.detach()[:, keep]
    wanted = (
        before + torch.linalg.solve(gram + ridge, inputs.T @ targets / len(x) - gram @ before.T).T
    )
    bound = 1e3 * EPS * float(torch.linalg.cond(gram + ridge))
    assert (model[2].weight[:, keep] - wanted).abs().max() <= bound * wanted.abs().max()
    bias = y.mean(0) - wanted @ x.mean(0)[keep]
    assert (model[2].bias - bias).abs().max() <= bound * wanted.abs().max() * x.abs().max()
    gone = [i for i in range(20) if i not in keep]
    assert not model[2].weight[:, gone].any()


def test_padding_does_not_count():
    dense = correlated()
    models = [copy.deepcopy(dense) for _ in range(2)]
    clean = loader()
    dirty = copy.deepcopy(clean)
    for batch in dirty:
        padded = batch["attention_mask"] == 0
        assert padded.any()
        batch["input_ids"][padded] = VOCAB - 1
    for model, batches in zip(models, (clean, dirty)):
        prune(model, "obs", batches=batches)
    for (name, a), b in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        torch.testing.assert_close(a, b, msg=name)


def test_masks_and_weights_grow_together_while_an_optimizer_trains():
    model = correlated("mpnet")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pruning = prune(model, "obs", optimizer=optimizer, end_step=4, pruning_frequency=2)
    assert pruning.sparsity().total == 0
    before = pruning.plan()
    modes = []
    for step in range(6):
        train(model, optimizer, 1, first=step)
        now = pruning.plan()
        for entry in now:
            assert set(entry.keep) <= set(before[entry.group.name].keep)
            gone = [i for i in range(entry.group.num_units) if i not in entry.keep]
            for member in entry.group.consumers:
                weight = model.get_submodule(member.name).weight
                assert not weight.unflatten(1, (-1, member.unit_size))[:, gone].any()
        modes.append(sum(len(e.keep) for e in now))
        before = now
    assert modes[0] > modes[1] == modes[2] > modes[3] == modes[5]
    assert pruning.done
    assert pruning.sparsity().ffn == pruning.sparsity().mha == 0.5
    assert set(optimizer.state) == set(model.parameters()) - unused(model)
    masked = copy.deepcopy(model)
    model_slim(model, optimizer=optimizer)
    x = text_inputs()
    torch.testing.assert_close(outputs_of(model, **x), outputs_of(masked, **x), atol=1e-4, rtol=0)
    train(model, optimizer, 1, first=6)


def unused(model):
    return {p for p in model.parameters() if p.grad is None and p not in seen_by_adam(model)}


def seen_by_adam(model):
    fresh = copy.deepcopy(model)
    sum(o.sum() for o in fresh(**text_inputs()).to_tuple()).backward()
    return {p for p, q in zip(model.parameters(), fresh.parameters()) if q.grad is not None}


def test_a_step_leaves_everything_else_as_it_was():
    model = correlated().train()
    model.encoder.layer[1].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    pruning = prune(model, "obs", optimizer=optimizer, start_step=1, end_step=1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    outputs = model(**text_inputs())
    outputs[0].square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    same = dict(model.named_parameters())
    optimizer.step()
    assert pruning.done
    assert model.training
    assert not any(m.training for m in model.encoder.layer[1].modules())
    consumers = {m.name for e in pruning.plan() for m in e.group.consumers}
    for name, parameter in model.named_parameters():
        assert parameter is same[name]
        own = name.rpartition(".")[0] in consumers
        assert torch.equal(parameter, before[name]) != own, name
        assert (parameter.grad is None) == (name not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_linears_without_a_bias_get_none():
    torch.manual_seed(0)
    model = Gated(10, 24).double()
    model.down = nn.Linear(24, 10, bias=False).double()
    dense = copy.deepcopy(model)
    batches = [torch.randn(30, 10, dtype=torch.float64) + 1 for _ in range(3)]
    values = {"pattern": "channelx1", "op_names": ["down"], "target_sparsity": 0.5, "end_step": 0}
    by_size = copy.deepcopy(model)
    for own, kind in ((model, "obs"), (by_size, "magnitude")):
        config = WeightPruningConfig(
            values, pruning_type=kind, pruning_scope="local", round_multiplier=1
        )
        prepare_pruning(own, config, dataloader=batches)
    assert model.down.bias is None
    x = torch.cat(batches)
    missed = [(m(x) - dense(x)).square().sum() for m in (model, by_size)]
    assert missed[0] < missed[1]


def test_the_global_scope_takes_what_is_cheapest_of_all_and_keeps_limits():
    dense = correlated()
    with torch.no_grad():  # a layer that loses nothing, whatever goes
        dense.encoder.layer[1].output.dense.weight.zero_()
    values = {"pruning_scope": "global", "round_multiplier": 1, "mha_sparsity": 0.0}
    model = copy.deepcopy(dense)
    kept = [len(e.keep) for e in prune(model, "obs", **values).plan()]
    assert sum(kept) == LAYERS * FFN // 2
    assert kept[1] == min(kept) == 2, "the default limit of 0.98: int(0.98 * 80) = 78 may go"
    limited = copy.deepcopy(dense)
    limits = {"min_sparsity_ratio_per_op": 0.4, "max_sparsity_ratio_per_op": 0.6}
    pruning = prune(limited, "obs", **values, **limits)
    assert sum(len(e.keep) for e in pruning.plan()) == LAYERS * FFN // 2
    assert all(0.4 <= s <= 0.6 for s in pruning.sparsity().groups.values())
    even = copy.deepcopy(dense)
    prune(even, "obs", **{**values, "pruning_scope": "local"})
    assert distance(model, dense) < distance(even, dense)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_rounding_and_steps_of_the_schedule_are_those_of_other_criteria(scope):
    widths = {}
    for kind in ("magnitude", "obs"):
        model = correlated()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        pruning = prune(
            model,
            kind,
            optimizer=optimizer,
            end_step=3,
            pruning_scope=scope,
            ffn2_sparsity=0.6,
        )
        widths[kind] = []
        for step in range(3):
            train(model, optimizer, 1, first=step)
            widths[kind].append([len(e.keep) for e in pruning.plan()])
            ffn = [len(e.keep) for e in pruning.plan() if e.group.kind == "ffn"]
            assert all(w % 8 == 0 for w in ffn)
        assert pruning.notes == ()
    if scope == "local":
        assert widths["obs"] == widths["magnitude"]
    for a, b in zip(widths["obs"], widths["magnitude"]):  # rounding gives back up to 7 of each
        assert abs(sum(a) - sum(b)) <= 7 * LAYERS


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit():
    def begin(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return prune(model, "obs", optimizer=optimizer, end_step=5), optimizer

    def go(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)  # of dropout
            train(model, optimizer, 1, first=step)

    whole = correlated()
    pruning, optimizer = begin(whole)
    go(whole, optimizer, range(6))
    first = correlated()
    early, optimizer = begin(first)
    go(first, optimizer, range(3))
    second = correlated()
    second.load_state_dict(first.state_dict())
    late, optimizer = begin(second)
    late.load_state_dict(early.state_dict())
    go(second, optimizer, range(3, 6))
    assert late.plan() == pruning.plan()
    assert str(late.report()) == str(pruning.report())
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values()):
        assert torch.equal(a, b), name


def test_masks_that_are_there_stay_and_what_remains_is_measured():
    model = correlated()
    prune(model, "magnitude", ffn2_sparsity=0.2, mha_sparsity=0.25)
    carried = {e.group.name: set(e.keep) for e in carried_masks(model)}
    assert len(carried) == 2 * LAYERS
    for entry in prune(model, "obs", ffn2_sparsity=0.6).plan():
        assert set(entry.keep) < carried[entry.group.name]
        assert len(entry.keep) == {"ffn": 32, "mha": 2}[entry.group.kind]


def test_with_another_rule_beside_it():
    model = correlated()
    heads, ffns = (
        parse_auto_slim_config(model, end_step=2, pruning_scope="local", **own)[0]
        for own in (
            {"mha_sparsity": 0.5, "pruning_type": "snip_momentum"},
            {"ffn2_sparsity": 0.5, "pruning_type": "obs", "round_multiplier": 8},
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruning = prepare_pruning(model, [heads, ffns], optimizer, loader())
    train(model, optimizer, 2)
    assert pruning.sparsity().ffn == pruning.sparsity().mha == 0.5


def test_bad_combinations_are_refused_and_change_nothing():
    model = correlated()
    before = copy.deepcopy(model.state_dict())
    config = parse_auto_slim_config(model, pruning_type="obs", end_step=0, **CUT)
    with pytest.raises(ValueError, match="give dataloader="):
        prepare_pruning(model, config)
    with pytest.raises(ValueError, match="dataloader holds no batch"):
        prepare_pruning(model, config, dataloader=[])
    for wrong, told in ((text_inputs(), "got dict"), (0.5, "got float"), (["a text"], "texts")):
        with pytest.raises(TypeError, match=told):
            prepare_pruning(model, config, dataloader=wrong)
    for key, value in (("criterion_reduce_type", "max"), ("low_memory_usage", True)):
        with pytest.raises(ValueError, match=f"{key}={value!r} has no meaning for .*'obs'"):
            WeightPruningConfig(pattern="mha", pruning_type="obs", **{key: value})
    WeightPruningConfig(pattern="mha", pruning_type="obs", criterion_reduce_type="mean")
    with pytest.raises(ValueError, match="optimizer= is needed"):
        prepare_pruning(model, [{**c, "end_step": 3} for c in config], dataloader=loader())
    with torch.no_grad():
        model.encoder.layer[1].intermediate.dense.bias[3] = float("nan")
    with pytest.raises(ValueError, match=r"'encoder\.layer\.1\.output\.dense': .* NaN or infinite"):
        prepare_pruning(model, config, dataloader=loader())
    assert not is_masked(model)
    differing = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert differing == ["encoder.layer.1.intermediate.dense.bias"]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_degenerate_data_is_survived_and_told():
    dense = correlated()
    model = copy.deepcopy(dense)
    one = {k: v[:1, :5] for k, v in text_inputs().items()}
    pruning = prune(model, "obs", batches=[one, one])
    assert "10 tokens, fewer than the 80 inputs" in pruning.notes[0]
    assert pruning.sparsity().ffn == 0.5
    assert all(p.isfinite().all() for p in model.parameters())
    # Forty directions are kept, and ten tokens ask for ten at most.
    assert distance(model, dense, [one]) < 1e-2 * float(outputs_of(dense, **one).square().sum())
    dead = copy.deepcopy(dense)
    with torch.no_grad():
        dead.encoder.layer[0].intermediate.dense.weight[:20] = 0
        dead.encoder.layer[2].output.dense.weight.zero_()
    prune(dead, "obs")
    assert all(p.isfinite().all() for p in dead.parameters())
    constant = remove([Layer(torch.ones(3, 4), torch.zeros(4, 4))], [2, 1])
    assert set(constant.errors.values()) == {0.0}, "a bias makes up for inputs that do not vary"


def test_a_part_of_an_endless_loader_is_read_once():
    model = FAMILIES["bert"]()
    given = []

    def endless():
        while True:
            given.append(text_inputs(16, 24, len(given)))
            given[-1]["labels"] = torch.zeros(16)
            yield given[-1]

    stream = endless()
    prune(model, "obs", batches=stream)
    tokens = [batch.tokens for batch in read_batches(model, given)]
    assert sum(tokens[:-1]) < CALIBRATION_TOKENS <= sum(tokens)
    assert len(first_batches(model, [torch.zeros(0, 4)] * 600)) == 512

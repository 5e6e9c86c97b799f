"""Pruning under DistributedDataParallel: two processes are one process on the same global batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from parallel_cases import adamw, assert_same_run, double_model, outcome, pruned, rules_of, run
from tiny_models import FAMILIES, FFN, VOCAB, text_inputs
from torch.nn.parallel import DistributedDataParallel

import slimkern

STEPS = 8


def one(criterion, micro_batches=1, **values):
    model = double_model()
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of(criterion, **values))
    run(model, optimizer, STEPS, micro_batches=micro_batches)
    return outcome(model, pruning)


def wrapped(seed=0, **values):
    model = double_model(seed)
    return model, DistributedDataParallel(model, **values)


def ddp(criterion, micro_batches, values):
    model, wrapper = wrapped()
    optimizer = adamw(wrapper)
    pruning = pruned(model, optimizer, rules_of(criterion, **values))
    place = {"rank": dist.get_rank(), "size": dist.get_world_size()}
    run(wrapper, optimizer, STEPS, micro_batches=micro_batches, **place)
    return outcome(model, pruning)


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "snip", "snip_momentum"])
@pytest.mark.parametrize(
    "values", [{}, {"criterion_reduce_type": "max", "pruning_scope": "global"}]
)
def test_two_processes_are_one(pair, criterion, values):
    first, second = pair(ddp, criterion, 1, values)
    assert first["plan"] == second["plan"]
    for name, weight in first["model"].items():
        assert torch.equal(weight, second["model"][name]), name
    for name, score in first["state"]["scores"].items():
        assert torch.equal(score, second["state"]["scores"][name]), name
    assert_same_run(first, one(criterion, **values), STEPS)


def test_accumulated_gradients_under_no_sync_are_those_of_one_process(pair):
    first, second = pair(ddp, "snip_momentum", 3, {})
    assert first["plan"] == second["plan"]
    assert_same_run(first, one("snip_momentum", 3), STEPS)


def resumed(stop):
    place = {"rank": dist.get_rank(), "size": dist.get_world_size()}
    found = []
    for parts in ((STEPS,), (stop, STEPS - stop)):
        state, first = None, 0
        for steps in parts:
            model, wrapper = wrapped(seed=first)
            optimizer = adamw(model)
            pruning = pruned(model, optimizer, rules_of("snip_momentum"))
            if state is not None:
                model.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
                pruning.load_state_dict(state[2])
            run(wrapper, optimizer, steps, first, **place)
            first += steps
            state = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), pruning.state_dict())
            )
        found.append(outcome(model, pruning))
    return found


def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(pair):
    for whole, parts in pair(resumed, 3):
        assert whole["plan"] == parts["plan"]
        for name, weight in whole["model"].items():
            assert torch.equal(weight, parts["model"][name]), name


def unsynced():
    """Every rank trains by itself and the weights are averaged after each step."""
    model = double_model()
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of("snip_momentum", pruning_scope="global"))
    for i in range(STEPS):
        run(model, optimizer, 1, first=i, rank=dist.get_rank(), size=dist.get_world_size())
        for parameter in model.parameters():
            dist.all_reduce(parameter.data)
            parameter.data /= dist.get_world_size()
    return pruning.plan().to_json(), pruning.state_dict()["scores"]["0.fc2"]


def test_masks_are_the_same_where_gradients_are_not(pair):
    (first, seen), (second, other) = pair(unsynced)
    assert first == second
    assert not torch.equal(seen, other)


CUT = {"pruning_scope": "local", "end_step": 2, "round_multiplier": 8}


def of_hugging_face(wrap_first):
    model = FAMILIES["bert"]("ForSequenceClassification")
    wrapper = None if not wrap_first else DistributedDataParallel(model)
    given = model if wrapper is None else torch.compile(wrapper)
    configs = slimkern.parse_auto_slim_config(given, ffn2_sparsity=0.5, mha_sparsity=0.5, **CUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruning = slimkern.prepare_pruning(given, configs, optimizer)
    wrapper = wrapper or DistributedDataParallel(model)
    for step in range(3):
        batch = text_inputs(4, 9, seed=2 * step + dist.get_rank())
        wrapper(**batch).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruning.done
    with pytest.raises(slimkern.SurgeryError, match=r"pass the module inside \(model\.module\)"):
        slimkern.slim_(wrapper, pruning.plan())
    batch = text_inputs()
    masked = model.eval()(**batch).logits.detach()
    small = slimkern.model_slim(wrapper, optimizer=optimizer)
    assert small is model
    with pytest.raises(RuntimeError, match="Wrap what model_slim returned anew"):
        wrapper(**batch)
    again = DistributedDataParallel(small)
    again(**batch).logits.square().mean().backward()
    optimizer.step()
    return (
        masked,
        small.bert.encoder.layer[0].output.dense.in_features,
        {n: p.detach() for n, p in small.named_parameters()},
    )


@pytest.mark.parametrize("wrap_first", [True, False])
def test_three_calls_on_the_wrapper_or_before_it(pair, wrap_first):
    first, second = pair(of_hugging_face, wrap_first)
    assert first[1] == FFN // 2
    assert torch.equal(first[0], second[0])
    for name, weight in first[2].items():
        assert torch.equal(weight, second[2][name]), name


def by_obs(scope, with_error):
    rank = dist.get_rank()
    model = DistributedDataParallel(FAMILIES["bert"](dtype=torch.float64))
    batches = [text_inputs(4, 12, seed + 100 * rank) for seed in range(8)]
    if with_error:
        batches[3]["input_ids"][0, 0] = VOCAB + 7 if rank == 0 else 0
    cut = {**CUT, "pruning_scope": scope, "end_step": 0}
    configs = slimkern.parse_auto_slim_config(model, None, 0.5, 0.5, pruning_type="obs", **cut)
    if with_error:
        words = ("out of range", "calibrating at step 0 failed on rank 0: IndexError")[rank]
        with pytest.raises((IndexError, RuntimeError)[rank], match=words):
            slimkern.prepare_pruning(model, configs, None, batches)
        return None
    pruning = slimkern.prepare_pruning(model, configs, None, batches)
    return outcome(model.module, pruning)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_obs_calibrates_on_rank_0_and_all_have_its_weights(pair, scope):
    first, second = pair(by_obs, scope, False)
    model = FAMILIES["bert"](dtype=torch.float64)
    cut = {**CUT, "pruning_scope": scope, "end_step": 0}
    configs = slimkern.parse_auto_slim_config(model, None, 0.5, 0.5, pruning_type="obs", **cut)
    batches = [text_inputs(4, 12, seed) for seed in range(8)]
    wanted = outcome(model, slimkern.prepare_pruning(model, configs, None, batches))
    assert first["plan"] == second["plan"] == wanted["plan"]
    for name, weight in wanted["model"].items():
        assert torch.equal(weight, first["model"][name]), name
        assert torch.equal(weight, second["model"][name]), name


def test_an_error_of_the_calibration_is_one_on_every_rank(pair):
    pair(by_obs, "local", True)


def masked_before(zero):
    """Masks first, then the wrapper; perhaps an optimizer that is dealt out over the ranks."""
    model = double_model()
    pruned(model, None, rules_of("magnitude", end_step=0, target_sparsity=0.25))
    wrapper = DistributedDataParallel(model)
    optimizer = adamw(model)
    if zero:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        values = {"lr": 1e-2, "eps": 1e-3}
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **values)
    pruning = pruned(model, optimizer, rules_of("snip_momentum"))
    run(wrapper, optimizer, STEPS, rank=dist.get_rank(), size=dist.get_world_size())
    if zero:
        with pytest.raises(ValueError, match="ZeroRedundancyOptimizer: its shares"):
            slimkern.slim_(model, pruning.plan(), optimizer)
    return outcome(model, pruning)


@pytest.mark.parametrize("zero", [False, True])
def test_masks_before_the_wrapper_grow_on(pair, zero):
    first, second = pair(masked_before, zero)
    assert first["plan"] == second["plan"]
    model = double_model()
    pruned(model, None, rules_of("magnitude", end_step=0, target_sparsity=0.25))
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of("snip_momentum"))
    run(model, optimizer, STEPS)
    assert_same_run(first, outcome(model, pruning), STEPS)

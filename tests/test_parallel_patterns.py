"""Block patterns in two processes: one process on the same global batch, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_cases import adamw
from pattern_cases import Net, batch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slimkern
from slimkern.patterns.masks import block_masked

STEPS = 7
RULE = {"pattern": "4x1", "target_sparsity": 0.5, "end_step": 5}
REGROW = {"pruning_type": "gradient", "regrow": True}


def net():
    return Net().double()


def trained(model, inner, rule, rank=0, size=1):
    """Train on this rank's share of global batches of 8 rows: masks and weights by name."""
    optimizer = adamw(inner)
    run = slimkern.prepare_pruning(model, rule, optimizer)
    for step in range(STEPS):
        x = torch.cat([batch(step), batch(step + 100)])[:8].double()
        x = x[rank * 8 // size : (rank + 1) * 8 // size]
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    masks = {n: m.mask.blocks() for n, m in block_masked(inner).items()}
    return masks, {n: p.detach() for n, p in inner.named_parameters()}, run.state_dict()["scores"]


def of_rank(rule):
    model = net()
    wrapper = DistributedDataParallel(model)
    found = trained(wrapper, model, rule, dist.get_rank(), dist.get_world_size())
    x = batch(0).double()
    wanted = wrapper(x)
    assert slimkern.model_slim(wrapper, [x], round_multiplier=99) is model  # no channel goes
    assert not block_masked(model)
    torch.testing.assert_close(wrapper(x), wanted)  # its weights are where they were
    return found


@pytest.mark.parametrize("more", [{}, REGROW, {"pattern": "2:4", "pruning_type": "snip"}])
def test_two_processes_are_one(pair, more):
    rule = {**RULE, **more}
    (masks, weights, scores), second = pair(of_rank, rule)
    alone = net()
    wanted = trained(alone, alone, rule)
    eps = torch.finfo(torch.float64).eps
    for name, mask in wanted[0].items():
        assert torch.equal(masks[name], mask)
        assert torch.equal(masks[name], second[0][name])
    for name, weight in wanted[1].items():
        assert torch.equal(weights[name], second[1][name]), name
        # As in parallel_cases.assert_same_run: reassociated sums, passed on by rate / eps = 10.
        assert (weights[name] - weight).abs().max() <= STEPS * 1e4 * eps, name
    for name, score in wanted[2].items():
        torch.testing.assert_close(scores[name], score, rtol=1e-5, atol=0)


def unsynced():
    """Every rank has gradients of its own, and the weights are averaged after each step."""
    model = net()
    optimizer = adamw(model)
    run = slimkern.prepare_pruning(model, RULE, optimizer)
    for step in range(STEPS):
        x = batch(2 * step + dist.get_rank()).double()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for parameter in model.parameters():
            dist.all_reduce(parameter.data)
            parameter.data /= dist.get_world_size()
    return run.state_dict()["blocks"], run.state_dict()["scores"]["fc1"]


def test_masks_are_the_same_where_gradients_are_not(pair):
    (first, seen), (second, other) = pair(unsynced)
    assert all(torch.equal(bits, second[name]) for name, bits in first.items())
    assert not torch.equal(seen, other)


def disagreeing():
    found = []
    for rule in (
        {**RULE, "target_sparsity": 0.5 + 0.1 * dist.get_rank()},
        {**RULE, "op_names": ["fc1", "fc2"][dist.get_rank()]},
    ):
        model = net()
        with pytest.raises(RuntimeError, match="the ranks disagree on what to prune"):
            slimkern.prepare_pruning(model, rule, adamw(model))
        found.append(bool(block_masked(model)))
    return found


def test_ranks_with_other_rules_are_an_error_on_both(pair):
    assert pair(disagreeing) == [[False, False]] * 2


def failing():
    model = net()
    optimizer = adamw(model)
    slimkern.prepare_pruning(model, {**RULE, "end_step": 1}, optimizer)
    x = batch(0).double() * (float("nan") if dist.get_rank() else 1.0)
    model(x).square().mean().backward()
    words = "not finite" if dist.get_rank() else "scoring blocks at step 1 failed on rank 1"
    with pytest.raises(RuntimeError, match=words):
        optimizer.step()


def test_a_failure_on_one_rank_is_one_on_both(pair):
    pair(failing)


def sharded():
    model = net()
    fully_shard(model)
    with pytest.raises(ValueError, match="fc1: its weight is sharded over ranks"):
        slimkern.prepare_pruning(model, RULE, adamw(model))
    late = net()
    optimizer = adamw(late)
    slimkern.prepare_pruning(late, RULE, optimizer)
    fully_shard(late)
    optimizer.param_groups[0]["params"][:] = list(late.parameters())
    late(batch(0).double()).square().mean().backward()
    with pytest.raises(ValueError, match="is sharded over ranks, and a block mask needs"):
        optimizer.step()


def test_sharded_weights_are_refused(pair):
    pair(sharded)

"""Pruning of models that fully_shard has sharded: scores add up over shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_cases import (
    SIZE,
    adamw,
    assert_same_run,
    double_model,
    outcome,
    pruned,
    rules_of,
    run,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = 8


def one(criterion, **values):
    model = double_model()
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of(criterion, **values))
    run(model, optimizer, STEPS)
    return outcome(model, pruning)


def sharded(mesh=None, **values):
    model = double_model()
    mesh = init_device_mesh("cpu", (SIZE,)) if mesh is None else mesh
    for layer in model:
        fully_shard(layer, mesh=mesh, **values)
    return fully_shard(model, mesh=mesh, **values)


def whole(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def fsdp(criterion, values, placement=None):
    model = sharded(**({} if placement is None else {"shard_placement_fn": placement}))
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of(criterion, **values))
    run(model, optimizer, STEPS, rank=dist.get_rank(), size=SIZE)
    found = outcome(model, pruning)
    full = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
    )
    found["model"] = {n: w.clone() for n, w in full.items()}
    return found


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "snip", "snip_momentum"])
@pytest.mark.parametrize(
    "values", [{}, {"criterion_reduce_type": "sum", "pruning_scope": "global"}]
)
def test_two_processes_with_shards_are_one(pair, criterion, values):
    first, second = pair(fsdp, criterion, values)
    assert first["plan"] == second["plan"]
    for name, score in first["state"]["scores"].items():
        assert torch.equal(score, second["state"]["scores"][name]), name
    assert_same_run(first, one(criterion, **values), STEPS)

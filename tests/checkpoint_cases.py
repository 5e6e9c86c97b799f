"""What the tests of save and load share: slim models, and when two models are the same."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from slimkern.discovery import discover
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import slim_

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

FAMILIES = sorted(tiny_models.FAMILIES)


def uneven_plan(model: nn.Module, example=None) -> SlimPlan:
    """Another width in every layer; heads and channels from the middle and both ends."""
    groups = [g for g in discover(model, example).groups if not g.is_head]
    random = torch.Generator().manual_seed(3)
    entries = []
    for i, group in enumerate(groups):
        kept = max(1, group.num_units // 2 - i % 3)
        order = torch.randperm(group.num_units, generator=random)[:kept]
        entries.append(PlanEntry(group, tuple(sorted(order.tolist()))))
    return SlimPlan(tuple(entries))


def even_ffn_plan(model: nn.Module) -> SlimPlan:
    groups = [g for g in discover(model).groups if g.kind == "ffn" and not g.is_head]
    kept = tuple(range(1, 64, 2))
    return SlimPlan(tuple(PlanEntry(g, kept) for g in groups))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_models.text_inputs())[0]


def slimmed(name: str, task: str = "Model", plan=uneven_plan, **options) -> nn.Module:
    model = tiny_models.FAMILIES[name](task, **options)
    return slim_(model, plan(model))


def loose_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    inside = model.state_dict()
    return {n: b for n, b in model.named_buffers() if n not in inside}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert type(a) is type(b)
    assert torch.equal(outputs(a), outputs(b))
    state, other = a.state_dict(), b.state_dict()
    assert list(state) == list(other)
    for name, value in state.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name
    for name, value in loose_buffers(a).items():
        assert torch.equal(value, loose_buffers(b)[name]), name
    assert not any(t.is_meta for t in [*b.parameters(), *b.buffers()])

"""Training with masked blocks takes the course of training with masks multiplied in."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from masked_cases import plan_for
from torch.nn.utils import prune

import slimkern
from slimkern.ops._columns import zero_columns_
from slimkern.surgery import mask_

pytest.importorskip("transformers")
STEPS = 200


def losses(model, after=None):
    """Of 200 steps of AdamW towards fixed random labels."""
    random = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.01)
    found = []
    for step in range(STEPS):
        given = tiny_models.text_inputs(batch=4, length=8, seed=step % 5)
        labels = torch.randint(2, (4,), generator=random)
        loss = torch.nn.functional.cross_entropy(model(**given).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after is not None:
            after()
        found.append(float(loss.detach()))
    return torch.tensor(found, dtype=torch.float64)


def test_the_course_of_training():
    dense = tiny_models.FAMILIES["bert"](
        "ForSequenceClassification",
        num_hidden_layers=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)  # a course that does not blow up roundings
    plan = plan_for(dense)
    masked = mask_(copy.deepcopy(dense), plan)
    assert len(slimkern.masked_blocks(masked)) == 2
    for entry in plan:
        for member in entry.group.consumers:
            linear = dense.get_submodule(member.name)
            units = torch.zeros(entry.group.num_units)
            units[list(entry.keep)] = 1
            mask = units.repeat_interleave(member.unit_size).expand_as(linear.weight)
            prune.custom_from_mask(linear, "weight", mask.contiguous())
    linears = [masked.get_submodule(m.name) for e in plan for m in e.group.consumers]
    got = losses(masked.train(), lambda: [m.zero_masked() for m in linears])
    want = losses(dense.train())
    assert want[-20:].mean() < want[:20].mean()
    assert ((got - want).abs() / want).max() <= 1e-4


@pytest.mark.parametrize("layout", ["plain", "sliced", "transposed"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_columns_are_zeroed_where_they_are_not_zero(dtype, layout):
    keep = torch.tensor([0, 5, 6, 62])
    wide = torch.randn(34, 126).to(dtype)
    w = {"plain": wide[:17, :63].contiguous(), "sliced": wide[::2, :63]}.get(layout)
    w = torch.randn(63, 17).to(dtype).t() if w is None else w
    want = torch.zeros_like(w)
    want[:, keep] = w[:, keep]
    before = w._version
    assert zero_columns_(w, keep) is w
    assert torch.equal(w, want)
    assert w._version > before
    if layout != "transposed":
        before = w._version
        zero_columns_(w, keep)
        assert w._version == before  # nothing was written
    w[3, 1] = float("nan")
    zero_columns_(w, keep)
    assert torch.equal(w, want)
    none = torch.randn(0, 63, dtype=torch.float64).to(dtype)
    assert zero_columns_(none, keep).shape == (0, 63)
    everything = torch.randn(5, 4).to(dtype)
    assert not zero_columns_(everything, torch.empty(0, dtype=torch.int64)).any()

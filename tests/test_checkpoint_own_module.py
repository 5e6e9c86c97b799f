"""Save and load of a module of one's own, which no library can build."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from checkpoint_cases import transformers, uneven_plan
from torch import nn

from slimkern.checkpoint import CheckpointError, load, save
from slimkern.surgery import slim_


class Stack(nn.Module):
    """Two linears in a row, twice, with a tied pair of norms and a buffer that no file holds."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, width), nn.GELU(), nn.Linear(width, 6), nn.LayerNorm(6),
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6), nn.LayerNorm(6),
        )  # fmt: skip
        self.body[7].weight = self.body[3].weight
        self.register_buffer("scale", torch.arange(6.0), persistent=False)
        self.register_buffer("seen", torch.zeros(2))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.body(x) * self.scale)


def _stack() -> tuple[Stack, torch.Tensor]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = tiny_models.randomize(Stack())
    return slim_(model, uneven_plan(model, x)), x


def test_a_module_of_ones_own(tmp_path):
    model, x = _stack()
    save(model.double(), tmp_path / "slim")
    fresh = Stack().eval()
    loaded = load(tmp_path / "slim", model=fresh)
    assert loaded is fresh
    assert torch.equal(loaded(x.double()), model(x.double()))
    assert loaded.body[7].weight is loaded.body[3].weight
    assert loaded.slim_plan == model.slim_plan
    with pytest.raises(CheckpointError, match="model="):
        load(tmp_path / "slim")
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(tmp_path / "slim")


def test_a_module_that_does_not_fit_is_left_alone(tmp_path):
    model, _ = _stack()
    save(model, tmp_path / "slim")
    other = Stack()
    other.more = nn.Linear(2, 2)
    for wrong in (Stack(width=20), other, copy.deepcopy(model), nn.Linear(2, 2)):
        before = {n: (id(p), p.clone()) for n, p in wrong.named_parameters()}
        with pytest.raises(CheckpointError):
            load(tmp_path / "slim", model=wrong)
        for name, parameter in wrong.named_parameters():
            identity, value = before[name]
            assert id(parameter) == identity
            assert torch.equal(parameter, value)

"""Operations that keep channels apart, alone and in chains: found, and cut exactly."""

from __future__ import annotations

import math

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
from discovery_cases import WIDTH, X, assert_exact, between, scale
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slimkern.discovery import discover

EXACT = {
    "gelu": (lambda s, h, x: F.gelu(h), {}),
    "tanh gelu": (lambda s, h, x: F.gelu(h, approximate="tanh"), {}),
    "spelled-out gelu": (
        lambda s, h, x: (
            0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))))
        ),
        {},
    ),
    "relu6": (lambda s, h, x: F.relu6(h), {}),
    "leaky relu": (lambda s, h, x: F.leaky_relu(h, 0.2), {}),
    "elu": (lambda s, h, x: F.elu(h), {}),
    "celu": (lambda s, h, x: F.celu(h), {}),
    "mish": (lambda s, h, x: F.mish(h), {}),
    "softplus": (lambda s, h, x: F.softplus(h), {}),
    "hardswish": (lambda s, h, x: F.hardswish(h), {}),
    "log sigmoid": (lambda s, h, x: F.logsigmoid(h), {}),
    "softsign": (lambda s, h, x: F.softsign(h), {}),
    "squared": (lambda s, h, x: h * h, {}),
    "in place": (lambda s, h, x: h.mul_(2).relu_(), {}),
    "where": (lambda s, h, x: torch.where(h > 0, h, h.exp() - 1), {}),
    "masked fill": (lambda s, h, x: h.masked_fill(h < 0, 0.1), {}),
    "dropout": (lambda s, h, x: s.d(h), {"d": nn.Dropout(0.5)}),
    "shared prelu": (lambda s, h, x: s.p(h), {"p": nn.PReLU()}),
    "over other dimensions": (lambda s, h, x: h.softmax(1) + h.mean(1, keepdim=True), {}),
    "there and back": (
        lambda s, h, x: h.permute(2, 0, 1).unsqueeze(1).tanh().squeeze(1).movedim(0, -1),
        {},
    ),
    "flattened batch": (lambda s, h, x: h.reshape(15, -1).tanh().reshape(3, 5, -1), {}),
    "padded tokens": (lambda s, h, x: F.pad(h, (0, 0, 1, 2))[:, 1:6], {}),
    "repeated batch": (lambda s, h, x: h.repeat(2, 1, 1)[:3], {}),
    "masked tokens": (lambda s, h, x: h[x.sum(-1) > -99].view(3, 5, -1), {}),
    "chosen tokens": (lambda s, h, x: h[torch.arange(3)], {}),
    "top tokens": (lambda s, h, x: h.topk(5, dim=1).values, {}),
    "one scale for all": (lambda s, h, x: h * s.g, {"g": scale(1)}),
    "scale per token": (lambda s, h, x: h * x.mean(-1, keepdim=True), {}),
    "other dtype": (lambda s, h, x: h.float().tanh().double(), {}),
    "scale per channel": (lambda s, h, x: h * s.g + s.b, {"g": scale(WIDTH), "b": scale(WIDTH)}),
    "second branch": (lambda s, h, x: h + s.k(x), {"k": nn.Linear(10, WIDTH)}),
    "gate": (lambda s, h, x: F.silu(h) * s.k(x), {"k": nn.Linear(10, WIDTH, bias=False)}),
    "gate per block": (lambda s, h, x: h * s.k(x)[:, :1], {"k": nn.Linear(10, WIDTH)}),
    "embedded scale": (
        lambda s, h, x: h * s.e(torch.arange(5)),
        {"e": nn.Embedding(7, WIDTH)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_entry_by_entry_operations_are_exact(name):
    middle, children = EXACT[name]
    assert_exact(between(middle, **children))


def test_per_channel_parameters_are_cut():
    found = assert_exact(between(*EXACT["scale per channel"][:1], **EXACT["scale per channel"][1]))
    assert {(b.name, b.dim, b.unit_size) for b in found["second"].between} == {
        ("g", 0, 1),
        ("b", 0, 1),
    }


def test_prelu_per_channel():
    model = between(lambda s, h, x: s.p(h), p=nn.PReLU(WIDTH))
    x = X[:, 0]
    found = assert_exact(model, x)
    assert [b.name for b in found["second"].between] == ["p.weight"]


def test_a_matrix_that_is_no_linear_still_ends_the_head():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.tail = tm.mlp(4, 6, 5), nn.Parameter(torch.ones(5, 3))

        def forward(self, x):
            return self.body(x) @ self.tail

    (group,) = discover(Tail(), torch.zeros(2, 4)).groups
    assert (group.name, group.is_head) == ("body.2", False)


def test_consumer_that_is_producer_of_the_next():
    found = discover(tm.mlp(5, 6, 7, 8), torch.zeros(2, 5))
    assert [(g.name, g.producers[0].name, g.num_units, g.is_head) for g in found] == [
        ("2", "0", 6, False),
        ("4", "2", 7, True),
    ]


POOL = {
    "relu": lambda s, h, x: h.relu(),
    "tanh": lambda s, h, x: h.tanh(),
    "square": lambda s, h, x: h * h,
    "scale": lambda s, h, x: h * s.g,
    "gate": lambda s, h, x: h * s.k(x).sigmoid(),
    "token": lambda s, h, x: h + x.mean(-1, keepdim=True),
    "blocks": lambda s, h, x: h.unflatten(-1, (-1, 6)).tanh().flatten(-2),
    "block softmax": lambda s, h, x: h.unflatten(-1, (-1, 6)).softmax(-1).flatten(-2),
    "block mix": lambda s, h, x: h.unflatten(-1, (-1, 6)).softmax(-2).flatten(-2),
    "over tokens": lambda s, h, x: h.softmax(1) + h.mean(1, keepdim=True),
    "swap": lambda s, h, x: h.transpose(0, 1).flip(0).transpose(0, 1),
    "in place": lambda s, h, x: h.clone().mul_(0.5).add_(h),
    "split": lambda s, h, x: torch.cat(h.split(12, -1)[::-1], -1),
    "stack": lambda s, h, x: torch.stack([h, h.exp().log()], 0).sum(0),
    "norm": lambda s, h, x: F.layer_norm(h, h.shape[-1:]),
    "shift": lambda s, h, x: h.roll(2, -1),
    "max": lambda s, h, x: h - h.amax(-1, keepdim=True),
    "constant": lambda s, h, x: h * torch.linspace(0, 1, h.shape[-1], dtype=h.dtype),
    "transpose": lambda s, h, x: h.unflatten(-1, (-1, 6)).mT.flatten(-2),
    "expand": lambda s, h, x: h.unsqueeze(0).expand(2, -1, -1, -1).sum(0),
    "attend": lambda s, h, x: (x @ x.mT).softmax(-1) @ h,
    "gram": lambda s, h, x: (h @ h.mT).softmax(-1) @ h,
    "outer": lambda s, h, x: (h.unsqueeze(-1) * h.unsqueeze(-2)).sum(-1),
    "diagonal": lambda s, h, x: torch.diag_embed(h).diagonal(dim1=-2, dim2=-1),
    "width": lambda s, h, x: h * h.shape[-1] ** -0.5,
}  # fmt: skip
KEEPS = ["relu", "tanh", "square", "scale", "gate", "token", "over tokens", "swap", "in place"]


def chain(names):
    def middle(s, h, x):
        for name in names:
            h = POOL[name](s, h, x)
        return h

    return between(middle, g=scale(WIDTH), k=nn.Linear(10, WIDTH)), names


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(sorted(POOL)), min_size=1, max_size=4, unique=True))
def test_any_chain_is_found_exact_or_refused(names):
    model, _ = chain(names)
    found = discover(model, X)
    if found.groups:
        assert_exact(model)
    else:
        assert "second" in {r.name for r in found.refused}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(KEEPS), min_size=1, max_size=5, unique=True))
def test_chains_that_keep_channels_apart_are_found(names):
    assert_exact(chain(names)[0])

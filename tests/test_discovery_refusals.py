"""What discovery must refuse, with which reason."""

from __future__ import annotations

import math

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
from discovery_cases import WIDTH, X, between, scale
from torch import nn

from slimkern.discovery import discover

MIXED = {
    "layer norm": (lambda s, h, x: s.n(h), {"n": nn.LayerNorm(WIDTH)}, "'layer_norm' in 'n'"),
    "batch norm": (
        lambda s, h, x: s.n(h.mT).mT, {"n": nn.BatchNorm1d(WIDTH)}, "'batch_norm' in 'n'",
    ),
    "softmax": (lambda s, h, x: h.softmax(-1), {}, "'softmax'"),
    "sum": (lambda s, h, x: h + h.sum(-1, keepdim=True), {}, "'sum'"),
    "norm": (lambda s, h, x: F.normalize(h, dim=-1), {}, "norm"),
    "cumsum": (lambda s, h, x: h.cumsum(-1), {}, "'cumsum'"),
    "sort": (lambda s, h, x: h.sort(-1).values, {}, "'sort'"),
    "flip": (lambda s, h, x: h.flip(-1), {}, "'flip'"),
    "roll": (lambda s, h, x: h.roll(1, -1), {}, "'roll'"),
    "triu": (lambda s, h, x: torch.triu(h), {}, "'triu'"),
    "cat": (lambda s, h, x: torch.cat([h, h], -1), {"second": 48}, "'cat'"),
    "chunks": (
        lambda s, h, x: h.chunk(2, -1)[0] * h.chunk(2, -1)[1], {"second": 12}, "takes a part",
    ),
    "glu": (lambda s, h, x: F.glu(h), {"second": 12}, "'glu'"),
    "part": (lambda s, h, x: h[..., :12], {"second": 12}, "takes a part"),
    "permuted": (
        lambda s, h, x: h.unflatten(-1, (4, 6)).mT.flatten(-2), {}, "not in the same order",
    ),
    "padded": (lambda s, h, x: F.pad(h, (1, -1)), {}, "'constant_pad_nd'"),
    "repeated": (lambda s, h, x: h.repeat(1, 1, 2), {"second": 48}, "'repeat'"),
    "largest": (lambda s, h, x: h.topk(24, -1).values, {}, "'topk'"),
    "masked": (lambda s, h, x: h[h.abs() > -1].view(3, 5, -1), {}, "'index'"),
    "indexed": (lambda s, h, x: h[..., torch.arange(WIDTH)], {}, "'index'"),
    "convolution": (lambda s, h, x: s.c(h.mT).mT, {"c": nn.Conv1d(24, 24, 1)}, "'convolution'"),
    "recurrent": (lambda s, h, x: s.c(h)[0], {"c": nn.LSTM(24, 24, batch_first=True)}, "(LSTM)"),
    "buffer": (lambda s, h, x: h * s.g, {"g": torch.ones(WIDTH)}, "'g', which can't be cut"),
    "constant": (lambda s, h, x: h * torch.arange(24.0), {}, "a constant, which can't be cut"),
    "misused scale": (lambda s, h, x: h * s.g + s.g.sum(), {"g": scale(24)}, "'sum'"),
    "flipped scale": (lambda s, h, x: h * s.g.flip(0), {"g": scale(24)}, "'flip'"),
    "random": (lambda s, h, x: h * torch.rand_like(h), {}, "'rand_like'"),
    "written into": (
        lambda s, h, x: torch.zeros(3, 5, 48, dtype=h.dtype).index_copy(2, torch.arange(24), h),
        {"second": 48},
        "'index_copy'",
    ),
    "written in place": (lambda s, h, x: (h[..., :3].zero_(), h)[1], {}, "takes a part"),
    "branch on data": (lambda s, h, x: h if h.sum() > 0 else h + 1, {}, "'sum'"),
    "channel as number": (lambda s, h, x: h * h.amax((0, 1))[0].item(), {}, "takes a part"),
    "matrix": (lambda s, h, x: h @ s.m, {"m": scale(24, 24)}, "'m' multiplies them"),
    "one head": (lambda s, h, x: (x @ x.mT).softmax(-1) @ h, {}, "a single head"),
    "residual": (lambda s, h, x: F.relu(h + s.r(x)), {"r": nn.Conv1d(5, 5, 15)}, "residual"),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in MIXED if n != "residual"])
def test_what_cannot_be_cut_is_refused_with_the_place(name):
    middle, children, reason = MIXED[name]
    model = between(middle, **children)
    found = discover(model, X)
    assert not found.groups
    assert reason in {r.name: r.reason for r in found.refused}["second"]


def test_the_operation_depends_on_the_width():
    for middle in (
        lambda s, h, x: h / h.shape[-1],
        lambda s, h, x: h / math.sqrt(h.shape[-1]),
        lambda s, h, x: h + torch.full((), h.shape[-1], dtype=h.dtype),
        lambda s, h, x: h * torch.tensor(1.0 / h.shape[-1]),
        lambda s, h, x: h.view(3, 5, WIDTH),
        lambda s, h, x: h.view(3, 5, 4, -1).tanh().flatten(2),
        lambda s, h, x: h if h.shape[-1] == WIDTH else h + 1,
    ):
        found = discover(between(middle), X)
        assert not found.groups
        assert [r.name for r in found.refused] == ["second"]
        assert "units" in found.refused[0].reason


def test_residual_into_the_middle():
    model = between(lambda s, h, x: F.relu(h + x), hidden=WIDTH)
    found = discover(model, torch.zeros(3, 5, WIDTH))
    assert not found.groups
    assert "a residual is added" in found.refused[0].reason


def test_gated_residual_is_not_taken_for_a_stream():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            x = self.norm(x + self.inner(x))
            return x + self.second(torch.sigmoid(self.first(x)) * x)

    found = discover(Block(), torch.zeros(2, 3, 8))
    assert not found.groups
    assert [r.name for r in found.refused] == ["second"]


def test_second_consumers():
    model = between(lambda s, h, x: h * s.k(h).mean(), k=nn.Linear(WIDTH, 3))
    found = discover(model, X)
    reasons = {r.name: r.reason for r in found.refused}
    assert not found.groups
    assert set(reasons) == {"second", "k"}
    assert all("consumed by 'k', 'second'" in r for r in reasons.values())


def test_an_output_of_the_model():
    class Shows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            h = self.a(x).relu()
            return {"y": self.b(h), "extra": [h]}

    found = discover(Shows(), torch.zeros(2, 4))
    assert not found.groups
    assert "an output of the model" in found.refused[0].reason


def test_linears_that_are_not_plain():
    class Own(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    model = between(lambda s, h, x: s.o(F.relu(h)), o=Own(WIDTH, WIDTH))
    reasons = {r.name: r.reason for r in discover(model, X).refused}
    assert "Own is not supported" in reasons["o"]
    assert "second" in reasons or not discover(model, X).groups

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
    model = between(lambda s, h, x: s.o(F.relu(h)), o=normed)
    found = discover(model, X)
    assert not found.groups
    assert "parametrization" in {r.name: r.reason for r in found.refused}["o"]


def test_tied_functional_repeated_and_idle_linears():
    tied = between(lambda s, h, x: F.relu(h) + 0 * s.t(x).sum(), t=nn.Linear(10, WIDTH))
    tied.t.weight = tied.first.weight
    found = discover(tied, X)
    assert "tied to 't.weight'" in {r.name: r.reason for r in found.refused}["second"]

    used = between(lambda s, h, x: F.relu(h) + F.linear(x, s.first.weight))
    found = discover(used, X)
    reasons = {r.name: r.reason for r in found.refused}
    assert "used outside it" in reasons["first"]
    assert "second" in reasons

    twice = between(lambda s, h, x: F.relu(h) + s.first(x))
    reasons = {r.name: r.reason for r in discover(twice, X).refused}
    assert "several times" in reasons["first"]
    assert "several times" in reasons["second"]

    idle = between(lambda s, h, x: F.relu(h), i=nn.Linear(3, 4))
    found = discover(idle, X)
    assert [g.name for g in found] == ["second"]
    assert {r.name: r.reason for r in found.refused} == {"i": "not called by the example inputs"}


def test_conv1d_of_gpt2_is_refused_by_name():
    found = discover(tm.OTHERS["gpt2"]("LMHeadModel"))
    assert not found.groups
    assert len(found.refused) == 4 * tm.LAYERS
    assert all("Conv1D is not supported" in r.reason for r in found.refused)


def test_shared_layers_of_albert_are_refused():
    found = discover(tm.OTHERS["albert"]("ForSequenceClassification"))
    assert [g.name for g in found if not g.is_head] == []
    assert len([r for r in found.refused if "several times" in r.reason]) == 6


def test_keyword_calls_complex_constants_and_scripted_parts():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)
            self.script = torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.ReLU()))

        def forward(self, x):
            h = self.a(input=x) * torch.tensor(1j) * 2j
            return self.b(input=h.abs()), self.script(x)

    found = discover(Odd(), torch.zeros(2, 4))
    assert [g.name for g in found] == ["b"]
    assert "script.0" in {r.name for r in found.refused}


def test_hooks_that_change_the_computation_are_seen():
    model = between(lambda s, h, x: F.relu(h))
    assert len(discover(model, X).groups) == 1
    model.first.register_forward_hook(lambda m, i, out: out.flip(-1))
    found = discover(model, X)
    assert not found.groups
    assert "'flip'" in found.refused[0].reason

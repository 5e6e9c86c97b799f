"""Example inputs in every form, and a model that is left as it was."""

from __future__ import annotations

import copy

import pytest
import tiny_models as tm
import torch
import torch.nn.functional as F
from discovery_cases import X, between
from torch import nn

from slimkern.discovery import discover


def test_inputs_in_every_form():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x, y=None):
            return self.b(self.a(x).relu())

    x, model = torch.zeros(2, 4), Two()
    expected = discover(model, x)
    for given_inputs in ((x,), [x], {"x": x}, (x, x), (x, x, torch.zeros(2)), {"x": x.double()}):
        assert discover(model, given_inputs) == expected
    with pytest.raises(ValueError, match=r"example_inputs.*int"):
        discover(model, 3)
    with pytest.raises(ValueError, match="example_inputs: needed for Two"):
        discover(model)


def test_a_batch_with_labels_for_a_hugging_face_model():
    model = tm.FAMILIES["bert"]("ForSequenceClassification")
    before = model.config.to_dict()
    batch = {**tm.text_inputs(), "labels": torch.tensor([0, 1, 0])}
    assert discover(model, batch) == discover(model)
    assert model.config.to_dict() == before


def test_a_branch_on_data_is_followed_on_real_tensors():
    model = between(lambda s, h, x: F.relu(h) if x.sum() > -1e9 else h.flip(-1))
    assert [g.name for g in discover(model, X)] == ["second"]
    model = between(lambda s, h, x: F.relu(h) if x.sum() < -1e9 else h.flip(-1))
    assert not discover(model, X).groups


class Busy(nn.Module):
    """Counts its calls, keeps what it saw, writes into a buffer and registers another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(4, 6), nn.Linear(6, 4), 0
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.cache = x
        self.seen += x.sum(0)
        self.register_buffer("late", x.clone())
        assert not self.training
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model = Busy().train()
    model.b.eval()
    events = []
    model.a.register_forward_hook(lambda *_: events.append(1))
    keys = {m: list(m.__dict__) for m in model.modules()}
    weights = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    identities = {n: id(p) for n, p in model.named_parameters()}
    if fails:
        with pytest.raises(RuntimeError):
            discover(model, torch.zeros(2, 5))
    else:
        assert len(discover(model, torch.ones(2, 4)).groups) == 1
    assert {m: list(m.__dict__) for m in model.modules()} == keys
    assert model.calls == 0
    assert [m.training for m in (model, model.a, model.b)] == [True, True, False]
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.a(torch.zeros(2, 4)).shape == (2, 6)

"""What the tests of the three calls share: training, zeros, and how exact a slim model must be."""

from __future__ import annotations

import copy
import math

import torch
from tiny_models import FFN, LAYERS, text_inputs

from slimkern.auto_slim import prepare_pruning


def ids(seed=0):
    return text_inputs(2, 6, seed)


def train(model, optimizer, steps=2, first=0):
    model.train()
    for step in range(first, first + steps):
        outputs = model(**ids(step))
        sum(o.float().square().mean() for o in outputs.to_tuple()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def outputs_of(model, **inputs):
    with torch.no_grad():
        return torch.cat([o.double().flatten() for o in model(**inputs).to_tuple()])


def assert_as_exact_as(model, masked, dense):
    """``model`` is as near to the masked weights in fp64 as the dense computation of them is."""
    inputs = text_inputs()
    exact = outputs_of(copy.deepcopy(dense).double(), **inputs)
    dtype = next(dense.parameters()).dtype
    # Another order of summation: as good as independent roundings of the sums in each layer.
    sums = torch.finfo(dtype).eps * math.sqrt(LAYERS * FFN) * exact.abs().max()
    allowed = (outputs_of(dense, **inputs) - exact).abs().max() + sums
    for candidate in (model, masked):
        assert (outputs_of(candidate, **inputs) - exact).abs().max() <= allowed


def prepared(model, config, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return prepare_pruning(model, config, optimizer, **arguments)


def zeroed(model, name, units, size=1):
    weight = model.get_submodule(name).weight
    with torch.no_grad():
        for unit in units:
            weight[:, unit * size : (unit + 1) * size] = 0
    return model

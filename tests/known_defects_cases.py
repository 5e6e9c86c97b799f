"""What the tests of known defects share: a short schedule, zeros, a run and a training loop."""

from __future__ import annotations

import torch
from tiny_models import text_inputs

ONE_STEP = {"pruning_scope": "local", "end_step": 1, "round_multiplier": 8}


def zero_columns(linear, columns):
    with torch.no_grad():
        linear.weight[:, columns] = 0


def run(model, *args, **kwargs):
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


def train(model, optimizer, steps=1, batch=None):
    for step in range(steps):
        inputs = text_inputs(seed=step) if batch is None else {}
        outputs = model(batch) if batch is not None else model(**inputs)[0]
        outputs.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

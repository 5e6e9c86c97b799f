"""What the tests of block patterns share: small models, slow selection, and training by masks."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import nn

import slimkern

PATTERNS = ["4x1", "32x32", "1x16", "1x1", "2:4", "1:2", "channelx2", "2xchannel", "7x5"]
SIZES = (20, 36, 24)  # inputs, hidden, outputs: divisible by 2 and 4, ragged for other blocks


class Net(nn.Module):
    """Three linears, of which the last is the head."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2 = nn.Linear(SIZES[0], SIZES[1]), nn.Linear(SIZES[1], SIZES[2])
        self.head = nn.Linear(SIZES[2], 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(torch.nn.functional.gelu(self.fc1(x)))))


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(7, SIZES[0], generator=generator, dtype=torch.float64).to(dtype)


def loss_of(model, step):
    dtype = next(model.parameters()).dtype
    x = batch(step, dtype)
    return (model(x) - x[:, :3]).square().mean()


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def started(model, pattern="4x1", optimizer=None, **values):
    """A pruning run of the model, and its optimizer."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    values = {"target_sparsity": 0.5, "end_step": 4, **values}
    config = {"pattern": pattern, **values}
    return slimkern.prepare_pruning(model, config, optimizer), optimizer


def one_shot(model, pattern="4x1", **values):
    """A pruning run that cuts by magnitude at once."""
    values = {"pruning_type": "magnitude", "end_step": 0, "target_sparsity": 0.5, **values}
    return slimkern.prepare_pruning(model, {"pattern": pattern, **values})


def slow_items(share, items):
    """floor(share * items), where share is the short decimal or ratio that was meant."""
    return int(Fraction(share).limit_denominator(10**9) * items)


def slow_lowest(scores, count, floor, cap):
    """Which items of which layers go: one sort of everything, in plain Python.

    Args:
        scores: layer name -> list of numbers.
        count: how many go in all.
        floor, cap: layer name -> the least and the most that go of it.
    """
    ranked = {n: sorted(range(len(s)), key=lambda i: (s[i], i)) for n, s in scores.items()}
    gone = {n: set(ranked[n][: floor[n]]) for n in scores}
    queue = sorted(
        (scores[n][i], place, i, n)
        for place, n in enumerate(scores)
        for i in ranked[n][floor[n] : cap[n]]
    )
    for _, _, i, name in queue[: max(0, count - sum(map(len, gone.values())))]:
        gone[name].add(i)
    return gone


def slow_blocks(elements, block, reduce_type):
    """Scores of blocks, by two loops over the blocks of a list of lists."""
    (bn, bk), rows, cols = block, len(elements), len(elements[0])
    found = []
    for top in range(0, rows, bn):
        found.append([])
        for left in range(0, cols, bk):
            own = [v for row in elements[top : top + bn] for v in row[left : left + bk]]
            total = math.fsum(own)
            found[-1].append({"mean": total / len(own), "sum": total, "max": max(own)}[reduce_type])
    return found

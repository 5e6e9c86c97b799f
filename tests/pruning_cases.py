"""What the tests of pruning share: a small model, its groups, and runs that prune it."""

from __future__ import annotations

import torch
from torch import nn

from slimkern.config import WeightPruningConfig
from slimkern.discovery.groups import Attribute, Group, Member
from slimkern.pruning import Pruning

LAYERS, HIDDEN, WIDTH, HEADS, HEAD_DIM = 3, 8, 64, 4, 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = HEADS
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HEADS * HEAD_DIM) for _ in range(3))
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN)
        self.fc1, self.fc2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.o(y)
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))


def ffn(i):
    return Group(
        f"{i}.fc2", "ffn", WIDTH, (Member(f"{i}.fc1", 1, "producer"),),
        (Member(f"{i}.fc2", 1, "consumer"),),
    )  # fmt: skip


def mha(i):
    roles = (("q", "query"), ("k", "key"), ("v", "value"))
    return Group(
        f"{i}.o", "mha", HEADS, tuple(Member(f"{i}.{n}", HEAD_DIM, r) for n, r in roles),
        (Member(f"{i}.o", HEAD_DIM, "consumer"),), (), (Attribute(str(i), "heads", 1),),
    )  # fmt: skip


FFNS, MHAS = tuple(map(ffn, range(LAYERS))), tuple(map(mha, range(LAYERS)))


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


def rule(pattern="channelx1", **values):
    defaults = {"target_sparsity": 0.5, "end_step": 4, "pruning_scope": "local"}
    values = {"round_multiplier": 1, **defaults, **values}
    return WeightPruningConfig({"pattern": pattern, **values}).rules[0]


def start(model, *rules, optimizer="adamw", **values):
    if optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    elif optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    rules = rules or (rule(**values),)
    pairs = [(r, FFNS if r.pattern == "channelx1" else MHAS) for r in rules]
    return Pruning(model, pairs, optimizer), optimizer


def train(model, optimizer, steps, first=0, micro_batches=1):
    for i in range(first, first + steps):
        for j in range(micro_batches):
            generator = torch.Generator().manual_seed(1000 * i + j)
            x = torch.randn(2, 5, HIDDEN, generator=generator)
            (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def widths(model):
    kept = []
    for group in (*FFNS, *MHAS):
        cols = getattr(model.get_submodule(group.name), "cols", None)
        size = group.consumers[0].unit_size
        kept.append(group.num_units if cols is None else len(cols) // size)
    return kept

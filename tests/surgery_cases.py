"""What the tests of surgery share: a block, its groups, a plan, and the rounding allowed."""

from __future__ import annotations

import torch
from torch import nn

from slimkern.discovery.groups import Attribute, Group, Member
from slimkern.plan import PlanEntry, SlimPlan

HEADS, HEAD_DIM, HIDDEN, WIDTH = 4, 6, 10, 17


class Attention(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.num_heads, self.all_head_size = HEADS, HEADS * HEAD_DIM
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.k = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.v = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=bias)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (
            p(x).view(b, s, self.num_heads, HEAD_DIM).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, s, self.all_head_size))


class Block(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.attention = Attention(bias)
        self.fc1 = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.fc2 = nn.Linear(WIDTH, HIDDEN, bias=bias)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))


FFN = Group("fc2", "ffn", WIDTH, (Member("fc1", 1, "producer"),), (Member("fc2", 1, "consumer"),))
MHA = Group(
    "attention.o",
    "mha",
    HEADS,
    tuple(
        Member(f"attention.{n}", HEAD_DIM, r)
        for n, r in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    (Member("attention.o", HEAD_DIM, "consumer"),),
    attributes=(
        Attribute("attention", "num_heads", 1),
        Attribute("attention", "all_head_size", HEAD_DIM),
    ),
)
PLAN = SlimPlan((PlanEntry(FFN, (0, 3, 4, 9, 16)), PlanEntry(MHA, (1, 3))))


def make_block(dtype=torch.float32, bias=True) -> Block:
    torch.manual_seed(0)
    return Block(bias).to(dtype).eval()


def inputs(dtype=torch.float32):
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_equal_to_rounding(a, b, like):
    """Two orders of summing the same products differ by at most the rounding of the longest sum."""
    scale = like.abs().max()
    steps = max(HIDDEN, WIDTH, HEADS * HEAD_DIM)
    assert (a - b).abs().max() <= 4 * steps * torch.finfo(a.dtype).eps * scale

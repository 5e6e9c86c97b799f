"""What must work right after an install with torch alone: the three calls and a reload."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import slimkern


def model() -> nn.Module:
    """A residual block whose FFN can be slimmed."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), nn.Linear(8, 1))


assert Path(slimkern.__file__).parent.parent != Path(__file__).resolve().parents[1], "not installed"
x = torch.randn(5, 8)
net = model()
found = slimkern.discover(net, x)
plan = slimkern.make_plan(found, slimkern.importance(net, found), ffn_sparsity=0.5)
masked = slimkern.mask_(model(), plan)
small = slimkern.slim_(net, plan)
assert (masked(x) - small(x)).abs().max() < 1e-5
for isa in slimkern.cpu.available_isas():
    slimkern.cpu.set_isa(isa)
    y = slimkern.ops.indexed_linear(x, net[0].weight, net[0].bias, backend="cpu")
    assert (y - net[0](x)).abs().max() < 1e-5, isa
with tempfile.TemporaryDirectory() as folder:
    slimkern.save(small, Path(folder) / "slim")
    assert torch.equal(slimkern.load(Path(folder) / "slim", model=model())(x), small(x))
print(f"slimkern {slimkern.__version__} works: {slimkern.cpu.available_isas()}")

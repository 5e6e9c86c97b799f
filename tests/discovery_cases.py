"""What the tests of discovery share: two linears with anything between, cut exactly."""

from __future__ import annotations

import tiny_models as tm
import torch
from exactness import assert_deletion_is_exact
from torch import nn

from slimkern.discovery import discover

X = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WIDTH = 24


def between(middle, **children):
    """A model ``second(middle(first(x)))`` in fp64 with random weights."""
    return tm.randomize(tm.Between(middle, **children).double())


def scale(*shape):
    return nn.Parameter(torch.ones(*shape))


def assert_exact(model, x=X):
    found = discover(model, x)
    assert [g.name for g in found] == ["second"], str(found)
    with torch.no_grad():
        assert_deletion_is_exact(model, found, lambda m: m(x))
    return found

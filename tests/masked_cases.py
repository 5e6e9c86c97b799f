"""What the tests of masked blocks share: weights, and masked, dense and slim models."""

from __future__ import annotations

import copy
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn

from slimkern.discovery import discover
from slimkern.ops._weights import AttentionWeights, FfnWeights, LinearWeights, NormWeights
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import mask_

FAMILIES = sorted(tiny_models.FAMILIES)


class Maker:
    """Random leaves of a dtype."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.dtype, self.random = dtype, torch.Generator().manual_seed(seed)
        self.leaves: list[Tensor] = []

    def tensor(self, *shape: int, scale: float = 0.5, strided: bool = False) -> Tensor:
        wide = (*shape[:-1], 2 * shape[-1]) if strided else shape
        made = torch.randn(wide, generator=self.random, dtype=torch.float64) * scale
        made = (made[..., ::2] if strided else made).to(self.dtype).requires_grad_()
        self.leaves.append(made)
        return made

    def linear(self, out: int, inner: int, bias: bool = True) -> LinearWeights:
        return LinearWeights(self.tensor(out, inner), self.tensor(out) if bias else None)

    def norm(self, size: int) -> NormWeights:
        return NormWeights(self.tensor(size), self.tensor(size), 1e-5)

    def ffn(self, hidden: int, channels: int, activation: str, ending: str, bias: bool = True):
        post = self.norm(hidden) if ending == "norm" else None
        return FfnWeights(
            self.linear(channels, hidden, bias), self.linear(hidden, channels, bias),
            activation=activation, post=post, residual=ending != "plain",
        )  # fmt: skip

    def attention(self, hidden: int, heads: int, d: int, ending: str, bias: bool = True):
        post = self.norm(hidden) if ending == "norm" else None
        made = [self.linear(heads * d, hidden, bias) for _ in range(3)]
        return AttentionWeights(
            *made, self.linear(hidden, heads * d, bias), d, post=post, residual=ending != "plain"
        )


def kept(size: int, count: int | None, seed: int = 0) -> Tensor | None:
    if count is None:
        return None
    random = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=random)[:count].sort().values


def whole_heads(heads: Tensor | None, d: int) -> Tensor | None:
    return None if heads is None else (heads[:, None] * d + torch.arange(d)).flatten()


def gradients(y: Tensor, leaves: list[Tensor], seed: int = 1) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    grad = torch.randn(y.shape, generator=random, dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def plan_for(model: nn.Module, ffn: slice = slice(1, None, 3), mha: slice = slice(0, None, 2)):
    """Every third channel and every second head, of the layers' own."""
    entries = []
    for group in discover(model).groups:
        if not group.is_head:
            units = range(group.num_units)
            entries.append(PlanEntry(group, tuple(units[ffn if group.kind == "ffn" else mha])))
    return SlimPlan(tuple(entries))


def masked_pair(family: str, dtype: torch.dtype = torch.float64, **options: Any):
    """A model of two layers masked in blocks, and the same one dense with zeros."""
    layers = {"n_layers" if family == "distilbert" else "num_hidden_layers": 2}
    dense = tiny_models.FAMILIES[family](**{**layers, **options}).to(dtype)
    plan = plan_for(dense)
    masked = mask_(copy.deepcopy(dense), plan)
    zeroed = {m.name for e in plan for m in e.group.consumers}
    for name in zeroed:
        weight = dense.get_parameter(f"{name}.weight")
        weight.data.copy_(masked.get_parameter(f"{name}.weight").data)
    return masked, dense


def layer_of(model: Any, index: int = 0) -> Any:
    stack = getattr(model, "transformer", None) or model.encoder
    return stack.layer[index]


def step(model: nn.Module, given: dict[str, Tensor], **call: Any) -> list[Tensor]:
    """The attended outputs and the gradients of all parameters."""
    model.zero_grad()
    y = model(**given, **call)[0][given["attention_mask"].bool()]
    random = torch.Generator().manual_seed(3)
    target = torch.randn(y.shape, generator=random, dtype=torch.float64).to(y.dtype)
    (y - target).square().mean().backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [y.detach(), *grads]


def masked_entries(model: nn.Module) -> list[Tensor]:
    """For each parameter, whether a masked unit owns the entry."""
    from slimkern.nn import MaskedLinear

    owned = {id(p): torch.zeros_like(p, dtype=torch.bool) for p in model.parameters()}
    for linear in model.modules():
        if isinstance(linear, MaskedLinear):
            for side, dim in (("rows", 0), ("cols", 1)):
                index = getattr(linear, side)
                if index is None:
                    continue
                dead = torch.ones(linear.weight.shape[dim], dtype=torch.bool)
                dead[index] = False
                owned[id(linear.weight)] |= dead[:, None] if dim == 0 else dead
                if dim == 0 and linear.bias is not None:
                    owned[id(linear.bias)] |= dead
    return [owned[id(p)] for p in model.parameters()]

"""What the tests of ``fuse_`` share: tiny slim models, calls, and what a fused one may differ."""

from __future__ import annotations

import copy
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn

from slimkern import accuracy, fuse_
from slimkern.discovery import Group, discover
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import slim_

FAMILIES = sorted(tiny_models.FAMILIES)
BERT_LIKE = ["bert", "electra", "roberta", "xlm-roberta"]


def _keep(cut: str, group: Group, index: int) -> tuple[int, ...]:
    units = range(group.num_units)
    if cut == "even":
        return tuple(units[::2])
    if cut == "extreme":  # one head, one channel
        return (units[-1],)
    return tuple(units[index % 3 : group.num_units - index : 1 if group.kind == "mha" else 2])


def tiny(
    family: str, cut: str = "uneven", dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """A tiny model of two layers: ``dense``, ``even``, ``uneven`` or ``extreme``."""
    layers = {"n_layers" if family == "distilbert" else "num_hidden_layers": 2}
    model = tiny_models.FAMILIES[family](**{**layers, **options})
    if cut != "dense":
        groups = [g for g in discover(model).groups if not g.is_head]
        mha = [g for g in groups if g.kind == "mha"]
        ffn = [g for g in groups if g.kind == "ffn"]
        entries = [
            PlanEntry(g, _keep(cut, g, i)) for kind in (mha, ffn) for i, g in enumerate(kind)
        ]
        slim_(model, SlimPlan(tuple(entries)))
    return model.to(dtype)


def layer_of(model: Any, index: int = 0) -> Any:
    """One of the encoder layers."""
    stack = getattr(model, "transformer", None) or model.encoder
    return stack.layer[index]


def inputs(padded: bool = True, **sizes: int) -> dict[str, Tensor]:
    """Token ids and a mask; ragged on the right where it is padded."""
    made = tiny_models.text_inputs(**sizes)
    if not padded:
        made["attention_mask"] = torch.ones_like(made["attention_mask"])
    return made


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The first output at the positions that are attended to, [positions, hidden]."""
    with torch.no_grad():
        y = model(**given)[0]
    return y[given["attention_mask"].bool()]


def assert_as_exact(fused: nn.Module, plain: nn.Module, given: Any, kind: str) -> None:
    """The fused model's error against float64 is within what plain PyTorch's may be."""
    exact = copy.deepcopy(plain).double()
    want = run(exact, given)
    bound = accuracy.rounding_bound(lambda: run(exact, given), want, kind)
    got = run(fused, given)
    assert got.dtype == next(plain.parameters()).dtype
    assert accuracy.relative_error(got, want) <= bound < 0.2


def fused_copy(model: nn.Module, precision: str | None = "highest") -> Any:
    """A fused copy of a model."""
    return fuse_(copy.deepcopy(model), precision=precision)

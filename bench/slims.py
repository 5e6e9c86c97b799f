"""The slim models of the table: which units stay, and the same cut made in three ways.

slimkern's own removal, plain slicing by hand, and Torch-Pruning's dependency graph start from the
same dense module and the same plan and must give the same module: a check that slim is slim. The
names in a plan are those of the module that ``Work.build`` returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import slimkern
from bench.work import Work
from slimkern.discovery.groups import Group
from slimkern.plan import PlanEntry, SlimPlan


def plan_of(
    module: nn.Module, inputs: tuple[Tensor, ...], ffn: Sequence[int], heads: Sequence[int]
) -> SlimPlan:
    """The units of largest magnitude, as many as asked of each layer.

    Args:
        module: dense.
        inputs: its positional arguments.
        ffn: FFN channels that stay, one number per layer in order of execution.
        heads: the same for attention heads.

    Raises:
        ValueError: the module has another number of layers than ``ffn`` or ``heads``.
    """
    found = slimkern.discover(module, inputs)
    scores = slimkern.importance(module, found, criterion="magnitude")
    entries = []
    for kind, widths in (("ffn", ffn), ("mha", heads)):
        groups = [group for group in found if group.kind == kind]
        if len(groups) != len(widths):
            raise ValueError(f"{len(widths)} widths ({kind}) for {len(groups)} layers: {widths}")
        entries += [_best(group, scores[group.name], n) for group, n in zip(groups, widths)]
    return SlimPlan(tuple(entries))


def _best(group: Group, scores: Tensor, count: int) -> PlanEntry:
    order = scores.argsort(descending=True, stable=True)[:count]
    return PlanEntry(group, tuple(order.sort().values.tolist()))


class SlimBuild:
    """Builds a slim module: a dense one, cut by slimkern. The plan is made at the first call.

    Args:
        dense: builds the module before the cut.
        inputs: positional arguments of it, of any shape.
        ffn, heads: see :func:`plan_of`.
    """

    def __init__(
        self,
        dense: Callable[[], nn.Module],
        inputs: Callable[[], tuple[Tensor, ...]],
        ffn: Sequence[int],
        heads: Sequence[int],
    ) -> None:
        self.dense, self.inputs, self.ffn, self.heads = dense, inputs, ffn, heads
        self._plan: SlimPlan | None = None

    def __call__(self) -> nn.Module:
        return slimkern.slim_(self.dense(), self.plan())

    def plan(self) -> SlimPlan:
        """The plan, the same at every call."""
        if self._plan is None:
            self._plan = plan_of(self.dense(), self.inputs(), self.ffn, self.heads)
        return self._plan


def dense_and_plan(work: Work) -> tuple[nn.Module, SlimPlan]:
    """A fresh dense module and the plan of a slim work.

    Raises:
        ValueError: the work is not slim.
    """
    if work.dense is None or work.plan is None:
        raise ValueError(f"{work.case} is no slim work; accepted: works with dense and plan")
    return work.dense(), work.plan()


@torch.no_grad()
def hand_sliced(work: Work) -> nn.Module:
    """The slim module as one makes it by hand: new linears out of indexed weights."""
    module, plan = dense_and_plan(work)
    for entry in plan:
        keep = torch.tensor(entry.keep)
        for dim, members in ((0, entry.group.producers), (1, entry.group.consumers)):
            for member in members:
                linear = module.get_submodule(member.name)
                size = member.unit_size
                kept = (keep[:, None] * size + torch.arange(size)).flatten()
                owner, _, name = member.name.rpartition(".")
                setattr(module.get_submodule(owner), name, _sliced(linear, kept, dim))
    return module


def _sliced(linear: nn.Linear, kept: Tensor, dim: int) -> nn.Linear:
    weight = linear.weight.index_select(dim, kept)
    bias = linear.bias[kept] if dim == 0 else linear.bias
    sliced = nn.Linear(weight.shape[1], weight.shape[0])
    sliced.weight, sliced.bias = nn.Parameter(weight), nn.Parameter(bias.clone())
    return sliced


def torch_pruning_missing() -> str | None:
    """Why :func:`torch_pruned` can't run here, or None."""
    return None if find_spec("torch_pruning") else "torch-pruning is not installed"


def torch_pruned(work: Work) -> nn.Module:
    """The slim module as Torch-Pruning makes it.

    Its dependency graph finds what depends on the removed rows of the first linear (in attention:
    of the query), and prunes the whole group. https://github.com/VainF/Torch-Pruning

    Raises:
        RuntimeError: it has found another group than the plan's.
    """
    import torch_pruning as tp

    module, plan = dense_and_plan(work)
    with torch.enable_grad():
        graph = tp.DependencyGraph().build_dependency(module, copy.deepcopy(work.inputs()))
    for entry in plan:
        first = entry.group.producers[0]
        gone = sorted(set(range(entry.group.num_units)) - set(entry.keep))
        rows = [u * first.unit_size + i for u in gone for i in range(first.unit_size)]
        linear = module.get_submodule(first.name)
        group = graph.get_pruning_group(linear, tp.prune_linear_out_channels, idxs=rows)
        found = {d.target.module for d, _ in group if isinstance(d.target.module, nn.Linear)}
        members = (*entry.group.producers, *entry.group.consumers)
        if found != {module.get_submodule(m.name) for m in members}:
            raise RuntimeError(f"{entry.group.name}: Torch-Pruning's group is another: {group}")
        group.prune()
    return module

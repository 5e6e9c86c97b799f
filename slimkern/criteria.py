"""Importance of units: element scores, reduced over the weights that a unit owns.

Element scores of a weight W with gradient G: ``magnitude`` \\|W\\|, ``gradient`` \\|G\\|,
``snip`` \\|W G\\| (Lee et al. 2019), and ``snip_momentum``, the decaying sum
``s = 0.9 s + |W G|`` over optimizer steps. A unit's score is their mean (or sum, or maximum) over
its columns in the second linear for an FFN channel, and the average over q, k, v and the output
projection of the same reduction for a head: the definitions of Intel Neural Compressor 2.6.
Layers that are tied contribute their average. A unit that no second linear reads (its columns are
zero, as those of a masked unit are) has no magnitude.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.discovery.groups import Group, Member
from slimkern.shards import add_shares_, is_sharded, local, unit_share

CRITERIA = ("magnitude", "gradient", "snip", "snip_momentum")
MOMENTUM = 0.9

_REDUCE: dict[str, Callable[[Tensor, tuple[int, int]], Tensor]] = {
    "mean": lambda t, dims: t.mean(dims),
    "sum": lambda t, dims: t.sum(dims),
    "max": lambda t, dims: t.amax(dims),
}


def scored_members(group: Group) -> tuple[Member, ...]:
    """The linears whose weights decide: the second of an FFN, all four of an attention."""
    return group.consumers if group.kind == "ffn" else (*group.producers, *group.consumers)


def element_scores(weight: Tensor, grad: Tensor | None, criterion: str) -> Tensor:
    """Scores of a weight's elements in fp32, same shape (``snip_momentum``: one step's term).

    Raises:
        ValueError: the criterion is unknown, or needs a gradient that is not there.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if criterion == "magnitude":
        return weight.detach().float().abs()
    if grad is None:
        raise ValueError(f"criterion {criterion!r} needs a gradient, and there is none")
    if criterion == "gradient":
        return grad.detach().float().abs()
    return (weight.detach().float() * grad.detach().float()).abs_()


def reduce_units(elements: Tensor, member: Member, reduce_type: str = "mean") -> Tensor:
    """Element scores [out, in] -> one score per unit, over its rows or its columns.

    Raises:
        ValueError: ``reduce_type`` is unknown.
    """
    if reduce_type not in _REDUCE:
        raise ValueError(f"reduce_type must be one of {', '.join(_REDUCE)}, got {reduce_type!r}")
    if member.role == "consumer":
        return _REDUCE[reduce_type](elements.unflatten(1, (-1, member.unit_size)), (0, 2))
    return _REDUCE[reduce_type](elements.unflatten(0, (-1, member.unit_size)), (1, 2))


def _unit_scores(elements: Tensor, weight: Tensor, member: Member, reduce_type: str) -> Tensor:
    """As :func:`reduce_units`; of a sharded weight this rank's share, for ``add_shares_``."""
    if not is_sharded(weight):
        return reduce_units(elements, member, reduce_type)
    dim = 1 if member.role == "consumer" else 0
    return unit_share(elements, weight, dim, member.unit_size, reduce_type == "mean")


class ScoreKeeper:
    """Scores of some groups while a model trains.

    ``observe`` is called with fresh gradients before an optimizer step; ``scores`` reads the
    result. What is stored per linear is one number per unit, or per element for the reduce type
    ``max``, where the maximum of sums is not the sum of maxima.

    Args:
        groups: the groups.
        criterion: one of ``CRITERIA``.
        reduce_type: ``mean``, ``sum`` or ``max``.
        low_memory: per-element scores are stored in bfloat16.
        memory: the factor m of ``s = m s + new``; by default that of the criterion, which is 0.9
            for ``snip_momentum`` and 0 (the last gradient counts) for the others.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        criterion: str = "snip_momentum",
        reduce_type: str = "mean",
        low_memory: bool = False,
        memory: float | None = None,
    ) -> None:
        self.groups = tuple(groups)
        self.criterion = criterion
        self.reduce_type = reduce_type
        usual = MOMENTUM if criterion == "snip_momentum" else 0.0
        self.memory = usual if memory is None else memory
        self.dtype = torch.bfloat16 if low_memory and reduce_type == "max" else torch.float32
        self.state: dict[str, Tensor] = {}

    @torch.no_grad()
    def observe(
        self,
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor | None],
        scale: Tensor | float = 1.0,
    ) -> None:
        """Take in the gradient of every member that has one.

        Args:
            weights, grads: member name -> its weight, and the weight's gradient.
            scale: what the gradients were multiplied by (a loss scale not yet undone).
        """
        fresh: dict[str, Tensor] = {}
        for member in (m for g in self.groups for m in scored_members(g)):
            weight, grad = weights[member.name], grads[member.name]
            if grad is None:
                continue
            new = element_scores(local(weight), local(grad), self.criterion)
            if self.reduce_type != "max":
                new = _unit_scores(new, weight, member, self.reduce_type)
            fresh[member.name] = new / scale  # every criterion here is linear in the gradients
        add_shares_(fresh, weights)
        for name, new in fresh.items():
            old = self.state.get(name)
            if old is not None and self.memory:
                new = new.add_(old.float(), alpha=self.memory)
            self.state[name] = new.to(self.dtype)

    @torch.no_grad()
    def scores(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{group name: fp32 scores [num_units]}``.

        Raises:
            RuntimeError: a gradient was needed and none but zeros has arrived at a group since
                the start, or one held infinity or NaN.
        """
        return {group.name: self._group(group, weights) for group in self.groups}

    def _group(self, group: Group, weights: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for member in scored_members(group):
            if self.criterion == "magnitude":
                weight = weights[member.name]
                elements = element_scores(local(weight), None, self.criterion)
                share = {member.name: _unit_scores(elements, weight, member, self.reduce_type)}
                add_shares_(share, weights)
                parts.append(share[member.name])
            elif member.name in self.state:
                state = self.state[member.name].float()
                whole = self.reduce_type == "max"
                parts.append(reduce_units(state, member, "max") if whole else state)
        if not parts:
            raise RuntimeError(
                f"{group.name}: no gradient has reached its weights, and criterion "
                f"{self.criterion!r} needs one (are they frozen, or was backward() not called?)"
            )
        score = torch.stack(parts).mean(0)
        if self.criterion == "magnitude":  # the weights of a dead or masked head still have a size
            score = score * _live_units(group, weights)
        if not torch.isfinite(score).all():
            raise RuntimeError(f"{group.name}: scores are not finite; a gradient held inf or NaN")
        if self.criterion != "magnitude" and not score.any() and _alive(group, weights):
            raise RuntimeError(
                f"{group.name}: all scores are zero, as every gradient so far was; criterion "
                f"{self.criterion!r} can't tell its units apart"
            )
        return score


def _live_units(group: Group, weights: Mapping[str, Tensor]) -> Tensor:
    """1 for a unit that any consumer reads, 0 for one whose columns are all zero: [num_units]."""
    sizes = {
        m.name: _unit_scores(local(weights[m.name]).detach().abs(), weights[m.name], m, "max")
        for m in group.consumers
    }
    add_shares_(sizes, weights)
    return (torch.stack(list(sizes.values())).amax(0) > 0).float()


def _alive(group: Group, weights: Mapping[str, Tensor]) -> bool:
    """Whether any consumer has a weight that is not zero (a dead layer rightly scores zero)."""
    return bool(_live_units(group, weights).any())


def importance(
    model: nn.Module,
    groups: Iterable[Group],
    criterion: str = "magnitude",
    batches: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Scores per unit of a model as it stands.

    The criteria that read gradients run forward and backward over ``batches`` in evaluation mode
    (no dropout) and average over them (``snip_momentum``: decaying sum in order). The model's
    gradients, ``requires_grad`` flags and training mode are left as they were found.

    Args:
        model: the model; a batch goes in as ``model(**batch)`` for a mapping, ``model(*batch)``
            for a tuple or list, ``model(batch)`` otherwise.
        groups: what :func:`slimkern.discover` returned, or some of its groups.
        criterion: ``magnitude``, ``gradient``, ``snip`` or ``snip_momentum``.
        batches: inputs, for the criteria that read gradients.
        loss: ``loss(outputs, batch) -> scalar``; without it ``outputs.loss`` is taken.

    Returns:
        ``{group name: fp32 tensor [num_units]}``.

    Raises:
        ValueError: an argument is missing or unknown, or the outputs have no loss.
        RuntimeError: no gradient reached a group, or scores are not finite.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    keeper = ScoreKeeper(groups, criterion, memory=MOMENTUM if "momentum" in criterion else 1.0)
    names = [m.name for g in keeper.groups for m in scored_members(g)]
    weights: dict[str, Tensor] = {n: model.get_parameter(f"{n}.weight") for n in names}
    if criterion == "magnitude":
        return keeper.scores(weights)
    if batches is None:
        raise ValueError(f"criterion {criterion!r} reads gradients and needs batches=")
    count = 0
    with differentiable(model, weights.values()):
        for batch in batches:
            value = _loss_of(model, batch, loss)
            wanted = list(dict.fromkeys(weights.values()))
            found = dict(zip(wanted, torch.autograd.grad(value, wanted, allow_unused=True)))
            keeper.observe(weights, {n: found[w] for n, w in weights.items()})
            count += 1
    if not count:
        raise ValueError("batches= held no batch")
    scores = keeper.scores(weights)
    return scores if criterion == "snip_momentum" else {n: s / count for n, s in scores.items()}


def _loss_of(model: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] | None) -> Tensor:
    if isinstance(batch, Mapping):
        outputs = model(**batch)
    elif isinstance(batch, (tuple, list)):
        outputs = model(*batch)
    else:
        outputs = model(batch)
    value = loss(outputs, batch) if loss is not None else getattr(outputs, "loss", None)
    if value is None:
        raise ValueError("the outputs have no .loss: give labels in the batches, or loss=")
    if value.dim() or not value.requires_grad:
        raise ValueError(
            f"the loss must be a scalar that depends on the weights, got shape "
            f"{tuple(value.shape)}, requires_grad={value.requires_grad}"
        )
    return value


@contextmanager
def differentiable(model: nn.Module, weights: Iterable[Tensor]) -> Iterator[None]:
    """Evaluation mode, gradients for ``weights`` alone; everything as before at the end."""
    modes = {m: m.training for m in model.modules()}
    flags = {p: p.requires_grad for p in model.parameters()}
    wanted = set(weights)
    try:
        model.eval()
        for parameter in flags:
            parameter.requires_grad_(parameter in wanted)
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

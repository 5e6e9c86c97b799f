"""One pruning rule over a run: when it cuts, what it has seen, and which units stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimkern.config import PruningRule
from slimkern.criteria import ScoreKeeper, scored_members
from slimkern.discovery.groups import Group
from slimkern.parallel import Ranks
from slimkern.schedule import prune_steps, sparsity_at
from slimkern.selection import select
from slimkern.shards import check_shards, is_sharded

ALONE = Ranks()
MASKED = -1.0  # below every score: what is masked stays masked, also where live scores are zero


@dataclass
class RuleTrack:
    """When a rule cuts, what it reads, and how much is gone by then."""

    rule: PruningRule
    steps: range
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def names(self) -> tuple[str, ...]:
        """The linears whose weights are scored."""
        raise NotImplementedError

    @property
    def subject(self) -> tuple[Any, ...]:
        """The rule and what it prunes, which are the same on every rank."""
        raise NotImplementedError

    def check(self, weights: Mapping[str, Tensor], optimizer: Any) -> None:
        """Refuse weights that this rule can't be followed on, and a run without an optimizer.

        Raises:
            ValueError: no optimizer counts the steps, a criterion needs the gradient of a frozen
                weight, the rule needs whole weights and they are sharded, or how is not known.
        """
        if optimizer is None and self.steps[-1] > 0:
            raise ValueError(
                f"optimizer= is needed: pattern {self.rule.pattern!r} is to be pruned up to "
                f"step {self.steps[-1]}, and steps are the optimizer's (without one, only "
                f"pruning_type='magnitude' or 'obs' with start_step=0 and end_step=0)"
            )
        frozen = [n for n in self.names if not weights[n].requires_grad]
        if self.rule.needs_gradients and frozen:
            raise ValueError(
                f"pruning_type={self.rule.pruning_type!r} reads gradients, but these weights "
                f"are frozen: {', '.join(frozen)}; use 'magnitude' or unfreeze them"
            )

    def observes(self, step: int) -> bool:
        """Whether the gradients of the optimizer step after ``step`` completed ones count."""
        if not self.rule.needs_gradients or step >= self.steps[-1]:
            return False
        return self.rule.pruning_type == "snip_momentum" or step + 1 in self.steps

    def sparsity(self, step: int) -> float:
        """The fraction that is to be removed after ``step`` completed steps."""
        rule = self.rule
        return sparsity_at(step, self.steps, rule.target_sparsity, rule.sparsity_decay_type)

    def floor(self, sparsity: float) -> float:
        """What each layer loses at least when all together lose ``sparsity``.

        It grows with the sparsity: it is a part of the target, not a first cut.
        """
        rule = self.rule
        share = sparsity / rule.target_sparsity if rule.target_sparsity else 1.0
        return rule.min_sparsity_ratio_per_op * share


def checked_steps(rule: PruningRule) -> range:
    """The prune steps of a rule.

    Raises:
        ValueError: there is no schedule, or it prunes before there are gradients.
    """
    if rule.end_step is None:
        raise ValueError(
            "when to prune is not known: give end_step (the optimizer step at which the "
            "target is reached) or total_steps (the length of the training)"
        )
    steps = prune_steps(rule.start_step, rule.end_step, rule.pruning_frequency)
    if steps[0] == 0 and rule.needs_gradients:
        raise ValueError(
            f"start_step=0 and end_step=0 prune before the first optimizer step, but "
            f"pruning_type={rule.pruning_type!r} reads gradients: give an end_step of at "
            f"least 1, or total_steps, or pruning_type='magnitude' (or 'obs')"
        )
    return steps


@dataclass
class Track(RuleTrack):
    """One rule at work on its groups: its prune steps, its scores, and what it had to leave."""

    groups: tuple[Group, ...]
    keeper: ScoreKeeper

    @classmethod
    def start(cls, rule: PruningRule, groups: tuple[Group, ...]) -> Track:
        """A rule before its first step.

        Raises:
            ValueError: there is no schedule, or it prunes before there are gradients.
        """
        steps = checked_steps(rule)
        keeper = ScoreKeeper(
            groups, rule.pruning_type, rule.criterion_reduce_type, rule.low_memory_usage
        )
        track = cls(rule, steps, groups, keeper)
        if rule.pruning_scope == "local":  # the widths do not depend on scores: known ahead
            flat = {g.name: torch.zeros(g.num_units) for g in groups}
            track.notes = track._select(flat, rule.target_sparsity)[1]
        return track

    @property
    def names(self) -> tuple[str, ...]:
        """The linears whose weights are scored."""
        return tuple(m.name for g in self.groups for m in scored_members(g))

    @property
    def subject(self) -> tuple[Any, ...]:
        """The rule and what it prunes, which are the same on every rank."""
        return self.rule, self.groups

    def check(self, weights: Mapping[str, Tensor], optimizer: Any) -> None:
        """As :meth:`RuleTrack.check`; of sharded weights also that their scores can be had."""
        super().check(weights, optimizer)
        sharded = [n for n in self.names if is_sharded(weights[n])]
        check_shards({n: weights[n] for n in sharded})
        if sharded and self.rule.criterion_reduce_type == "max":
            raise ValueError(
                f"criterion_reduce_type='max' keeps a score of every element, and "
                f"{sharded[0]!r} is sharded; accepted for sharded weights: 'mean', 'sum'"
            )

    def choose(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        keep: Mapping[str, tuple[int, ...]],
        ranks: Ranks = ALONE,
    ) -> dict[str, tuple[int, ...]]:
        """The units that stay after ``step`` completed steps; what is masked stays masked.

        Args:
            step: a prune step.
            weights: linear name -> its weight.
            keep: group name -> the units that are kept so far.
            ranks: whose scores are averaged, so that all choose alike.

        Raises:
            RuntimeError: no gradient, or none but zeros, has reached a group.
        """
        if not self.sparsity(step):
            return {g.name: keep[g.name] for g in self.groups}
        with ranks.together(f"scoring units at step {step}"):
            scores = self.keeper.scores(weights)
        return self.highest(step, ranks.mean(scores), keep)

    def highest(
        self, step: int, scores: Mapping[str, Tensor], keep: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[int, ...]]:
        """:meth:`choose` by these scores, which are written to: ``{group name: [num_units]}``."""
        for name, score in scores.items():
            masked = torch.ones_like(score, dtype=torch.bool)
            masked[list(keep[name])] = False
            score[masked] = MASKED
        chosen, notes = self._select(scores, self.sparsity(step))
        if step == self.steps[-1]:
            self.notes = notes
        # A group with more masks than the ratio asks for by now is left as it is.
        return {n: tuple(sorted({*own} & {*keep[n]})) for n, own in chosen.items()}

    def own_scores(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """This rule's part of saved scores, on the weights' devices.

        Raises:
            ValueError: a shape is that of another configuration.
        """
        found = {}
        for group in self.groups:
            for name in (m.name for m in scored_members(group) if m.name in scores):
                weight = weights[name]
                whole = self.rule.criterion_reduce_type == "max"
                want = tuple(weight.shape) if whole else (group.num_units,)
                if tuple(scores[name].shape) != want:
                    raise ValueError(
                        f"scores of {name!r} have shape {tuple(scores[name].shape)}, expected "
                        f"{want}: the state is of another configuration"
                    )
                found[name] = scores[name].to(weight.device, self.keeper.dtype, copy=True)
        return found

    def _select(
        self, scores: Mapping[str, Tensor], sparsity: float
    ) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
        rule = self.rule
        return select(
            scores,
            sparsity,
            scope=rule.pruning_scope,
            multiple_of=rule.round_multiplier if rule.pattern == "channelx1" else 1,
            min_sparsity=self.floor(sparsity),
            max_sparsity=rule.max_sparsity_ratio_per_op,
        )

"""One rule with a block pattern over a run: what it has seen, and which blocks stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimkern.config import PruningRule
from slimkern.parallel import Ranks
from slimkern.patterns.pattern import BlockPattern
from slimkern.patterns.scores import BlockScores, BlockTarget
from slimkern.patterns.selection import group_elements, group_scores, select_items
from slimkern.shards import is_sharded
from slimkern.track import ALONE, MASKED, RuleTrack, checked_steps


@dataclass
class BlockTrack(RuleTrack):
    """A rule at work on its layers."""

    targets: tuple[BlockTarget, ...]
    keeper: BlockScores

    @classmethod
    def start(cls, rule: PruningRule, targets: tuple[BlockTarget, ...]) -> BlockTrack:
        """A rule before its first step.

        Raises:
            ValueError: there is no schedule, or it prunes before there are gradients.
        """
        keeper = BlockScores(
            targets, rule.pruning_type, rule.criterion_reduce_type, rule.low_memory_usage
        )
        return cls(rule, checked_steps(rule), targets, keeper)

    @property
    def pattern(self) -> BlockPattern:
        """The rule's pattern."""
        pattern = self.rule.block
        assert pattern is not None
        return pattern

    @property
    def names(self) -> tuple[str, ...]:
        """The linears whose weights are scored."""
        return tuple(t.name for t in self.targets)

    @property
    def subject(self) -> tuple[Any, ...]:
        """The rule and what it prunes, which are the same on every rank."""
        return self.rule, self.targets

    def check(self, weights: Mapping[str, Tensor], optimizer: Any) -> None:
        """As :meth:`RuleTrack.check`; sharded weights are refused."""
        super().check(weights, optimizer)
        sharded = [n for n in self.names if is_sharded(weights[n])]
        if sharded:
            raise ValueError(
                f"pattern {self.rule.pattern!r}: {sharded[0]!r} is sharded over ranks, and a block "
                f"mask needs the weight whole; use DistributedDataParallel"
            )

    def needs_dense(self, step: int) -> bool:
        """Whether masked weights need gradients in the step after ``step`` completed ones."""
        return self.rule.regrow and self.observes(step)

    @torch.no_grad()
    def choose(
        self,
        step: int,
        weights: Mapping[str, Tensor],
        kept: Mapping[str, Tensor],
        ranks: Ranks = ALONE,
    ) -> dict[str, Tensor]:
        """The blocks that stay after ``step`` completed steps.

        Without ``regrow`` what is masked stays masked.

        Args:
            step: a prune step.
            weights: layer name -> its weight, as it is stored.
            kept: layer name -> bool [block rows, block columns], the blocks that are kept so far.
            ranks: whose scores are averaged, so that all choose alike.

        Raises:
            RuntimeError: no gradient, or none but zeros, has reached a layer.
        """
        sparsity = self.sparsity(step)
        if not sparsity:
            return {t.name: kept[t.name] for t in self.targets}
        with ranks.together(f"scoring blocks at step {step}"):
            scores = self.keeper.scores(weights)
        scores = ranks.mean(scores)
        if not self.rule.regrow:
            for name, score in scores.items():
                score[~kept[name]] = MASKED
        gone, notes = select_items(
            {n: self._items(s) for n, s in scores.items()},
            self.pattern,
            sparsity,
            scope=self.rule.pruning_scope,
            min_sparsity=self.floor(sparsity),
            max_sparsity=self.rule.max_sparsity_ratio_per_op,
        )
        if step == self.steps[-1]:
            self.notes = notes
        chosen = {n: ~self._blocks(scores[n], gone[n]) for n in scores}
        # A layer with more masks than the ratio asks for by now is left as it is.
        return chosen if self.rule.regrow else {n: c & kept[n] for n, c in chosen.items()}

    def own_scores(
        self, scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """This rule's part of saved scores, on the weights' devices.

        Raises:
            ValueError: a shape is that of another configuration.
        """
        found = {}
        for target in (t for t in self.targets if t.name in scores):
            score, want = scores[target.name], self.keeper.state_shape(target)
            if tuple(score.shape) != want:
                raise ValueError(
                    f"scores of {target.name!r} have shape {tuple(score.shape)}, expected "
                    f"{want}: the state is of another configuration"
                )
            device = weights[target.name].device
            found[target.name] = score.to(device, self.keeper.dtype, copy=True)
        return found

    def _items(self, score: Tensor) -> Tensor:
        if not self.pattern.of:
            return score.flatten()
        return group_scores(score, self.pattern, self.rule.criterion_reduce_type)

    def _blocks(self, score: Tensor, gone: Tensor) -> Tensor:
        if not self.pattern.of:
            return gone.view(score.shape)
        return group_elements(score, gone, self.pattern)

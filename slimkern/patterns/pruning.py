"""The part of a pruning run that moves block masks: what :class:`slimkern.Pruning` calls.

It counts no steps and mounts no hooks of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.config import PruningRule
from slimkern.nn import BlockMasked
from slimkern.ops import BlockMask
from slimkern.parallel import Ranks
from slimkern.patterns.masks import block_masked, mask_blocks_
from slimkern.patterns.scores import BlockTarget
from slimkern.patterns.track import BlockTrack
from slimkern.pruning_report import GroupReport
from slimkern.track import ALONE

BlockRules = Iterable[tuple[PruningRule, tuple[BlockTarget, ...]]]
Kept = dict[str, Tensor]


class Digest:
    """Blocks as a text that tells them apart, made only where somebody reads it."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = kept

    def __str__(self) -> str:
        return hashlib.sha256(self.kept.cpu().contiguous().numpy().tobytes()).hexdigest()


def digests(kept: Mapping[str, Tensor]) -> dict[str, Digest]:
    """What ranks hold against each other of the blocks that they keep."""
    return {name: Digest(blocks) for name, blocks in kept.items()}


class BlockPruning:
    """Block masks of a model, and the rules that move them.

    Args:
        model: the model. Its linears are masked from the first cut on; masks that it carries stay.
        rules: each rule with the layers it prunes.

    Attributes:
        tracks: the rules at work, in order.

    Raises:
        ValueError: a rule lacks a schedule, or prunes before there are gradients.
    """

    def __init__(self, model: nn.Module, rules: BlockRules) -> None:
        self.model = model
        self.tracks = [BlockTrack.start(rule, targets) for rule, targets in rules]
        self.targets = {t.name: t for track in self.tracks for t in track.targets}
        self._last: dict[str, BlockMask] = {}  # masks, as last seen; their bits are the modules'
        self.kept()

    def kept(self) -> Kept:
        """Layer name -> bool [block rows, block columns]: the blocks that are kept, as of now.

        Once masks were taken off, the blocks that were kept by then.
        """
        found: Kept = {}
        for name, target in self.targets.items():
            module = self.model.get_submodule(name)
            if isinstance(module, BlockMasked):
                self._last[name] = module.mask
            if name in self._last:
                found[name] = self._last[name].blocks()
            else:
                weight = self.model.get_parameter(f"{name}.weight")
                found[name] = torch.ones(target.grid, dtype=torch.bool, device=weight.device)
        return found

    @property
    def released(self) -> bool:
        """Whether masks were taken off since the last cut, as ``model_slim`` does."""
        return any(
            not isinstance(self.model.get_submodule(name), BlockMasked) for name in self._last
        )

    def observe(self, step: int, weights: Mapping[str, Tensor], scale: Tensor | float) -> None:
        """Read the gradients of the optimizer step after ``step`` completed ones.

        Where they are dense, they are masked then: the optimizer gets what it would have got.
        """
        for track in self.tracks:
            if track.observes(step):
                grads = {n: weights[n].grad for n in track.names}
                track.keeper.observe(weights, grads, scale)
        for module in self._modules():
            if module.dense_gradient:
                module.mask_gradient()

    def clean(self) -> None:
        """After an optimizer step: masked weights are zero again."""
        for module in self._modules():
            module.zero_moved()

    def choose(self, step: int, weights: Mapping[str, Tensor], ranks: Ranks = ALONE) -> Kept:
        """The blocks that stay of the layers whose rules have ``step`` among their prune steps."""
        tracks = [t for t in self.tracks if step in t.steps]
        kept = self.kept() if tracks else {}
        return {n: k for t in tracks for n, k in t.choose(step, weights, kept, ranks).items()}

    def apply(self, kept: Mapping[str, Tensor]) -> None:
        """Mask what is not kept. Only bits change: weights and optimizer state stay in place."""
        now = self.kept()
        moved = {n: k for n, k in kept.items() if not torch.equal(k.to(now[n].device), now[n])}
        mask_blocks_(self.model, {n: (self.targets[n].block, k) for n, k in moved.items()})
        self._last = {n: m.mask for n, m in block_masked(self.model).items() if n in self.targets}

    def ready(self, step: int) -> None:
        """Ask for dense gradients where the step after ``step`` completed ones needs them."""
        for track in self.tracks:
            for name in track.names:
                module = self.model.get_submodule(name)
                if isinstance(module, BlockMasked):
                    module.dense_gradient = track.needs_dense(step)

    def stop(self) -> None:
        """No gradient is dense any more."""
        for module in self._modules():
            module.dense_gradient = False

    def rows(self) -> tuple[GroupReport, ...]:
        """Every layer, and what is kept of its blocks."""
        kept = self.kept()
        return tuple(
            GroupReport(
                t.name,
                track.pattern.text,
                kept[t.name].numel(),
                int(kept[t.name].sum()),
                track.rule.target_sparsity,
            )
            for track in self.tracks
            for t in track.targets
        )

    def weights_removed(self) -> tuple[int, int]:
        """``(removed, all)``: weights of the layers that are pruned in blocks."""
        removed = total = 0
        for name, kept in self.kept().items():
            size = prod(self.targets[name].shape)
            total += size
            removed += size - self.targets[name].weights(kept)
        return removed, total

    def state(self) -> dict[str, Tensor]:
        """Layer name -> the bits of its mask, on the CPU."""
        return {
            n: BlockMask.from_blocks(k, self.targets[n].block, self.targets[n].shape).bits.cpu()
            for n, k in self.kept().items()
        }

    def read_state(self, bits: Mapping[str, Any]) -> Kept:
        """The inverse of :meth:`state`: the blocks that are kept. Nothing is changed.

        Raises:
            ValueError: the state is of other layers, or of another pattern.
        """
        if set(bits) != set(self.targets):
            differing = sorted(set(bits) ^ set(self.targets))
            raise ValueError(
                f"the state is of other block-masked layers; only one side has {differing}"
            )
        found: Kept = {}
        for name, target in self.targets.items():
            try:
                found[name] = BlockMask(bits[name], target.block, target.shape).blocks()
            except (TypeError, ValueError) as error:
                raise ValueError(f"the mask of {name!r} does not fit: {error}") from error
        return found

    def _modules(self) -> list[BlockMasked]:
        found = (self.model.get_submodule(name) for name in self.targets)
        return [m for m in found if isinstance(m, BlockMasked)]

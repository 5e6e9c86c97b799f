"""Importance of blocks while a model trains: element scores, reduced over each block.

The element scores are those of :mod:`slimkern.criteria`. What is stored per layer is one number per
block where the reduction of a decaying sum is the decaying sum of the reductions (``mean``,
``sum``), and one per weight for ``max``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimkern.criteria import MOMENTUM, element_scores
from slimkern.nn.block_views import block_grid, block_views


@dataclass(frozen=True)
class BlockTarget:
    """A linear layer that a block pattern prunes.

    Attributes:
        name: the module's dotted name.
        shape: [outputs, inputs].
        block: outputs and inputs of a block; (1, 1) for ``N:M``.
        transposed: the weight is stored as [inputs, outputs].
    """

    name: str
    shape: tuple[int, int]
    block: tuple[int, int]
    transposed: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return block_grid(self.shape, self.block)

    def weights(self, kept: Tensor) -> int:
        """How many weights the kept blocks have, of bool [block rows, block columns]."""
        sides = []
        for size, block, count in zip(self.shape, self.block, self.grid):
            side = torch.full((count,), block, dtype=torch.float64, device=kept.device)
            side[-1] = size - (count - 1) * block
            sides.append(side)
        return int(sides[0] @ kept.double() @ sides[1])

    def oriented(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as [outputs, inputs]."""
        return weight.t() if self.transposed else weight


def reduce_blocks(elements: Tensor, block: tuple[int, int], reduce_type: str = "mean") -> Tensor:
    """Element scores [outputs, inputs] -> one score per block, [block rows, block columns].

    A ragged block counts the weights that it has.
    """
    grid = block_grid((elements.shape[0], elements.shape[1]), block)
    reduced = elements.new_empty(grid)
    for view, place in block_views(elements, block):
        if reduce_type == "max":
            reduced[place] = view.amax((1, 3))
        else:
            reduced[place] = view.mean((1, 3)) if reduce_type == "mean" else view.sum((1, 3))
    return reduced


class BlockScores:
    """Scores of the blocks of some layers.

    ``observe`` is called with fresh gradients before an optimizer step; ``scores`` reads the
    result. A masked weight that has a masked gradient earns nothing: neither call needs a dense
    gradient.

    Args:
        targets: the layers.
        criterion: one of :data:`slimkern.criteria.CRITERIA`.
        reduce_type: ``mean``, ``sum`` or ``max`` over a block.
        low_memory: what is stored is bfloat16.
    """

    def __init__(
        self,
        targets: Iterable[BlockTarget],
        criterion: str = "snip_momentum",
        reduce_type: str = "mean",
        low_memory: bool = False,
    ) -> None:
        self.targets = tuple(targets)
        self.criterion = criterion
        self.reduce_type = reduce_type
        self.memory = MOMENTUM if criterion == "snip_momentum" else 0.0
        self.dtype = torch.bfloat16 if low_memory else torch.float32
        self.state: dict[str, Tensor] = {}

    def state_shape(self, target: BlockTarget) -> tuple[int, int]:
        """The shape of what is stored for a layer."""
        return target.shape if self.reduce_type == "max" else target.grid

    @torch.no_grad()
    def observe(
        self,
        weights: Mapping[str, Tensor],
        grads: Mapping[str, Tensor | None],
        scale: Tensor | float = 1.0,
    ) -> None:
        """Take in the gradient of every layer that has one.

        Args:
            weights, grads: layer name -> its weight, and the weight's gradient, as they are stored.
            scale: what the gradients were multiplied by (a loss scale not yet undone).
        """
        for target in self.targets:
            grad = grads[target.name]
            if grad is None:
                continue
            new = target.oriented(element_scores(weights[target.name], grad, self.criterion))
            if self.reduce_type != "max":
                new = reduce_blocks(new, target.block, self.reduce_type)
            new = new / scale  # every criterion that reads gradients is linear in their size
            old = self.state.get(target.name)
            if old is not None and self.memory:
                new = new.add_(old.float(), alpha=self.memory)
            self.state[target.name] = new.to(self.dtype)

    @torch.no_grad()
    def scores(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{layer name: fp32 scores [block rows, block columns]}``, new tensors.

        Raises:
            RuntimeError: a gradient was needed and none but zeros has arrived at a layer since the
                start, or one held infinity or NaN.
        """
        return {t.name: self._of(t, weights[t.name]) for t in self.targets}

    def _of(self, target: BlockTarget, weight: Tensor) -> Tensor:
        if self.criterion == "magnitude":
            elements = target.oriented(element_scores(weight, None, "magnitude"))
            score = reduce_blocks(elements, target.block, self.reduce_type)
        elif target.name not in self.state:
            raise RuntimeError(
                f"{target.name}: no gradient has reached its weight, and criterion "
                f"{self.criterion!r} needs one (is it frozen, or was backward() not called?)"
            )
        else:
            score = self.state[target.name].to(torch.float32, copy=True)
            if self.reduce_type == "max":
                score = reduce_blocks(score, target.block, "max")
        if not torch.isfinite(score).all():
            raise RuntimeError(f"{target.name}: scores are not finite; a gradient held inf or NaN")
        if self.criterion != "magnitude" and not score.any() and weight.any():
            raise RuntimeError(
                f"{target.name}: all scores are zero, as every gradient so far was; criterion "
                f"{self.criterion!r} can't tell its blocks apart"
            )
        return score

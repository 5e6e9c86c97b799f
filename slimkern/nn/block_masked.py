"""The masked state for block patterns: a linear of full size whose weight is masked in blocks."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from slimkern.nn.block_views import block_grid, block_views
from slimkern.ops import BlockMask, block_masked_linear

Own = TypeVar("Own", bound="BlockMasked")


class BlockMasked(nn.Module):
    """What masked linears of any make have in common: ``y = x @ (weight ∘ mask)ᵀ + bias``.

    Input and output are those of the plain linear. Gradients of masked weights are zero, and so
    are the weights themselves once :meth:`zero_masked` has been called after an optimizer step.
    A state dict has zeros there in any case: a plain save of the model is the masked model.

    Attributes:
        mask_bits: the bits of the mask (:class:`slimkern.ops.BlockMask`), in a non-persistent
            buffer: it follows ``.to(device)``, and the state dict is that of the plain linear.
        block: outputs and inputs of a block.
        dense_gradient: weight gradients are computed for masked weights too.
        backend: an implementation of :func:`slimkern.ops.block_masked_linear`, or ``None`` for the
            default.
    """

    plain: ClassVar[type[nn.Module]]  # the class that this one takes the place of
    transposed: ClassVar[bool] = False  # the weight is [inputs, outputs]
    weight: Any  # as the class that is masked has them
    bias: Any
    mask_bits: Tensor
    block: tuple[int, int]
    dense_gradient: bool
    backend: str | None

    @classmethod
    def adopt(cls: type[Own], linear: nn.Module, block: tuple[int, int]) -> Own:
        """Turn a plain linear into a masked one that keeps every block, in place.

        The same object changes class, so that its parameters stay in optimizers, its hooks stay
        mounted and other references to it see the change.

        Args:
            linear: of the class ``plain``; one that is masked in such blocks already is left as
                it is.
            block: outputs and inputs of a block.

        Raises:
            TypeError: the linear is of another class.
            ValueError: it is masked in other blocks.
        """
        if type(linear) is cls:
            if linear.block != tuple(block):
                raise ValueError(f"the linear is masked in blocks {linear.block}, not {block}")
            return linear
        if type(linear) is not cls.plain:
            raise TypeError(
                f"{cls.__name__} takes the place of {cls.plain.__name__}, not of "
                f"{type(linear).__name__}"
            )
        shape = _shape(linear.weight, cls.transposed)  # type: ignore[arg-type]
        whole = torch.ones(block_grid(shape, block), dtype=torch.bool, device=linear.weight.device)  # type: ignore[arg-type]
        linear.__class__ = cls
        masked: Own = linear  # type: ignore[assignment]
        masked.block = (int(block[0]), int(block[1]))
        masked.dense_gradient, masked.backend = False, None
        bits = BlockMask.from_blocks(whole, masked.block, shape).bits
        masked.register_buffer("mask_bits", bits, persistent=False)
        return masked

    def release(self) -> nn.Module:
        """The inverse of :meth:`adopt`: the plain linear again; what was masked is zero in it."""
        self.zero_masked()
        del self._buffers["mask_bits"], self.block, self.dense_gradient, self.backend
        self._non_persistent_buffers_set -= {"mask_bits"}
        self.__class__ = self.plain  # type: ignore[assignment]
        return self

    @property
    def oriented(self) -> Tensor:
        """The weight as [outputs, inputs]."""
        return self.weight.t() if self.transposed else self.weight

    @property
    def mask(self) -> BlockMask:
        """The mask; its bits are the buffer itself."""
        return BlockMask(self.mask_bits, self.block, _shape(self.weight, self.transposed))

    def set_mask(self, mask: BlockMask) -> None:
        """Mask other blocks, and set the weights in them to zero. Nothing is allocated anew.

        Raises:
            ValueError: the mask is of another weight's shape, or of other blocks.
        """
        mine = self.mask
        if (mask.block, mask.shape) != (mine.block, mine.shape):
            raise ValueError(
                f"the mask is of blocks {mask.block} in a weight {mask.shape}; accepted: "
                f"{mine.block} in {mine.shape}"
            )
        self.mask_bits.copy_(mask.bits)
        self.zero_masked()

    @torch.no_grad()
    def zero_masked(self) -> None:
        """Set masked weights to zero, whatever they were."""
        self._fill(self.oriented)

    @torch.no_grad()
    def zero_moved(self) -> None:
        """Set masked weights back to zero that an optimizer with momentum or noise has moved.

        A product, several times faster than filling; unlike that it leaves a NaN where it is.
        """
        kept = self.mask.blocks()
        for view, (rows, cols) in block_views(self.oriented, self.block):
            view.mul_(kept[rows, None, cols, None])

    @torch.no_grad()
    def mask_gradient(self) -> None:
        """Set the gradient of masked weights to zero, where there is one."""
        grad = self.weight.grad
        if grad is not None:
            self._fill(grad.t() if self.transposed else grad)

    def _fill(self, matrix: Tensor) -> None:
        dead = ~self.mask.blocks()
        for view, (rows, cols) in block_views(matrix, self.block):
            view.masked_fill_(dead[rows, None, cols, None], 0)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.get(f"{prefix}weight")
        if keep_vars or weight is None or weight.is_meta or self.mask_bits.is_meta:
            return
        saved = weight.clone()
        with torch.no_grad():
            self._fill(saved.t() if self.transposed else saved)
        if not torch.equal(saved, weight):  # else what is saved is the weight itself, as ever
            destination[f"{prefix}weight"] = saved

    def masked_product(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` -> ``[..., outputs]``: what ``forward`` of every make is."""
        return block_masked_linear(
            x,
            self.oriented,
            self.bias,
            self.mask,
            dense_gradient=self.dense_gradient,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The linear's description with its blocks and what is kept of them."""
        rows, cols = self.block
        kept = self.mask.blocks().float().mean().item()
        return f"{super().extra_repr()}, block={rows}x{cols}, kept_blocks={kept:.4f}"


class BlockMaskedLinear(BlockMasked, nn.Linear):
    """An ``nn.Linear`` whose weight [out, in] is masked in blocks."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in_features] -> [..., out_features]."""
        return self.masked_product(input)


def _shape(weight: Tensor, transposed: bool) -> tuple[int, int]:
    rows, cols = weight.shape
    return (cols, rows) if transposed else (rows, cols)

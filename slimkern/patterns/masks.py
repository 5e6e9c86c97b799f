"""Block masks on a model: put on, taken off, and read. Weights are never allocated anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from slimkern.nn import BlockMasked
from slimkern.ops import BlockMask
from slimkern.patterns.targets import masked_class


def mask_blocks_(model: nn.Module, kept: Mapping[str, tuple[tuple[int, int], Tensor]]) -> nn.Module:
    """Put linears in the masked state for block patterns, in place.

    A linear that keeps every block is, or becomes, a plain one.

    Args:
        model: changed in place.
        kept: linear name -> its block (outputs, inputs), and the blocks that stay, bool
            [block rows, block columns].

    Returns:
        the model.
    """
    for name, (block, blocks) in kept.items():
        module = model.get_submodule(name)
        kind = masked_class(module)
        if kind is None:
            raise TypeError(f"{name!r} is a {type(module).__name__}, which can't be block-masked")
        if bool(blocks.all()):
            if isinstance(module, BlockMasked):
                module.release()
            continue
        linear = kind.adopt(module, block)
        shape = (linear.oriented.shape[0], linear.oriented.shape[1])
        blocks = blocks.to(linear.weight.device)
        linear.set_mask(BlockMask.from_blocks(blocks, block, shape))
    return model


def block_masked(model: nn.Module) -> dict[str, BlockMasked]:
    """The block-masked linears of a model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockMasked)}


@contextmanager
def released(model: nn.Module, *, for_good: bool = False) -> Iterator[dict[str, BlockMask]]:
    """For the time of a ``with``: block-masked linears are plain ones, with zeros in them.

    The outputs stay the same. Masks come back at the end, or, with ``for_good``, only if the
    ``with`` block raises.

    Yields:
        linear name -> its mask.
    """
    linears = block_masked(model)
    masks = {n: m.mask for n, m in linears.items()}
    settings = {n: (type(m), m.dense_gradient, m.backend) for n, m in linears.items()}
    for linear in linears.values():
        linear.release()
    back = True
    try:
        yield masks
        back = not for_good
    finally:
        if back:
            for name, linear in linears.items():
                kind, dense, backend = settings[name]
                again = kind.adopt(linear, masks[name].block)
                again.set_mask(masks[name])
                again.dense_gradient, again.backend = dense, backend

"""Calls on which a module, its equation and its kernels are compared before it is fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimkern.discovery.block import Block
from slimkern.ops.attention_block.reference import attention_block
from slimkern.ops.encoder_layer.reference import encoder_layer
from slimkern.ops.ffn.reference import ffn

_EQUATIONS: dict[str, Callable[..., Tensor]] = {
    "encoder_layer": encoder_layer,
    "attention_block": attention_block,
    "ffn": ffn,
}
SEQUENCES, TOKENS, _KEPT = 2, 5, 3


class MismatchError(Exception):
    """A module is not what its description says, or its kernels are not exact enough."""


@dataclass(frozen=True)
class Sample:
    """One call: hidden states, a mask of four dimensions, a bias per head, and what counts."""

    x: Tensor
    mask: Tensor | None
    bias: Tensor | None
    attended: Tensor

    def on(self, device: torch.device) -> Sample:
        """The same on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        bias = None if self.bias is None else self.bias.to(device)
        return Sample(self.x.to(device), mask, bias, self.attended.to(device))

    def arguments(self, call: str) -> tuple[Any, ...]:
        """The arguments as a module of that call takes them."""
        if call == "ffn":
            return (self.x,)
        return (self.x, self.mask, self.bias) if "mpnet" in call else (self.x, self.mask)

    def output(self, module: Any, call: str) -> Tensor:
        """What a module makes of it, at the positions that count; hooks are not called."""
        y = module.forward(*self.arguments(call))
        y = y[0] if isinstance(y, tuple) else y
        if not isinstance(y, Tensor) or y.shape != self.x.shape:
            raise MismatchError(
                f"it returns no tensor of shape {tuple(self.x.shape)} for one like it"
            )
        return y[self.attended]

    def equation(self, block: Block, weights: Any) -> Tensor:
        """What the block's equation makes of it, at the positions that count."""
        if block.kind == "ffn":
            return _EQUATIONS["ffn"](self.x, weights)[self.attended]
        mask = None if self.mask is None else self.mask[:, 0, 0]
        bias = None if self.bias is None else self.bias[0]
        return _EQUATIONS[block.kind](self.x, weights, mask, bias)[self.attended]


def samples_for(block: Block, hidden: int, heads: int, dtype: torch.dtype) -> Iterator[Sample]:
    """Without padding and, where there is attention, with some."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(SEQUENCES, TOKENS, hidden, generator=random).to(dtype)
    everything = torch.ones(SEQUENCES, TOKENS, dtype=torch.bool)
    bias = None
    if "mpnet" in block.call:
        bias = torch.randn(1, heads, TOKENS, TOKENS, generator=random).to(dtype)
        bias = bias.expand(SEQUENCES, -1, -1, -1)
    yield Sample(x, None, bias, everything)
    if block.kind == "ffn":
        return
    attended = everything.clone()
    attended[-1, _KEPT:] = False
    least = torch.finfo(dtype).min
    mask = torch.zeros(SEQUENCES, 1, 1, TOKENS, dtype=dtype)
    yield Sample(x, mask.masked_fill(~attended[:, None, None], least), bias, attended)

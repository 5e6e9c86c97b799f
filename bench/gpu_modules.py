"""The modules that only the GPU's table has: the gradients of a linear one by one, a masked FFN.

Each is plain PyTorch as a user writes it, with full-size weights and the kept indices, and knows
what it is without the masks: ``sliced`` is the module on weights that were cut beforehand, which is
the least that can be done, and ``kept`` is what of the outputs such a module can have.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.work import Outputs

Part = Literal["fwd", "dx", "dW"]


def part_of(tensor: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """tensor[rows][:, cols], where an index is there."""
    if rows is not None:
        tensor = tensor[rows]
    return tensor if cols is None else tensor[:, cols]


class LinearPart(nn.Module):
    """One of the products of ``y = x @ W[rows][:, cols]ᵀ + b[rows]``.

    ``fwd`` takes x [M, C] and gives y [M, R]; ``dx`` takes dy [M, R] and gives dx [M, C]; ``dW``
    takes dy and x and gives dW [N, K], which is zero outside of the kept rows and columns.

    Attributes:
        part: which one.
        weight, bias: [N, K] and [N].
        rows, cols: kept indices, int64, sorted; or None for all.
    """

    rows: Tensor | None
    cols: Tensor | None

    def __init__(
        self, part: Part, N: int, K: int, rows: Tensor | None, cols: Tensor | None
    ) -> None:
        super().__init__()
        self.part = part
        self.weight = nn.Parameter(torch.empty(N, K))
        self.bias = nn.Parameter(torch.empty(N))
        self.register_buffer("rows", rows)
        self.register_buffer("cols", cols)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The product, on what is gathered of the weight in this very call."""
        weight = part_of(self.weight, self.rows, self.cols)
        if self.part == "fwd":
            bias = self.bias if self.rows is None else self.bias[self.rows]
            return F.linear(*inputs, weight, bias)
        if self.part == "dx":
            return inputs[0] @ weight
        gradient = inputs[0].t() @ inputs[1]
        if self.cols is not None:
            wide = gradient.new_zeros(gradient.shape[0], self.weight.shape[1])
            gradient = wide.index_copy_(1, self.cols, gradient)
        if self.rows is not None:
            gradient = gradient.new_zeros(self.weight.shape).index_copy_(0, self.rows, gradient)
        return gradient

    def sliced(self) -> LinearPart:
        """The same product of a linear that was cut beforehand."""
        with torch.no_grad():
            weight = part_of(self.weight, self.rows, self.cols)
            module = LinearPart(self.part, *weight.shape, None, None)
            module.weight = nn.Parameter(weight.clone())
            bias = self.bias if self.rows is None else self.bias[self.rows]
            module.bias = nn.Parameter(bias.clone())
        return module

    def kept(self, outputs: Outputs) -> Outputs:
        """What of the outputs the sliced module has."""
        if self.part != "dW":
            return outputs
        return tuple(part_of(output, self.rows, self.cols) for output in outputs)


class MaskedFfn(nn.Module):
    """``LayerNorm(x + fc2[:, keep](gelu(fc1[keep](x))))`` with full-size weights.

    Attributes:
        fc1, fc2: of all channels.
        keep: kept channels, int64, sorted.
    """

    keep: Tensor

    def __init__(self, H: int, channels: int, keep: Tensor) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(H, channels), nn.Linear(channels, H)
        self.LayerNorm = nn.LayerNorm(H, eps=1e-12)
        self.register_buffer("keep", keep)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H] -> [..., H], by gathering."""
        h = F.linear(x, self.fc1.weight[self.keep], self.fc1.bias[self.keep])
        y = F.linear(F.gelu(h), self.fc2.weight[:, self.keep], self.fc2.bias)
        return self.LayerNorm(x + y)

    def multiplied(self, x: Tensor) -> Tensor:
        """The same by multiplying all channels by zero or one."""
        mask = x.new_zeros(self.fc1.weight.shape[0]).index_fill_(0, self.keep, 1.0)
        return self.LayerNorm(x + self.fc2(F.gelu(self.fc1(x)) * mask))

    def sliced(self) -> nn.Module:
        """The FFN of the kept channels alone."""
        from bench.modules import Ffn

        module = Ffn(self.fc1.weight.shape[1], len(self.keep)).to(self.keep.device)
        with torch.no_grad():
            module.fc1.weight = nn.Parameter(self.fc1.weight[self.keep].clone())
            module.fc1.bias = nn.Parameter(self.fc1.bias[self.keep].clone())
            module.fc2.weight = nn.Parameter(self.fc2.weight[:, self.keep].clone())
            module.fc2.bias = nn.Parameter(self.fc2.bias.clone())
            module.LayerNorm = self.LayerNorm
        return module

    def kept(self, outputs: Outputs) -> Outputs:
        """What of y, dx and the gradients of the parameters the sliced module has."""
        if len(outputs) == 1:
            return outputs
        y, dx, dw1, db1, dw2, *rest = outputs
        return (y, dx, dw1[self.keep], db1[self.keep], dw2[:, self.keep], *rest)

"""Second moments of a linear layer's inputs and targets, exact enough to invert.

Products are computed in fp32 (in fp64 for fp64 inputs) over stretches of at most ``STRETCH`` rows
and added up in fp64, of inputs from which the mean of the first rows has been subtracted: rounding
stays at the level of one short fp32 product, and no large mean cancels in the covariance (the
shifted form of Chan, Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

STRETCH = 1024  # rows per fp32 product
_PANEL = 256  # columns per product: only blocks on and above the diagonal are computed


class Moments:
    """Sums over tokens of ``x xᵀ`` and ``x yᵀ``, for inputs ``x`` and targets ``y`` of a linear.

    Args:
        inputs: ``n``, the width of ``x``.
        outputs: ``m``, the width of ``y``; 0 where no targets are given.
        device: where the sums are kept.

    Attributes:
        tokens: rows seen.
    """

    def __init__(
        self, inputs: int, outputs: int = 0, device: torch.device | str | None = None
    ) -> None:
        self.tokens = 0
        new: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self._xx = torch.zeros(inputs, inputs, **new)
        self._xy = torch.zeros(inputs, outputs, **new)
        self._x = torch.zeros(inputs, **new)
        self._y = torch.zeros(outputs, **new)
        self._yy = 0.0
        self._shift_x: Tensor | None = None
        self._shift_y: Tensor | None = None

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in rows ``x`` ``[T, n]`` with their targets ``y`` ``[T, m]``."""
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        x = x.to(wide)
        y = x.new_zeros(len(x), 0) if y is None else y.to(wide)
        if not len(x):
            return
        if self._shift_x is None or self._shift_y is None:
            self._shift_x, self._shift_y = x[:STRETCH].mean(0), y[:STRETCH].mean(0)
        for rows, targets in zip(x.split(STRETCH), y.split(STRETCH)):
            self._add(rows - self._shift_x, targets - self._shift_y)
        self.tokens += len(x)

    def _add(self, x: Tensor, y: Tensor) -> None:
        for start in range(0, x.shape[1], _PANEL):
            stop = min(start + _PANEL, x.shape[1])
            self._xx[:stop, start:stop] += x[:, :stop].T @ x[:, start:stop]
        self._x += x.sum(0, dtype=torch.float64)
        if y.shape[1]:
            self._xy += x.T @ y
            self._y += y.sum(0, dtype=torch.float64)
            self._yy += float(y.square().sum(dtype=torch.float64))

    @property
    def mean_x(self) -> Tensor:
        """The mean input, ``[n]`` in fp64."""
        shift = torch.zeros_like(self._x) if self._shift_x is None else self._shift_x.double()
        return shift + self._x / max(1, self.tokens)

    @property
    def mean_y(self) -> Tensor:
        """The mean target, ``[m]`` in fp64."""
        shift = torch.zeros_like(self._y) if self._shift_y is None else self._shift_y.double()
        return shift + self._y / max(1, self.tokens)

    def select(self, columns: Tensor) -> Moments:
        """What would have been summed up if only these inputs had been seen, in this order."""
        part = Moments(0)
        part._xx = self._whole()[columns][:, columns]
        part._xy, part._x = self._xy[columns], self._x[columns]
        part._y, part._yy, part.tokens = self._y.clone(), self._yy, self.tokens
        part._shift_x = None if self._shift_x is None else self._shift_x[columns]
        part._shift_y = self._shift_y
        return part

    def less(self, constant: Tensor) -> Moments:
        """The same inputs with ``constant`` ``[m]`` subtracted from every target."""
        part = copy.copy(self)
        part._shift_y = None if self._shift_y is None else self._shift_y.double() - constant
        return part

    def through(self, weight: Tensor, bias: Tensor | None = None) -> Moments:
        """These inputs with the targets ``y = W x + b`` of a linear, which need not be computed.

        Args:
            weight: ``[m, n]``.
            bias: ``[m]``; ``None``: 0.
        """
        weight = weight.detach().double()
        made = Moments(0)
        made._xx, made._x, made.tokens = self._whole(), self._x.clone(), self.tokens
        made._xy, made._y = made._xx @ weight.T, weight @ self._x
        made._yy = float((weight.T * made._xy).sum())
        if self._shift_x is not None:
            made._shift_x = self._shift_x
            made._shift_y = weight @ self._shift_x.double()
            if bias is not None:
                made._shift_y = made._shift_y + bias.detach().double()
        return made

    def _whole(self) -> Tensor:
        """``_xx`` with its lower half, of which only blocks are summed up, made from the upper."""
        return _mirrored(self._xx.clone())

    def covariance(self) -> Tensor:
        """``mean((x - mean_x)(x - mean_x)ᵀ)``, ``[n, n]`` in fp64."""
        count = max(1, self.tokens)
        return self._whole().addr_(self._x, self._x, alpha=-1 / count).div_(count)

    def into_covariance(self) -> Tensor:
        """As :meth:`covariance`, in the memory of the sums: nothing else can be asked after it."""
        count = max(1, self.tokens)
        total, self._xx = _mirrored(self._xx), self._xx[:0]
        return total.addr_(self._x, self._x, alpha=-1 / count).div_(count)

    def cross(self) -> Tensor:
        """``mean((x - mean_x)(y - mean_y)ᵀ)``, ``[n, m]`` in fp64."""
        count = max(1, self.tokens)
        return (self._xy - torch.outer(self._x, self._y) / count) / count

    def variance_y(self) -> float:
        """``mean(‖y - mean_y‖²)``: the variance that a repair can explain, over all outputs."""
        count = max(1, self.tokens)
        return max(0.0, (self._yy - float(self._y.square().sum()) / count) / count)

    def second(self) -> Tensor:
        """``mean(x xᵀ)``, about zero instead of the mean, ``[n, n]`` in fp64."""
        mean = self.mean_x
        return self.covariance() + torch.outer(mean, mean)

    def second_cross(self) -> Tensor:
        """``mean(x yᵀ)``, about zero instead of the means, ``[n, m]`` in fp64."""
        return self.cross() + torch.outer(self.mean_x, self.mean_y)


def _mirrored(total: Tensor) -> Tensor:
    """Fill what lies below the diagonal with what lies above it, in place, block by block."""
    for start in range(0, len(total), _PANEL):
        stop = min(start + _PANEL, len(total))
        total[start:stop, :start] = total[:start, start:stop].T
        block = total[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
    return total

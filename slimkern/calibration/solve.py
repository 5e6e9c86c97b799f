"""Least squares: the weights that make the kept units say what the dense layer said.

With inputs ``x`` of the kept units, targets ``y`` and the weights ``W₀`` that are there,

    W, b = argmin  mean(‖W x + b - y‖²) + λ ‖W - W₀‖²,      λ = ridge · mean(diag(H))

from second moments alone. A bias is solved for exactly, as if a row of ones stood among the inputs:
that is the same problem about the means. Where the data say nothing (fewer tokens than channels, a
channel that is constant) the weights stay as they are. Pure functions of tensors, in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimkern.calibration.moments import Moments


@dataclass(frozen=True)
class Solution:
    """A repaired linear.

    Attributes:
        weight: ``[m, kept]``, fp64.
        bias: ``[m]``, fp64; ``None`` where none was solved for.
        error: what is missed on the data it was solved on, ``mean(‖W x + b - y‖²)``, as a fraction
            of the target's variance; 0 where the target does not vary.
    """

    weight: Tensor
    bias: Tensor | None
    error: float


@torch.no_grad()
def least_squares(
    moments: Moments, weight: Tensor, *, bias: bool = True, ridge: float = 1e-3
) -> Solution:
    """The linear that maps the inputs of ``moments`` to its targets best.

    Args:
        moments: of the kept inputs, with targets.
        weight: ``W₀``, ``[m, kept]``: what the solution is held to.
        bias: whether there is a bias to solve for.
        ridge: of the mean diagonal of the inputs' second moment: how strongly.

    Raises:
        ValueError: nothing was seen, the sums are not finite, or ``ridge`` is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    solved = _solve(*_problem(moments, bias), weight.double(), ridge)
    fitted = _offset(moments, solved) if bias else None
    return Solution(solved, fitted, _missed(moments, solved, fitted))


@torch.no_grad()
def as_it_was(moments: Moments, weight: Tensor, old_bias: Tensor | None, *, bias: bool) -> Solution:
    """The weights that the kept units had, with a bias that makes up for the means if ``bias``.

    Without a new bias, the error is what the old one leaves.
    """
    weight = weight.double()
    if bias:
        fitted = _offset(moments, weight)
        return Solution(weight, fitted, _missed(moments, weight, fitted))
    return Solution(weight, None, _missed(moments, weight, old_bias))


def _offset(moments: Moments, weight: Tensor) -> Tensor:
    """The bias with which the means fit."""
    return moments.mean_y - weight @ moments.mean_x


def _problem(moments: Moments, bias: bool) -> tuple[Tensor, Tensor]:
    """Second moment of the inputs, and inputs times targets."""
    if not moments.tokens:
        raise ValueError("no token was seen: there is nothing to solve from")
    if bias:
        found = moments.covariance(), moments.cross()
    else:
        found = moments.second(), moments.second_cross()
    if not (found[0].isfinite().all() and found[1].isfinite().all()):
        raise ValueError("inputs or targets are not finite")
    return found


def _solve(hessian: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    mean = float(hessian.diagonal().mean())
    damped = hessian.clone()
    damped.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    wanted = cross - hessian @ weight.T
    return weight + torch.cholesky_solve(wanted, torch.linalg.cholesky(damped)).T


def _missed(moments: Moments, weight: Tensor, bias: Tensor | None) -> float:
    """``mean(‖W x + b - y‖²)`` as a fraction of the target's variance, from the moments."""
    hessian, cross = _problem(moments, True)
    energy = moments.variance_y()
    if not energy > 0:
        return 0.0
    explained = 2 * (weight * cross.T).sum() - ((weight @ hessian) * weight).sum()
    off = _offset(moments, weight)
    off = off if bias is None else off - bias.double()
    return max(0.0, 1 - float(explained) / energy) + float(off.square().sum()) / energy

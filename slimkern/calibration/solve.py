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

_FLAT = torch.finfo(torch.float32).eps ** 2  # less variance than that is rounding of a constant


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
    hessian, cross = _about_means(moments)
    if bias:
        solved = _solve(hessian, cross, weight.double(), ridge)
    else:
        solved = _solve(moments.second(), moments.second_cross(), weight.double(), ridge)
    return _solution(moments, hessian, cross, solved, bias)


@torch.no_grad()
def as_it_was(moments: Moments, weight: Tensor, old_bias: Tensor | None, *, bias: bool) -> Solution:
    """The weights that the kept units had, with a bias that makes up for the means if ``bias``.

    Without a new bias, the error is what the old one leaves.
    """
    return _solution(moments, *_about_means(moments), weight.double(), bias, old_bias)


def _about_means(moments: Moments) -> tuple[Tensor, Tensor]:
    """Second moment of the inputs, and inputs times targets, about their means."""
    if not moments.tokens:
        raise ValueError("no token was seen: there is nothing to solve from")
    found = moments.covariance(), moments.cross()
    if not (found[0].isfinite().all() and found[1].isfinite().all()):
        raise ValueError("inputs or targets are not finite")
    return found


def _solve(hessian: Tensor, cross: Tensor, weight: Tensor, ridge: float) -> Tensor:
    mean = float(hessian.diagonal().mean())
    damped = hessian.clone()
    damped.diagonal().add_(ridge * mean if mean > 0 else 1.0)
    wanted = cross - hessian @ weight.T
    return weight + torch.cholesky_solve(wanted, torch.linalg.cholesky(damped)).T


def _solution(
    moments: Moments,
    hessian: Tensor,
    cross: Tensor,
    weight: Tensor,
    fit: bool,
    old_bias: Tensor | None = None,
) -> Solution:
    """Weights with what they miss, and with the bias that makes the means fit if ``fit``."""
    fitted = moments.mean_y - weight @ moments.mean_x
    energy = moments.variance_y()
    if energy <= _FLAT * float(moments.mean_y.square().sum()):
        return Solution(weight, fitted if fit else None, 0.0)
    explained = 2 * (weight * cross.T).sum() - ((weight @ hessian) * weight).sum()
    error = max(0.0, 1 - float(explained) / energy)
    if fit:
        return Solution(weight, fitted, error)
    off = fitted if old_bias is None else fitted - old_bias.double()
    return Solution(weight, None, error + float(off.square().sum()) / energy)

"""Structured optimal brain surgeon: which units of a linear's input can go, and what that costs.

With inputs of second moment ``H`` and a weight ``W`` ``[out, n]``, removing the block ``B`` of
columns and letting all others make up for it raises ``tr(ΔW H ΔWᵀ)`` by
``tr(W_B ([H⁻¹]_BB)⁻¹ W_Bᵀ)``. The cheapest unit goes, ``W`` and ``H⁻¹`` follow,

    W   <- W   - W_B      ([H⁻¹]_BB)⁻¹ H⁻¹_B:
    H⁻¹ <- H⁻¹ - H⁻¹_:B   ([H⁻¹]_BB)⁻¹ H⁻¹_B:

and again (Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon",
1992; for whole structures Kurtic, Frantar and Alistarh, "ZipLM", 2023, arXiv:2302.04089). Pure
functions of tensors, in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_QUIET = torch.finfo(torch.float32).eps  # of the mean second moment: rounding of a constant
_PENDING = 128  # rows that wait before they are subtracted from the inverse
_COMPACT = 0.75  # removed rows and columns are dropped once this fraction is left


@dataclass(frozen=True)
class Layer:
    """One linear whose input units are ranked.

    Attributes:
        weight: ``[out, n]``, fp64.
        hessian: the second moment of its inputs, ``[n, n]``, fp64; about the mean where a bias
            makes up for means.
        unit_size: columns per unit.
        spent: the memory of ``hessian`` may be written over: it is the largest thing there is.
    """

    weight: Tensor
    hessian: Tensor
    unit_size: int = 1
    spent: bool = False


@dataclass(frozen=True)
class Removal:
    """The order in which units went.

    Attributes:
        order: units removed, first one first.
        errors: units kept -> the error there: the fraction of the layer's output energy
            ``tr(W H Wᵀ)`` that is lost, averaged where several layers share their units. It has an
            entry for the full width (0) and for every level that was asked for.
    """

    order: tuple[int, ...]
    errors: dict[int, float]

    def keep(self, num_units: int, kept: int) -> tuple[int, ...]:
        """The units that stay, sorted, when all but ``kept`` of them have gone."""
        gone = set(self.order[: num_units - kept])
        return tuple(u for u in range(num_units) if u not in gone)


@torch.no_grad()
def remove(
    layers: Sequence[Layer], levels: Sequence[int], *, damping: float = 0.01, chunk: int = 16
) -> Removal:
    """Remove units one by one, or in small chunks, down to the smallest of ``levels``.

    Args:
        layers: the linears that read the units; one, or several that share them.
        levels: numbers of units kept at which the error is wanted.
        damping: ``damping * mean(diag(H))`` is added to the diagonal of ``H``.
        chunk: columns that go at once between two updates. 1 is the exact greedy order.

    Raises:
        ValueError: a level is out of range, sizes do not fit, or an input is not finite.
    """
    _check(layers, levels, chunk)
    num_units = layers[0].weight.shape[1] // layers[0].unit_size
    at_once = max(1, chunk // max(layer.unit_size for layer in layers))
    states = [_State(layer, damping) for layer in layers]
    wanted = sorted({n for n in levels if n < num_units}, reverse=True)
    order: list[int] = []
    errors = {num_units: 0.0}
    alive = torch.arange(num_units, device=layers[0].weight.device)
    lost = 0.0
    for level in wanted:
        while len(alive) > level:
            scores = torch.stack([state.scores() for state in states]).mean(0)
            cheapest = scores.argsort(stable=True)[: min(at_once, len(alive) - level)]
            lost += sum(state.drop(cheapest) for state in states) / len(states)
            order += alive[cheapest].tolist()
            stays = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
            stays[cheapest] = False
            alive = alive[stays]
        errors[level] = lost
    return Removal(tuple(order), errors)


def _check(layers: Sequence[Layer], levels: Sequence[int], chunk: int) -> None:
    if not layers:
        raise ValueError("layers is empty; at least one linear must read the units")
    units = {layer.weight.shape[1] // layer.unit_size for layer in layers}
    if len(units) > 1:
        raise ValueError(f"layers share their units, but have {sorted(units)} of them")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    for level in levels:
        if not 1 <= level <= min(units):
            raise ValueError(f"levels: {level} units can't stay of {min(units)}; at least 1 must")
    for layer in layers:
        n = layer.weight.shape[1]
        if tuple(layer.hessian.shape) != (n, n):
            raise ValueError(f"hessian is {tuple(layer.hessian.shape)}, the weight reads {n}")
        if not (layer.hessian.isfinite().all() and layer.weight.isfinite().all()):
            raise ValueError("weight or hessian is not finite")


class _State:
    """One layer while its units go: only what is still there, removed rows dropped lazily.

    The inverse is held as ``base - Pᵀ P``: what units that went subtract waits as rows of ``P``
    until there are ``_PENDING`` of them, as one large product costs less than many thin ones.
    """

    def __init__(self, layer: Layer, damping: float) -> None:
        self.size = layer.unit_size
        self.weight = layer.weight.double().clone()
        hessian = layer.hessian.double()
        energy = float(((self.weight @ hessian) * self.weight).sum())
        self.energy = energy if energy > 0 else float("inf")  # a dead layer loses nothing
        mean = float(hessian.diagonal().mean())
        # Damping would make the weights of what never varies count.
        self.weight[:, hessian.diagonal() <= _QUIET * mean] = 0
        damped = hessian if layer.spent else hessian.clone()
        damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
        torch.linalg.cholesky(damped, out=damped)
        self.base = torch.cholesky_inverse(damped)
        del damped
        self.diagonal = self.base.diagonal().clone()  # of the inverse itself
        self.pending = self.base.new_empty(0, len(self.base))  # P
        # Where each live unit stands in weight and inverse.
        self.places = torch.arange(len(self.base) // self.size, device=self.base.device)

    def _columns(self, places: Tensor) -> Tensor:
        offsets = torch.arange(self.size, device=places.device)
        return (places[:, None] * self.size + offsets).flatten()

    def scores(self) -> Tensor:
        """What removing each live unit alone costs, relative to the layer's energy."""
        if self.size == 1:
            columns = self.weight[:, self.places]
            return columns.square().sum(0) / self.diagonal[self.places] / self.energy
        self._settle()
        blocks = self._columns(self.places).view(-1, self.size)
        inner = self.base[blocks[:, :, None], blocks[:, None, :]]  # [units, size, size]
        columns = self.weight[:, blocks.flatten()].view(len(self.weight), -1, self.size)
        solved = torch.linalg.solve(inner, columns.permute(1, 2, 0))  # [units, size, out]
        return torch.einsum("ous,uso->u", columns, solved) / self.energy

    def drop(self, live: Tensor) -> float:
        """Remove the ``live``-th live units; returns what it cost, relative to the energy."""
        gone = self._columns(self.places[live])
        rows = self.base[gone] - self.pending[:, gone].T @ self.pending
        root = torch.linalg.cholesky(rows[:, gone])
        step = torch.linalg.solve_triangular(root, rows, upper=False)  # stepᵀ step is subtracted
        columns = torch.linalg.solve_triangular(root, self.weight[:, gone].T, upper=False)
        self.weight -= columns.T @ step
        self.diagonal -= step.square().sum(0)
        self.pending = torch.cat([self.pending, step])
        stays = torch.ones(len(self.places), dtype=torch.bool, device=live.device)
        stays[live] = False
        self.places = self.places[stays]
        if len(self.pending) >= _PENDING:
            self._settle()
        return float(columns.square().sum()) / self.energy

    def _settle(self) -> None:
        """Subtract what is pending, and let go of rows and columns that are removed."""
        if len(self.places) * self.size < _COMPACT * len(self.base):
            kept = self._columns(self.places)
            self.weight = self.weight[:, kept].contiguous()
            self.base = self.base[kept][:, kept].contiguous()
            self.diagonal, self.pending = self.diagonal[kept], self.pending[:, kept]
            self.places = torch.arange(len(self.places), device=self.base.device)
        if len(self.pending):
            self.base.addmm_(self.pending.T, self.pending, alpha=-1)
            self.pending = self.pending[:0]

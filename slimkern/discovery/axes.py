"""Symbolic axes: which linear's output features run along a dimension of a tensor.

A dimension is a sequence of *factors*, slowest first; a factor is a plain ``int`` (that many
entries of no interest) or an :class:`Axis`. A view splits an axis of ``heads * head_dim`` entries
into two, and a later view puts the two side by side again: an axis is a tree of digits, and two
dimensions are the same exactly where their leaves are the same.

Two axes that an operation pairs entry by entry (``act(gate) * up``; the heads of queries and keys)
become one: axes are united (union-find), so "these weight slices must go together" needs no search.
An operation that mixes the entries of an axis (a sum, a norm, a matrix product) leaves a reason on
it: entries of a mixed axis can't be removed one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod


class Axis:
    """A run of ``size`` entries that a tensor dimension (or a digit of one) goes through.

    Attributes:
        size: number of entries.
        mixed: why the entries can't be removed one by one (the first reason found), or None.
        normed: a norm or a reduction mixed the entries.
        residual: an activation from further up was added along the axis.
    """

    __slots__ = ("_parent", "_split", "mixed", "normed", "residual", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.mixed: str | None = None
        self.normed = False
        self.residual = False
        self._parent: Axis | None = None
        self._split: tuple[Axis, Axis] | None = None

    @property
    def root(self) -> Axis:
        """The axis that stands for all axes united with this one."""
        axis = self
        while axis._parent is not None:
            if axis._parent._parent is not None:
                axis._parent = axis._parent._parent
            axis = axis._parent
        return axis

    def divide(self, inner: int) -> tuple[Axis, Axis]:
        """Split an unsplit root into ``size // inner`` blocks of ``inner`` entries each."""
        parts = Axis(self.size // inner), Axis(inner)
        for part in parts:
            part.mixed, part.normed, part.residual = self.mixed, self.normed, self.residual
        self._split = parts
        return parts

    def unite(self, other: Axis) -> None:
        """Make two unsplit roots of one size the same axis."""
        if self is other:
            return
        other._parent = self
        self.mixed = self.mixed or other.mixed
        self.normed |= other.normed
        self.residual |= other.residual


Factor = Axis | int
Dim = tuple[Factor, ...]


def leaves(factors: Iterable[Factor]) -> list[Factor]:
    """Factors as digits: unsplit roots, neighbouring plain counts multiplied, ones left out."""
    found: list[Factor] = []
    stack = list(factors)[::-1]
    while stack:
        factor = stack.pop()
        if isinstance(factor, Axis):
            root = factor.root
            if root._split is None:
                found.append(root)
            else:
                stack += root._split[::-1]
        elif factor != 1:
            if found and isinstance(found[-1], int):
                found[-1] *= factor
            else:
                found.append(factor)
    return found


def axes(factors: Iterable[Factor]) -> list[Axis]:
    """The digits of ``factors`` that are axes."""
    return [f for f in leaves(factors) if isinstance(f, Axis)]


def size(factor: Factor) -> int:
    """Number of entries of a factor."""
    return factor if isinstance(factor, int) else factor.size


def extent(factors: Iterable[Factor]) -> int:
    """Number of entries of a sequence of factors."""
    return prod(size(f) for f in factors)


def _divide(factor: Factor, inner: int) -> tuple[Factor, Factor]:
    return (factor // inner, inner) if isinstance(factor, int) else factor.divide(inner)


def mix(factors: Iterable[Factor], reason: str, *, normed: bool = False) -> None:
    """Leave ``reason`` on every axis among the digits of ``factors``."""
    for axis in axes(factors):
        axis.mixed = axis.mixed or reason
        axis.normed |= normed


def pair(a: Dim, b: Dim, plain: Callable[[Axis, bool], None], odd: str) -> Dim:
    """Unite two dimensions of one extent, entry by entry.

    Args:
        a, b: the dimensions.
        plain: called as ``plain(axis, in_a)`` where an axis of ``a`` (or of ``b``) meets entries
            of the other that are no axis.
        odd: the reason left on axes whose digits don't line up.

    Returns:
        the common dimension: axes where either has one.
    """
    left, right, common = leaves(a)[::-1], leaves(b)[::-1], list[Factor]()
    while left and right:
        x, y = left.pop(), right.pop()
        if isinstance(x, Axis) and leaves([x]) != [x]:
            left += leaves([x])[::-1]
            right.append(y)
            continue
        if isinstance(y, Axis) and leaves([y]) != [y]:
            right += leaves([y])[::-1]
            left.append(x)
            continue
        if size(x) != size(y):
            if max(size(x), size(y)) % min(size(x), size(y)):
                mix([x, y, *left, *right], odd)
                return (extent(a),)
            if size(x) > size(y):
                x, rest = _divide(x, size(x) // size(y))
                left.append(rest)
            else:
                y, rest = _divide(y, size(y) // size(x))
                right.append(rest)
        if isinstance(x, Axis) and isinstance(y, Axis):
            x.unite(y)
        elif isinstance(x, Axis):
            plain(x, True)
        elif isinstance(y, Axis):
            plain(y, False)
        common.append(x if isinstance(x, Axis) else y)
    return tuple(common)


def regroup(dims: Sequence[Dim], shape: Sequence[int], odd: str) -> list[Dim]:
    """The dimensions after a view of contiguous entries to ``shape``.

    Axes that the new shape cuts in a way that no digit allows get ``odd`` as a reason.
    """
    flat = leaves(f for dim in dims for f in dim)[::-1]
    out: list[Dim] = []
    for n in shape:
        dim: list[Factor] = []
        need = int(n)
        while need > 1 and flat:
            factor = flat.pop()
            if isinstance(factor, Axis) and leaves([factor]) != [factor]:
                flat += leaves([factor])[::-1]
                continue
            have = size(factor)
            if have > need:
                if have % need:
                    flat.append(factor)
                    break
                factor, rest = _divide(factor, have // need)
                flat.append(rest)
            elif need % have:
                flat.append(factor)
                break
            dim.append(factor)
            need //= size(factor)
        if need != 1:
            mix((f for d in dims for f in d), odd)
            return [(int(m),) for m in shape]
        out.append(tuple(dim))
    return out

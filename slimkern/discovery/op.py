"""One operation of a traced forward, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from slimkern.discovery.axes import Axis, Dim, axes, mix, pair
from slimkern.discovery.record import Value

if TYPE_CHECKING:
    from slimkern.discovery.trace import Tracer


@dataclass
class Op:
    """An operation in flight.

    Attributes:
        tracer: knows all values.
        name: the short name (``add_``).
        args: the arguments by name.
        operands: what is known of the tensors among them.
        out: the (first) result.
        residual: set where it adds an activation from further up.
        bits: set where it is a layer of its own (see ``Value.made_by``).
    """

    tracer: Tracer
    name: str
    args: dict[str, Any]
    operands: list[Value]
    out: Tensor
    residual: bool = False
    bits: int = 0

    @property
    def here(self) -> str:
        """How reasons speak of the operation: its name and its place."""
        name = self.name.strip("_").removeprefix("native_")
        if name.startswith("scaled_dot_product"):
            name = "scaled_dot_product_attention"
        return f"{name!r} {self.tracer.here()}"

    def of(self, name: str) -> Value:
        """What is known of the operand ``name``."""
        return self.tracer.value(self.args[name])

    def mix(self, dims: Iterable[Dim], *, normed: bool = False) -> None:
        """The operation mixes the entries of these dimensions."""
        for dim in dims:
            mix(dim, f"{self.here} mixes them", normed=normed)

    def plain(self) -> list[Dim]:
        """A result without axes."""
        return [(int(n),) for n in self.out.shape]

    def part(self, dim: Dim) -> None:
        """The operation takes some of the entries of a dimension."""
        mix(dim, f"{self.here} takes a part of them (a fused projection)")

    def meet(self, a: Dim, b: Dim, value: Value, values: list[Value]) -> Dim:
        """Entries of two dimensions meet one by one; ``b`` is of ``value``, one of ``values``."""

        def plain(axis: Axis, in_a: bool) -> None:
            axis.residual |= self.residual
            other = value if in_a else next(v for v in values if v is not value)
            axis.mixed = axis.mixed or self._added(other)

        odd = f"{self.here} pairs them with entries that are arranged differently"
        common = pair(a, b, plain, odd)
        if self.residual:
            for axis in axes(common):
                axis.residual = True
                axis.mixed = axis.mixed or self._added(value)
        return common

    def _added(self, other: Value) -> str:
        if self.residual:
            return f"a residual is added to them {self.tracer.here()}"
        kind = "an activation" if other.live else "a constant"
        what = repr(other.name) if other.name else kind
        return f"{self.here} combines them with {what}, which can't be cut"


Rule = Callable[[Op], "list[Dim]"]


def rule(table: dict[str, Rule], *names: str) -> Callable[[Rule], Rule]:
    """Enter a rule into a table under some names of operations."""

    def add(function: Rule) -> Rule:
        table.update(dict.fromkeys(names, function))
        return function

    return add


def unknown(op: Op) -> list[Dim]:
    """An operation without a rule mixes whatever it is given."""
    op.mix(d for v in op.operands for d in v.dims)
    return op.plain()


def repeats(value: Value, dim: int) -> bool:
    """Whether a dimension is one entry shown many times (``expand``).

    Such entries go with any number of units; that their number follows a cut, the rehearsal sees.
    """
    return value.tensor.stride(dim) == 0 and not axes(value.dims[dim])

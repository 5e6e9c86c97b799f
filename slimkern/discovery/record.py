"""What a trace writes down: values, calls of linears, and the trace itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from slimkern.discovery.axes import Axis, Dim


@dataclass
class Value:
    """What is known of a tensor.

    Attributes:
        tensor: the tensor itself; holding it keeps its identity unique.
        dims: the factors of each dimension.
        made_by: linears that it was computed from, as bits.
        last: of these, the ones whose output it still is: no other linear and no sum with an
            activation from further up came after. The head of a model is found by it.
        live: it depends on the model's inputs.
        lost: axes that it depends on but no longer shows.
        name: the parameter, buffer or input that it is.
    """

    tensor: Tensor
    dims: list[Dim]
    made_by: int = 0
    last: int = 0
    live: bool = False
    lost: frozenset[Axis] = frozenset()
    name: str = ""


@dataclass
class Call:
    """A linear module and its one call.

    Attributes:
        name, module: the linear.
        index: its bit, in order of execution.
        out: the axis of its output features.
        taken: the factors of its input features, as they were then.
        lost: axes that its input depends on without showing them.
        source: the linears that its input was computed from, as bits.
        fresh: the linears whose output its input still is (see ``Value.last``), as bits.
        blocked: why it can be no member of a group, or None.
        tied: it is blocked because a parameter is also another module's.
    """

    name: str
    module: nn.Linear
    index: int = -1
    calls: int = 0
    out: Axis = field(default_factory=lambda: Axis(1))
    taken: Dim = ()
    lost: frozenset[Axis] = frozenset()
    source: int = 0
    fresh: int = 0
    blocked: str | None = None
    tied: bool = False


@dataclass(frozen=True)
class Step:
    """An operation as it was called: its name, the numbers it computes with, and the place."""

    name: str
    numbers: tuple[complex, ...]
    place: str


@dataclass
class Trace:
    """What one forward showed.

    Attributes:
        linears: every plain linear, by name.
        foreign: modules that multiply by a matrix but are no plain linear: name -> reason.
        params: the axis of each dimension of each other parameter: (name, dimension) -> axis.
        products: factor pairs of two activations that were contracted with each other (queries
            with keys), each with the axes that the activation no longer shows.
        carried: dimensions that a product of two activations carries along (the values').
        steps: all operations in order, linears as one each.
        last: linears that reach the outputs with no other linear after them, as bits.
        fake: whether it ran on fake tensors.
        joined: linears whose output is a term of a residual sum, as bits.
    """

    linears: dict[str, Call] = field(default_factory=dict)
    foreign: dict[str, str] = field(default_factory=dict)
    params: dict[tuple[str, int], Axis] = field(default_factory=dict)
    products: list[tuple[Dim, Dim]] = field(default_factory=list)
    carried: list[Dim] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    last: int = 0
    joined: int = 0
    fake: bool = True

    def called(self) -> list[Call]:
        """The linears that were called, in order of their first call."""
        return sorted((c for c in self.linears.values() if c.calls), key=lambda c: c.index)

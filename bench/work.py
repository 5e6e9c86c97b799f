"""What is measured: a piece of work at one shape, the same for every provider."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from slimkern.plan import SlimPlan
from slimkern.report.speed_schema import Level, Precision

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """How a provider is to run.

    Attributes:
        precision: see :data:`slimkern.report.speed_schema.PRECISIONS`.
        threads: of the provider's own pool.
        device: ``cpu`` or ``cuda``.
    """

    precision: Precision
    threads: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class Work:
    """A piece of work at one shape.

    Attributes:
        level: op, layer, model or training.
        name: what it is, without the shape.
        shape: as it is shown, ``8x128``.
        build: a fresh float32 module on the CPU, in eval mode, always with the same weights. It
            takes the inputs as positional tensors and returns one tensor.
        inputs: the same tensors at every call; floating ones in float32, fit for ``build``.
        flops: of the matrix products of a forward (of a whole step where ``backward``); with
            padding, of a forward, those of each sequence's own tokens.
        values: numbers (weights, inputs and outputs) that must move at least once.
        roundings: rounding errors that add up on the way to an output: the lengths of all sums
            of products one after the other.
        stores: tensors that are rounded to storage one after the other on the way to an output.
        backward: forward and backward; outputs are then y, dx and the parameters' gradients in
            the order of ``named_parameters``.
        compiled: on the short list of what ``torch.compile`` is measured on.
        smoke: small enough for the smoke run.
        tags: what providers ask for, such as ``slim`` or ``indexed``.
        dense: of a slim work, builds the module before the cut; plan: what stays of it, in names
            of the module (see :mod:`bench.slims`). ``None`` where nothing was cut.
        before: of a slim layer or model, the same work before the cut: eager torch does it in the
            same rounds, so that what the cut brings is a ratio of one run.
        reference: the outputs in fp64, where they are not those of ``build``'s module (a training
            step's); ``None`` to run the module.
        attended: of works with padding, bool [B, T]: which rows of the output have to be right. A
            runtime may leave anything finite in the others, which nobody attends to.
    """

    level: Level
    name: str
    shape: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    flops: float
    values: float
    roundings: int
    stores: int
    backward: bool = False
    compiled: bool = False
    smoke: bool = False
    tags: frozenset[str] = field(default_factory=frozenset)
    dense: Callable[[], nn.Module] | None = None
    plan: Callable[[], SlimPlan] | None = None
    before: Work | None = None
    reference: Callable[[], Outputs] | None = None
    attended: Callable[[], Tensor] | None = None

    @property
    def case(self) -> str:
        """Unique in a run."""
        return f"{self.level}/{self.name}/{self.shape}"

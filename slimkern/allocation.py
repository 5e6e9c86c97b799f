"""One budget for a whole model: costs and error curves, and the widths that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimkern import timing
from slimkern.budget import Choice, allocate, levels
from slimkern.calibration.batches import Batch
from slimkern.calibration.walk import Progress, Walk
from slimkern.copies import sharing_copy
from slimkern.costs import Costs, count_macs, count_parameters
from slimkern.curves import Curve, error_curves
from slimkern.discovery.groups import Group
from slimkern.latency import Call, measure_latency
from slimkern.layerwise import Method
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import slim_

_CORRECTIONS, _AGREEMENT = 3, 0.02  # rounds of correction; when a table is right
_ROUNDS = 15
KINDS = ("params", "macs", "latency", "speedup")


@dataclass(frozen=True)
class Budget:
    """What a model may cost at most.

    Attributes:
        kind: ``params``, ``macs``, ``latency`` (seconds of a forward) or ``speedup``.
        values: one per slim model that is wanted.
    """

    kind: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}; accepted: {', '.join(KINDS)}")
        for value in self.values:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"target_{self.kind} must be a positive number, got {value!r}")
            if self.kind == "speedup" and value < 1:
                raise ValueError(f"target_speedup must be at least 1, got {value!r}")


@dataclass(frozen=True)
class Prediction:
    """What the tables say of a slim model.

    Attributes:
        unit: ``parameters``, ``MACs`` or ``seconds``.
        dense, slim: of the dense and of the slim model.
        shape: (batch, tokens) of the forward; ``None`` for parameters.
    """

    unit: str
    dense: float
    slim: float
    shape: tuple[int, int] | None

    @property
    def ratio(self) -> float:
        """How many times less the slim model costs."""
        return self.dense / self.slim


class Allocation:
    """Costs and errors of every group at every width, and budgets spent on them.

    Args:
        model: the dense model, in evaluation mode.
        groups: what may be cut.
        budget: what is to be kept to.
        shape: (batch, tokens) of the forward that latency and MACs are of.
        round_multiplier: FFN widths are multiples of it.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        budget: Budget,
        shape: tuple[int, int],
        round_multiplier: int,
    ) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"latency_shape must be (batch, tokens), got {shape!r}")
        self.model = model
        self.groups = groups
        self.budget = budget
        self.shape = shape
        self.levels = {
            g.name: levels(g.num_units, round_multiplier if g.kind == "ffn" else 1) for g in groups
        }
        self.costs = Costs("", 0.0, {})
        self.call: Call | None = None  # the forward that seconds are of
        self.threads: int | None = None
        self.added = 0  # parameters of new biases
        self.curves: Mapping[str, Curve] = {}

    def count(
        self,
        example: Batch,
        threads: int | None,
        cache: str | Path | None,
        progress: Progress,
    ) -> None:
        """Count, or measure, what every width costs.

        Args:
            example: a batch, from which inputs of the wanted shape are made for timing.
            threads, cache: as of :func:`slimkern.latency.measure_latency`.
        """
        if self.budget.kind == "params":
            self.costs = count_parameters(self.model, self.groups)
        elif self.budget.kind == "macs":
            self.costs = count_macs(self.model, self.groups, self.shape)
        else:
            dtype = next(p.dtype for p in self.model.parameters())
            batch, tokens = self.shape
            self.call, self.threads = forward_of(example, self.shape), threads
            self.costs = measure_latency(
                self.model,
                self.groups,
                self.call,
                levels=self.levels,
                threads=threads,
                cache=cache,
                key=f"{batch} x {tokens} tokens, {dtype}",
                progress=lambda done, total: progress("measure latency", done, total),
            )

    def observe(self, walk: Walk, method: Method, progress: Progress) -> None:
        """Measure what every width loses."""
        if method.add_bias and method.repair != "none" and self.budget.kind == "params":
            linears = [self.model.get_submodule(site.name) for site in walk.sites]
            self.added = sum(len(m.get_parameter("weight")) for m in linears if m.bias is None)
        self.curves = error_curves(walk, self.model, self.levels, method, progress)

    def widths(self, value: float) -> tuple[dict[str, int], Prediction]:
        """The widths that lose least under a budget of ``value``, and what they cost.

        Raises:
            ValueError: the smallest widths cost more; the message says what they cost.
        """
        full = {g.name: g.num_units for g in self.groups}
        dense = self.costs.total(full)
        limit = dense / value if self.budget.kind == "speedup" else float(value) - self.added
        choices = []
        for group in self.groups:
            kept = self.levels[group.name]
            curve = self.curves[group.name]
            spent = tuple(self.costs.of(group.name, n) for n in kept)
            choices.append(Choice(group.name, kept, tuple(curve[n] for n in kept), spent))
        smallest = self.costs.fixed + sum(min(c.costs) for c in choices)
        if limit < smallest:
            raise ValueError(
                f"target_{self.budget.kind}={value:g} can't be met: the dense model takes "
                f"{dense:.6g} {self.costs.unit} and the smallest one {smallest + self.added:.6g} "
                f"({dense / (smallest + self.added):.2f} times less)"
            )
        if self.call is None:
            widths = allocate(choices, limit - self.costs.fixed)
            predicted = self.costs.total(widths) + self.added
        else:
            widths, predicted = self._corrected(choices, limit, dense, self.call)
        shape = None if self.budget.kind == "params" else self.shape
        return widths, Prediction(self.costs.unit, dense, predicted, shape)

    def _corrected(
        self, choices: list[Choice], limit: float, dense: float, call: Call
    ) -> tuple[dict[str, int], float]:
        """Widths for a limit in seconds, and the seconds they take.

        A search among noisy tables is drawn to what was timed too fast. So a copy of the chosen
        widths is timed, the table is corrected by one factor, and the search is run again, until
        the two agree.
        """
        factor = 1.0
        for _ in range(_CORRECTIONS):
            smallest = sum(min(c.costs) for c in choices)
            widths = allocate(choices, max(limit / factor - self.costs.fixed, smallest))
            predicted = self.costs.total(widths)
            measured = dense * self._share(widths, call)
            agreed = abs(measured / (predicted * factor) - 1) <= _AGREEMENT
            factor = measured / predicted
            if agreed:
                break
        return widths, predicted * factor

    def _share(self, widths: Mapping[str, int], call: Call) -> float:
        """The time of a model of these widths as a fraction of the dense model's."""
        entries = [PlanEntry(g, tuple(range(widths[g.name]))) for g in self.groups]
        copy = slim_(sharing_copy(self.model), SlimPlan(tuple(entries)))
        times = timing.time_interleaved(
            {"dense": call(self.model), "slim": call(copy)},
            check=lambda outputs: None,  # outputs were checked when the table was measured
            rounds=_ROUNDS,
            threads=self.threads,
        )
        return times["slim"].minimum / times["dense"].minimum


def forward_of(
    example: Batch, shape: tuple[int, int]
) -> Callable[[nn.Module], Callable[[], object]]:
    """Forwards of ``shape`` (batch, tokens), to be timed, with inputs made from an example's.

    Rows are repeated or left out to make up the batch, and so are the columns of whole numbers
    (token ids, types, masks); a mask of tokens becomes all ones. Other inputs keep their columns.
    """
    rows, columns = shape

    def sized(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        value = _repeated(value, 0, rows)
        if value.dim() == 2 and not value.is_floating_point():
            value = _repeated(value, 1, columns)
            return torch.ones_like(value) if name == "attention_mask" else value
        return value

    args = tuple(sized("", value) for value in example.inputs.args)
    kwargs = {name: sized(name, value) for name, value in example.inputs.kwargs.items()}
    args, kwargs = replace(example.inputs, args=args, kwargs=kwargs).materialize(None)
    return lambda model: lambda: model(*args, **kwargs)


def _repeated(tensor: Tensor, dim: int, size: int) -> Tensor:
    index = torch.arange(size, device=tensor.device) % tensor.shape[dim]
    return tensor.index_select(dim, index)

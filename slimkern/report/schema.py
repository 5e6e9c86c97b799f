"""The shape of the ``results`` that a run fills in and ``write_report`` renders.

Plain dictionaries, lists, strings and numbers: what is written to ``results.json`` beside the page
can be read back and rendered again. Only ``title``, ``command``, ``date``, ``machine`` and
``versions`` are required; every other section is left out of the page when it is absent or empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict

from slimkern.timing import LatencyRow, Machine

if TYPE_CHECKING:
    from slimkern.plan import SlimPlan
    from slimkern.training.evaluation import Score

__all__ = [
    "REQUIRED",
    "Data",
    "HistoryPoint",
    "Latency",
    "LatencyRow",
    "LayerWidth",
    "Machine",
    "Model",
    "Results",
    "Size",
    "Stage",
    "check",
    "layer_widths",
]

Scalar = str | int | float | bool | None


class Model(TypedDict, total=False):
    """What was made slim."""

    name: str
    architecture: str
    """The class, for example ``BertModel``."""
    protocol: str
    """``bi-encoder``, ``cross-encoder`` or a word of the caller's."""
    task: str
    """For example ``sentence-pair similarity``."""


class Data(TypedDict, total=False):
    """What it was trained and evaluated on."""

    name: str
    splits: dict[str, int]
    """Rows of each split, in the order of the page."""
    note: str


class Size(TypedDict, total=False):
    """Parameters with and without the embedding tables, and bytes of the weights file."""

    dense_parameters: int
    slim_parameters: int
    dense_parameters_no_embeddings: int
    slim_parameters_no_embeddings: int
    dense_bytes: int
    slim_bytes: int


class LayerWidth(TypedDict):
    """Units that stayed in one group; :func:`layer_widths` fills in a whole plan."""

    name: str
    kind: Literal["ffn", "mha"]
    kept: int
    total: int


class HistoryPoint(TypedDict, total=False):
    """One logged step of the slimming run. Sparsities are fractions of units removed so far."""

    step: int
    epoch: float
    loss: float
    ffn_sparsity: float
    mha_sparsity: float
    score: float
    """The metric named by ``history_score`` on the split named there, where it was evaluated."""


class Stage(TypedDict, total=False):
    """A part of the run and how long it took."""

    name: str
    seconds: float
    note: str


class Latency(TypedDict, total=False):
    """The latency table and the conditions it was measured under."""

    rows: list[LatencyRow]
    threads: int
    rounds: int
    precision: str
    checked: str
    """What was compared before the clock was started, in one sentence."""


class Results(TypedDict, total=False):
    """Everything a run has to tell. See the module's docstring for what is required."""

    title: str
    summary: str
    command: str
    date: str
    """ISO 8601, with the time zone."""
    machine: Machine
    versions: dict[str, str]
    model: Model
    data: Data
    settings: dict[str, Scalar]
    """The run's own settings: epochs, learning rate, target sparsities, seed."""
    scores: list[Score]
    size: Size
    layers: list[LayerWidth]
    history: list[HistoryPoint]
    history_score: str
    """What ``HistoryPoint.score`` is, for example ``dev Spearman``."""
    stages: list[Stage]
    latency: Latency
    notes: list[str]


_SCORE = ("split", "metric", "dense", "slim", "low", "high", "level", "rows")
"""The keys of :class:`slimkern.training.evaluation.Score`, which is not imported for them: it lives
beside the trainer."""

REQUIRED: tuple[str, ...] = ("title", "command", "date", "machine", "versions")


def check(results: Mapping[str, object]) -> None:
    """Refuse results that the page could not render honestly.

    Raises:
        ValueError: a required section is missing or empty, or a section is unknown; the message
            names it and what is accepted.
    """
    missing = [key for key in REQUIRED if not results.get(key)]
    if missing:
        raise ValueError(f"results lacks {', '.join(missing)}; required: {', '.join(REQUIRED)}")
    unknown = sorted(set(results) - set(Results.__annotations__))
    if unknown:
        accepted = ", ".join(Results.__annotations__)
        raise ValueError(f"results has unknown sections {', '.join(unknown)}; accepted: {accepted}")
    _check_rows(
        results, "layers", tuple(LayerWidth.__annotations__), ("name", "kind", "kept", "total")
    )
    _check_rows(results, "scores", _SCORE, ("split", "metric", "dense", "slim"))
    _check_rows(results, "history", tuple(HistoryPoint.__annotations__), ("step",))


def _check_rows(
    results: Mapping[str, object],
    section: str,
    accepted: Sequence[str],
    required: Sequence[str],
) -> None:
    rows = results.get(section) or ()
    assert isinstance(rows, Sequence)
    for index, row in enumerate(rows):
        wrong = [k for k in required if k not in row] + [k for k in row if k not in accepted]
        if wrong:
            raise ValueError(
                f"results[{section!r}][{index}] lacks or does not know {', '.join(wrong)}; "
                f"required: {', '.join(required)}; accepted: {', '.join(accepted)}"
            )


def layer_widths(plan: SlimPlan) -> list[LayerWidth]:
    """The ``layers`` section of a plan: what stays of every group, in the plan's order."""
    return [
        LayerWidth(
            name=entry.group.name,
            kind=entry.group.kind,
            kept=len(entry.keep),
            total=entry.group.num_units,
        )
        for entry in plan.entries
    ]

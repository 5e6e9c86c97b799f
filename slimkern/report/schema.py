"""The shape of the ``results`` that a run fills in and ``write_report`` renders.

Plain dictionaries, lists, strings and numbers: what is written to ``results.json`` beside the page
can be read back and rendered again. Only ``title``, ``command``, ``date``, ``machine`` and
``versions`` are required; every other section is left out of the page when it is absent or empty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict

from slimkern.machine import Machine
from slimkern.timing import LatencyRow

if TYPE_CHECKING:
    from slimkern.plan import SlimPlan
    from slimkern.training.evaluation import Score

__all__ = [
    "Calibration",
    "Cost",
    "Data",
    "Family",
    "FamilyMember",
    "HistoryPoint",
    "Latency",
    "LatencyRow",
    "LayerWidth",
    "Machine",
    "MethodResult",
    "Model",
    "OneShot",
    "Results",
    "Size",
    "Stage",
    "layer_widths",
    "method_result",
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


class _Width(TypedDict):
    name: str
    kind: Literal["ffn", "mha"]
    kept: int
    total: int


class LayerWidth(_Width, total=False):
    """Units that stayed in one group; :func:`layer_widths` fills in a whole plan."""

    error: float
    """One-shot: the fraction of its target's variance that the repaired layer misses."""


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


class Calibration(TypedDict, total=False):
    """What the one-shot road saw of the data."""

    source: str
    sequences: int
    tokens: int


class Cost(TypedDict):
    """What a forward of both models costs, or what they weigh."""

    unit: str
    """``seconds``, ``parameters`` or ``MACs``."""
    dense: float
    slim: float


class OneShot(TypedDict, total=False):
    """What the one-shot road has to tell beside the common sections."""

    seconds: float
    """Of calibration, selection and repair."""
    calibration: Calibration
    before_healing: list[Score]
    """As ``scores``, with the model as the cut left it; empty where nothing was healed."""
    shape: list[int]
    """(batch, tokens) of predicted and measured latency."""
    predicted: Cost
    measured: Cost


class _Member(TypedDict):
    name: str
    parameters: int
    parameters_no_embeddings: int
    slim_min: float
    slim_median: float
    scores: list[Score]


class FamilyMember(_Member, total=False):
    """One model of a family; its times were taken in turns with all the others."""

    target_speedup: float
    """What was asked for; absent for the model that the run is about."""
    predicted: Cost
    heal_epochs: float


class FusedModel(TypedDict):
    """The slim model, fused; its times stand in the latency rows under its name."""

    name: str
    math: str
    """How its products are computed: ``fp32``, ``bf16``, ``bf16x3`` or ``bf16x6``."""
    blocks: int
    packed_bytes: int
    scores: list[Score]


class Fused(TypedDict, total=False):
    """The slim model as it is served."""

    models: list[FusedModel]
    refused: str
    """Why there are none."""


class Family(TypedDict):
    """Models of several speeds from one calibration, the run's own among them."""

    shape: list[int]
    threads: int
    rounds: int
    dense_min: float
    dense_median: float
    members: list[FamilyMember]


class MethodResult(TypedDict, total=False):
    """One of several runs with the same teacher; :func:`method_result` fills it in."""

    name: str
    """``one-shot`` or ``gradual``."""
    seconds: float
    """Of the slimming alone: no dense training, no evaluation."""
    scores: list[Score]
    size: Size
    latency: Latency
    settings: dict[str, Scalar]


class Results(TypedDict, total=False):
    """Everything a run has to tell. See the module's docstring for what is required."""

    title: str
    summary: str
    command: str
    date: str
    """ISO 8601, with the time zone."""
    machine: Machine
    versions: dict[str, str]
    method: str
    """``one-shot`` or ``gradual``."""
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
    seconds: float
    """Of the slimming alone: no dense training, no evaluation."""
    latency: Latency
    fused: Fused
    one_shot: OneShot
    family: Family
    methods: list[MethodResult]
    """All runs with this teacher, where there are several; the other sections are of the first."""
    notes: list[str]


def method_result(results: Results) -> MethodResult:
    """What a page about several runs shows of one of them.

    Raises:
        ValueError: the results do not say by which method they were made.
    """
    if "method" not in results:
        raise ValueError("results do not say their method")
    found: MethodResult = {"name": results["method"]}
    for key in ("seconds", "scores", "size", "latency", "settings"):
        if key in results:
            found[key] = results[key]
    return found


def layer_widths(plan: SlimPlan) -> list[LayerWidth]:
    """The ``layers`` section of a plan: what stays of every group, in the plan's order."""
    rows = []
    for entry in plan.entries:
        row = LayerWidth(
            name=entry.group.name,
            kind=entry.group.kind,
            kept=len(entry.keep),
            total=entry.group.num_units,
        )
        if entry.error is not None:
            row["error"] = entry.error
        rows.append(row)
    return rows

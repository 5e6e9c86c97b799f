"""The shape of speed results: what a benchmark run fills in, and what the page and tables read.

Plain dictionaries, lists, strings and numbers, so that a file of results can be read back. A
``SpeedRow`` is one provider doing one piece of work in one precision; rows with the same ``case``
did the same work on the same inputs, in turns, in one run.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from slimkern.machine import Machine

Level = Literal["op", "layer", "model", "training"]
LEVELS: tuple[Level, ...] = ("op", "layer", "model", "training")
Precision = Literal["fp32", "fp32-high", "fp32-medium", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp32-high", "fp32-medium", "bf16")
"""``fp32``, ``fp32-high`` and ``fp32-medium`` are float32 models under
``torch.set_float32_matmul_precision`` ``highest``, ``high`` and ``medium`` (other runtimes: their
own setting of the same meaning); ``bf16`` is a model held in bfloat16 (training: autocast)."""


class SpeedRow(TypedDict, total=False):
    """One provider, one piece of work, one precision.

    ``level, case, work, shape, provider, precision`` are always there. A row with ``skipped`` (it
    can't run here; the reason) or ``failed`` (its output is wrong; what the check said) has no
    times; every other row has ``seconds``, ``error`` and ``bound``.
    """

    level: Level
    case: str
    """Names the work and its shape, unique in a run: ``model/MiniLM-L6 slim/8x128``."""
    work: str
    """The work without its shape: ``MiniLM-L6 slim``."""
    shape: str
    """``8x128`` (batch x tokens), or ``M=1024`` of an op, or ``16x48, 80%`` of a training step."""
    provider: str
    """``torch eager``, ``onnxruntime``, ``slimkern avx512``, ..."""
    precision: Precision
    seconds: list[float]
    """Per call, one entry per round; entry i of every row of a case is of the same round."""
    error: float
    """Root mean square of the difference from the fp64 reference, over that of the reference."""
    bound: float
    """What ``error`` may be at most; derived, see ``bench/check.py``."""
    first_call: float
    """Seconds from the plain torch module to the first output: load, pack, compile, warm up."""
    peak_bytes: int
    """How far the process's resident memory rose over that, at its highest; absent: unknown."""
    flops: float
    """Floating-point operations of the matrix products of the work, 2 per multiply-add."""
    bytes: float
    """Compulsory traffic: every weight, input and output once, in the precision's storage."""
    floor: float
    """Seconds that the machine's limits alone would take; the fraction of the limit that is
    reached is ``floor / min(seconds)``."""
    limit: str
    """The limit behind ``floor``: ``fp32 FMA``, ``bf16 dot``, ``L2 read``, ``memory read``, ..."""
    bounds: dict[str, float]
    """GPU -> seconds that the peaks of its data sheet alone would take: a bound, no result."""
    subject: bool
    """True for the row that pytest-benchmark itself carries."""
    skipped: str
    failed: str


class Limit(TypedDict):
    """One measured peak of the machine, with the run's number of threads."""

    name: str
    """``fp32 FMA``, ``bf16 dot``, ``AMX bf16``, ``L2 read``, ``L3 read``, ``memory read``, ..."""
    unit: Literal["flop/s", "byte/s"]
    value: float
    size: int
    """Bytes of the working set it was measured with (0 where that has no meaning)."""


class ModelSize(TypedDict):
    """How large a model is."""

    parameters: int
    """All of them; a tied one counts once."""
    layer_parameters: int
    """Those outside of embedding tables."""
    weight_bytes: int
    """Of all parameters, in the dtype that was timed."""


class SpeedResults(TypedDict, total=False):
    """A run. ``title, command, date, machine, versions, threads, rows`` are always there."""

    title: str
    command: str
    date: str
    machine: Machine
    versions: dict[str, str]
    threads: int
    rounds: int
    smoke: bool
    """True for a rehearsal, whose times mean nothing."""
    seconds: float
    """How long the whole run took."""
    limits: list[Limit]
    rows: list[SpeedRow]
    models: dict[str, ModelSize]
    """By provider, where the providers are models of different sizes."""
    notes: list[str]

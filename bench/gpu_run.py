"""One piece of work on a GPU, by all providers: compared with fp64, then timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from bench import check, gpu_bounds, limits
from bench.gpu_providers import Sliced, gpu_providers, on_device, step_providers
from bench.gpu_time import ROUND, Direct, Replay, time_in_turns
from bench.gpu_works import LAUNCHED, Item, Mode
from bench.harness import STICK, allowed, new_row
from bench.providers.base import Call, Provider
from bench.work import Outputs, Setting, Work
from slimkern.report.speed_schema import Limit, Precision, SpeedRow

SHOWN = 300  # characters of an error
Key = tuple[str, str, str]
"""Case, provider, precision."""


@dataclass
class Bench:
    """What holds for a whole run.

    Attributes:
        device: ``cuda``, or ``cpu`` for a rehearsal, which captures nothing.
        limits: measured; floors are taken from them.
        seconds: about how long the rounds of a case may take.
        most: rounds.
        compile_seconds: after which a compile is given up.
        left: seconds until the run should end.
        lost: what ended an earlier process; it is not tried again.
        tell: is told what is about to be done.
    """

    device: str
    limits: list[Limit]
    seconds: float
    most: int
    compile_seconds: float
    left: Callable[[], float]
    lost: Mapping[Key, str] = field(default_factory=dict)
    tell: Callable[[Key], None] = lambda key: None

    def providers_of(self, work: Work) -> list[Provider]:
        """Who is asked to do this work."""
        if work.level == "training":
            return step_providers()
        return gpu_providers(min(self.compile_seconds, 0.5 * self.left()))


class DeviceLost(RuntimeError):  # noqa: N818
    """The device's context is broken: nothing more runs in this process."""


@dataclass
class _Candidate:
    row: SpeedRow
    call: Call
    right: Callable[[Outputs], float]
    """The error of outputs against the reference."""


def measure(item: Item, precision: Precision, bench: Bench) -> list[SpeedRow]:
    """The rows of one case; a provider whose output is wrong has no times.

    Raises:
        DeviceLost: an error left the device unusable; the message says what was being done.
    """
    setting = Setting(precision, device=bench.device)
    rows, candidates = _prepare_all(item.work, setting, bench)
    for row in rows:
        row["bounds"] = gpu_bounds.of_row(row)
    if item.checked_only:
        return [row for row in rows if "failed" in row]
    found: list[SpeedRow] = []
    for mode in item.modes:
        found += _timed(rows, candidates, mode, bench)
    candidates.clear()
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()
    return found


def _prepare_all(
    work: Work, setting: Setting, bench: Bench
) -> tuple[list[SpeedRow], list[_Candidate]]:
    rows: list[SpeedRow] = []
    candidates: list[_Candidate] = []
    providers = bench.providers_of(work)
    jobs = [(work, providers)]
    if work.before is not None:
        jobs.append((work.before, [p for p in providers if p.name == STICK]))
    for done, asked in jobs:
        placed = on_device(done, bench.device)
        reference: Outputs | None = None
        sticks: dict[Precision, float] = {}
        for provider in asked:
            row = new_row(work, done, provider, setting)
            row["floor"], row["limit"] = limits.floor(done, setting, bench.limits)
            key = (row["case"], row["provider"], row["precision"])
            refusal = provider.refuses(placed, setting)
            if refusal is not None:
                row["skipped"] = refusal
            elif key in bench.lost:
                row["failed"] = bench.lost[key]
            else:
                bench.tell(key)
                try:
                    if reference is None:
                        reference = check.reference(placed)
                    candidate = _prepare(provider, placed, setting, row, reference, sticks)
                    candidates += [candidate] if candidate else []
                except Exception as error:  # noqa: BLE001 - a failing part is told, and the rest goes on
                    row["failed"] = _said(error)
                    _still_there(row["failed"], bench.device)
            rows.append(row)
    return rows, candidates


def _prepare(
    provider: Provider,
    work: Work,
    setting: Setting,
    row: SpeedRow,
    reference: Outputs,
    sticks: dict[Precision, float],
) -> _Candidate | None:
    """Sets a provider up and compares its first output; fills the row."""
    on_gpu = setting.device == "cuda"
    held = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    call = provider.prepare(work, setting)
    expected = provider.expected(work, reference) if isinstance(provider, Sliced) else reference

    def right(outputs: Outputs) -> float:
        return check.error_of(work, outputs, expected)

    with torch.inference_mode():
        row["error"] = right(call())
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    row["bound"] = allowed(work, setting, row["error"], sticks)
    if row["error"] <= row["bound"]:
        return _Candidate(row, call, right)
    row["failed"] = (
        f"its error against fp64 is {row['error']:.3g}, at most {row['bound']:.3g} is right"
    )
    return None


def _timed(
    rows: list[SpeedRow], candidates: list[_Candidate], mode: Mode, bench: Bench
) -> list[SpeedRow]:
    """The rows with seconds, named after the mode."""
    fresh = {id(row): _named(row, mode) for row in rows}
    runs: dict[str, Replay | Direct] = {}
    for candidate in candidates:
        row = fresh[id(candidate.row)]
        key = (row["case"], row["provider"], row["precision"])
        if key in bench.lost:
            row["failed"] = bench.lost[key]
            continue
        bench.tell(key)
        try:
            with torch.inference_mode():
                runs[row["provider"]] = _run(candidate, mode, bench.device)
        except Exception as error:  # noqa: BLE001
            row["failed"] = _said(error)
            _still_there(row["failed"], bench.device)
    if runs:
        with torch.inference_mode():
            least = ROUND if bench.device == "cuda" else 0.0
            seconds = time_in_turns(runs, bench.seconds, bench.most, least)
        for row in fresh.values():
            if row["provider"] in seconds:
                row["seconds"] = seconds[row["provider"]]
    return list(fresh.values())


def _named(row: SpeedRow, mode: Mode) -> SpeedRow:
    if mode == "graph":
        return row.copy()
    work = row["work"] + LAUNCHED
    case = f"{row['level']}/{work}/{row['shape']}"
    return SpeedRow(**{**row, "work": work, "case": case})  # type: ignore[typeddict-item]


def _run(candidate: _Candidate, mode: Mode, device: str) -> Replay | Direct:
    """The call, warm; a graph's outputs are compared with the reference again.

    Raises:
        ValueError: a replay's outputs are wrong.
    """
    if device == "cpu":
        return Direct(candidate.call)
    if mode == "launched":
        candidate.call()
        return Direct(candidate.call)
    replay = Replay(candidate.call)
    replay()
    torch.cuda.synchronize()
    error = candidate.right(replay.outputs)
    if not error <= candidate.row["bound"]:
        raise ValueError(
            f"in a CUDA graph its error against fp64 is {error:.3g}, at most "
            f"{candidate.row['bound']:.3g} is right"
        )
    return replay


def _said(error: BaseException) -> str:
    """The error in one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def _still_there(doing: str, device: str) -> None:
    """A small graph is captured: an error may leave neither the device nor the allocator usable.

    Raises:
        DeviceLost: it can't be; the message is ``doing``.
    """
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
        one = torch.ones(1, device=device)
        replay = Replay(lambda: (one + 1,))
        replay()
        usable = float(replay.outputs[0]) == 2.0
    except Exception as error:
        raise DeviceLost(doing) from error
    if not usable:
        raise DeviceLost(doing)

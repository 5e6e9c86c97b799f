"""Everything about a GPU in one command of under eight minutes: check, tune, measure, write.

    python -m bench.gpu --out bench/results/MACHINE-DATE.json      # and a .md of the same name
    python -m bench.gpu --quick                                    # about a minute of it
    python -m bench.gpu --smoke                                    # a rehearsal, without a GPU

Every operation is compared with fp64 in bfloat16 before anything is timed, and every provider of a
piece of work before that is timed; what is wrong has no times. A part that fails is told in the
results, the rest goes on, and the command exits with 1. ``--smoke`` runs tiny work on the CPU, with
Triton's interpreter: its times mean nothing, and the results say so.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from bench import report
from slimkern import machine
from slimkern.report.speed_check import check_speed
from slimkern.report.speed_schema import Limit, SpeedResults, SpeedRow
from slimkern.report.speed_tables import full_tables

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"full": 440.0, "quick": 60.0, "smoke": 300.0}
SILENCE = 60.0  # seconds without a word, beyond the longest compile, after which a process is ended
GRACE = 20.0  # seconds for what was begun before the time was up
LIVES = 8  # processes that may be started one after the other
METHODS = (
    "Operations and layers are replays of CUDA graphs, each of as many calls as take about half a "
    "millisecond, so that what fits stays in the L2 cache. Models and training steps are measured "
    "twice: as replays, and (launched) with every kernel launched from Python.",
    "All providers of a piece of work run in turns, at least 5 ms each in a round; the host's "
    "clock is read before the first replay and after the device is idle again.",
    "Training steps: forward, backward and fused AdamW, under bfloat16 autocast with float32 "
    "weights.",
)
REHEARSAL = (
    "A rehearsal on a CPU, with Triton's interpreter: nothing was measured, the times mean nothing."
)


@dataclass
class Found:
    """What the worker's lines have told so far."""

    limits: list[Limit] = field(default_factory=list)
    rows: list[SpeedRow] = field(default_factory=list)
    done: list[list[str]] = field(default_factory=list)
    lost: list[tuple[list[str], str]] = field(default_factory=list)
    late: list[list[str]] = field(default_factory=list)
    checked: int = 0
    tuned: str = ""
    doing: list[str] | None = None
    ended: bool = False
    crash: str = ""
    ending: str = ""
    """Why it ended before all was done."""

    def take(self, entry: dict[str, Any]) -> None:
        """One line."""
        self.limits = entry.get("limits", self.limits)
        self.tuned = entry.get("tuned", self.tuned)
        self.doing = entry.get("doing", self.doing)
        self.crash = entry.get("crash", self.crash)
        self.ended = entry.get("end", self.ended)
        if "done" in entry:
            self.done.append(entry["done"])
            self.rows += entry["rows"]
            self.checked += bool(entry.get("checked"))
            self.late += [entry["done"]] if entry.get("late") else []
            self.doing = None

    def lose(self, reason: str) -> bool:
        """What was being done ended the process: it is not done again. False: it was nothing that
        is known, or the same as before."""
        self.crash = ""
        if self.doing is None or any(key == self.doing for key, _ in self.lost):
            self.ending = reason
            return False
        self.lost.append((self.doing, reason))
        print(f"lost: {', '.join(self.doing)}: {reason}", file=sys.stderr)
        self.doing = None
        return True


def run(extent: str, device: str, seconds: float, compile_seconds: float) -> Found:
    """Starts measuring processes, one after the other, until all is done or the time is up.

    An interrupt ends it early; what was found by then is returned.
    """
    found = Found()
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as scratch:
        for life in range(LIVES):
            log = Path(scratch) / f"{life}.jsonl"
            log.touch()
            state = Path(scratch) / "state.json"
            known = {"limits": found.limits, "done": found.done, "lost": found.lost}
            state.write_text(json.dumps(known), encoding="utf-8")
            command = [sys.executable, "-m", "bench.gpu_worker", "--extent", extent]
            command += ["--device", device, "--seconds", str(max(0.0, until - time.monotonic()))]
            command += ["--compile-seconds", str(compile_seconds)]
            command += ["--state", str(state), "--log", str(log)]
            try:
                reason = _follow(command, log, found, compile_seconds + SILENCE, until + GRACE)
            except KeyboardInterrupt:
                found.ending = "interrupted"
                break
            if found.ended or not found.lose(found.crash or reason):
                break
            if time.monotonic() > until:
                found.ending = "the time was up"
                break
        else:
            found.ending = f"{LIVES} processes were lost"
    return found


def _follow(command: list[str], log: Path, found: Found, silence: float, until: float) -> str:
    """Reads along until the process ends, falls silent or the time is up; returns which."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if "cpu" in command:
        environment["TRITON_INTERPRET"] = "1"
    with (
        subprocess.Popen(command, cwd=ROOT, env=environment) as process,
        log.open(encoding="utf-8") as lines,
    ):
        try:
            return _listen(process, lines, found, silence, until)
        finally:
            process.kill()


def _listen(
    process: subprocess.Popen[bytes], lines: TextIO, found: Found, silence: float, until: float
) -> str:
    heard, part = time.monotonic(), ""
    while True:
        alive = process.poll() is None  # before reading: nothing it wrote is missed
        text = lines.read()
        if text:
            heard = time.monotonic()
            *whole, part = (part + text).split("\n")
            for line in whole:
                found.take(json.loads(line))
        if not alive:
            return f"the process ended with {process.returncode}"
        if time.monotonic() - heard > silence:
            return f"no answer in {silence:.0f} s"
        if time.monotonic() > until:
            return "the time was up"
        time.sleep(0.05)


def results_of(found: Found, extent: str, seconds: float, command: str) -> SpeedResults:
    """What was found, as the tables and the page read it."""
    smoke = extent == "smoke"
    failed = sum("failed" in row for row in found.rows)
    notes = [*((REHEARSAL,) if smoke else ()), *METHODS]
    notes.append(
        f"Compared with fp64 before anything was timed: {found.checked} cases of awkward sizes in "
        f"bfloat16; with what was timed, {failed} results were wrong or could not be had."
    )
    notes += [found.tuned] if found.tuned else []
    if found.late:
        names = ", ".join(f"{case} ({precision})" for case, precision in found.late)
        notes.append(f"The time was up before {len(found.late)} cases: {names}.")
    if found.ending:
        notes.append(f"The run ended before all was done: {found.ending}.")
    results = SpeedResults(
        title="slimkern on a GPU" + (": a rehearsal without one" if smoke else ""),
        command=command,
        date=machine.now(),
        machine=machine.machine(),
        versions=machine.versions(),
        threads=1,
        seconds=round(seconds, 1),
        limits=found.limits,
        rows=found.rows,
        notes=notes,
    )
    if smoke:
        results["smoke"] = True
    check_speed(results)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="a tenth of it, about a minute")
    extent.add_argument("--smoke", action="store_true", help="a rehearsal: tiny, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="and a .md beside it")
    parser.add_argument("--seconds", type=float, help="after which nothing new is begun")
    parser.add_argument("--compile-seconds", type=float, default=45.0, help="for one torch.compile")
    asked = parser.parse_args(arguments)
    if not asked.smoke and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is False here: --smoke rehearses without a GPU")
    name = "smoke" if asked.smoke else "quick" if asked.quick else "full"
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = shlex.join(["python", "-m", "bench.gpu", *given])
    begun = time.monotonic()
    seconds = SECONDS[name] if asked.seconds is None else asked.seconds
    # Who ends the command gets what was found so far.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        found = run(name, "cpu" if asked.smoke else "cuda", seconds, asked.compile_seconds)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not found.rows:
        print(f"nothing could be measured: {found.ending or 'no rows'}", file=sys.stderr)
        return 1
    results = results_of(found, name, time.monotonic() - begun, command)
    report.write(asked.out, report.compact(results))
    report.write(asked.out.with_suffix(".md"), full_tables(results))
    for row in results["rows"]:
        if "failed" in row:
            print(f"failed: {row['case']}, {row['provider']}, {row['precision']}: {row['failed']}")
    return 1 if found.ending or found.lost or any("failed" in row for row in results["rows"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())

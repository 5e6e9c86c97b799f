"""The process that measures: writes a line of JSON for everything it does and finds.

A broken kernel can take the device's context, or the process, with it. So the measuring is done
here, and :mod:`bench.gpu` reads along, notes what was being done when this process ended or fell
silent, and starts another for what is left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CRASHED = 3  # exit code: the device is lost
OUT_OF_TIME = "the time was up"


class Log:
    """Appends a JSON object as a line, at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def __call__(self, **entry: Any) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()


def work(asked: argparse.Namespace, log: Log) -> int:
    """Measures what is listed and not done; the process's exit code."""
    from bench import gpu_run, gpu_works, limits

    gc.freeze()  # what the imports hold is set aside from every later collection
    until = time.monotonic() + asked.seconds
    smoke = asked.extent == "smoke"
    state = json.loads(asked.state.read_text(encoding="utf-8"))
    measured = state["limits"]
    if not measured:
        measured = (
            limits.torch_limits("cpu", width=64, sizes=(2**16,), cache=2**20)
            if smoke
            else limits.measure(1, asked.device)
        )
        log(limits=measured)
    bench = gpu_run.Bench(
        device=asked.device,
        limits=measured,
        seconds={"full": 1.5, "quick": 0.3, "smoke": 0.01}[asked.extent],
        most=1 if smoke else 15,
        compile_seconds=asked.compile_seconds,
        left=lambda: until - time.monotonic(),
        lost={tuple(key): reason for key, reason in state["lost"]},
        tell=lambda key: log(doing=key),
    )
    done = {tuple(key) for key in state["done"]}
    for item in gpu_works.items(asked.extent):
        for precision in item.precisions:
            case = (item.work.case, precision)
            if case in done:
                continue
            if bench.left() <= 0:
                log(done=case, rows=[], late=True)
                continue
            begun = time.monotonic()
            try:
                rows = gpu_run.measure(item, precision, bench)
            except gpu_run.DeviceLost as error:
                log(crash=str(error))
                return CRASHED
            log(done=case, rows=rows, checked=item.checked_only, took=time.monotonic() - begun)
    log(end=True)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; started by :mod:`bench.gpu`."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_worker", description=__doc__)
    parser.add_argument("--extent", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--compile-seconds", type=float, required=True)
    parser.add_argument("--state", type=Path, required=True, help="what is done and what is lost")
    parser.add_argument("--log", type=Path, required=True)
    asked = parser.parse_args(arguments)
    log = Log(asked.log)
    code = work(asked, log)
    sys.stdout.flush()
    # Compiler processes and a lost device may hold up an orderly exit.
    os._exit(code)


if __name__ == "__main__":
    main()

"""One process, one target: ``python -m tests.compile.worker sm_90`` prints a row per kernel."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.compile import amdgcn, cases, code, machine, sass
from tests.compile.cases import Case
from tests.compile.code import Figures
from tests.compile.targets import TARGETS, Target


def _reader_version() -> str:
    texts = (Path(module.__file__).read_bytes() for module in (amdgcn, code, sass))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def figures(launch: machine.Launch, target: Target, version: str) -> dict[str, Any]:
    """What the machine code says; remembered beside Triton's cache, by the kernel's hash there."""
    from triton import knobs

    folder = Path(knobs.cache.dir) / f"figures-{version}"
    path = folder / f"{launch.compiled.hash}.json"
    if path.exists():
        return json.loads(path.read_text())
    read = amdgcn.read if target.backend == "hip" else sass.read
    found: Figures = read(launch.compiled)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{id(launch)}")
    scratch.write_text(json.dumps(found.to_json()))
    scratch.replace(path)
    return json.loads(path.read_text())  # as it is read the next time, keys included


def _said(error: BaseException) -> str:
    """The compiler's error, and what led to it."""
    text = f"{type(error).__name__}: {error}"[-1500:]
    return text if error.__cause__ is None else f"{text}\nbecause of {_said(error.__cause__)}"


def positions(case: Case, full: bool) -> Iterator[tuple[int | None, list[int]]]:
    """Which place in its tables of tiles a case is compiled with, and a list for their lengths."""
    counts: list[int] = []
    yield None, counts
    if not full:
        longest = max(counts, default=0)
        yield from ((position, counts) for position in ((0, longest - 1) if longest else ()))
        return
    position = 0
    while position < max(counts, default=0):
        yield position, counts
        position += 1


def rows(case: Case, target: Target, full: bool, double: bool, seen: set[str]) -> Iterator[dict]:
    """Compiles a case in its configurations."""
    import torch

    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    for position, counts in positions(case, full):
        tape = machine.Tape(seen=seen)
        about = {"case": case.name, "dtype": case.dtype, "tile": position, "narrow": case.narrow}
        try:
            with machine.tile_number(position, counts, double), machine.recorded(tape):
                case.call()
        except Exception as error:  # noqa: BLE001  (reported, and the rest is compiled)
            yield about | {"error": _said(error)}
        version = _reader_version()
        for launch in tape.launches:
            yield about | {
                "kernel": launch.kernel,
                "constants": {k: str(v) for k, v in launch.constants.items()},
                "indices": launch.indices,
                "itemsize": launch.itemsize,
                "figures": figures(launch, target, version),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--double", action="store_true", help="twice every tile, to see it found")
    parser.add_argument("--only", default="", help="ops and cases whose 'op: case' contains this")
    asked = parser.parse_args()
    target = TARGETS[asked.target]
    machine.pretend(target)
    existing = sorted(machine.kernels())
    found = cases.collect(cases.Meta(target))
    seen: set[str] = set()
    for op, listed in found.items():
        for case in listed:
            if (case.full and not asked.full) or asked.only not in f"{op}: {case.name}":
                continue
            for row in rows(case, target, asked.full, asked.double, seen):
                print(json.dumps({"target": target.name, "op": op} | row), flush=True)
    print(json.dumps({"target": target.name, "existing": existing}), flush=True)


if __name__ == "__main__":
    sys.exit(main())

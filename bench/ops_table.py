"""What runs where, from the registry of the ops: a table, printed or put into the README.

    python -m bench.ops_table --readme README.md

A cell says in which passes an op has an implementation: ``forward``, or ``both``. The columns of
instruction sets are backend ``cpu``: its kernels are built for each, and products of matrices for
AMX too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import slimkern.ops  # noqa: F401  (registers the ops)
from bench.report import into_readme
from slimkern.ops._registry import COMPOSED, OPS, Op, Pass

MARKERS = ("<!-- ops table -->", "<!-- /ops table -->")
COLUMNS = ("reference", "scalar", "AVX2", "AVX-512", "AMX", "Triton")
PASSES: tuple[Pass, ...] = ("forward", "backward")
NOTES = (
    "Reference is the equation in torch: every device and dtype. The instruction sets are built "
    "from one C++ source each; on a machine with AMX, passes over rows run as AVX-512. Triton is "
    "for NVIDIA GPUs since Ampere and for AMD's."
)


def _backend(column: str) -> str:
    return {"reference": "reference", "Triton": "triton"}.get(column, "cpu")


def _families() -> dict[str, list[Op]]:
    """Ops by the last part of their package, without those that have no kernel to run."""
    found: dict[str, list[Op]] = {}
    for op in OPS.values():
        if op.backends.units != "none":
            found.setdefault(op.backends.package.split(".")[-1], []).append(op)
    return found


def passes(ops: Sequence[Op], column: str) -> set[Pass]:
    """The passes for which every op of a family has an implementation."""
    if column == "AMX" and not any(op.backends.units == "products" for op in ops):
        return set()
    return {
        name
        for name in PASSES
        if any(name in op.passes for op in ops)
        and all(op.has(_backend(column)) for op in ops if name in op.passes)
    }


def _cell(found: Iterable[Pass]) -> str:
    names = [name for name in PASSES if name in set(found)]
    return "both" if len(names) == 2 else "".join(names) or "no"


def table() -> str:
    """The table as markdown: a line per op, alone and composed."""
    families = _families()
    lines = [f"| op | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    for name in sorted({*families, *COMPOSED}):
        parts = COMPOSED.get(name, (name,))
        cells = [_composed([families[part] for part in parts], column) for column in COLUMNS]
        lines.append(f"| `{name}` | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + f"\n\n{NOTES}\n"


def _composed(parts: Sequence[Sequence[Op]], column: str) -> set[Pass]:
    """What all parts have; AMX where a part has it, as the others run as AVX-512 there."""
    column_of_rest = "AVX-512" if column == "AMX" else column
    found = set.intersection(*(passes(ops, column_of_rest) for ops in parts))
    if column == "AMX" and not any(passes(ops, "AMX") for ops in parts):
        return set()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--readme", type=Path, help="put the table between its markers")
    asked = parser.parse_args(arguments)
    if asked.readme is None:
        print(table(), end="")
        return
    text = asked.readme.read_text(encoding="utf-8")
    asked.readme.write_text(into_readme(text, table(), asked.readme.name, MARKERS), "utf-8")


if __name__ == "__main__":
    main()

"""The README's table and plot, from the results of finished runs.

    python bench/readme.py --runs runs/full-0 runs/full-1 runs/full-2 --plot docs/results.svg

Each run is a folder that `slimkern demo` or `slimkern slim` wrote. Scores are means over the runs
(seeds) that are given; latencies are those of the first one, or of the run that --latency names
(the machine was quiet there). The table goes to standard output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

Results = dict[str, Any]


def load(folders: list[Path]) -> list[Results]:
    runs = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    sizes = {run["size"]["slim_parameters"] for run in runs}
    if len(sizes) > 1:
        raise SystemExit(f"--runs are of different slim models: {sorted(sizes)} parameters")
    return runs


def scores(runs: list[Results]) -> list[tuple[str, list[float], list[float]]]:
    """(split and metric, dense of each run, slim of each run)."""
    rows = []
    for position, row in enumerate(runs[0]["scores"]):
        name = f"{row['split']} {row['metric']}"
        rows.append(
            (
                name,
                [run["scores"][position]["dense"] for run in runs],
                [run["scores"][position]["slim"] for run in runs],
            )
        )
    return rows


def table(runs: list[Results]) -> str:
    first = runs[0]
    lines = ["| | dense | slim | |", "|---|---|---|---|"]
    for name, dense, slim in scores(runs):
        seeds = f", slim {min(slim):.4f} to {max(slim):.4f}" if len(runs) > 1 else ""
        change = f"{mean(slim) - mean(dense):+.4f}{seeds}"
        lines.append(f"| {name} | {mean(dense):.4f} | {mean(slim):.4f} | {change} |")
    size = first["size"]
    for name, key in (("parameters", ""), ("without embeddings", "_no_embeddings")):
        dense, slim = size[f"dense_parameters{key}"], size[f"slim_parameters{key}"]
        lines.append(f"| {name} | {dense:,} | {slim:,} | {slim / dense - 1:+.1%} |")
    for row in first["latency"]["rows"]:
        dense, slim = row["dense_min"] * 1e3, row["slim_min"] * 1e3
        name = f"{row['batch']} x {row['tokens']} tokens, ms"
        lines.append(f"| {name} | {dense:.1f} | {slim:.1f} | {dense / slim:.2f}x faster |")
    machine, versions = first["machine"], first["versions"]
    lines.append("")
    lines.append(
        f"{len(runs)} run(s); {machine['cpu']} ({machine['isa']}), {first['latency']['threads']} "
        f"thread(s), float32; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"slimkern {versions['slimkern']}; {first['date'][:10]}; `{first['command']}`"
    )
    return "\n".join(lines)


def plot(runs: list[Results], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    gray, teal = "#8b97a5", "#0f8f8f"
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), width_ratios=(1, 1.1))
    for y, (_, dense, slim) in enumerate(scores(runs)):
        left.plot([mean(dense), mean(slim)], [y, y], color="#d8dee5", lw=3, zorder=1)
        left.scatter(dense, [y] * len(dense), color=gray, s=28, zorder=2)
        left.scatter(slim, [y] * len(slim), color=teal, s=28, zorder=3)
    left.set_yticks(range(len(scores(runs))), [name for name, _, _ in scores(runs)])
    left.invert_yaxis()
    left.set_title(f"STS-B, {len(runs)} seed(s), a point each", fontsize=10)
    rows = runs[0]["latency"]["rows"]
    for y, row in enumerate(rows):
        right.barh(y - 0.19, row["dense_min"] * 1e3, 0.36, color=gray)
        right.barh(y + 0.19, row["slim_min"] * 1e3, 0.36, color=teal)
        text = f"{row['dense_min'] / row['slim_min']:.1f}x"
        right.text(row["slim_min"] * 1e3, y + 0.19, f" {text}", va="center", fontsize=8)
    right.set_yticks(range(len(rows)), [f"{r['batch']} x {r['tokens']}" for r in rows])
    right.invert_yaxis()
    right.set_title("one forward, ms (batch x tokens)", fontsize=10)
    right.barh([0], [0], color=gray, label="dense")
    right.barh([0], [0], color=teal, label="slim")
    right.legend(frameon=False, fontsize=8, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", nargs="+", type=Path, required=True)
    parser.add_argument("--latency", type=Path, help="the run whose latencies are shown")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    runs = load(arguments.runs)
    if arguments.latency is not None:
        runs[0]["latency"] = load([arguments.latency])[0]["latency"]
    print(table(runs))
    if arguments.plot is not None:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()

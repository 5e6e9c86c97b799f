"""Figures and tables of several slim models of one dense one: a family, two methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from slimkern.report.drawing import DENSE, SLIM, STYLE, TRACK, WARM, svg
from slimkern.report.schema import Cost, Family, LatencyRow, MethodResult, Results
from slimkern.report.signs import TIMES

if TYPE_CHECKING:
    from slimkern.training.evaluation import Score


class Point(NamedTuple):
    """A model on the curve: kind ``dense``, ``family``, or ``other`` for one that is not on it."""

    name: str
    speedup: float
    score: float
    kind: str


def curve(points: Sequence[Point], score_name: str) -> str:
    """Score against measured speed-up: a line through the dense model and the family's points."""
    line = sorted((p for p in points if p.kind != "other"), key=lambda p: p.speedup)
    colours = {"dense": DENSE, "family": SLIM, "other": WARM}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.plot([p.speedup for p in line], [p.score for p in line], color=TRACK, linewidth=3)
        for point in points:
            axes.scatter([point.speedup], [point.score], s=64, color=colours[point.kind], zorder=3)
            axes.annotate(
                point.name,
                (point.speedup, point.score),
                xytext=(7, 6),
                textcoords="offset points",
                fontsize=9,
            )
        axes.set_title(score_name)
        axes.set_xlabel("measured speed-up over the dense model")
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}" + TIMES))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.margins(x=0.10, y=0.18)
        return svg(figure, "curve", f"{score_name} against measured speed-up")


def methods(names: Sequence[str], rows: Sequence[tuple[str, float, Sequence[float]]]) -> str:
    """Scores of several slim models and the dense one: ``rows`` are (label, dense, each model)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.42 * len(rows) + 1.1), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(rows))[::-1]
        for at, (_, dense, values) in zip(y, rows):
            ends = (min(dense, *values), max(dense, *values))
            axes.plot(ends, [at, at], color=TRACK, linewidth=5, zorder=1)
        axes.scatter([dense for _, dense, _ in rows], y, s=70, color=DENSE, label="dense", zorder=3)
        for i, (name, colour) in enumerate(zip(names, (SLIM, WARM))):
            scores = [values[i] for _, _, values in rows]
            axes.scatter(scores, y, s=70, color=colour, label=name, zorder=4)
        axes.set_yticks(y, [label for label, _, _ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", ncols=len(names) + 1)
        return svg(figure, "methods", "Scores of the dense model and of each method's slim one")


def curve_of(results: Results) -> str | None:
    """The curve of a run's family, the other methods' models beside it; ``None`` without scores."""
    family = results["family"]
    scored = [member for member in family["members"] if member["scores"]]
    if not scored:
        return None
    name, dense = _axis(scored[0]["scores"])
    points = [Point("dense", 1.0, dense, "dense")]
    for member in scored:
        label = member["name"] if "target_speedup" in member else results.get("method", "slim")
        kind = "family" if "target_speedup" in member else "other"
        points.append(Point(label, speedup(family, member), _score(member["scores"], name), kind))
    for method in results.get("methods") or ():
        row = _row_at(method.get("latency", {}).get("rows", ()), family["shape"])
        own = method["name"] != results.get("method")
        if own and row is not None and method.get("scores"):
            faster = row["dense_min"] / row["slim_min"]
            score = _score(method["scores"], name)
            points.append(Point(method["name"], faster, score, "other"))
    return curve(points, " ".join(name))


def speedup(family: Family, member: Any) -> float:
    """Measured: how many times faster than the dense model a member is."""
    return float(family["dense_min"] / member["slim_min"])


def family_rows(family: Family) -> list[dict[str, Any]]:
    """The family's table: a row per model, predicted beside measured."""
    rows = []
    for member in family["members"]:
        predicted = member.get("predicted")
        known = predicted is not None and predicted["unit"] == "seconds"
        rows.append(
            {
                "name": member["name"],
                "parameters": member["parameters_no_embeddings"],
                "epochs": member.get("heal_epochs", 0.0),
                "predicted": predicted["slim"] if predicted and known else None,
                "measured": member["slim_min"],
                "predicted_speedup": faster(predicted) if predicted and known else None,
                "speedup": speedup(family, member),
                "scores": [score["slim"] for score in member["scores"]],
            }
        )
    return rows


def faster(cost: Cost) -> float:
    """Dense over slim."""
    return cost["dense"] / cost["slim"]


def method_rows(methods: Sequence[MethodResult]) -> list[tuple[str, float, list[float]]]:
    """(split and metric, dense, each method's score) of what all methods were scored on."""
    if not methods:
        return []
    tables = [{(s["split"], s["metric"]): s for s in m.get("scores") or ()} for m in methods]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    return [
        (" · ".join(key), tables[0][key]["dense"], [table[key]["slim"] for table in tables])
        for key in shared
    ]


def _axis(scores: Sequence[Score]) -> tuple[tuple[str, str], float]:
    """(split, metric) that a curve shows, dev's Spearman where it is there, and its dense score."""
    split = next((s["split"] for s in scores if s["split"] == "dev"), scores[0]["split"])
    own = [s for s in scores if s["split"] == split]
    chosen = next((s for s in own if s["metric"].lower() == "spearman"), own[0])
    return (chosen["split"], chosen["metric"]), chosen["dense"]


def _score(scores: Sequence[Score], name: tuple[str, str]) -> float:
    return next(s["slim"] for s in scores if (s["split"], s["metric"]) == name)


def _row_at(rows: Sequence[LatencyRow], shape: Sequence[int]) -> LatencyRow | None:
    return next((r for r in rows if [r["batch"], r["tokens"]] == list(shape)), None)

"""The report's figures: inline SVG whose ink follows the page, in light and in dark.

Drawn with matplotlib's object interface (no global state, no screen). Text stays text, in the
page's font.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from slimkern.report.drawing import DENSE, INK, SLIM, STYLE, TRACK, WARM, svg
from slimkern.report.schema import HistoryPoint, LatencyRow, LayerWidth, Size
from slimkern.report.signs import MINUS, TIMES

if TYPE_CHECKING:
    from slimkern.training.evaluation import Score


_MOST_POINTS = 500  # of a drawn line: a page is read at about 1,000 pixels


def accuracy(scores: Sequence[Score]) -> str:
    """Dense and slim per split and metric, beside the difference with its interval."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.52 * len(scores) + 1.3), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        rows = np.arange(len(scores))[::-1]
        for y, score in zip(rows, scores):
            ends = [score["dense"], score["slim"]]
            left.plot(ends, [y, y], color=TRACK, linewidth=5, zorder=1)
        left.scatter([s["dense"] for s in scores], rows, s=70, color=DENSE, label="dense", zorder=3)
        left.scatter([s["slim"] for s in scores], rows, s=70, color=SLIM, label="slim", zorder=3)
        left.set_yticks(rows, [f"{s['split']} · {s['metric']}" for s in scores])
        left.set_title("Score")
        left.margins(x=0.12)
        left.set_ylim(-0.6, len(scores) - 0.4)
        left.grid(axis="y", visible=False)
        right.axvline(0.0, color=INK, linewidth=1)
        for y, score in zip(rows, scores):
            difference = score["slim"] - score["dense"]
            if "low" in score and "high" in score:
                right.plot([score["low"], score["high"]], [y, y], color=SLIM, linewidth=2.2)
            right.scatter([difference], [y], s=46, color=SLIM, zorder=3)
        right.set_title(f"Difference, slim {MINUS} dense")
        right.grid(axis="y", visible=False)
        right.margins(x=0.12)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(5))
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=2)
        return svg(figure, "accuracy", "Scores of the dense and the slim model")


def widths(layers: Sequence[LayerWidth]) -> str:
    """What stays of every layer, over what was there: a panel per kind."""
    titles = {"ffn": "FFN channels kept", "mha": "Attention heads kept"}
    bars = {w["name"]: (w["kept"], w["total"], f"{w['kept']:,} of {w['total']:,}") for w in layers}
    return _layer_bars(layers, bars, titles, "widths", "Units kept in every layer")


def errors(layers: Sequence[LayerWidth]) -> str:
    """One-shot: what every repaired layer misses of its target's variance; a panel per kind."""
    own = [w for w in layers if "error" in w]
    most = max(w["error"] for w in own)
    bars = {w["name"]: (w["error"], most, f"{w['error']:.2%}") for w in own}
    titles = {"ffn": "FFN: variance missed", "mha": "Attention: variance missed"}
    return _layer_bars(own, bars, titles, "errors", "Error of every repaired layer")


def _layer_bars(
    layers: Sequence[LayerWidth],
    bars: Mapping[str, tuple[float, float, str]],
    titles: Mapping[str, str],
    name: str,
    title: str,
) -> str:
    """A bar per layer, a panel per kind: ``bars`` are (length, length of the track, text)."""
    kinds = [k for k in ("ffn", "mha") if any(w["kind"] == k for w in layers)]
    with matplotlib.rc_context(STYLE):
        most = max(sum(w["kind"] == k for w in layers) for k in kinds)
        figure = Figure(figsize=(9.2, 0.30 * most + 1.1), layout="constrained")
        panels = figure.subplots(1, len(kinds), squeeze=False)[0]
        for kind, axes in zip(kinds, panels):
            own = [w["name"] for w in layers if w["kind"] == kind]
            y = np.arange(len(own))[::-1]
            axes.barh(y, [bars[n][1] for n in own], color=TRACK, height=0.66)
            axes.barh(y, [bars[n][0] for n in own], color=SLIM, height=0.66)
            longest = max(bars[n][1] for n in own) or 1.0
            for at, n in zip(y, own):
                axes.text(longest * 1.02, at, bars[n][2], va="center", fontsize=9)
            axes.set_yticks(y, layer_labels(own))
            axes.set_xlim(0, longest * 1.32)
            axes.set_ylim(-0.6, len(own) - 0.4)
            axes.set_xticks([])
            axes.grid(visible=False)
            axes.spines[["bottom", "left"]].set_visible(False)
            axes.set_title(titles[kind])
        return svg(figure, name, title)


def history(points: Sequence[HistoryPoint], score_name: str) -> str:
    """Sparsity, loss and, where it was evaluated, the score over the steps of the run."""
    steps = [p["step"] for p in points]
    sparse = [k for k in ("ffn_sparsity", "mha_sparsity") if any(k in p for p in points)]
    shown = [bool(sparse), any("loss" in p for p in points), any("score" in p for p in points)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.9 * sum(shown) + 0.6), layout="constrained")
        panels = iter(figure.subplots(max(1, sum(shown)), 1, sharex=True, squeeze=False)[:, 0])
        last = None
        if shown[0]:
            last = next(panels)
            for key, colour in zip(sparse, (SLIM, WARM) if len(sparse) == 2 else (SLIM,)):
                name = {"ffn_sparsity": "FFN channels", "mha_sparsity": "attention heads"}[key]
                x, y = _series(points, key)
                last.step(x, y, where="post", color=colour, linewidth=2, label=name)
            last.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            last.set_ylim(bottom=0)
            last.set_title("Removed so far")
            last.legend(loc="lower right", ncols=2)
        if shown[1]:
            last = next(panels)
            x, y = _thinned(*_series(points, "loss"))
            last.plot(x, y, color=DENSE, linewidth=0.8, alpha=0.55, label="logged")
            last.plot(x, _smoothed(y), color=SLIM, linewidth=2, label="smoothed")
            last.set_title("Training loss")
            last.legend(loc="upper right", ncols=2)
        if shown[2]:
            last = next(panels)
            x, y = _series(points, "score")
            last.plot(x, y, color=SLIM, linewidth=2, marker="o", markersize=5)
            last.set_title(score_name or "Score")
        if last is not None:
            last.set_xlabel("step")
            last.set_xlim(min(steps), max(max(steps), min(steps) + 1))
            last.xaxis.set_major_locator(MaxNLocator(integer=True))
        return svg(figure, "history", "Sparsity and loss over the steps")


def size(sizes: Size) -> str:
    """Parameters and bytes, dense and slim, each pair on the scale of its dense bar."""
    rows = []
    for label, key, unit in (
        ("parameters in the layers", "parameters_no_embeddings", "M"),
        ("parameters in all", "parameters", "M"),
        ("weights file", "bytes", "MB"),
    ):
        if f"dense_{key}" in sizes and f"slim_{key}" in sizes:
            dense, slim = both(sizes, key)
            share = f"{MINUS}{1 - slim / dense:.0%}" if dense else ""
            texts = [f"{value / 1e6:,.1f} {unit}" for value in (dense, slim)]
            rows.append((label, [(dense, texts[0]), (slim, f"{texts[1]}  ({share})")]))
    series = [("dense", DENSE), ("slim", SLIM)]
    return _grouped_bars(rows, series, "size", "Parameters and file size")


def latency(table: Sequence[LatencyRow]) -> str:
    """Median time of a forward per batch and length, each group on the scale of its dense bar."""
    fused = [next(iter(row.get("further_median", {}).items()), None) for row in table]
    names = {found[0] for found in fused if found is not None}
    series = [("dense", DENSE), ("slim", SLIM)]
    if len(names) == 1 and None not in fused:
        series.append((f"slim, {names.pop()}", WARM))
    rows = []
    for row, found in zip(table, fused):
        dense = row["dense_median"]
        bars = [(dense, milliseconds(dense))]
        for seconds in [row["slim_median"], found[1] if found else 0.0][: len(series) - 1]:
            ratio = (
                f"{dense / seconds:.2f}{TIMES} faster"
                if dense >= seconds
                else (f"{seconds / dense:.2f}{TIMES} slower")
            )
            bars.append((seconds, f"{milliseconds(seconds)}  ({ratio})"))
        rows.append((f"{row['batch']} {TIMES} {row['tokens']} tokens", bars))
    return _grouped_bars(rows, series, "latency", "Latency of the models")


def milliseconds(seconds: float) -> str:
    """Three or more significant digits, with the unit."""
    value = seconds * 1e3
    return f"{value:,.1f} ms" if value >= 10 else f"{value:.2f} ms"


def _grouped_bars(
    rows: Sequence[tuple[str, Sequence[tuple[float, str]]]],
    series: Sequence[tuple[str, str]],
    name: str,
    title: str,
) -> str:
    """Bars of very different sizes, a group per row, each on the scale of its first.

    Args:
        rows: label of the group, and (value, text) of its bars, as many as ``series``.
        series: (label, colour) of the first bars of all groups, of the second ones, and so on.
        name, title: of the figure.
    """
    ratios = [[value / bars[0][0] if bars[0][0] else 1.0 for value, _ in bars] for _, bars in rows]
    longest = max(max(group) for group in ratios)
    pitch = 0.18 * len(series) + 0.14  # of groups; that of bars is 0.18
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, 1.32 * pitch * len(rows) + 0.6), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(rows))[::-1] * pitch
        for i, (label, colour) in enumerate(series):
            places = y + 0.18 * ((len(series) - 1) / 2 - i)
            axes.barh(places, [r[i] for r in ratios], color=colour, height=0.15, label=label)
            for at, ratio, (_, bars) in zip(places, ratios, rows):
                axes.text(ratio[i] + 0.012 * longest, at, bars[i][1], va="center", fontsize=9)
        axes.set_yticks(y, [label for label, _ in rows])
        axes.set_xlim(0, 1.25 * longest)
        axes.set_ylim(-0.55 * pitch, (len(rows) - 0.45) * pitch)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines[["bottom", "left"]].set_visible(False)
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower left", ncols=len(series))
        return svg(figure, name, title)


def number(section: Mapping[str, object], key: str) -> float:
    """A number of a section by its name.

    Raises:
        ValueError: it is none; the message names the key.
    """
    value = section[key]
    if not isinstance(value, (int, float)):
        raise ValueError(f"{key} is {value!r}; accepted: a number")
    return float(value)


def both(section: Mapping[str, object], key: str) -> tuple[float, float]:
    """``dense_<key>`` and ``slim_<key>`` of a section."""
    return number(section, f"dense_{key}"), number(section, f"slim_{key}")


def layer_labels(names: Sequence[str]) -> list[str]:
    """Short labels of groups: the layer's number where the names differ in one number only."""
    numbers = [re.findall(r"\d+", name) for name in names]
    shapes = {re.sub(r"\d+", "#", name) for name in names}
    if len(shapes) == 1 and len(names) > 1:
        for column in range(len(numbers[0])):
            found = [n[column] for n in numbers]
            if len(set(found)) == len(names):
                return [f"layer {n}" for n in found]
    return [name if len(name) <= 28 else "…" + name[-27:] for name in names]


def _series(points: Sequence[HistoryPoint], key: str) -> tuple[np.ndarray, np.ndarray]:
    own = [(p["step"], number(p, key)) for p in points if key in p]
    return np.array([x for x, _ in own], float), np.array([y for _, y in own], float)


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most :data:`_MOST_POINTS` points: means of neighbours."""
    if len(x) <= _MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), _MOST_POINTS)
    return np.array([x[p].mean() for p in parts]), np.array([y[p].mean() for p in parts])


def _smoothed(y: np.ndarray) -> np.ndarray:
    """A centred running mean over a twentieth of the points."""
    half = max(1, len(y) // 40)
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])

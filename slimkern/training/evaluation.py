"""Statistics of an evaluation: correlations, and a paired bootstrap interval of their difference.

Everything is plain NumPy in float64 and deterministic: the same predictions give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

Statistic = Literal["pearson", "spearman", "accuracy"]
Array = npt.NDArray[np.float64]

_CHUNK = 256
"""Resamples computed together: bounds the memory at about 256 x rows x 8 bytes per temporary."""


class Score(TypedDict, total=False):
    """One statistic of one split, as the report shows it; :func:`compare` fills it in.

    ``low`` and ``high`` bound the difference ``slim - dense`` (paired bootstrap at ``level``).
    """

    split: str
    metric: str
    dense: float
    slim: float
    low: float
    high: float
    level: float
    rows: int


@dataclass(frozen=True)
class Interval:
    """A difference ``slim - dense`` with its bootstrap interval.

    Attributes:
        estimate: the difference on the rows as they are.
        low, high: the bounds of the central ``level`` of the resampled differences.
        level: the interval's coverage, for example 0.95.
        resamples: how many resamples it rests on.
    """

    estimate: float
    low: float
    high: float
    level: float
    resamples: int


def pearson(gold: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """Pearson's correlation, ``cov(x, y) / (sd(x) sd(y))``, of two vectors of one length.

    Returns NaN where one of them is constant: the correlation is not defined there.

    Raises:
        ValueError: the vectors differ in length, have under two entries, or are not finite.
    """
    x, y = _vectors(gold=gold, predicted=predicted)
    return float(_weighted_pearson(x, y, np.ones((1, x.size)))[0])


def spearman(gold: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties sharing their mean rank.

    Returns NaN where one of them is constant.

    Raises:
        ValueError: the vectors differ in length, have under two entries, or are not finite.
    """
    x, y = _vectors(gold=gold, predicted=predicted)
    return float(_weighted_spearman(x, y, np.ones((1, x.size)))[0])


def accuracy(gold: npt.ArrayLike, predicted: npt.ArrayLike) -> float:
    """The fraction of rows where the predicted label is the gold one.

    Raises:
        ValueError: the vectors differ in length, have under two entries, or are not finite.
    """
    x, y = _vectors(gold=gold, predicted=predicted)
    return float(np.mean(x == y))


def bootstrap_difference(
    gold: npt.ArrayLike,
    dense: npt.ArrayLike,
    slim: npt.ArrayLike,
    statistic: Statistic = "pearson",
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of ``statistic(gold, slim) - statistic(gold, dense)`` over resampled rows.

    A paired percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    chapter 13): rows are drawn with replacement, both models are scored on the *same* draw, and the
    interval is read off the quantiles of the differences. What it covers is the sampling of the
    evaluation rows, not the training seed. A draw is held as how often each row occurs, and every
    statistic is computed with these counts as weights, which is the same number as on the
    repeated rows.

    Args:
        gold: the true scores or labels, ``(rows,)``.
        dense: the dense model's predictions, ``(rows,)``.
        slim: the slim model's predictions of the same rows, ``(rows,)``.
        statistic: ``pearson``, ``spearman`` or ``accuracy``.
        resamples: number of draws, at least 100.
        level: coverage, in (0, 1).
        seed: of the draws; the result depends on nothing else.

    Raises:
        ValueError: an argument is out of range, vectors differ in length, or the statistic is not
            defined because the gold scores or the predictions are constant.
    """
    if statistic not in _WEIGHTED:
        raise ValueError(f"statistic is {statistic!r}; accepted: {', '.join(_WEIGHTED)}")
    if resamples < 100:
        raise ValueError(f"resamples is {resamples}; accepted: at least 100")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is {level}; accepted: a fraction in (0, 1)")
    y, a, b = _vectors(gold=gold, dense=dense, slim=slim)
    score = _WEIGHTED[statistic]
    once = np.ones((1, y.size))
    estimate = float((score(y, b, once) - score(y, a, once))[0])
    if np.isnan(estimate):
        raise ValueError(
            f"{statistic} is not defined: gold, dense or slim has the same value in every row"
        )
    random = np.random.default_rng(seed)
    differences = []
    for start in range(0, resamples, _CHUNK):
        draws = min(_CHUNK, resamples - start)
        drawn = random.integers(0, y.size, size=(draws, y.size))
        counts = np.stack([np.bincount(row, minlength=y.size) for row in drawn]).astype(np.float64)
        differences.append(score(y, b, counts) - score(y, a, counts))
    # A draw of tiny data may hit one row only, where a correlation is not defined: it is left out.
    tail = (1.0 - level) / 2.0
    low, high = np.nanquantile(np.concatenate(differences), [tail, 1.0 - tail])
    return Interval(estimate, float(low), float(high), level, resamples)


def compare(
    split: str,
    gold: npt.ArrayLike,
    dense: npt.ArrayLike,
    slim: npt.ArrayLike,
    statistics: tuple[Statistic, ...] = ("pearson", "spearman"),
    *,
    seed: int = 0,
) -> list[Score]:
    """The report's ``scores`` rows of one split: dense, slim and the interval per statistic.

    Raises:
        ValueError: as :func:`bootstrap_difference`.
    """
    rows: list[Score] = []
    for statistic in statistics:
        interval = bootstrap_difference(gold, dense, slim, statistic, seed=seed)
        rows.append(
            {
                "split": split,
                "metric": statistic.capitalize(),
                "dense": _PLAIN[statistic](gold, dense),
                "slim": _PLAIN[statistic](gold, slim),
                "low": interval.low,
                "high": interval.high,
                "level": interval.level,
                "rows": int(np.size(np.asarray(gold))),
            }
        )
    return rows


def _vectors(**named: npt.ArrayLike) -> tuple[Array, ...]:
    """The arguments as float64 vectors of one length."""
    vectors = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
    sizes = {name: v.shape for name, v in vectors.items()}
    first = next(iter(sizes.values()))
    if any(len(s) != 1 or s != first for s in sizes.values()):
        raise ValueError(f"shapes are {sizes}; accepted: vectors of one length")
    if first[0] < 2:
        raise ValueError(f"there are {first[0]} rows; accepted: at least 2")
    for name, vector in vectors.items():
        if not np.isfinite(vector).all():
            raise ValueError(f"{name} has entries that are not finite")
    return tuple(vectors.values())


def _weighted_pearson(x: Array, y: Array, counts: Array) -> Array:
    """Pearson's correlation per row of ``counts`` ``(draws, rows)``; x, y ``(rows,)`` or as counts.

    A vector is constant when its weighted spread is at rounding level: then the result is NaN.
    """
    total = counts.sum(axis=1, keepdims=True)
    dx = x - (counts * x).sum(axis=1, keepdims=True) / total
    dy = y - (counts * y).sum(axis=1, keepdims=True) / total
    xx, yy = (counts * dx * dx).sum(axis=1), (counts * dy * dy).sum(axis=1)
    xy = (counts * dx * dy).sum(axis=1)
    # Removing the mean of a constant leaves an error of about rows * eps * |value| per entry.
    eps = np.finfo(np.float64).eps * x.shape[-1]
    floor_x = total[:, 0] * (eps * np.abs(x).max(axis=-1)) ** 2
    floor_y = total[:, 0] * (eps * np.abs(y).max(axis=-1)) ** 2
    defined = (xx > floor_x) & (yy > floor_y)
    result = np.full(xy.shape, np.nan)
    np.divide(xy, np.sqrt(xx) * np.sqrt(yy), out=result, where=defined)
    return np.clip(result, -1.0, 1.0)


def _weighted_ranks(values: Array, counts: Array) -> Array:
    """Mean ranks of the repeated rows: entry ``i`` is the rank that every copy of row ``i`` has."""
    _, tie_of = np.unique(values, return_inverse=True)
    order = np.argsort(tie_of, kind="stable")
    starts = np.flatnonzero(np.diff(tie_of[order], prepend=-1))
    per_tie = np.add.reduceat(counts[:, order], starts, axis=1)
    below = np.cumsum(per_tie, axis=1) - per_tie
    ranks: Array = (below + (per_tie + 1.0) / 2.0)[:, tie_of]
    return ranks


def _weighted_spearman(x: Array, y: Array, counts: Array) -> Array:
    return _weighted_pearson(_weighted_ranks(x, counts), _weighted_ranks(y, counts), counts)


def _weighted_accuracy(x: Array, y: Array, counts: Array) -> Array:
    result: Array = (counts * (x == y)).sum(axis=1) / counts.sum(axis=1)
    return result


_WEIGHTED: dict[str, Callable[[Array, Array, Array], Array]] = {
    "pearson": _weighted_pearson,
    "spearman": _weighted_spearman,
    "accuracy": _weighted_accuracy,
}
_PLAIN: dict[str, Callable[[npt.ArrayLike, npt.ArrayLike], float]] = {
    "pearson": pearson,
    "spearman": spearman,
    "accuracy": accuracy,
}

"""Correlations and the paired bootstrap, against SciPy and against what they must mean."""

from __future__ import annotations

import numpy as np
import pytest

from slimkern.training.evaluation import (
    accuracy,
    bootstrap_difference,
    compare,
    pearson,
    spearman,
)

stats = pytest.importorskip("scipy.stats")


def data(rows: int = 400, seed: int = 0):
    random = np.random.default_rng(seed)
    gold = np.round(random.random(rows) * 5, 1)  # as in STS-B: with many ties
    return gold, gold + random.normal(size=rows), gold + 1.5 * random.normal(size=rows)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_correlations_are_scipys(seed, ties):
    gold, dense, _ = data(seed=seed)
    dense = np.round(dense) if ties else dense
    # n products are summed: the error of each sum is at most n eps of its terms' size, and a
    # correlation is a ratio of three such sums.
    bound = 3 * len(gold) * np.finfo(float).eps
    assert abs(pearson(gold, dense) - stats.pearsonr(gold, dense)[0]) <= bound
    assert abs(spearman(gold, dense) - stats.spearmanr(gold, dense)[0]) <= bound


def test_scale_and_sign():
    gold, dense, _ = data()
    assert pearson(gold, gold) == pytest.approx(1.0, abs=1e-15)
    assert pearson(gold, -gold) == pytest.approx(-1.0, abs=1e-15)
    assert spearman(gold, np.exp(gold)) == pytest.approx(1.0, abs=1e-15)
    assert pearson(gold, 1e6 + 1e-3 * dense) == pytest.approx(pearson(gold, dense), abs=1e-6)


def test_a_constant_has_no_correlation():
    gold, dense, _ = data()
    for value in (0.0, 0.1, 1e9 + 0.1):
        assert np.isnan(pearson(gold, np.full_like(gold, value)))
        assert np.isnan(spearman(gold, np.full_like(gold, value)))
        with pytest.raises(ValueError, match="not defined"):
            bootstrap_difference(gold, dense, np.full_like(gold, value))


@pytest.mark.parametrize("statistic", ["pearson", "spearman", "accuracy"])
def test_the_bootstrap_is_the_statistic_on_repeated_rows(statistic):
    gold, dense, slim = data(60)
    if statistic == "accuracy":
        gold, dense, slim = np.round(gold), np.round(dense), np.round(slim)
    plain = {"pearson": pearson, "spearman": spearman, "accuracy": accuracy}[statistic]
    random = np.random.default_rng(7)
    drawn = random.integers(0, 60, size=(200, 60))
    differences = [plain(gold[d], slim[d]) - plain(gold[d], dense[d]) for d in drawn]
    expected = np.quantile(differences, [0.05, 0.95])
    found = bootstrap_difference(gold, dense, slim, statistic, resamples=200, level=0.9, seed=7)
    assert [found.low, found.high] == pytest.approx(expected, abs=1e-12)
    assert found.estimate == pytest.approx(plain(gold, slim) - plain(gold, dense), abs=1e-12)


def test_the_interval_is_deterministic_and_paired():
    gold, dense, slim = data()
    first = bootstrap_difference(gold, dense, slim)
    assert first == bootstrap_difference(gold, dense, slim)
    assert first != bootstrap_difference(gold, dense, slim, seed=1)
    assert first.low < first.estimate < first.high < 0
    same = bootstrap_difference(gold, dense, dense)
    assert (same.low, same.estimate, same.high) == (0.0, 0.0, 0.0)


def test_the_interval_covers_what_it_says():
    # 60 draws of 200 rows from a known model; the true difference is a population figure.
    def model(rows, seed):
        random = np.random.default_rng(seed)
        gold = random.normal(size=rows)
        return gold, gold + 0.6 * random.normal(size=rows), gold + random.normal(size=rows)

    truth = 1 / np.sqrt(2) - 1 / np.sqrt(1.36)
    intervals = [bootstrap_difference(*model(200, s), resamples=400) for s in range(60)]
    covered = sum(i.low <= truth <= i.high for i in intervals)
    # Binomial(60, 0.95): fewer than 50 has a chance of 1 in 10,000.
    assert covered >= 50


def test_compare_fills_the_report():
    gold, dense, slim = data()
    rows = compare("dev", gold.tolist(), dense, slim)
    assert [r["metric"] for r in rows] == ["Pearson", "Spearman"]
    assert rows[0]["split"] == "dev"
    assert rows[0]["rows"] == 400
    assert rows[1]["dense"] == spearman(gold, dense)
    assert rows[1]["low"] < rows[1]["slim"] - rows[1]["dense"] < rows[1]["high"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"statistic": "kendall"}, "kendall"),
        ({"resamples": 5}, "resamples"),
        ({"level": 1.0}, "level"),
        ({"slim": [1.0, 2.0]}, "one length"),
        ({"slim": [[1.0], [2.0], [3.0]]}, "one length"),
        ({"slim": [1.0, 2.0, float("nan")]}, "slim has entries"),
        ({"gold": [1.0], "dense": [1.0], "slim": [1.0]}, "at least 2"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"gold": [1.0, 2.0, 3.0], "dense": [1.0, 3.0, 2.0], "slim": [3.0, 1.0, 2.0]}
    with pytest.raises(ValueError, match=message):
        bootstrap_difference(**{**arguments, **change})

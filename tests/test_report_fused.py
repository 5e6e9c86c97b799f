"""The page's section on the fused model: what it tells, and what it refuses."""

from __future__ import annotations

import copy
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from test_report import FULL, _Page

from slimkern.report import figures, render
from slimkern.report.figures import TIMES


def with_fused():
    results = copy.deepcopy(FULL)
    results["fused"] = {"models": []}
    for name, math, value in (("fused", "fp32", 0.8767), ("fused, bf16", "bf16", 0.8123)):
        scores = [{**score, "slim": value} for score in results["scores"]]
        results["fused"]["models"].append({
            "name": name, "math": math, "blocks": 6, "packed_bytes": 8_400_000, "scores": scores,
        })  # fmt: skip
    for row in results["latency"]["rows"]:
        row["further_min"] = {"fused": row["dense_min"] / 4, "fused, bf16": row["dense_min"] / 8}
        row["further_median"] = {"fused": row["dense_min"] / 4, "fused, bf16": 1.0}
    return results


def test_scores_times_and_memory_stand_side_by_side():
    text = _Page(render(with_fused())).text
    for expected in ("0.8767", "0.8123", f"4.00{TIMES}", f"8.00{TIMES}", "8.4 MB", "6 blocks"):
        assert expected in text, expected
    assert "Fused" not in _Page(render(FULL)).text


def test_the_figure_has_a_third_bar():
    svg = figures.latency(with_fused()["latency"]["rows"])
    texts = "".join(ElementTree.fromstring(svg).itertext())
    assert "slim, fused" in texts
    assert f"5.00{TIMES} faster" in texts
    assert "var(--warm)" in svg
    assert "var(--warm)" not in figures.latency(FULL["latency"]["rows"])


def test_a_model_that_can_not_be_fused_says_why():
    page = _Page(render({**FULL, "fused": {"refused": "nothing can be fused: <b>"}}))
    assert "nothing can be fused: <b>" in page.text


def test_wrong_sections_are_named():
    for spoil, message in (
        (lambda r: r["fused"]["models"][0].pop("math"), "math"),
        (lambda r: r["fused"]["models"][1]["scores"].pop(), "1 scores"),
        (lambda r: r["latency"]["rows"][0]["further_min"].pop("fused"), "'fused'"),
    ):
        results = with_fused()
        spoil(results)
        with pytest.raises(ValueError, match=message):
            render(results)

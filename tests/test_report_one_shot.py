"""The page of a one-shot run, of a family, and of two methods side by side."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from test_report import FULL, MINIMAL, _Page

from slimkern.discovery.groups import Group, Member
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.report import comparisons, figures, layer_widths, render, write_report
from slimkern.report.figures import MINUS, TIMES
from slimkern.report.schema import method_result

BEFORE = [
    {"split": "dev", "metric": "Pearson", "dense": 0.9, "slim": 0.8512}
    | {"low": -0.06, "high": -0.03, "level": 0.95, "rows": 1500},
    {"split": "dev", "metric": "Spearman", "dense": 0.8, "slim": 0.7812},
]
ONE_SHOT = {
    "seconds": 44.0,
    "calibration": {"source": "texts.txt", "sequences": 2048, "tokens": 30123},
    "before_healing": BEFORE,
    "shape": [8, 128],
    "predicted": {"unit": "seconds", "dense": 0.123, "slim": 0.0615},
    "measured": {"unit": "seconds", "dense": 0.1, "slim": 0.052},
}


def member(name, seconds, score, **more):
    scores = [{"split": s, "metric": "Spearman", "dense": 0.9, "slim": score} for s in ("dev", "t")]
    return {
        "name": name,
        "parameters": 15_000_000,
        "parameters_no_embeddings": 3_000_000,
        "slim_min": seconds,
        "slim_median": seconds * 1.1,
        "scores": scores,
        **more,
    }


FAMILY = {
    "shape": [8, 128],
    "threads": 2,
    "rounds": 9,
    "dense_min": 0.12,
    "dense_median": 0.13,
    "members": [
        member("slim", 0.04, 0.871),
        member(
            "1.5x",
            0.075,
            0.8931,
            target_speedup=1.5,
            predicted={"unit": "seconds", "dense": 0.12, "slim": 0.08},
            heal_epochs=2.0,
        ),
        member("2x", 0.06, 0.8812, target_speedup=2.0),
    ],
}
OWN = {
    **FULL,
    "method": "one-shot",
    "seconds": 334.0,
    "layers": [{**row, "error": 0.01 * i} for i, row in enumerate(FULL["layers"])],
    "one_shot": ONE_SHOT,
    "family": FAMILY,
}
GRADUAL = {**FULL, "method": "gradual", "seconds": 900.0}


def test_the_one_shot_sections_are_told():
    page = _Page(render(OWN))
    for text in (
        *("2,048 sequences", "30,123 tokens", "texts.txt", "44.0 s", "before healing", "0.8512"),
        *("predicted, ms", "measured, ms", "61.5", "52.0", f"2.00{TIMES}", f"1.92{TIMES}"),
        *("A family", "0.8931", "1.5x", "(healed, 2 epochs)", f"1.60{TIMES}", "2 threads"),
        *("Attention: variance missed", "5.00%"),
    ):
        assert text in page.text, text
    assert len([t for t, _ in page.seen if t == "svg"]) == 7
    ids = [a["id"] for _, a in page.seen if "id" in a]
    assert len(ids) == len(set(ids))


def test_two_methods_stand_side_by_side():
    both = {**OWN, "methods": [method_result(OWN), method_result(GRADUAL)]}
    page = _Page(render(both))
    for text in ("One-shot and gradual, side by side", "5 min 34 s", "15 min 00 s"):
        assert text in page.text, text
    assert "side by side" not in render(OWN)
    assert json.loads(json.dumps(both)) == both
    rows = comparisons.method_rows(both["methods"])
    assert rows == [("dev · Pearson", 0.9, [0.88, 0.88]), ("dev · Spearman", 0.8, [0.81, 0.81])]


def test_a_method_without_a_name_is_refused():
    with pytest.raises(ValueError, match="method"):
        method_result(FULL)


def test_sections_may_be_partly_empty():
    results = copy.deepcopy(OWN)
    results["one_shot"]["before_healing"] = []
    del results["one_shot"]["predicted"], results["one_shot"]["measured"]
    for row in results["family"]["members"]:
        row["scores"] = []
    page = _Page(render(results))
    assert "before healing" not in page.text.replace("give, before healing", "")
    assert "curve" not in {a.get("id") for _, a in page.seen}
    _Page(render({**MINIMAL, "one_shot": {"seconds": 1.0}}))
    parameters = {"unit": "parameters", "dense": 2_000_000.0, "slim": 1_000_000.0}
    results["one_shot"] |= {"predicted": parameters}
    text = _Page(render(results)).text
    assert "predicted, parameters" in text
    assert "2,000,000" in text


def test_the_curve_holds_every_model():
    both = {**OWN, "methods": [method_result(OWN), method_result(GRADUAL)]}
    both["methods"][1]["latency"] = copy.deepcopy(FULL["latency"])
    drawn = comparisons.curve_of(both)
    ElementTree.fromstring(drawn)
    shown = re.findall(r">([^<>]+)</text>", drawn)
    for name in ("dense", "1.5x", "2x", "one-shot", "gradual", "dev Spearman"):
        assert name in shown, name
    rows = comparisons.family_rows(FAMILY)
    assert [row["speedup"] for row in rows] == pytest.approx([3.0, 1.6, 2.0])
    assert [row["predicted_speedup"] for row in rows] == [None, pytest.approx(1.5), None]


def test_figures_follow_the_page():
    for svg in (
        figures.errors(OWN["layers"]),
        comparisons.curve([comparisons.Point("dense", 1.0, 0.9, "dense")] * 2, "dev"),
        comparisons.methods(["a", "b"], [("dev", 0.9, [0.8, 0.7])]),
    ):
        assert ElementTree.fromstring(svg).get("viewBox")
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)) <= {"#ffffff"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"one_shot": {"before_healing": [{"split": "dev"}]}}, "slim"),
        ({"family": {"shape": [8, 128]}}, "members"),
        ({"family": {**FAMILY, "members": [{"name": "2x"}]}}, "slim_min"),
        ({"methods": [{"seconds": 1.0}]}, "name"),
    ],
)
def test_wrong_sections_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report({**MINIMAL, **change}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_are_escaped():
    evil = "<script>alert(1)</script>"
    results = copy.deepcopy(OWN)
    results["one_shot"]["calibration"]["source"] = evil
    results["family"]["members"][1]["name"] = evil
    results["methods"] = [{**method_result(OWN), "name": evil}, method_result(GRADUAL)]
    page = _Page(render(results))
    assert "script" not in {tag for tag, _ in page.seen}


def test_errors_of_a_plan():
    group = Group("fc2", "ffn", 6, (Member("fc1", 1, "producer"),), (Member("fc2", 1, "consumer"),))
    assert layer_widths(SlimPlan((PlanEntry(group, (1, 4), 0.25),))) == [
        {"name": "fc2", "kind": "ffn", "kept": 2, "total": 6, "error": 0.25}
    ]


def test_differences_have_a_minus():
    assert f"({MINUS}0.0488)" in _Page(render(OWN)).text

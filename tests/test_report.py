"""The page: complete, self-contained, escaped, and honest about what is missing."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from slimkern.discovery.groups import Group, Member
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.report import figures, layer_widths, render, write_report
from slimkern.report.figures import MINUS, TIMES

MINIMAL = {
    "title": "A title",
    "command": "slimkern demo",
    "date": "2026-01-02T03:04:05+00:00",
    "machine": {"cpu": "A processor", "cores": 2, "isa": "avx2"},
    "versions": {"slimkern": "0.1.0", "torch": "2.13.0"},
}
FULL = {
    **MINIMAL,
    "summary": "A summary",
    "model": {"name": "mini", "architecture": "BertModel", "protocol": "cross-encoder"},
    "data": {"name": "STS", "splits": {"train": 5749, "dev": 1500}, "note": "a note on data"},
    "settings": {"epochs": 6, "learning_rate": 1e-4, "full": True, "seed": None},
    "scores": [
        {"split": "dev", "metric": "Pearson", "dense": 0.9, "slim": 0.88}
        | {"low": -0.03, "high": -0.01, "level": 0.95, "rows": 1500},
        {"split": "dev", "metric": "Spearman", "dense": 0.8, "slim": 0.81},
    ],
    "size": {
        "dense_parameters": 22_713_216,
        "slim_parameters": 15_000_000,
        "dense_parameters_no_embeddings": 10_795_776,
        "slim_parameters_no_embeddings": 3_022_848,
        "dense_bytes": 90_868_376,
        "slim_bytes": 60_100_000,
    },
    "layers": [
        {"name": f"encoder.layer.{i}.{n}", "kind": k, "kept": 3 + i, "total": 12}
        for i in range(3)
        for n, k in (("output.dense", "ffn"), ("attention.output.dense", "mha"))
    ],
    "history": [
        {"step": s, "loss": 1 / (1 + s), "ffn_sparsity": s / 1000, "mha_sparsity": s / 2000}
        | ({"score": 0.5 + s / 2000} if s % 100 == 0 else {})
        for s in range(0, 800)
    ],
    "history_score": "dev Spearman",
    "stages": [{"name": "teacher", "seconds": 3725.0}, {"name": "slim", "seconds": 61.4}],
    "latency": {
        "rows": [
            {"batch": 1, "tokens": 32, "dense_min": 0.004, "dense_median": 0.005}
            | {"slim_min": 0.002, "slim_median": 0.0025},
            {"batch": 8, "tokens": 128, "dense_min": 0.1, "dense_median": 0.12}
            | {"slim_min": 0.2, "slim_median": 0.24},
        ],
        "threads": 1,
        "rounds": 15,
        "precision": "float32",
        "checked": "the reloaded model's outputs are bit-equal.",
    },
    "notes": ["one note", "another"],
}


class _Page(HTMLParser):
    """Tags and text of a page; raises where a tag is closed that is not open."""

    VOID = ("meta", "br", "link", "img", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_tells_everything():
    page = _Page(render(FULL))
    for text in (
        *("A title", "A summary", "A processor", "2 cores", "avx2", "slimkern demo"),
        *("2026-01-02T03:04:05+00:00", "2.13.0", "BertModel", "cross-encoder", "0.8800"),
        *(f"{MINUS}0.0300 to {MINUS}0.0100", f"{MINUS}72.0%", "90.9 MB", "1 h 2 min"),
        *("10,795,776", "3,022,848", f"2.00{TIMES}", f"0.50{TIMES}", f"2.00{TIMES} slower"),
        *("1 min 01 s", "layer 2", "5 of 12", "dev Spearman"),
        *("the reloaded model's outputs are bit-equal.", "one note", "a note on data", "0.0001"),
        *("paired bootstrap", "95 %", "5,749", "1 thread"),
    ):
        assert text in page.text, text
    assert len([t for t, _ in page.seen if t == "svg"]) == 5


def test_the_page_needs_nothing_else():
    text = render(FULL)
    page = _Page(text)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "iframe", "object", "embed", "img"}
    for tag, attributes in page.seen:
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, value)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    ids = [a["id"] for _, a in page.seen if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:url\(#|xlink:href="#|href="#)([^)"]+)', text)
    assert set(used) <= set(ids)


def test_text_is_escaped_everywhere():
    evil = '<script>alert(\'&"1")</script>'
    results = copy.deepcopy(FULL)
    for key in ("title", "summary", "command", "date", "history_score"):
        results[key] = evil
    results["machine"]["cpu"] = results["model"]["name"] = results["data"]["name"] = evil
    results["data"]["note"] = results["latency"]["checked"] = results["latency"]["precision"] = evil
    results["versions"] = {evil: evil}
    results["settings"] = {evil: evil}
    results["stages"] = [{"name": evil, "seconds": 1.0, "note": evil}]
    results["notes"] = [evil]
    results["layers"][0]["name"] = evil
    results["scores"][0] |= {"split": evil, "metric": evil}
    page = _Page(render(results))
    assert "script" not in {tag for tag, _ in page.seen}
    assert page.text.count("<script>") > 10


def test_sections_that_are_missing_are_left_out():
    page = _Page(render(MINIMAL))
    assert "svg" not in {tag for tag, _ in page.seen}
    for heading in ("Accuracy", "Widths", "Sparsity", "Size", "Latency"):
        assert heading not in page.text
    for section in ("scores", "size", "layers", "history", "latency", "settings", "stages"):
        _Page(render({k: v for k, v in FULL.items() if k != section}))
        _Page(render({**MINIMAL, section: FULL[section]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"title": ""}, "title"),
        ({"machine": {}}, "machine"),
        ({"score": []}, "score"),
        ({"layers": [{"name": "a", "kind": "ffn", "kept": 1}]}, "total"),
        ({"scores": [{"split": "dev", "metric": "P", "dense": 1.0, "slim": 1.0, "p": 1}]}, "p"),
        ({"history": [{"loss": 1.0}]}, "step"),
    ],
)
def test_wrong_results_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_report({**MINIMAL, **change}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written(tmp_path):
    path = write_report(FULL, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "results.json"]
    again = json.loads((path.parent / "results.json").read_text())
    assert again == FULL
    assert render(again) == path.read_text() == render(FULL)


def test_a_number_that_is_none_is_refused(tmp_path):
    results = copy.deepcopy(FULL)
    results["scores"][0]["slim"] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_report(results, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_figures_follow_the_page_and_keep_their_text():
    for svg in (
        figures.accuracy(FULL["scores"]),
        figures.widths(FULL["layers"]),
        figures.history(FULL["history"], "dev Spearman"),
        figures.size(FULL["size"]),
        figures.latency(FULL["latency"]["rows"]),
    ):
        root = ElementTree.fromstring(svg)
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "<text" in svg
        assert "var(--slim)" in svg
        # Nothing is drawn in a colour of its own, which a dark page could swallow.
        assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)) <= {"#ffffff"}
    assert len(figures.history(FULL["history"], "")) < 100_000


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["encoder.layer.0.o.dense", "encoder.layer.1.o.dense"], ["layer 0", "layer 1"]),
        (["a.0.b.0", "a.0.b.1"], ["layer 0", "layer 1"]),
        (["fc2", "out"], ["fc2", "out"]),
        (["one.0.x"], ["one.0.x"]),
        (["x" * 40], ["…" + "x" * 27]),
    ],
)
def test_layers_have_short_names(names, labels):
    assert figures.layer_labels(names) == labels


def test_widths_of_a_plan():
    group = Group("fc2", "ffn", 6, (Member("fc1", 1, "producer"),), (Member("fc2", 1, "consumer"),))
    assert layer_widths(SlimPlan((PlanEntry(group, (1, 4)),))) == [
        {"name": "fc2", "kind": "ffn", "kept": 2, "total": 6}
    ]

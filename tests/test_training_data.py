"""Data files: every format gives the same rows, every bad file a message with the place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimkern.training.data import (
    Columns,
    DataError,
    class_labels,
    class_names,
    numeric_labels,
    read_pairs,
)

ROWS = [("a cat", 'a "dog", big', 1.5), ("two\u2028birds", "fish", 0.0)]


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    if suffix == ".csv":
        text = 'sentence1,sentence2,score\na cat,"a ""dog"", big",1.5\ntwo\u2028birds,fish,0.0\n'
    elif suffix == ".tsv":
        text = 'sentence1\tsentence2\tscore\na cat\ta "dog", big\t1.5\ntwo\u2028birds\tfish\t0.0\n'
    elif suffix == ".jsonl":
        keys = ("sentence1", "sentence2", "score")
        text = "\n".join(json.dumps(dict(zip(keys, row))) for row in ROWS) + "\n\n"
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*ROWS))))
        parquet.write_table(pyarrow.table(columns), path)
        return path
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    pairs = read_pairs(write(tmp_path, suffix))
    assert [(p.first, p.second) for p in pairs] == [(a, b) for a, b, _ in ROWS]
    assert numeric_labels(pairs, "f") == [1.5, 0.0]


def test_columns_by_number_without_header(tmp_path):
    path = tmp_path / "sts.csv"
    path.write_text('x\t0001\t2.4\tA "b\tC d\nx\t0002\t5\tE\tF\textra\n', encoding="utf-8")
    pairs = read_pairs(
        path, Columns(first="3", second="4", label="2", delimiter="tab", header=False)
    )
    assert [(p.first, p.second, p.label, p.line) for p in pairs] == [
        ('A "b', "C d", "2.4", 1),
        ("E", "F", "5", 2),
    ]


def test_single_sentences_have_no_second(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nfine,good\nawful,bad\n", encoding="utf-8")
    pairs = read_pairs(path)
    assert [p.second for p in pairs] == [None, None]
    assert class_labels(pairs, class_names(pairs), path) == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.txt", "x", None, r"format '\.txt' is unknown; accepted: \.csv"),
        ("a.csv", "", None, "has no rows"),
        ("a.csv", "sentence1,sentence2,score\n", None, "has no rows"),
        ("a.csv", "x,y,score\n1,2,3\n", None, "has x, y, score; name one with --sentence1"),
        ("a.csv", "sentence1,y,score\na,b,3\n", Columns(second="z"), "no column 'z'.*--sentence2"),
        ("a.csv", "sentence1,sentence2,score\na,b,1\na,,2\n", None, "line 3: the second sentence"),
        ("a.csv", "sentence1,sentence2,score\na,b\n", None, "line 2: the label is missing"),
        ("a.csv", 'sentence1,sentence2,score\n"a\nb",c,1\na,,1\n', None, "line 4: the second"),
        ("a.jsonl", '{"sentence1": 1}\n{oops\n', None, "line 2: is not JSON"),
        ("a.jsonl", '["a"]\n', None, "line 1: is not a JSON object"),
        ("a.jsonl", '{"sentence1": 7, "score": 1}\n', None, "line 1: the first sentence is 7"),
        ("a.parquet", "no parquet", None, "is not a parquet file"),
        ("a.csv", "a\tb\n", Columns(first=7, header=False), "--sentence1 is column 7, but there"),
        ("a.csv", "a,b\n", Columns(delimiter="::"), "--delimiter is '::'"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, columns, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_pairs(path, columns)


def test_missing_and_undecodable_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_pairs(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_pairs(tmp_path / "latin.csv")


def test_scores_that_are_no_numbers_are_named_with_their_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("sentence1,sentence2,score\na,b,1\na,b,high\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.csv, line 3: the score 'high' is not a number"):
        numeric_labels(read_pairs(path), path)
    path.write_text("sentence1,sentence2,score\na,b,nan\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        numeric_labels(read_pairs(path), path)


def test_unknown_class_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,2\nb,10\nc,9\n", encoding="utf-8")
    pairs = read_pairs(path)
    assert class_names(pairs) == ["2", "9", "10"]
    with pytest.raises(DataError, match="line 3: the label '10' is not among"):
        class_labels(pairs, ["2", "9"], path)

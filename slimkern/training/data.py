"""Sentence pairs from csv, tsv, jsonl and parquet files, with errors that name file and line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
FIRST_NAMES = ("sentence1", "text1", "question1", "premise", "text_a", "sentence", "text", "query")
SECOND_NAMES = ("sentence2", "text2", "question2", "hypothesis", "text_b", "passage", "positive")
LABEL_NAMES = ("score", "label", "labels", "similarity_score", "similarity", "gold", "target")


class DataError(ValueError):
    """A file can't be used; the message names the file, the place and what is accepted."""


@dataclass(frozen=True)
class Pair:
    """One row of a data file.

    Attributes:
        first: the first sentence.
        second: the second sentence, or ``None`` where the file has single sentences.
        label: the gold score or class as the file has it.
        line: the row's 1-based line (its row number in a parquet file), for error messages.
    """

    first: str
    second: str | None
    label: str | float | int
    line: int


@dataclass(frozen=True)
class Columns:
    """Which columns of a file mean what: a name, or the 0-based number of a column.

    ``None`` finds the column by its usual names (:data:`FIRST_NAMES`, :data:`SECOND_NAMES`,
    :data:`LABEL_NAMES`). ``delimiter=None`` takes a comma in ``.csv`` and a tab in ``.tsv`` files.
    Files separated by tabs are read without quoting, as the GLUE files are written.
    """

    first: str | int | None = None
    second: str | int | None = None
    label: str | int | None = None
    delimiter: str | None = None
    header: bool = True


@dataclass(frozen=True)
class _Table:
    """``rows``: (line, cells); ``names`` is empty where the file has no header."""

    path: Path
    names: tuple[str, ...]
    rows: list[tuple[int, Sequence[Any]]]


def read_pairs(path: str | Path, columns: Columns | None = None) -> list[Pair]:
    """Read sentence pairs (or single sentences) with a label.

    Args:
        path: a ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` file.
        columns: which columns to take; found by their usual names if left out.

    Raises:
        DataError: the file does not exist, is of an unknown format, is damaged, is empty, lacks a
            column, or has a row without a sentence or a label; the message says which.
    """
    columns = columns or Columns()
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    table = _read_table(path, columns)
    if not table.rows:
        raise DataError(f"{path}: has no rows")
    wanted = {
        "first sentence": _column(table, columns.first, FIRST_NAMES, "--sentence1"),
        "second sentence": _column(table, columns.second, SECOND_NAMES, "--sentence2", must=False),
        "label": _column(table, columns.label, LABEL_NAMES, "--label"),
    }
    return [_pair(path, line, cells, wanted) for line, cells in table.rows]


def read_texts(path: str | Path, columns: Columns | None = None) -> list[tuple[str, str | None]]:
    """Read texts without labels: (first, second or ``None``) of every row.

    Args:
        path: a ``.txt`` file of one text a line, where empty lines do not count, or a file of any
            format that :func:`read_pairs` reads, with one or two columns of text.
        columns: which columns to take; ``label`` is not looked at.

    Raises:
        DataError: as :func:`read_pairs`, but for labels.
    """
    columns = columns or Columns()
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix.lower() == ".txt":
        lines = [line.strip() for line in _read_text(path).split("\n")]
        texts: list[tuple[str, str | None]] = [(line, None) for line in lines if line]
        if not texts:
            raise DataError(f"{path}: has no text")
        return texts
    table = _read_table(path, columns, (".txt", *FORMATS))
    if not table.rows:
        raise DataError(f"{path}: has no rows")
    wanted = {
        "first sentence": _column(table, columns.first, FIRST_NAMES, "--sentence1"),
        "second sentence": _column(table, columns.second, SECOND_NAMES, "--sentence2", must=False),
        "label": None,
    }
    pairs = [_pair(path, line, cells, wanted) for line, cells in table.rows]
    return [(pair.first, pair.second) for pair in pairs]


def numeric_labels(pairs: Sequence[Pair], path: str | Path) -> list[float]:
    """The labels as finite numbers.

    Raises:
        DataError: a label is no finite number; the message names its line and shows it.
    """
    values = []
    for pair in pairs:
        try:
            value = float(pair.label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise DataError(f"{path}, line {pair.line}: the score {pair.label!r} is not a number")
        values.append(value)
    return values


def class_names(pairs: Sequence[Pair]) -> list[str]:
    """The distinct labels as text, numbers in numeric order, words in alphabetical order."""
    labels = {str(pair.label) for pair in pairs}
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)


def class_labels(pairs: Sequence[Pair], names: Sequence[str], path: str | Path) -> list[int]:
    """The labels as indices into ``names``.

    Raises:
        DataError: a label is not in ``names``; the message names its line.
    """
    index = {name: i for i, name in enumerate(names)}
    result = []
    for pair in pairs:
        if str(pair.label) not in index:
            raise DataError(
                f"{path}, line {pair.line}: the label {str(pair.label)!r} is not among the "
                f"training labels {', '.join(names)}"
            )
        result.append(index[str(pair.label)])
    return result


def _read_table(path: Path, columns: Columns, accepted: Sequence[str] = FORMATS) -> _Table:
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        known = ", ".join(accepted)
        raise DataError(f"{path}: the format {suffix!r} is unknown; accepted: {known}")
    if suffix == ".parquet":
        return _read_parquet(path)
    text = _read_text(path)
    if suffix in (".jsonl", ".json"):
        return _read_jsonl(path, text)
    return _read_delimited(path, text, columns)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise DataError(f"{path}: is not UTF-8 text ({where})") from None


def _read_delimited(path: Path, text: str, columns: Columns) -> _Table:
    delimiter = columns.delimiter or ("\t" if path.suffix.lower() == ".tsv" else ",")
    delimiter = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}.get(delimiter, delimiter)
    if len(delimiter) != 1:
        raise DataError(f"--delimiter is {delimiter!r}; accepted: one character, or tab")
    # split("\n") keeps the line breaks that only Unicode knows (U+0085, U+2028) inside a cell.
    lines = (line + "\n" for line in text.replace("\r\n", "\n").split("\n"))
    if delimiter == "\t":
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=delimiter)
    rows: list[tuple[int, Sequence[Any]]] = []
    start = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    if not columns.header or not rows:
        return _Table(path, (), rows)
    return _Table(path, tuple(cell.strip() for cell in rows[0][1]), rows[1:])


def _read_jsonl(path: Path, text: str) -> _Table:
    names: dict[str, None] = {}
    objects = list(_json_lines(path, text))
    for _, row in objects:
        names.update(dict.fromkeys(row))
    return _Table(path, tuple(names), [(n, [row.get(k) for k in names]) for n, row in objects])


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: is not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: is not a JSON object, one object per line")
        yield number, row


def _read_parquet(path: Path) -> _Table:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import read_table
    except ImportError as error:
        raise DataError(f"{path}: parquet needs pyarrow (pip install pyarrow)") from error
    try:
        table = read_table(path)
    except (ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: is not a parquet file ({error})") from None
    names = tuple(table.column_names)
    columns = [table.column(name).to_pylist() for name in names]
    return _Table(path, names, [(i + 1, row) for i, row in enumerate(zip(*columns))])


def _column(
    table: _Table, wanted: str | int | None, usual: Sequence[str], option: str, must: bool = True
) -> int | None:
    """The index of a column, by name, by number, or by its usual names."""
    width = len(table.names) or max(len(cells) for _, cells in table.rows)
    if isinstance(wanted, str) and wanted in table.names:
        return table.names.index(wanted)
    if isinstance(wanted, int) or (isinstance(wanted, str) and wanted.isdecimal()):
        if int(wanted) < width:
            return int(wanted)
        raise DataError(f"{table.path}: {option} is column {wanted}, but there are {width} columns")
    if wanted is None:
        lowered = [name.lower() for name in table.names]
        for name in usual:
            if name in lowered:
                return lowered.index(name)
        if not must:
            return None
    has = ", ".join(table.names) if table.names else f"{width} columns without names"
    what = f"no column {wanted!r}" if wanted is not None else f"none of {', '.join(usual)}"
    raise DataError(f"{table.path}: {what} in the file; it has {has}; name one with {option}")


def _pair(path: Path, line: int, cells: Sequence[Any], wanted: dict[str, int | None]) -> Pair:
    found: dict[str, Any] = {}
    for what, index in wanted.items():
        if index is None:
            found[what] = None
            continue
        cell = cells[index] if index < len(cells) else None
        cell = cell.strip() if isinstance(cell, str) else cell
        if cell is None or cell == "":
            raise DataError(f"{path}, line {line}: the {what} is missing")
        if what != "label" and not isinstance(cell, str):
            raise DataError(f"{path}, line {line}: the {what} is {cell!r}, not text")
        found[what] = cell
    return Pair(found["first sentence"], found["second sentence"], found["label"], line)

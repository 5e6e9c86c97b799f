"""What every long command shares: threads, Ctrl-C, errors as sentences, and the last lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from slimkern.cli._display import Display

if TYPE_CHECKING:
    from slimkern.report.schema import Results
    from slimkern.training.evaluation import Score

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


@contextmanager
def session(threads: int | None, output: Path) -> Iterator[Display]:
    """Run a command's body: expected errors end it with one sentence, Ctrl-C with how to go on.

    Exit codes: 2 for an error, 130 for Ctrl-C.
    """
    display = Display()
    # The tokenizers' own thread pool is of no use here and warns when a process forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if threads is not None:
        torch.set_num_threads(threads)

    from slimkern.cli._run_folder import InterruptedRunError, RunError
    from slimkern.cli.fetch import FetchError
    from slimkern.training.data import DataError

    try:
        yield display
    except (KeyboardInterrupt, InterruptedRunError):
        display.line(f"interrupted; the same command goes on from the last checkpoint in {output}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (DataError, FetchError, RunError) as error:
        display.line(f"error: {error}")
        raise typer.Exit(EXIT_ERROR) from None


def check_teacher(folder: Path | None) -> None:
    """Refuse a ``--teacher`` that is no model's folder."""
    if folder is not None and not (folder / "config.json").is_file():
        raise typer.BadParameter(f"{folder} is no folder of a model", param_hint="--teacher")


def summarize(results: Results, folder: Path, home: Path | None = None) -> None:
    """The run's outcome as a table on standard output.

    Args:
        results: of the run.
        folder: of the run.
        home: where the report lies that is to be read; the run's folder by default.
    """
    console = Console()
    table = Table(title=results["title"])
    for name in ("", "dense", "slim", "change", "95 % interval"):
        table.add_column(name, justify="left" if not name else "right")
    one_shot = results.get("one_shot") or {}
    _add_scores(table, one_shot.get("before_healing") or [], "cut, ")
    _add_scores(table, results["scores"], "")
    size: dict[str, Any] = dict(results["size"])
    for name, key in (("parameters", ""), ("without embeddings", "_no_embeddings")):
        dense, slim = size[f"dense_parameters{key}"], size[f"slim_parameters{key}"]
        table.add_row(name, f"{dense:,}", f"{slim:,}", f"{slim / dense - 1:+.1%}")
    threads = results["latency"]["threads"]
    table.add_section()
    for row in results["latency"]["rows"]:
        _add_times(table, f"{row['batch']} x {row['tokens']} tokens", dict(row))
        for name, seconds in row.get("further_min", {}).items():
            _add_times(table, f"  {name}", {"dense_min": row["dense_min"], "slim_min": seconds})
    family = results.get("family")
    for member in family["members"] if family else ():
        if family and "target_speedup" in member:
            times = {"dense_min": family["dense_min"], "slim_min": member["slim_min"]}
            _add_times(table, f"family, {member['name']}", times)
    table.caption = f"times: fastest forward, {threads} thread(s), float32"
    console.print(table)
    if "predicted" in one_shot:
        console.print(_prediction(results), soft_wrap=True)
    console.print(f"slim model: {folder / 'slim'}", soft_wrap=True)
    console.print(f"report: {(home or folder) / 'report.html'}", soft_wrap=True)


def _add_scores(table: Table, scores: Sequence[Score], prefix: str) -> None:
    for score in scores:
        change = f"{score['slim'] - score['dense']:+.4f}"
        interval = f"{score['low']:+.4f} .. {score['high']:+.4f}"
        name = f"{prefix}{score['split']} {score['metric']}"
        table.add_row(name, f"{score['dense']:.4f}", f"{score['slim']:.4f}", change, interval)


def _add_times(table: Table, name: str, row: dict[str, Any]) -> None:
    dense, slim = row["dense_min"] * 1e3, row["slim_min"] * 1e3
    table.add_row(name, f"{dense:.2f} ms", f"{slim:.2f} ms", f"{dense / slim:.2f}x")


def _prediction(results: Results) -> str:
    """Predicted against measured, in one line."""
    section = results["one_shot"]
    predicted, measured = section["predicted"], section.get("measured")
    if measured is None:
        return (
            f"predicted: {predicted['slim']:,.0f} of {predicted['dense']:,.0f} {predicted['unit']}"
        )
    said = [
        f"{name} {cost['slim'] * 1e3:.2f} ms, {cost['dense'] / cost['slim']:.2f}x"
        for name, cost in (("predicted", predicted), ("measured", measured))
    ]
    batch, tokens = section["shape"]
    return f"{batch} x {tokens} tokens: {'; '.join(said)}"

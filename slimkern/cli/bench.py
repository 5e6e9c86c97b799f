"""``slimkern bench``: how fast a model is here, dense against slim."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkern.cli._options import given_options, parse_shape, refuse

if TYPE_CHECKING:
    from slimkern.cli._bench_models import Candidate
    from slimkern.report.speed_schema import SpeedResults, SpeedRow

EXIT_WRONG = 1
_models = partial(typer.Option, rich_help_panel="What is compared")
_how = partial(typer.Option, rich_help_panel="How")
_files = partial(typer.Option, rich_help_panel="Results")


class Dtype(str, Enum):
    """What the models are held in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class MatmulPrecision(str, Enum):
    """Of ``torch.set_float32_matmul_precision``."""

    highest = "highest"
    high = "high"
    medium = "medium"


def bench(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder of a slim model; folder or hub name.")],
    dense: Annotated[
        str | None,
        _models(
            help="What a slim MODEL was cut from, folder or hub name; "
            "built with random weights if left out."
        ),
    ] = None,
    slim: Annotated[Path | None, _models(help="Folder of what a dense MODEL became.")] = None,
    ffn2_sparsity: Annotated[
        float,
        _models(
            min=0, max=0.99, help="Time what a dense MODEL would be without these FFN channels."
        ),
    ] = 0.0,
    mha_sparsity: Annotated[
        float, _models(min=0, max=0.99, help="The same without this fraction of heads.")
    ] = 0.0,
    round_multiplier: Annotated[
        int, _models(min=1, help="FFN widths that would remain are multiples of it.")
    ] = 32,
    random: Annotated[
        bool,
        _models("--random", help="Random dense weights: for a folder with only a config.json."),
    ] = False,
    shape: Annotated[
        list[str] | None,
        _how(help="Batch and tokens; may be repeated. 1x16, 1x128, 8x128, 32x32 if left out."),
    ] = None,
    threads: Annotated[int | None, _how(min=1, help="PyTorch threads.")] = None,
    rounds: Annotated[int, _how(min=3, help="Of each shape: every model once a round.")] = 20,
    dtype: Annotated[Dtype, _how(help="What the models are held in.")] = Dtype.float32,
    precision: Annotated[
        MatmulPrecision, _how(help="Of float32 matrix products, as PyTorch names it.")
    ] = MatmulPrecision.highest,
    html: Annotated[Path | None, _files(help="Write a page with plots.")] = None,
    json_file: Annotated[Path | None, _files("--json", help="Write all numbers.")] = None,
) -> None:
    """Time a model on this machine, dense against slim, on your shapes.

    Each model's output is compared with float64 before it is timed. The models
    run in turns, round by round, so that whatever else the machine does meets
    both: trust the ratio and its interval more than the times. Inputs are random
    tokens without padding.

    Exit code: 1 where an output is wrong, 2 for a wrong argument.
    """
    values = {k: v for k, v in locals().items() if k != "context"}
    shapes = [parse_shape(text, "shape") for text in shape or ()]
    _check(values, given_options(context))
    wrong = _run(values, shapes)
    if wrong:
        raise typer.Exit(EXIT_WRONG)


def _check(values: dict[str, Any], given: set[str]) -> None:
    """Refuse what has no effect, and files that can't be written.

    Raises:
        BadParameter: naming the option.
    """
    if values["dtype"] is Dtype.bfloat16 and "precision" in given:
        raise refuse("precision", "has no effect: --dtype bfloat16 has no float32 products")
    if "round_multiplier" in given and not values["ffn2_sparsity"]:
        raise refuse("round_multiplier", "has no effect without --ffn2-sparsity")
    for name, option in (("html", "html"), ("json_file", "json")):
        path = values[name]
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise refuse(option, f"{str(path)!r} can't be written; accepted: a file in a folder")


def _run(values: dict[str, Any], shapes: list[tuple[int, int]]) -> bool:
    """Read, measure, show, write. Returns whether an output was wrong."""
    if values["html"] is not None:
        # Before anything is measured: it names the package that is missing.
        from slimkern.report.speed_page import write_speed_report
    import torch

    from slimkern import machine, timing
    from slimkern.cli._bench_measure import Setting, measure
    from slimkern.cli._bench_models import candidates, short_name
    from slimkern.cli._bench_table import show
    from slimkern.cli._display import Display

    start = time.perf_counter()
    found = candidates(values)
    wanted = _shapes(found, shapes)
    dtype = getattr(torch, values["dtype"].value)
    setting = Setting(
        short_name(values["model"]), dtype, values["precision"].value, values["rounds"]
    )
    with timing.pinned_threads(values["threads"]) as threads:
        line = machine.machine_line()
        rows = measure(found, wanted, setting, Display())
        results = _results(found, rows, values, threads)
    results["seconds"] = time.perf_counter() - start
    show(line, results)
    if values["json_file"] is not None:
        _write(values["json_file"], json.dumps(results, indent=1) + "\n")
        typer.echo(f"results: {values['json_file']}")
    if values["html"] is not None:
        write_speed_report(results, values["html"])
        typer.echo(f"page: {values['html']}")
    return any("failed" in row for row in rows)


def _shapes(found: Sequence[Candidate], asked: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The shapes that are asked for, or the usual ones as far as the model takes them.

    Raises:
        BadParameter: the model does not take so many tokens.
    """
    from slimkern.cli import _measure
    from slimkern.cli._bench_models import longest

    most = longest(found[0].model)
    if not asked:
        return _measure.shapes(most or max(tokens for _, tokens in _measure.SHAPES))
    for batch, tokens in asked:
        if most is not None and tokens > most:
            raise refuse("shape", f"{batch}x{tokens} is not accepted: MODEL takes {most} tokens")
    return list(dict.fromkeys(asked))


def _results(
    found: Sequence[Candidate], rows: list[SpeedRow], values: dict[str, Any], threads: int
) -> SpeedResults:
    """The run as data, which the page and the file are made of."""
    import torch

    from slimkern import machine
    from slimkern.cli._bench_measure import sizes
    from slimkern.cli._bench_models import short_name

    notes = [f"{c.name}: {c.origin}" for c in found]
    kind = values["dtype"].value
    if values["dtype"] is Dtype.float32:
        kind += f", matrix products in precision {values['precision'].value}"
    notes.append(
        f"{threads} thread(s), {kind}, {values['rounds']} rounds; error: against float64, root "
        "mean square, relative; peak memory: growth of the process in the first call"
    )
    if values["precision"] is MatmulPrecision.high:
        notes.append("PyTorch's own products on a CPU are the same under high as under highest")
    return {
        "title": f"{short_name(values['model'])}, {' against '.join(c.name for c in found)}",
        "command": " ".join(["slimkern", *sys.argv[1:]]),
        "date": machine.now(),
        "machine": machine.machine(),
        "versions": machine.versions(),
        "threads": threads,
        "rounds": values["rounds"],
        "rows": rows,
        "models": sizes(found, getattr(torch, values["dtype"].value)),
        "notes": notes,
    }


def _write(path: Path, text: str) -> None:
    """All of the file or nothing."""
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)

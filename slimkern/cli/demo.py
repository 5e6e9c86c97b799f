"""``slimkern demo``: a real embedding model on real data, dense against slim, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkern.cli._options import Method, Protocol, given_options, parse_family, refuse

if TYPE_CHECKING:
    from slimkern.cli._display import Display


def demo(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option(help="Folder of the runs: models, results.json, report.html.")
    ] = Path("slimkern-demo"),
    method: Annotated[
        Method,
        typer.Option(
            help="Calibrate, cut and heal, or the reference recipe's masks that grow. Both may run "
            "in one folder: the report then shows them side by side."
        ),
    ] = Method.one_shot,
    full: Annotated[
        bool, typer.Option("--full", help="The longer training: better, and slower.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few rows and steps: shows that everything works.")
    ] = False,
    protocol: Annotated[
        Protocol, typer.Option(help="Sentence embeddings, or the reference recipe on pairs.")
    ] = Protocol.bi_encoder,
    family: Annotated[
        str | None,
        typer.Option(help="One-shot: further models of these speed-ups, for example 1.5,2,3."),
    ] = None,
    family_heal_epochs: Annotated[float, typer.Option(min=0, help="Of each of these.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order of rows and of fresh heads.")] = 0,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of a fine-tuned dense teacher to start from.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="PyTorch threads; its own default if left out.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where the two downloaded packages are kept.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start this method's run anew.")
    ] = False,
) -> None:
    """Slim all-MiniLM-L6-v2 on STS-B: 80 % of the FFN channels and 60 % of the heads go.

    Downloads model and data once, fine-tunes the dense teacher, calibrates it and cuts it in
    seconds, heals the slim model by distillation, saves, reloads, evaluates dense and slim, times
    both, and writes report.html. Ctrl-C leaves a checkpoint: the same command goes on from there.
    """
    values = {k: v for k, v in locals().items() if k != "context"}
    from slimkern.cli._session import check_teacher, session

    if full and smoke:
        raise typer.BadParameter("accepted: --full or --smoke, not both", param_hint="--smoke")
    given = given_options(context)
    for name in ("family", "family_heal_epochs"):
        if method is Method.gradual and name in given:
            raise refuse(name, "belongs to --method one-shot; this run is --method gradual")
    if family_heal_epochs and family is None:
        raise refuse("family_heal_epochs", "there is no --family to heal")
    values["family"] = parse_family(family)
    check_teacher(teacher)
    with session(threads, output) as display:
        _run(values, display)


def _run(values: dict[str, Any], display: Display) -> None:
    """The command's work, from options that go together."""
    from slimkern.cli._demo_settings import SMOKE_ROWS, read_split, recipe
    from slimkern.cli._roads import slim_model
    from slimkern.cli._run import Run
    from slimkern.cli._session import summarize
    from slimkern.cli._together import METHODS, write_together
    from slimkern.cli.fetch import fetch_demo_files
    from slimkern.training import EmbeddingTask, RegressionTask, Task

    output, smoke, method = values["output"], values["smoke"], values["method"].value
    with display.stage("provide model and data"):
        files = fetch_demo_files(values["cache"])
    splits = {
        name: read_split(name, getattr(files, name), SMOKE_ROWS[name] if smoke else None)
        for name in ("train", "dev", "test")
    }
    task: Task = EmbeddingTask(scale=5.0)
    if values["protocol"] is Protocol.cross_encoder:
        gold = [float(pair.label) for pair in splits["train"].pairs]
        task = RegressionTask(mean=sum(gold) / len(gold))
    names = ("full", "smoke", "seed", "teacher", "family", "family_heal_epochs")
    options = {name: values[name] for name in names}
    settings = recipe(values["protocol"], method, files.model_dir, task, **options)
    run = Run(output / method, settings, task, splits, display, home=output)
    run.name = "all-MiniLM-L6-v2"
    run.prepare(values["overwrite"], METHODS)
    run.encode()
    run.train_dense()
    results = slim_model(
        run,
        None,
        title="all-MiniLM-L6-v2 on STS-B, dense against slim",
        model={
            "protocol": values["protocol"].value,
            "task": "semantic similarity of two sentences",
        },
        data={
            "name": "STS-benchmark",
            "splits": {name: len(split.pairs) for name, split in splits.items()},
            "note": "gold scores from 0 to 5; epochs are chosen on dev, test is only reported",
        },
        notes=["a smoke run on a few rows: its scores mean nothing"] if smoke else [],
    )
    write_together(output)
    summarize(results, run.folder, output)

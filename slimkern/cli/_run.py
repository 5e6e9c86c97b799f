"""One run from a dense model to a slim one: its stages, each of which an interrupted run skips.

The folder of a run holds ``run.json`` (what was asked), ``teacher/`` (the dense model),
``training/`` (checkpoints while it lasts), ``slim/`` (the result), ``results.json`` and
``report.html``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from slimkern.cli._display import Display
from slimkern.cli._progress import ShowProgress
from slimkern.cli._run_folder import (
    InterruptedRunError,
    RunError,
    RunSettings,
    Split,
    open_folder,
)
from slimkern.training import (
    DistillTrainer,
    KeepBest,
    SlimCallback,
    StopOnInterrupt,
    Task,
    Teacher,
    disable_dropout,
    predict,
)
from slimkern.training.evaluation import accuracy, spearman
from slimkern.training.rows import EncodedRows


class Run:
    """The stages of a run in its folder.

    Args:
        folder: the run's folder; created.
        settings: what was asked.
        task: what the model is trained for.
        splits: ``train`` and ``dev``, and where there is one ``test``.
        display: where progress is shown.
    """

    def __init__(
        self,
        folder: Path,
        settings: RunSettings,
        task: Task,
        splits: dict[str, Split],
        display: Display,
    ) -> None:
        self.folder = folder
        self.settings = settings
        self.task = task
        self.splits = splits
        self.display = display
        self.rows: dict[str, EncodedRows] = {}
        self.history: list[dict[str, Any]] = []
        self.tokenizer: Any = None
        self.name = Path(settings.model).name
        self.max_length = settings.max_length

    @property
    def teacher_folder(self) -> Path:
        """The folder the dense teacher is read from."""
        return Path(self.settings.teacher) if self.settings.teacher else self.folder / "teacher"

    @property
    def slim_folder(self) -> Path:
        """The folder the slim model is written to."""
        return self.folder / "slim"

    def prepare(self, overwrite: bool = False) -> None:
        """Open the folder: a new run, or one that was interrupted and asked for the same.

        Raises:
            RunError: as :func:`slimkern.cli._run_folder.open_folder`.
        """
        open_folder(self.folder, self.settings, self.splits, self.display, overwrite)

    def encode(self) -> None:
        """Tokenize every split once."""
        source = self.settings.teacher or self.settings.model
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise RunError(f"MODEL {source!r}: no tokenizer could be loaded: {error}") from error
        positions = getattr(config, "max_position_embeddings", self.max_length)
        self.max_length = min(self.max_length, self.tokenizer.model_max_length, positions)
        with self.display.stage("tokenize") as bar:
            for done, (name, split) in enumerate(self.splits.items()):
                bar(done, len(self.splits))
                self.rows[name] = self.task.encode(
                    split.pairs, self.tokenizer, self.max_length, split.path
                )

    def train_dense(self) -> None:
        """Make the dense teacher, unless there is one."""
        settings = self.settings.dense
        if self.settings.teacher or (self.teacher_folder / "config.json").is_file():
            return
        if settings is not None:
            set_seed(settings.seed)  # A fresh head is drawn before the Trainer seeds.
        model = self.load(self.settings.model, trained=settings is None)
        if settings is not None:
            scratch = self.folder / "training" / "dense"
            best = self._keep_best(scratch)
            trainer = DistillTrainer(
                model if settings.dropout else disable_dropout(model),
                self.task,
                self.rows["train"],
                settings.arguments(scratch),
                callbacks=[best],
            )
            self._train(trainer, model, "train the dense teacher", best)
        part = self.folder / "teacher.part"
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        _copy_pooling(Path(self.settings.model), part)
        os.replace(part, self.teacher_folder)
        shutil.rmtree(self.folder / "training", ignore_errors=True)

    def train_slim(self) -> nn.Module:
        """Grow the masks while distilling, and return the best masked model."""
        settings = self.settings
        set_seed(settings.slim.seed)
        teacher = None
        if settings.weights.needs_teacher:
            with self.display.stage("run the teacher over the training rows") as bar:
                dense: nn.Module = self.load(str(self.teacher_folder))
                teacher = Teacher(
                    dense.to(_device()),
                    self.task,
                    self.rows["train"],
                    hidden_states=settings.weights.hidden > 0,
                    progress=bar,
                )
        model = self.load(str(self.teacher_folder))
        slim = SlimCallback(
            ffn2_sparsity=settings.ffn2_sparsity,
            mha_sparsity=settings.mha_sparsity,
            warm_epochs=settings.warm_epochs,
            cooldown_epochs=settings.cooldown_epochs,
            **settings.pruning,
        )
        scratch = self.folder / "training" / "slim"
        best = self._keep_best(scratch, lambda: slim.pruning is not None and slim.pruning.done)
        trainer = DistillTrainer(
            model if settings.slim.dropout else disable_dropout(model),
            self.task,
            self.rows["train"],
            settings.slim.arguments(scratch),
            settings.weights,
            teacher,
            callbacks=[slim, best],
        )
        self._train(trainer, model, "slim while distilling", best)
        assert slim.pruning is not None, "training has begun"
        for note in slim.pruning.notes:
            self.display.line(f"note: {note}")
        self.history = trainer.state.log_history
        slim.pruning.remove()
        return model.cpu()

    def predictions(self, models: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """``{split: {model: predictions}}`` of the evaluation splits."""
        names = [name for name in self.splits if name != "train"]
        result: dict[str, dict[str, Any]] = {name: {} for name in names}
        for label, model in models.items():
            for name in names:
                with self.display.stage(f"evaluate {label} on {name}") as bar:
                    rows = self.rows[name]
                    result[name][label] = predict(model, self.task, rows, progress=bar)
        return result

    def load(self, source: str, trained: bool = True) -> PreTrainedModel:
        """The dense model of a folder or hub name, for the run's task.

        Raises:
            RunError: it can't be loaded, or is to be ``trained`` and has no trained head.
        """
        try:
            return self.task.load_model(source, trained)
        except (OSError, ValueError) as error:
            raise RunError(f"MODEL {source!r} could not be loaded: {error}") from error

    def _keep_best(self, folder: Path, ready: Callable[[], bool] = lambda: True) -> KeepBest:
        return KeepBest(self.score, folder, ready, self.settings.patience)

    def score(self, model: nn.Module) -> float:
        """The number by which epochs are compared, on the evaluation file."""
        rows = self.rows["dev"]
        statistic = accuracy if self.task.statistics == ("accuracy",) else spearman
        value = statistic(self.task.gold(rows), predict(model, self.task, rows))
        return value if value == value else -1.0  # constant predictions have no correlation

    def _train(self, trainer: DistillTrainer, model: nn.Module, name: str, best: KeepBest) -> None:
        """Train, from the last checkpoint where there is one, and take the best epoch's weights.

        Raises:
            InterruptedRunError: Ctrl-C; a checkpoint lies in the run's folder.
        """
        folder = Path(str(trainer.args.output_dir))
        last = get_last_checkpoint(folder) if folder.is_dir() else None
        with self.display.stage(name) as bar, StopOnInterrupt(self.display.line) as stop:
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(stop)
            trainer.add_callback(ShowProgress(bar, self.display, self.task.statistics[-1]))
            trainer.train(resume_from_checkpoint=last)
        if stop.requested:
            raise InterruptedRunError
        best.restore(model)


def _device() -> torch.device:
    """Where the Trainer will put the student: the teacher goes there too."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _copy_pooling(source: Path, target: Path) -> None:
    """How a sentence-transformers folder pools travels with the model."""
    if (source / "1_Pooling" / "config.json").is_file():
        shutil.copytree(source / "1_Pooling", target / "1_Pooling")
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)

"""One run from a dense model to a slim one: what both roads share, stage by stage.

The folder of a run holds ``run.json`` (what was asked), ``teacher/`` (the dense model),
``training/`` (checkpoints while it lasts), ``slim/`` (the result), ``results.json`` and
``report.html``; a one-shot run also ``oneshot/`` (the model before healing) and ``family/``. Every
stage that an interrupted run has finished is skipped when it goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
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
    STAGES_FILE,
    InterruptedRunError,
    RunError,
    RunSettings,
    Split,
    describe,
    describe_teacher,
    open_folder,
)
from slimkern.training import (
    AverageWeights,
    DistillTrainer,
    KeepBest,
    StopOnInterrupt,
    Task,
    Teacher,
    disable_dropout,
    predict,
)
from slimkern.training.evaluation import accuracy, spearman
from slimkern.training.rows import EncodedRows
from slimkern.training.task import Texts

TEACHER_PASS = "run the teacher over the training rows"


class Run:
    """The stages of a run in its folder.

    Args:
        folder: the run's folder; created.
        settings: what was asked.
        task: what the model is trained for.
        splits: ``train``, ``dev`` and ``test``, as far as they are there; where anything is
            trained, the first two are.
        display: where progress is shown.
        home: the folder of several runs that share a teacher; its own folder by default.
    """

    def __init__(
        self,
        folder: Path,
        settings: RunSettings,
        task: Task,
        splits: dict[str, Split],
        display: Display,
        home: Path | None = None,
    ) -> None:
        self.folder = folder
        self.home = folder if home is None else home
        self.settings = settings
        self.task = task
        self.splits = splits
        self.display = display
        self.rows: dict[str, EncodedRows] = {}
        self.history: list[dict[str, Any]] = []
        self.slimming_rows: EncodedRows | None = None
        self.calibration: list[dict[str, Tensor]] = []
        self.tokenizer: Any = None
        self.name = Path(settings.model).name
        self.max_length = settings.max_length
        self.latency_shape: tuple[int, int] | None = None
        self._teacher: Teacher | None = None

    @property
    def teacher_folder(self) -> Path:
        """The folder the dense teacher is read from."""
        return Path(self.settings.teacher) if self.settings.teacher else self.home / "teacher"

    def prepare(self, overwrite: bool = False, runs: Sequence[str] = ()) -> None:
        """Open the folder: a new run, or one that was interrupted and asked for the same.

        Args:
            overwrite: start anew where there is a run.
            runs: names of the folders in ``home`` that runs with this teacher may have.

        Raises:
            RunError: as :func:`slimkern.cli._run_folder.open_folder`.
        """
        if self.home != self.folder:
            shared = describe_teacher(self.settings, self.splits)
            open_folder(self.home, shared, self.display, overwrite, runs)
        description = describe(self.settings, self.splits)
        open_folder(self.folder, description, self.display, overwrite)
        self.display.keep_stages(self.folder / STAGES_FILE)

    def encode(self, unlabelled: Texts | None = None) -> None:
        """Tokenize every split once; ``unlabelled`` texts join the rows that are slimmed on."""
        source = self.settings.teacher or self.settings.model
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source)
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise RunError(f"MODEL {source!r}: no tokenizer could be loaded: {error}") from error
        longest = self.tokenizer.model_max_length
        longest = min(longest, getattr(config, "max_position_embeddings", longest))
        self.max_length = min(self.max_length, longest)
        if self.settings.one_shot is not None:
            batch, tokens = self.settings.one_shot.latency_shape
            self.latency_shape = (batch, min(tokens, longest))
            if tokens > longest:
                self.display.line(f"latency shape: {batch}x{longest}, the most the model takes")
        with self.display.stage("tokenize") as bar:
            for done, (name, split) in enumerate(self.splits.items()):
                bar(done, len(self.splits))
                self.rows[name] = self.task.encode(
                    split.pairs, self.tokenizer, self.max_length, split.path
                )
            rows = self.rows.get("train")
            if unlabelled is not None:
                more = self.task.encode_texts(unlabelled, self.tokenizer, self.max_length)
                rows = more if rows is None else rows + more
            self.slimming_rows = rows

    def train_dense(self) -> None:
        """Make the dense teacher, unless there is one."""
        settings = self.settings.dense
        if self.settings.teacher or (self.teacher_folder / "config.json").is_file():
            return
        if settings is not None:
            set_seed(settings.seed)  # A fresh head is drawn before the Trainer seeds.
        model = self.load(self.settings.model, trained=settings is None)
        if settings is not None:
            scratch = self.home / "training" / "dense"
            best = self.keep_best(scratch)
            trainer = DistillTrainer(
                model if settings.dropout else disable_dropout(model),
                self.task,
                self.rows["train"],
                settings.arguments(scratch),
                callbacks=[best],
            )
            self.train(trainer, model, "train the dense teacher", best)
        part = self.home / "teacher.part"
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        _copy_pooling(Path(self.settings.model), part)
        os.replace(part, self.teacher_folder)
        shutil.rmtree(self.home / "training", ignore_errors=True)

    def teacher(self, hidden_states: bool) -> Teacher:
        """The dense model's answers to the rows of the slimming; computed at the first call."""
        if self._teacher is None:
            assert self.slimming_rows is not None, "there are rows where anything is trained"
            with self.display.stage(TEACHER_PASS) as bar:
                dense: nn.Module = self.load(str(self.teacher_folder))
                self._teacher = Teacher(
                    dense.to(_device()),
                    self.task,
                    self.slimming_rows,
                    hidden_states=hidden_states,
                    progress=bar,
                )
        return self._teacher

    def forget_teacher(self) -> None:
        """Give the memory of the teacher's answers back."""
        self._teacher = None

    def predictions(self, models: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """``{split: {model: predictions}}`` of the evaluation splits."""
        names = [name for name in self.splits if name != "train"]
        result: dict[str, dict[str, Any]] = {name: {} for name in names}
        if not names:
            return result
        with self.display.stage(f"evaluate on {' and '.join(names)}") as bar:
            for label, model in models.items():
                for name in names:
                    bar.say(f"{label} on {name}")
                    rows = self.rows[name]
                    result[name][label] = predict(model, self.task, rows, progress=bar)
        return result

    def probe(self) -> dict[str, Tensor]:
        """A small batch by which a model is held against itself."""
        if self.rows:
            rows = self.rows.get("dev") or next(iter(self.rows.values()))
            return next(rows.by_length(32))[1]
        return {name: values[:32] for name, values in self.calibration[0].items()}

    def load(self, source: str, trained: bool = True) -> PreTrainedModel:
        """The dense model of a folder or hub name, for the run's task.

        Raises:
            RunError: it can't be loaded, or is to be ``trained`` and has no trained head.
        """
        try:
            return self.task.load_model(source, trained)
        except (OSError, ValueError) as error:
            raise RunError(f"MODEL {source!r} could not be loaded: {error}") from error

    def score(self, model: nn.Module) -> float:
        """The number by which epochs are compared, on the evaluation file."""
        rows = self.rows["dev"]
        statistic = accuracy if self.task.statistics == ("accuracy",) else spearman
        value = statistic(self.task.gold(rows), predict(model, self.task, rows))
        return value if value == value else -1.0  # constant predictions have no correlation

    def keep_best(
        self,
        folder: Path,
        ready: Callable[[], bool] = lambda: True,
        average: AverageWeights | None = None,
    ) -> KeepBest:
        """The callback that keeps the best epoch by :meth:`score`, in ``folder``."""
        return KeepBest(self.score, folder, ready, self.settings.patience, average)

    def train(self, trainer: DistillTrainer, model: nn.Module, stage: str, best: KeepBest) -> None:
        """Train, from the last checkpoint where there is one, and take the best epoch's weights.

        Raises:
            InterruptedRunError: Ctrl-C; a checkpoint lies in the run's folder.
        """
        folder = Path(str(trainer.args.output_dir))
        checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
        with self.display.stage(stage) as bar, StopOnInterrupt(self.display.line) as stop:
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(stop)
            trainer.add_callback(ShowProgress(bar, self.display, self.task.statistics[-1]))
            trainer.train(resume_from_checkpoint=checkpoint)
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

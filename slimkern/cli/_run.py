"""One run from a dense model to a slim one: its stages, each of which an interrupted run skips.

The folder of a run holds ``run.json`` (what was asked), ``teacher/`` (the dense model),
``training/`` (checkpoints while it lasts), ``slim/`` (the result), ``results.json`` and
``report.html``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from slimkern.cli._display import Bar, Display
from slimkern.training import (
    DistillationWeights,
    DistillTrainer,
    KeepBest,
    SlimCallback,
    StopOnInterrupt,
    Task,
    Teacher,
    TrainingSettings,
    disable_dropout,
    predict,
)
from slimkern.training.data import Pair
from slimkern.training.evaluation import accuracy, spearman
from slimkern.training.rows import EncodedRows


class InterruptedRunError(Exception):
    """The user pressed Ctrl-C; a checkpoint has been saved."""


class RunError(RuntimeError):
    """A run can't go on; the message says why and what to do."""


@dataclass(frozen=True)
class Split:
    """Rows of one file."""

    name: str
    path: str
    pairs: list[Pair] = field(repr=False)


@dataclass(frozen=True)
class RunSettings:
    """Everything that decides a run's result, beside its data.

    Attributes:
        model: folder or hub name of the dense model.
        task: ``embeddings``, ``regression`` or ``classification``.
        ffn2_sparsity, mha_sparsity: fractions of FFN channels and heads to remove.
        dense: how the dense teacher is trained; ``None``: it is used as it is.
        slim: how the masked model is trained.
        weights: of the distillation.
        teacher: folder of a dense teacher that is there already.
        warm_epochs, cooldown_epochs: before the sparsity grows, and after.
        pruning: further keys of ``WeightPruningConfig``.
        patience: epochs without improvement on the evaluation file after which training stops.
        max_length: tokens per sequence.
    """

    model: str
    task: str
    ffn2_sparsity: float
    mha_sparsity: float
    dense: TrainingSettings | None
    slim: TrainingSettings
    weights: DistillationWeights
    teacher: str | None = None
    warm_epochs: float | None = None
    cooldown_epochs: float | None = None
    pruning: dict[str, Any] = field(default_factory=dict)
    patience: int | None = None
    max_length: int = 128


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
            RunError: the folder holds a run of other settings, a finished one, or foreign files.
        """
        description = {
            "settings": asdict(self.settings),
            "data": {s.name: {"path": s.path, "rows": len(s.pairs)} for s in self.splits.values()},
        }
        asked = json.loads(json.dumps(description))
        path = self.folder / "run.json"
        if overwrite and path.is_file():
            _clear(self.folder)
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(_differences(found, asked))
            if differing:
                raise RunError(
                    f"--output {self.folder} holds a run with other settings "
                    f"({', '.join(differing)}); give another folder, or --overwrite to start anew"
                )
            if (self.folder / "report.html").is_file():
                raise RunError(
                    f"--output {self.folder} holds this run, finished; see its report.html, "
                    f"or give --overwrite to run it again"
                )
            self.display.line(f"going on with the run in {self.folder}")
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise RunError(f"--output {self.folder} is not empty and holds no run; give another")
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(asked, indent=1), encoding="utf-8")
        os.replace(scratch, path)

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
        model = self.load(self.settings.model)
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
                teacher = Teacher(
                    self.load(str(self.teacher_folder)),
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
        return model

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

    def load(self, source: str) -> PreTrainedModel:
        """The dense model of a folder or hub name, for the run's task.

        Raises:
            RunError: it can't be loaded.
        """
        try:
            return self.task.load_model(source)
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
            trainer.add_callback(_ShowProgress(bar, self.display, self.task.statistics[-1]))
            trainer.train(resume_from_checkpoint=last)
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedRunError
        best.restore(model)


class _ShowProgress(TrainerCallback):
    """Moves a stage's bar with the optimizer's steps, and says what the training does."""

    def __init__(self, bar: Bar, display: Display, statistic: str) -> None:
        self.bar = bar
        self.display = display
        self.statistic = statistic

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar(state.global_step, state.max_steps)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shown = [("loss", "loss", "{:.4f}"), ("ffn_sparsity", "FFN", "-{:.0%}")]
        shown.append(("mha_sparsity", "heads", "-{:.0%}"))
        logs = state.log_history[-1]
        self.bar.say("  ".join(f"{t} {f.format(logs[k])}" for k, t, f in shown if k in logs))

    def on_epoch_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scored = state.log_history[-1] if state.log_history else {}
        if "score" in scored and scored["step"] == state.global_step:
            epoch = scored["epoch"]
            self.display.line(f"  epoch {epoch:g}: dev {self.statistic} {scored['score']:.4f}")


def _differences(found: Any, asked: Any, path: str = "") -> list[str]:
    """Dotted names of what differs."""
    if isinstance(found, dict) and isinstance(asked, dict):
        keys = sorted(set(found) | set(asked))
        return [
            d
            for k in keys
            for d in _differences(found.get(k), asked.get(k), f"{path}.{k}" if path else k)
        ]
    return [] if found == asked else [path]


def _clear(folder: Path) -> None:
    """Remove what a run has written, and nothing else."""
    for name in ("teacher", "teacher.part", "training", "slim", "report_files"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("run.json", "results.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _copy_pooling(source: Path, target: Path) -> None:
    """How a sentence-transformers folder pools travels with the model."""
    if (source / "1_Pooling" / "config.json").is_file():
        shutil.copytree(source / "1_Pooling", target / "1_Pooling")
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)

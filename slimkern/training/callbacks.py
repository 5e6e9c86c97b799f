"""Callbacks of slimkern's own trainings: keep the best epoch, stop cleanly on Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimkern.training.state_files import read_state, write_state


class KeepBest(TrainerCallback):
    """Scores the model after each epoch, keeps the weights of the best one, and stops in time.

    The best epoch so far is on disk, so that an interrupted run finds it again. The weights are
    brought back by :meth:`restore`.

    Args:
        score: gives the model's score; higher is better.
        folder: where the best weights are kept.
        ready: whether an epoch counts; an epoch whose masks are not final must not win.
        patience: stop after this many epochs without an improvement; ``None`` never stops.
    """

    def __init__(
        self,
        score: Callable[[nn.Module], float],
        folder: Path,
        ready: Callable[[], bool] = lambda: True,
        patience: int | None = None,
    ) -> None:
        self.score = score
        self.folder = folder
        self.ready = ready
        self.patience = patience
        self.best: float | None = None
        self.best_epoch: float | None = None
        self.epochs_since = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """On resume, read which epoch was the best so far."""
        if state.global_step and (self.folder / "best.json").is_file():
            kept = read_state(self.folder, "best")
            if kept["step"] <= state.global_step:
                self.best, self.best_epoch = kept["score"], kept["epoch"]
                self.epochs_since = round((state.epoch or 0.0) - kept["epoch"])
                control.should_training_stop = self._out_of_patience()

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Score the epoch; keep its weights if they are the best."""
        within = not float(state.epoch or 0.0).is_integer() and state.global_step < state.max_steps
        if control.should_training_stop and within:
            return  # Stopped within the epoch: it will be scored when it is complete.
        model: nn.Module = kwargs["model"]
        score = self.score(model)
        entry = {"step": state.global_step, "epoch": state.epoch or 0.0, "score": score}
        state.log_history.append(entry)
        if not self.ready():
            return
        if self.best is None or score > self.best:
            self.best, self.best_epoch, self.epochs_since = score, entry["epoch"], 0
            self.folder.mkdir(parents=True, exist_ok=True)
            write_state({**entry, "model": dict(model.state_dict())}, self.folder, "best")
        else:
            self.epochs_since += 1
        if self._out_of_patience():
            control.should_training_stop = True

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.epochs_since >= self.patience

    def restore(self, model: nn.Module) -> float | None:
        """Load the best epoch's weights; returns its score, ``None`` where no epoch counted."""
        if self.best is not None:
            model.load_state_dict(read_state(self.folder, "best")["model"])
        return self.best


class StopOnInterrupt(TrainerCallback):
    """Turns Ctrl-C into: finish the step, save a checkpoint, stop. A second one stops at once.

    Used as a context manager around ``trainer.train()``, in the main thread. ``requested`` tells
    afterwards whether the run was interrupted.
    """

    def __init__(self, announce: Callable[[str], None] = print) -> None:
        self.announce = announce
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> StopOnInterrupt:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.announce("interrupted: finishing the step and saving a checkpoint")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the Trainer for a checkpoint and the end of training."""
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

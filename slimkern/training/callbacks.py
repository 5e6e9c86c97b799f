"""Callbacks of slimkern's own trainings: average the weights, keep the best epoch, stop cleanly."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from slimkern.cuts import refuse_sharded
from slimkern.parallel import ranks_of
from slimkern.training.checkpoints import read_beside, write_beside
from slimkern.training.state_files import read_state, write_state

AVERAGE_NAME = "slimkern_average"


class AverageWeights(TrainerCallback):
    """Keeps an exponential moving average of the trained weights: ``a <- d a + (1 - d) w``.

    The average of the last steps lies nearer to the middle of the valley than the last step does
    (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407). The decay rises with the
    number ``n`` of updates, ``d = min(decay ** every, (1 + n) / (10 + n))``: the average looks
    back over a ninth of the training so far until that is as long as ``1 / (1 - decay)`` steps.

    The training itself goes on with its own weights. Hand the callback to
    ``KeepBest(average=...)``, which then scores and keeps the average, or call :meth:`copy_to` when
    the training is over. Its state is saved with every checkpoint: a resumed training goes on
    exactly.

    Args:
        decay: per optimizer step, in (0, 1); 0.99 looks back over about 100 steps.
        every: optimizer steps between two updates. An update reads and writes every trained weight
            once, embeddings included.
        ready: no update before this is true. While masks grow it must not be: an average over
            their growth is not zero where a mask is.

    Attributes:
        weights: ``{parameter name: average}``, in float32 or wider; ``None`` before the first
            update.
        updates: how many steps have entered.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, decay: float = 0.99, every: int = 1, ready: Callable[[], bool] = lambda: True
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"decay is {decay}; accepted: a number in (0, 1)")
        if every < 1:
            raise ValueError(f"every is {every}; accepted: at least 1")
        self.decay = decay
        self.every = every
        self.ready = ready
        self.weights: dict[str, Tensor] | None = None
        self.updates = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, or on resume read the average beside the checkpoint.

        Raises:
            FileNotFoundError: training is resumed from a checkpoint that holds no average.
        """
        refuse_sharded(kwargs["model"], "AverageWeights")
        self.weights, self.updates = None, 0
        if state.global_step:
            kept = read_beside(args, state.global_step, AVERAGE_NAME)
            self.updates = kept["updates"]
            if kept["weights"] is not None:
                places = dict(kwargs["model"].named_parameters())
                self.weights = {n: w.to(places[n].device) for n, w in kept["weights"].items()}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the step's weights enter."""
        if state.global_step % self.every == 0 and self.ready():
            self.update(kwargs["model"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the average beside the checkpoint that has just been written."""
        kept = {"updates": self.updates, "weights": self.weights}
        write_beside(kept, args, state, AVERAGE_NAME)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Let the model's weights enter the average; the first ones are the average."""
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        if self.weights is None:
            # In float16 or bfloat16 a step of 1 % of the difference would be rounded away.
            self.weights = {n: _at_least_float32(p).clone() for n, p in trained.items()}
        else:
            decay = min(self.decay**self.every, (1 + self.updates) / (10 + self.updates))
            averages = list(self.weights.values())
            current = [trained[n].to(a.dtype) for n, a in self.weights.items()]
            torch._foreach_lerp_(averages, current, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average; nothing where there is none yet."""
        for name, average in (self.weights or {}).items():
            model.get_parameter(name).copy_(average)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model has the average; afterwards its own weights, bit by bit."""
        own = {n: model.get_parameter(n).detach().clone() for n in self.weights or {}}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in own.items():
                    model.get_parameter(name).copy_(weight)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


class KeepBest(TrainerCallback):
    """Scores the model after each epoch, keeps the weights of the best one, and stops in time.

    The best epoch so far is on disk, so that an interrupted run finds it again. The weights are
    brought back by :meth:`restore`. In a run of several processes rank 0's score counts, and rank 0
    writes.

    Args:
        score: gives the model's score; higher is better.
        folder: where the best weights are kept.
        ready: whether an epoch counts; an epoch whose masks are not final must not win.
        patience: stop after this many epochs without an improvement; ``None`` never stops.
        average: score and keep this average of the weights instead of the weights themselves; give
            the same callback to the Trainer.
    """

    def __init__(
        self,
        score: Callable[[nn.Module], float],
        folder: Path,
        ready: Callable[[], bool] = lambda: True,
        patience: int | None = None,
        average: AverageWeights | None = None,
    ) -> None:
        self.score = score
        self.folder = folder
        self.ready = ready
        self.patience = patience
        self.average = average
        self.best: float | None = None
        self.best_epoch: float | None = None
        self.epochs_since = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """On resume, read which epoch was the best so far."""
        refuse_sharded(kwargs["model"], "KeepBest")
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
        with nullcontext() if self.average is None else self.average.applied(model):
            self._judge(model, state)
        if self._out_of_patience():
            control.should_training_stop = True

    def _judge(self, model: nn.Module, state: TrainerState) -> None:
        """Score the model as it is, and write its weights where they are the best."""
        ranks = ranks_of()
        with ranks.together("scoring an epoch"):
            score = self.score(model)
        score = float(ranks.first(repr(float(score))))
        entry = {"step": state.global_step, "epoch": state.epoch or 0.0, "score": score}
        state.log_history.append(entry)
        if not self.ready():
            return
        if self.best is None or score > self.best:
            self.best, self.best_epoch, self.epochs_since = score, entry["epoch"], 0
            with ranks.together("keeping the best epoch"):
                if not ranks.rank:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_state({**entry, "model": dict(model.state_dict())}, self.folder, "best")
        else:
            self.epochs_since += 1

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
        """Ask the Trainer for a checkpoint and the end of training, on every rank at once."""
        if ranks_of().any(self.requested):
            control.should_save = True
            control.should_training_stop = True

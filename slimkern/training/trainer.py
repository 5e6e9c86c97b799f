"""``DistillTrainer``: a transformers Trainer with a task's loss and a dense teacher's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from slimkern.parallel import ranks_of
from slimkern.training.distillation import DistillationWeights
from slimkern.training.loss import DistillationLoss
from slimkern.training.rows import EncodedRows, LengthGroupedSampler
from slimkern.training.task import Task
from slimkern.training.teacher import Teacher

SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainingSettings:
    """How one model is trained.

    Attributes:
        epochs: passes over the training rows.
        learning_rate: the peak.
        batch_size: rows per optimizer step, and per process where there are several.
        schedule: ``linear`` or ``cosine`` decay to zero, or ``constant``, after the warm-up.
        warmup: fraction of the optimizer steps in which the learning rate rises linearly.
        weight_decay, betas: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        dropout: whether the model's own dropout is on. Distillation does better without.
        seed: of the order of rows, fresh heads and dropout.
    """

    epochs: float
    learning_rate: float
    batch_size: int = 32
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 1e-7
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    dropout: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise ValueError(f"epochs is {self.epochs}; accepted: a positive number")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}; accepted: a positive number")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; accepted: at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; accepted: a fraction in [0, 1)")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; accepted: {', '.join(SCHEDULES)}")

    def arguments(self, folder: Path, save: bool = True) -> TrainingArguments:
        """transformers' own arguments; checkpoints go to ``folder`` after each epoch."""
        return TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            lr_scheduler_type=self.schedule,
            warmup_steps=self.warmup,
            weight_decay=self.weight_decay,
            adam_beta1=self.betas[0],
            adam_beta2=self.betas[1],
            max_grad_norm=self.max_grad_norm,
            optim="adamw_torch_fused",
            seed=self.seed,
            save_strategy="epoch" if save else "no",
            save_total_limit=1,
            logging_steps=0.01,  # a hundredth of the training
            disable_tqdm=True,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )


class DistillTrainer(Trainer):
    """A ``transformers.Trainer`` for a task's rows, with the losses of a dense teacher added.

    Args:
        model: the model to train (the student).
        task: what it is trained for.
        rows: encoded training rows.
        arguments: as of any Trainer.
        weights: how much each part of the loss counts.
        teacher: the dense teacher; required where a weight asks for it.
        callbacks: for example :class:`slimkern.training.SlimCallback`.

    Raises:
        ValueError: a weight asks for a teacher or for labels, and there are none; or the teacher
            was made from other rows.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        rows: EncodedRows,
        arguments: TrainingArguments,
        weights: DistillationWeights | None = None,
        teacher: Teacher | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.loss = DistillationLoss(task, weights, teacher)
        self._epochs = _TellEpoch()
        self.weights = self.loss.weights
        if self.weights.task and not rows.labelled:
            raise ValueError(
                f"the task's loss has the weight {self.weights.task}, but none of the "
                f"{len(rows)} rows has a label: give DistillationWeights(task=0)"
            )
        if teacher is not None and not teacher.knows(rows):
            raise ValueError("the teacher was made from other rows than those that are trained on")
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=rows.collate,
            callbacks=[*callbacks, self._epochs],
        )
        self.task = task
        self.rows = rows
        self.teacher = teacher
        # The loss is a mean over the batch: the Trainer divides it by the accumulated batches.
        self.model_accepts_loss_kwargs = False
        self._parts: dict[str, list[float]] = defaultdict(list)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the task's and the teacher's losses on one batch."""
        loss, student = self.loss.with_outputs(model, inputs)
        for name, value in self.loss.parts.items():
            self._parts[name].append(value)
        return (loss, student) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean of each part of the loss since the last time."""
        if "loss" in logs and len(self._parts) > 1:
            means = {n: torch.tensor(np.mean(v)) for n, v in self._parts.items()}
            logs.update({f"loss_{n}": float(v) for n, v in ranks_of().mean(means).items()})
        self._parts.clear()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        size *= self.args.world_size  # its batches are dealt out in turns
        self._epochs.sampler = LengthGroupedSampler(self.rows.lengths(), size, self.args.seed)
        return self._epochs.sampler


class _TellEpoch(TrainerCallback):
    """Tells a sampler which epoch begins.

    The Trainer does so itself, but for the epoch that training is resumed within, where there are
    several processes: accelerate's loader hides the sampler one layer deeper then.
    """

    sampler: LengthGroupedSampler | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set the probability of every dropout module to zero; the model's config is left as it is."""
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.AlphaDropout)):
            module.p = 0.0
    return model


@torch.no_grad()
def predict(
    model: nn.Module,
    task: Task,
    rows: EncodedRows,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.float64]:
    """The model's prediction for every row, ``[rows]``, in evaluation mode (which is restored).

    Args:
        model: a dense, masked or slim model.
        task: what it was trained for.
        rows: the rows, in whose order the predictions come back.
        batch_size: sequences per forward; each distinct one is run once.
        progress: called with (sequences done, sequences in all).

    Raises:
        ValueError: a row has no label: such rows are for training alone.
    """
    rows.require_labels("an evaluation")
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    vectors: list[Tensor] = []
    order: list[int] = []
    try:
        for indices, batch in rows.sequences_by_length(batch_size):
            moved = {name: value.to(device) for name, value in batch.items()}
            vectors.append(task.run(model, moved).vectors.float().cpu())
            order += indices
            if progress is not None:
                progress(len(order), len(rows.sequences))
    finally:
        model.train(training)
    places = torch.tensor(order).argsort()
    of_rows = torch.tensor(rows.rows).T.flatten()  # all first sequences, then all second ones
    predictions = task.predictions(torch.cat(vectors)[places[of_rows]])
    return predictions.to(torch.float64).numpy()

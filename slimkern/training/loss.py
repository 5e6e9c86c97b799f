"""``DistillationLoss``: a task's loss and a dense teacher's, for any training loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimkern.training.distillation import DistillationWeights
from slimkern.training.task import Batch, Outputs, Task
from slimkern.training.tasks import EmbeddingTask
from slimkern.training.teacher import Teacher

ONLY_TASK = DistillationWeights(task=1, hidden=0, embedding=0, similarity=0)


class DistillationLoss:
    """The loss that heals a slim model: its task's own, and what the dense model says.

    ::

        loss_of = DistillationLoss("mean", DistillationWeights(task=0), dense)
        for batch in batches:              # {"input_ids": ..., "attention_mask": ...}
            loss = loss_of(slim, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    A call runs the model that trains, runs the teacher without gradients (or looks its answers up),
    and adds up :meth:`slimkern.training.Task.losses`. Rows need labels only where the task's own
    loss has a weight; ``NO_SCORE`` and ``NO_CLASS`` of :mod:`slimkern.training.rows` mark single
    rows that have none.

    Args:
        task: what is trained for; ``"mean"`` or ``"cls"`` stands for an embedding model of this
            pooling.
        weights: how much each part counts; by default the task's own, or the task's loss alone
            where there is no teacher.
        teacher: the dense model, which is put into evaluation mode and frozen; or a
            :class:`slimkern.training.Teacher`, whose stored answers need the batches of its rows.

    Attributes:
        parts: the weighted parts of the latest call by name, as floats; their sum is the loss.

    Raises:
        ValueError: a weight asks for a teacher and there is none; or the pooling is unknown.
    """

    def __init__(
        self,
        task: Task | str,
        weights: DistillationWeights | None = None,
        teacher: nn.Module | Teacher | None = None,
    ) -> None:
        self.task = EmbeddingTask(pooling=task) if isinstance(task, str) else task
        self.weights = weights or (ONLY_TASK if teacher is None else self.task.default_weights)
        if self.weights.needs_teacher and teacher is None:
            raise ValueError("the distillation weights ask for a teacher, and there is none")
        if isinstance(teacher, nn.Module):
            teacher.eval().requires_grad_(False)
        self.teacher = teacher
        self._parts: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module, batch: Batch, labels: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar with gradients to the model.

        Args:
            model: the model that trains.
            batch: what the model takes by name, as a tokenizer's call gives it, and perhaps
                ``labels``. Without an ``attention_mask`` every position counts as real.
            labels: in place of ``batch["labels"]``. Embedding models: the cosine each row should
                have, ``[B]``, where the batch holds the ``B`` first texts and then the ``B`` second
                ones. Regression: scores ``[B]``. Classification: indices of classes ``[B]``.

        Raises:
            ValueError: labels are missing, or not as many as rows; the teacher is the model itself;
                or the two models' outputs differ in shape.
        """
        loss, _ = self.with_outputs(model, batch, labels)
        return loss

    def with_outputs(
        self, model: nn.Module, batch: Batch, labels: Tensor | None = None
    ) -> tuple[Tensor, Outputs]:
        """As a call; returns the outputs of the model that trains as well."""
        if model is self.teacher:
            raise ValueError("the teacher is the model that trains; give it a copy of its own")
        if labels is None:
            labels = batch.get("labels")
        student = self.task.run(model, batch, hidden_states=self.weights.hidden > 0)
        teacher = self._teacher(batch, student.vectors.device)
        parts = self.task.losses(student, teacher, labels, self.weights)
        self._parts = {name: value.detach() for name, value in parts.items()}
        return torch.stack(list(parts.values())).sum(), student

    @property
    def parts(self) -> dict[str, float]:
        """The weighted parts of the latest call by name."""
        return {name: float(value) for name, value in self._parts.items()}

    @torch.no_grad()
    def _teacher(self, batch: Batch, device: torch.device) -> Outputs | None:
        if self.teacher is None or not self.weights.needs_teacher:
            return None
        if isinstance(self.teacher, Teacher):
            return self.teacher.outputs(batch)
        return self.task.run(self.teacher.to(device), batch, self.weights.hidden > 0)

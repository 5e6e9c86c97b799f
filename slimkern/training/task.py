"""What every task has in common: running a batch, adding up losses, encoding rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimkern.training import data
from slimkern.training.distillation import DistillationWeights, hidden_state_loss, real_tokens
from slimkern.training.evaluation import Statistic
from slimkern.training.rows import EncodedRows, Padding

Batch = dict[str, Tensor]
_OURS = ("labels", "sequences")


@dataclass
class Outputs:
    """What a model says about a batch.

    Attributes:
        vectors: per sequence, ``[B, D]``: the pooled embedding, or the logits of a cross-encoder.
        tokens: hidden states of the real tokens of all layers, ``[T, L, D]``, where asked for.
    """

    vectors: Tensor
    tokens: Tensor | None = None


class Task(ABC):
    """The part of training that depends on what is trained for."""

    name: str
    statistics: tuple[Statistic, ...]
    default_weights: DistillationWeights

    @abstractmethod
    def load_model(self, source: str, trained: bool = False) -> PreTrainedModel:
        """The dense model from a folder or a hub name.

        Args:
            source: folder or hub name.
            trained: refuse a model whose head would be drawn at random.

        Raises:
            OSError: there is no such model, or it can't be read.
            ValueError: ``trained``, and the head is not among the weights.
        """

    @abstractmethod
    def encode(
        self, pairs: Sequence[data.Pair], tokenizer: Any, max_length: int, path: str | Path
    ) -> EncodedRows:
        """Tokenize rows; ``path`` is where they came from, for error messages."""

    @abstractmethod
    def vectors(self, output: Any, batch: Batch) -> Tensor:
        """``[B, D]`` from a model's output."""

    @abstractmethod
    def predictions(self, vectors: Tensor) -> Tensor:
        """One number per row, ``[rows]``, to hold against the gold label."""

    @abstractmethod
    def task_loss(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """The loss on the gold labels."""

    def distillation_losses(
        self, student: Tensor, teacher: Tensor, weights: DistillationWeights
    ) -> dict[str, Tensor]:
        """The unweighted losses of ``vectors`` against the teacher's, by name of their weight."""
        raise NotImplementedError

    def run(self, model: nn.Module, batch: Batch, hidden_states: bool = False) -> Outputs:
        """One forward of a collated batch."""
        inputs = {name: value for name, value in batch.items() if name not in _OURS}
        output = model(**inputs, output_hidden_states=hidden_states, return_dict=True)
        tokens = None
        if hidden_states:
            # The first one is the embedding layer's, which is not slimmed.
            tokens = real_tokens(tuple(output.hidden_states[1:]), batch["attention_mask"])
        return Outputs(self.vectors(output, batch), tokens)

    def losses(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: Tensor,
        weights: DistillationWeights,
    ) -> dict[str, Tensor]:
        """The weighted parts of the loss; their sum is what is trained.

        Raises:
            ValueError: a part needs a teacher and there is none.
        """
        parts: dict[str, Tensor] = {}
        if weights.task:
            parts["task"] = self.task_loss(student.vectors, labels)
        if teacher is None:
            if weights.needs_teacher:
                raise ValueError("the distillation weights ask for a teacher, and there is none")
        else:
            if weights.hidden:
                if student.tokens is None or teacher.tokens is None:
                    raise ValueError("hidden-state distillation needs hidden states of both models")
                parts["hidden"] = hidden_state_loss(student.tokens, teacher.tokens)
            parts.update(self.distillation_losses(student.vectors, teacher.vectors, weights))
        return {name: getattr(weights, name) * value for name, value in parts.items()}

    def gold(self, rows: EncodedRows) -> npt.NDArray[np.float64]:
        """The labels that predictions are held against."""
        return np.asarray(rows.labels, dtype=np.float64)


def tokenize(
    tokenizer: Any, first: list[str], second: list[str] | None, max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids (and types, where the tokenizer has them) of texts or pairs of texts."""
    encoded = tokenizer(first, second, truncation=True, max_length=max_length)
    names = [n for n in ("input_ids", "token_type_ids") if n in encoded]
    return [dict(zip(names, row)) for row in zip(*(encoded[n] for n in names))]


def encode_jointly(
    tokenizer: Any,
    pairs: Sequence[data.Pair],
    labels: Sequence[float] | Sequence[int],
    max_length: int,
) -> EncodedRows:
    """Both sentences of a row as one sequence, as cross-encoders read them."""
    single = all(pair.second is None for pair in pairs)
    seconds = None if single else [str(pair.second) for pair in pairs]
    encoded = tokenize(tokenizer, [pair.first for pair in pairs], seconds, max_length)
    return EncodedRows([(row,) for row in encoded], labels, Padding.of(tokenizer))

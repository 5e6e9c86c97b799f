"""What every task has in common: running a batch, adding up losses, encoding rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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
from slimkern.training.rows import NO_SCORE, EncodedRows, Padding

Batch = Mapping[str, Tensor]
Texts = Sequence[str] | Sequence[tuple[str, str | None]]
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
    no_label: float | int = NO_SCORE

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

    def encode_texts(self, texts: Texts, tokenizer: Any, max_length: int) -> EncodedRows:
        """Tokenize texts that have no labels, as rows to add to the training rows.

        ``rows + task.encode_texts(...)`` trains on both: every row counts in the teacher's losses,
        labelled rows alone in the task's.

        Args:
            texts: single texts, or pairs of texts, as the model will read them; ``(text, None)`` is
                a single one.
            tokenizer: the model's.
            max_length: tokens per sequence.

        Raises:
            ValueError: there are no texts, or one is empty or no text; the message names its place.
        """
        labels = [self.no_label] * len(texts)
        return encode_jointly(tokenizer, checked_texts(texts), labels, max_length)

    @abstractmethod
    def vectors(self, output: Any, batch: Batch) -> Tensor:
        """``[B, D]`` from a model's output."""

    @abstractmethod
    def predictions(self, vectors: Tensor) -> Tensor:
        """One number per row, ``[rows]``, to hold against the gold label."""

    @abstractmethod
    def task_loss(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """The loss on the gold labels: a mean over the rows that have one, 0 where none has."""

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
            tokens = real_tokens(tuple(output.hidden_states[1:]), batch.get("attention_mask"))
        return Outputs(self.vectors(output, batch), tokens)

    def losses(
        self,
        student: Outputs,
        teacher: Outputs | None,
        labels: Tensor | None,
        weights: DistillationWeights,
    ) -> dict[str, Tensor]:
        """The weighted parts of the loss; their sum is what is trained.

        Raises:
            ValueError: a part needs a teacher or labels, and there are none.
        """
        parts: dict[str, Tensor] = {}
        if weights.task:
            if labels is None:
                raise ValueError(
                    f"the task's loss has the weight {weights.task}, but there are no labels: give "
                    f"them, or DistillationWeights(task=0)"
                )
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
        """The labels that predictions are held against.

        Raises:
            ValueError: a row has no label.
        """
        rows.require_labels("an evaluation")
        return np.asarray(rows.labels, dtype=np.float64)


def tokenize(
    tokenizer: Any, first: list[str], second: list[str] | None, max_length: int
) -> list[dict[str, list[int]]]:
    """Token ids (and types, where the tokenizer has them) of texts or pairs of texts."""
    encoded = tokenizer(first, second, truncation=True, max_length=max_length)
    names = [n for n in ("input_ids", "token_type_ids") if n in encoded]
    return [dict(zip(names, row)) for row in zip(*(encoded[n] for n in names))]


def checked_texts(texts: Texts) -> list[data.Pair]:
    """Texts without labels as rows of a file without labels.

    Raises:
        ValueError: as :meth:`Task.encode_texts`.
    """
    if isinstance(texts, str) or not texts:
        raise ValueError(f"texts is {texts!r}; accepted: a sequence of texts or of pairs of texts")
    pairs: list[data.Pair] = []
    for place, text in enumerate(texts):
        parts = tuple(text) if isinstance(text, (tuple, list)) else (text,)
        parts = parts[:1] if parts[1:] == (None,) else parts
        if not all(isinstance(part, str) and part.strip() for part in parts):
            raise ValueError(f"texts[{place}] is {text!r}; accepted: text that is not empty")
        if len(parts) > 2 or (pairs and (len(parts) == 1) != (pairs[0].second is None)):
            raise ValueError(f"texts[{place}] is {text!r}; accepted: all texts, or all pairs")
        pairs.append(data.Pair(parts[0], parts[1] if len(parts) == 2 else None, "", place + 1))
    return pairs


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

"""The three tasks: sentence embeddings, scores of pairs, classes of pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from slimkern.training import data
from slimkern.training.distillation import (
    DistillationWeights,
    class_loss,
    embedding_loss,
    labelled_cross_entropy,
    labelled_mse,
    mean_pool,
    score_loss,
    similarity_loss,
)
from slimkern.training.rows import NO_CLASS, EncodedRows, Padding
from slimkern.training.task import Batch, Task, Texts, checked_texts, encode_jointly, tokenize

POOLINGS = ("mean", "cls")


class EmbeddingTask(Task):
    """Sentence embeddings (a bi-encoder): cosine of two pooled vectors against ``gold / scale``.

    Args:
        scale: the score of two sentences that mean the same (5 for STS-B).
        pooling: ``mean`` over real tokens, or ``cls``: the first token's vector.
    """

    name = "embeddings"
    statistics = ("pearson", "spearman")
    default_weights = DistillationWeights()

    def __init__(self, scale: float = 1.0, pooling: str = "mean") -> None:
        if not scale > 0:
            raise ValueError(f"scale is {scale}; accepted: a positive number")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}; accepted: {', '.join(POOLINGS)}")
        self.scale = float(scale)
        self.pooling = pooling

    def load_model(self, source: str, trained: bool = False) -> PreTrainedModel:
        """As :meth:`Task.load_model`; an embedding model has no head."""
        return AutoModel.from_pretrained(source)

    def encode(
        self, pairs: Sequence[data.Pair], tokenizer: Any, max_length: int, path: str | Path
    ) -> EncodedRows:
        """As :meth:`Task.encode`."""
        if any(pair.second is None for pair in pairs):
            raise data.DataError(f"{path}: embeddings need two sentences a row; name --sentence2")
        labels = [value / self.scale for value in data.numeric_labels(pairs, path)]
        firsts = tokenize(tokenizer, [p.first for p in pairs], None, max_length)
        seconds = tokenize(tokenizer, [str(p.second) for p in pairs], None, max_length)
        return EncodedRows(list(zip(firsts, seconds)), labels, Padding.of(tokenizer))

    def encode_texts(self, texts: Texts, tokenizer: Any, max_length: int) -> EncodedRows:
        """As :meth:`Task.encode_texts`.

        A row has two sequences. Distinct single texts are put two and two in the order of their
        lengths, so that padding is rare; of an odd number the last one goes with the first. No loss
        looks at which two share a row, unless ``score`` has a weight.
        """
        pairs = checked_texts(texts)
        if pairs[0].second is None:
            distinct = list(dict.fromkeys(pair.first for pair in pairs))
            encoded = tokenize(tokenizer, distinct, None, max_length)
            encoded.sort(key=lambda sequence: len(sequence["input_ids"]))
            if len(encoded) % 2:
                encoded.append(encoded[0])
            firsts, seconds = encoded[::2], encoded[1::2]
        else:
            firsts = tokenize(tokenizer, [p.first for p in pairs], None, max_length)
            seconds = tokenize(tokenizer, [str(p.second) for p in pairs], None, max_length)
        labels = [self.no_label] * len(firsts)
        return EncodedRows(list(zip(firsts, seconds)), labels, Padding.of(tokenizer))

    def vectors(self, output: Any, batch: Batch) -> Tensor:
        """As :meth:`Task.vectors`."""
        hidden: Tensor = output.last_hidden_state
        mask = batch.get("attention_mask")
        if self.pooling == "mean":
            return mean_pool(hidden, mask)
        if mask is None:
            return hidden[:, 0]
        first = mask.argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), first]

    def predictions(self, vectors: Tensor) -> Tensor:
        """As :meth:`Task.predictions`.

        Raises:
            ValueError: the number of vectors is odd.
        """
        if len(vectors) % 2:
            raise ValueError(f"{len(vectors)} sequences are no rows of two: firsts, then seconds")
        first, second = vectors.chunk(2)
        return F.cosine_similarity(first, second)

    def task_loss(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`Task.task_loss`."""
        return labelled_mse(self.predictions(vectors), labels)

    def distillation_losses(
        self, student: Tensor, teacher: Tensor, weights: DistillationWeights
    ) -> dict[str, Tensor]:
        """As :meth:`Task.distillation_losses`."""
        parts = {}
        if weights.embedding:
            parts["embedding"] = embedding_loss(student, teacher)
        if weights.similarity:
            parts["similarity"] = similarity_loss(student, teacher)
        if weights.score:
            parts["score"] = score_loss(self.predictions(student), self.predictions(teacher))
        return parts


class RegressionTask(Task):
    """A score of a sentence or a pair (a cross-encoder with one logit), mean squared error.

    Args:
        mean: where a fresh head starts: the mean of the training scores, so that the first epoch is
            not spent on finding it.
    """

    name = "regression"
    statistics = ("pearson", "spearman")
    default_weights = DistillationWeights(
        task=0.0, hidden=2.0, embedding=0.0, similarity=0.0, score=1.0
    )

    def __init__(self, mean: float = 0.0) -> None:
        self.mean = float(mean)

    def load_model(self, source: str, trained: bool = False) -> PreTrainedModel:
        """As :meth:`Task.load_model`."""
        model, fresh = _load_with_head(source, trained, num_labels=1, problem_type="regression")
        for name, parameter in model.named_parameters():
            if name in fresh and name.endswith("bias") and parameter.shape == (1,):
                nn.init.constant_(parameter, self.mean)
        return model

    def encode(
        self, pairs: Sequence[data.Pair], tokenizer: Any, max_length: int, path: str | Path
    ) -> EncodedRows:
        """As :meth:`Task.encode`."""
        return encode_jointly(tokenizer, pairs, data.numeric_labels(pairs, path), max_length)

    def vectors(self, output: Any, batch: Batch) -> Tensor:
        """As :meth:`Task.vectors`."""
        return output.logits

    def predictions(self, vectors: Tensor) -> Tensor:
        """As :meth:`Task.predictions`."""
        return vectors.squeeze(-1)

    def task_loss(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`Task.task_loss`."""
        return labelled_mse(self.predictions(vectors), labels)

    def distillation_losses(
        self, student: Tensor, teacher: Tensor, weights: DistillationWeights
    ) -> dict[str, Tensor]:
        """As :meth:`Task.distillation_losses`."""
        if not weights.score:
            return {}
        return {"score": score_loss(self.predictions(student), self.predictions(teacher))}


class ClassificationTask(Task):
    """Classes of a sentence or a pair (a cross-encoder), cross-entropy.

    Args:
        names: the labels as the files spell them; their order is the order of the logits.
    """

    name = "classification"
    statistics = ("accuracy",)
    no_label = NO_CLASS
    default_weights = DistillationWeights(
        task=1.0, hidden=2.0, embedding=0.0, similarity=0.0, score=1.0
    )

    def __init__(self, names: Sequence[str]) -> None:
        if len(names) < 2:
            raise ValueError(f"classification needs at least 2 labels, got {list(names)}")
        self.names = tuple(names)

    def load_model(self, source: str, trained: bool = False) -> PreTrainedModel:
        """As :meth:`Task.load_model`."""
        labels = dict(enumerate(self.names))
        return _load_with_head(
            source,
            trained,
            num_labels=len(self.names),
            id2label=labels,
            label2id={name: i for i, name in labels.items()},
            problem_type="single_label_classification",
        )[0]

    def encode(
        self, pairs: Sequence[data.Pair], tokenizer: Any, max_length: int, path: str | Path
    ) -> EncodedRows:
        """As :meth:`Task.encode`."""
        labels = data.class_labels(pairs, self.names, path)
        return encode_jointly(tokenizer, pairs, labels, max_length)

    def vectors(self, output: Any, batch: Batch) -> Tensor:
        """As :meth:`Task.vectors`."""
        return output.logits

    def predictions(self, vectors: Tensor) -> Tensor:
        """As :meth:`Task.predictions`."""
        return vectors.argmax(dim=-1)

    def task_loss(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`Task.task_loss`."""
        return labelled_cross_entropy(vectors, labels)

    def distillation_losses(
        self, student: Tensor, teacher: Tensor, weights: DistillationWeights
    ) -> dict[str, Tensor]:
        """As :meth:`Task.distillation_losses`."""
        return {"score": class_loss(student, teacher)} if weights.score else {}


def _load_with_head(source: str, trained: bool, **config: Any) -> tuple[PreTrainedModel, set[str]]:
    """A model with a classification head, and the names of the weights drawn at random."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        source, output_loading_info=True, **config
    )
    fresh = set(info["missing_keys"])
    if trained and fresh:
        names = ", ".join(sorted(fresh))
        raise ValueError(f"it has no trained head ({names} would be random): fine-tune it first")
    return model, fresh


def read_pooling(source: str) -> str:
    """``mean`` or ``cls``, as a sentence-transformers folder says; ``mean`` where it is silent.

    Raises:
        ValueError: the folder asks for a pooling that is neither.
    """
    path = Path(source) / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    config = json.loads(path.read_text(encoding="utf-8"))
    asked = sorted(k for k, v in config.items() if k.startswith("pooling_mode_") and v is True)
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(asked) != 1 or asked[0] not in known:
        raise ValueError(f"{path} asks for {asked or 'no pooling'}; accepted: {', '.join(known)}")
    return known[asked[0]]

"""Distillation losses: what the slim model should keep of its dense teacher.

Pure functions of tensors. ``B`` sequences, ``T`` real (not padding) tokens of all of them together,
``L`` layers, ``D`` the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DistillationWeights:
    """How much each part of the loss counts; 0 leaves a part out, and its computation with it.

    Attributes:
        task: the task's own loss on the gold labels.
        hidden: :func:`hidden_state_loss`, over all layers.
        embedding: :func:`embedding_loss` (embedding models).
        similarity: :func:`similarity_loss` (embedding models).
        score: :func:`score_loss` (regression) or :func:`class_loss` (classification).
    """

    task: float = 1.0
    hidden: float = 3.0
    embedding: float = 1.0
    similarity: float = 10.0
    score: float = 0.0

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if not isfinite(value) or value < 0:
                raise ValueError(f"distillation weight {name} is {value}; accepted: at least 0")
        if not any(values.values()):
            raise ValueError("all distillation weights are 0: there is nothing to train for")

    @property
    def needs_teacher(self) -> bool:
        """Whether any part looks at the teacher."""
        return any((self.hidden, self.embedding, self.similarity, self.score))


def labelled_mse(predictions: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error over the rows that have a label: ``[B]``, NaN where there is none.

    0, with gradients of 0, where no row of the batch has one.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(predictions, labels, "predictions and labels")
    labelled = ~labels.isnan()
    # NaN is replaced before it meets a gradient: 0 * NaN would be NaN.
    errors = (predictions - labels.masked_fill(~labelled, 0).to(predictions.dtype)) * labelled
    return errors.square().sum() / labelled.sum().clamp_min(1)


def labelled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of ``[B, classes]`` over the rows that have a label: -100 marks others.

    0, with gradients of 0, where no row of the batch has one.
    """
    total = F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
    return total / (labels != -100).sum().clamp_min(1)


def hidden_state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the hidden states of real tokens, ``mean((S - T)²)``.

    The hidden states of every layer enter (as in TinyBERT, Jiao et al. 2020, arXiv:1909.10351); the
    hidden size does not change with slimming, so no projection is needed.

    Args:
        student, teacher: ``[T, L, D]``; the teacher's may be of a narrower dtype.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(student, teacher)
    return F.mse_loss(student, teacher.to(student.dtype))


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean cosine distance of pooled embeddings, ``mean(1 - cos(s_i, t_i))``, of ``[B, D]`` each.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(student, teacher)
    return (1 - F.cosine_similarity(student, teacher.to(student.dtype))).mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the batch's cosine-similarity matrices, of ``[B, D]`` each.

    ``mean((Ŝ Ŝᵀ - T̂ T̂ᵀ)²)`` with rows of unit length (similarity-preserving distillation, Tung
    and Mori 2019, arXiv:1907.09682): what an embedding model is used for is which texts are close.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(student, teacher)
    s, t = F.normalize(student), F.normalize(teacher.to(student.dtype))
    return F.mse_loss(s @ s.T, t @ t.T)


def score_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of regression scores ``[B]``.

    The softmax of a single logit is always 1, so that a KL divergence of it is always zero: a score
    needs this loss instead.

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(student, teacher)
    return F.mse_loss(student, teacher.to(student.dtype))


def class_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """``τ² KL(softmax(t / τ) ‖ softmax(s / τ))``, mean over the batch, of logits ``[B, classes]``.

    Hinton et al. 2015, arXiv:1503.02531; the factor ``τ²`` keeps the gradient's size independent of
    the temperature.

    Raises:
        ValueError: the shapes differ, or there is one logit only, where this loss is always zero.
    """
    _same_shape(student, teacher)
    if student.shape[-1] < 2:
        raise ValueError(
            "class_loss of a single logit is always zero; use score_loss for regression"
        )
    log_s = F.log_softmax(student / temperature, dim=-1)
    log_t = F.log_softmax(teacher.to(student.dtype) / temperature, dim=-1)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


def mean_pool(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over real tokens: ``[B, S, D]`` and ``[B, S]`` (1 real, 0 padding) to ``[B, D]``.

    Without a mask every token is real.
    """
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def real_tokens(hidden_states: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """Hidden states of the real tokens of all layers: ``L`` of ``[B, S, D]`` to ``[T, L, D]``.

    Tokens come sequence by sequence, in order. Without a mask every token is real.
    """
    # Stacked first: one gather, and backward one scatter, of rows of L * D instead of L of D.
    tokens = torch.stack(hidden_states, dim=2).flatten(0, 1)
    if attention_mask is None:
        return tokens
    return tokens.index_select(0, attention_mask.reshape(-1).nonzero().squeeze(1))


def _same_shape(first: Tensor, second: Tensor, what: str = "student and teacher") -> None:
    if first.shape != second.shape:
        raise ValueError(f"{what} differ in shape: {tuple(first.shape)}, {tuple(second.shape)}")

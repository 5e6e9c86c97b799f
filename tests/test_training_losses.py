"""Distillation losses against their equations, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from slimkern.training.distillation import (
    DistillationWeights,
    class_loss,
    embedding_loss,
    hidden_state_loss,
    mean_pool,
    real_tokens,
    score_loss,
    similarity_loss,
)


@pytest.fixture
def pair():
    random = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=random, dtype=torch.float64)  # noqa: E731
    return draw


def test_losses_of_equal_tensors_are_zero(pair):
    x = pair(5, 3)
    for loss in (hidden_state_loss, embedding_loss, similarity_loss, score_loss, class_loss):
        assert abs(float(loss(x, x.clone()))) < 1e-12


def test_equations(pair):
    s, t = pair(4, 3), pair(4, 3)
    assert torch.allclose(hidden_state_loss(s, t), ((s - t) ** 2).mean())
    cosine = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(s, t)]
    assert float(embedding_loss(s, t)) == pytest.approx(1 - sum(cosine) / 4, abs=1e-12)
    unit = lambda x: x / x.norm(dim=1, keepdim=True)  # noqa: E731
    expected = ((unit(s) @ unit(s).T - unit(t) @ unit(t).T) ** 2).mean()
    assert torch.allclose(similarity_loss(s, t), expected)
    p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
    expected = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    assert torch.allclose(class_loss(s, t), expected)


def test_kl_over_one_logit_is_refused(pair):
    with pytest.raises(ValueError, match="use score_loss"):
        class_loss(pair(4, 1), pair(4, 1))


@pytest.mark.parametrize(
    "loss", [hidden_state_loss, embedding_loss, similarity_loss, score_loss, class_loss]
)
def test_shapes_must_agree(pair, loss):
    with pytest.raises(ValueError, match="differ in shape"):
        loss(pair(4, 3), pair(1, 3))


def test_padding_never_enters(pair):
    hidden, mask = pair(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    poisoned = hidden.masked_fill(mask[..., None] == 0, 1e6)
    assert torch.allclose(mean_pool(poisoned, mask)[0], hidden[0, :2].mean(0))
    tokens = real_tokens((poisoned, poisoned + 1), mask)
    assert tokens.shape == (6, 2, 3)
    assert torch.equal(tokens[:, 0], torch.cat([hidden[0, :2], hidden[1]]))


def test_weights_are_checked():
    assert not DistillationWeights(1, 0, 0, 0, 0).needs_teacher
    with pytest.raises(ValueError, match="hidden is -1"):
        DistillationWeights(hidden=-1)
    with pytest.raises(ValueError, match="task is nan"):
        DistillationWeights(task=math.nan)
    with pytest.raises(ValueError, match="nothing to train"):
        DistillationWeights(0, 0, 0, 0, 0)

"""DistillationLoss in a loop of one's own, with plain batches of a tokenizer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_training import setting_of, write_model
from transformers import AutoTokenizer

from slimkern.training import (
    ClassificationTask,
    DistillationLoss,
    DistillationWeights,
    EmbeddingTask,
    RegressionTask,
    Teacher,
)
from slimkern.training.distillation import hidden_state_loss, real_tokens

FIRST = ["a cat sleeps", "the dog", "a red bird sings"]
SECOND = ["fish", "a dog eats", "a blue bird"]
NO_LABELS = DistillationWeights(task=0)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return setting_of(tmp_path_factory)


@pytest.fixture(scope="module")
def batch(setting):
    return AutoTokenizer.from_pretrained(setting[0])(
        FIRST + SECOND, padding=True, return_tensors="pt"
    )


def models(setting, task=None, seed=1):
    """A student that differs from its teacher, both without dropout."""
    load = (task or setting[1]).load_model
    student, dense = load(str(setting[0])).eval(), load(str(setting[0])).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return student, dense


def test_the_sum_of_its_parts(setting, batch):
    student, dense = (model.double() for model in models(setting))
    labels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    loss_of = DistillationLoss("mean", DistillationWeights(0.5, 3, 1, 10, 0), dense)
    loss = loss_of(student, batch, labels)
    mask = batch["attention_mask"]
    with torch.no_grad():
        s, t = (m(**batch, output_hidden_states=True).hidden_states[1:] for m in (student, dense))
        a, b = (
            torch.stack([h[:n].mean(0) for h, n in zip(last[-1], mask.sum(1))]) for last in (s, t)
        )
        ours, theirs = F.normalize(a) @ F.normalize(a).T, F.normalize(b) @ F.normalize(b).T
        expected = {
            "task": 0.5 * ((F.cosine_similarity(a[:3], a[3:]) - labels) ** 2).mean(),
            "hidden": 3 * hidden_state_loss(real_tokens(s, mask), real_tokens(t, mask)),
            "embedding": (1 - F.cosine_similarity(a, b)).mean(),
            "similarity": 10 * ((ours - theirs) ** 2).mean(),
        }
    assert loss_of.parts == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-9)
    assert loss.item() == pytest.approx(sum(loss_of.parts.values()), rel=1e-9)
    assert not any(p.requires_grad for p in dense.parameters())
    assert not dense.training


def test_a_loop_of_ones_own_without_labels(setting, batch):
    student, dense = models(setting)
    loss_of = DistillationLoss("mean", NO_LABELS, dense)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = loss_of(student, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert set(loss_of.parts) == {"hidden", "embedding", "similarity"}


def test_single_texts_need_no_rows_of_two(setting, batch):
    student, dense = models(setting)
    odd = {name: value[:5] for name, value in batch.items()}
    assert DistillationLoss("cls", NO_LABELS, dense)(student, odd).isfinite()
    with_task = DistillationLoss("cls", DistillationWeights(), dense)
    with pytest.raises(ValueError, match="5 sequences are no rows of two"):
        with_task(student, odd, torch.zeros(5))


def test_a_teacher_with_stored_answers_says_the_same(setting):
    _, task, rows = setting
    student, dense = models(setting)
    batch = rows.collate([rows[i] for i in range(8)])
    weights = DistillationWeights(task=0.5)
    nothing_kept = DistillationLoss(task, weights, Teacher(dense, task, rows, memory=0))
    live = DistillationLoss(task, weights, dense)
    assert nothing_kept(student, batch).item() == live(student, batch).item()
    teacher = Teacher(dense, task, rows)
    stored = DistillationLoss(task, weights, teacher)
    _, outputs = stored.with_outputs(student, batch)
    expected = weights.hidden * hidden_state_loss(outputs.tokens, teacher.outputs(batch).tokens)
    assert stored.parts["hidden"] == expected.item()
    assert stored.parts["task"] == live.parts["task"]
    plain = {name: value for name, value in batch.items() if name != "sequences"}
    with pytest.raises(ValueError, match="give the dense model itself"):
        stored(student, plain)


def test_without_a_mask_every_position_is_real(setting, batch):
    student, dense = (model.double() for model in models(setting))
    ids = batch["input_ids"][:, :3]
    full = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for pooling in ("mean", "cls"):
        loss_of = DistillationLoss(pooling, NO_LABELS, dense)
        loss_of(student, full)
        with_mask = loss_of.parts
        loss_of(student, {"input_ids": ids})
        assert loss_of.parts == pytest.approx(with_mask, rel=1e-9)


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        (RegressionTask(), torch.tensor([1.0, float("nan"), 3.0])),
        (ClassificationTask(["far", "near"]), torch.tensor([1, -100, 0])),
    ],
)
def test_cross_encoders(tmp_path, task, labels):
    folder = write_model(tmp_path, head=len(getattr(task, "names", "x")))
    student, dense = models((folder, task))
    batch = AutoTokenizer.from_pretrained(folder)(FIRST, SECOND, padding=True, return_tensors="pt")
    loss_of = DistillationLoss(task, DistillationWeights(1, 2, 0, 0, 1), dense)
    loss = loss_of(student, {**batch, "labels": labels})
    assert set(loss_of.parts) == {"task", "hidden", "score"}
    loss.backward()
    assert all(v > 0 for v in loss_of.parts.values())
    logits = student(**batch).logits[[0, 2]]
    kept = labels[[0, 2]]
    if isinstance(task, RegressionTask):
        expected = F.mse_loss(logits[:, 0], kept)
    else:
        expected = F.cross_entropy(logits, kept)
    # Both are means of two squares or logarithms, rounded a few times on the way.
    assert loss_of.parts["task"] == pytest.approx(expected.item(), rel=16 * 2**-23)


def test_what_is_missing_is_named(setting, batch):
    student, dense = models(setting)
    with pytest.raises(ValueError, match=r"weight 1\.0, but there are no labels"):
        DistillationLoss("mean", None, dense)(student, batch)
    with pytest.raises(ValueError, match="there is none"):
        DistillationLoss("mean", DistillationWeights())
    with pytest.raises(ValueError, match="pooling is 'max'"):
        DistillationLoss("max", NO_LABELS, dense)
    with pytest.raises(ValueError, match="is the model that trains"):
        DistillationLoss("mean", NO_LABELS, dense)(dense, batch)
    with pytest.raises(ValueError, match="predictions and labels differ in shape"):
        DistillationLoss("mean")(student, batch, torch.zeros(6))
    assert set(DistillationLoss(EmbeddingTask()).weights.__dict__) >= {"task"}
    assert not DistillationLoss("mean").weights.needs_teacher

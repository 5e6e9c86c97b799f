"""Rows without labels: joined to labelled ones, counted by the teacher's losses alone."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import setting_of, write_model
from transformers import AutoTokenizer

from slimkern.training import (
    ClassificationTask,
    DistillationWeights,
    DistillTrainer,
    EmbeddingTask,
    HealingSettings,
    RegressionTask,
    Teacher,
    predict,
)
from slimkern.training.data import Pair
from slimkern.training.distillation import labelled_cross_entropy, labelled_mse
from slimkern.training.rows import NO_CLASS, NO_SCORE

TEXTS = ["a cat sleeps", "the dog", "a red bird sings", "fish", "a cat sleeps"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return setting_of(tmp_path_factory)


@pytest.fixture(scope="module")
def tokenizer(setting):
    return AutoTokenizer.from_pretrained(setting[0])


def test_losses_count_labelled_rows_only():
    values = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)
    loss = labelled_mse(values, torch.tensor([0.0, math.nan, 2.0]))
    loss.backward()
    assert loss == (1 + 9) / 2
    assert values.grad.tolist() == [1, 0, 3]
    none = labelled_mse(values, torch.full((3,), math.nan))
    none.backward()
    assert none == 0
    assert values.grad.tolist() == [1, 0, 3]
    with pytest.raises(ValueError, match=r"predictions and labels differ in shape: \(3,\), \(1,\)"):
        labelled_mse(values, torch.ones(1))

    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [3.0, 3.0]], requires_grad=True)
    loss = labelled_cross_entropy(logits, torch.tensor([1, NO_CLASS, 0]))
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], torch.tensor([1, 0]))
    assert torch.allclose(loss, expected)
    none = labelled_cross_entropy(logits, torch.full((3,), NO_CLASS))
    none.backward()
    assert none == 0
    assert logits.grad.eq(0).all()


def test_embedding_texts_become_rows_of_two(setting, tokenizer):
    task = setting[1]
    rows = task.encode_texts(TEXTS, tokenizer, 16)
    assert len(rows.sequences) == 4  # one is there twice
    lengths = [[len(rows.sequences[i]["input_ids"]) for i in row] for row in rows.rows]
    assert lengths == [[3, 4], [5, 6]]
    assert rows.labelled == 0
    odd = task.encode_texts(TEXTS[:3], tokenizer, 16)
    assert odd.rows == [(0, 1), (2, 0)]
    pairs = task.encode_texts([("fish", "the dog"), ("fish", "a cat")], tokenizer, 16)
    assert pairs.rows == [(0, 1), (0, 2)]
    again = task.encode_texts([("the dog", None)], tokenizer, 16)
    assert again.rows == [(0, 0)]


def test_rows_are_joined_and_sequences_kept_once(tokenizer):
    task = EmbeddingTask(5.0)
    rows = task.encode([Pair("a cat", "the dog", 4.0, 1)], tokenizer, 16, "f")
    both = rows + task.encode_texts(["the dog", "fish"], tokenizer, 16)
    assert (len(both), both.labelled, len(both.sequences)) == (2, 1, 3)
    assert both.sequences[:2] == rows.sequences
    batch = both.collate([both[0], both[1]])
    assert batch["labels"].isnan().tolist() == [False, True]
    assert batch["labels"].dtype == torch.float32
    assert batch["sequences"].tolist() == [0, 2, 1, 1]  # both firsts, then both seconds
    loss = task.task_loss(torch.randn(4, 3), batch["labels"])
    assert loss.isfinite()


def test_rows_that_do_not_fit_are_refused(setting, tokenizer):
    _, task, rows = setting
    alone = RegressionTask().encode_texts(["fish"], tokenizer, 16)
    with pytest.raises(ValueError, match="sequences per row is 2 and 1"):
        _ = rows + alone
    with pytest.raises(ValueError, match="type of label is float and int"):
        _ = alone + ClassificationTask(["a", "b"]).encode_texts(["fish"], tokenizer, 16)
    with pytest.raises(TypeError, match="joined with a list"):
        rows.__add__([1])
    other = task.encode_texts(["fish"], tokenizer, 16)
    other.padding.values["input_ids"] = 7
    with pytest.raises(ValueError, match="padding is"):
        _ = rows + other


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"texts is \[\]"),
        ("fish", "texts is 'fish'"),
        (["fish", " "], r"texts\[1\] is ' '; accepted: text that is not empty"),
        (["fish", None], r"texts\[1\] is None"),
        (["fish", ("a", "b")], "accepted: all texts, or all pairs"),
        ([("a", "b"), ("a",)], "accepted: all texts, or all pairs"),
        ([("a", "b", "c")], "accepted: all texts, or all pairs"),
    ],
)
def test_bad_texts_are_named(setting, tokenizer, texts, message):
    for task in (setting[1], RegressionTask()):
        with pytest.raises(ValueError, match=message):
            task.encode_texts(texts, tokenizer, 16)


def test_evaluation_refuses_rows_without_labels(setting, tokenizer):
    source, task, rows = setting
    both = rows + task.encode_texts(TEXTS, tokenizer, 16)
    with pytest.raises(ValueError, match="2 of 50 rows have no label; an evaluation needs all"):
        task.gold(both)
    with pytest.raises(ValueError, match="2 of 50 rows"):
        predict(task.load_model(str(source)), task, both)
    assert len(task.gold(rows)) == 48


def test_training_on_both(setting, tokenizer, tmp_path):
    source, task, rows = setting
    more = [" ".join(text.split()[::-1]) for text in TEXTS]
    both = rows + task.encode_texts(more, tokenizer, 16)
    settings = HealingSettings(1, 1e-3, batch_size=8)
    model = settings.prepare(task.load_model(str(source)))
    teacher = Teacher(task.load_model(str(source)), task, both)
    arguments = settings.arguments(tmp_path, save=False)
    run = DistillTrainer(model, task, both, arguments, settings.weights(task), teacher)
    run.train()
    assert run.state.max_steps == 7
    assert all(math.isfinite(e["loss"]) for e in run.state.log_history if "loss" in e)
    assert all(p.isfinite().all() for p in model.parameters())
    other = Teacher(teacher.model, task, rows)
    with pytest.raises(ValueError, match="made from other rows"):
        DistillTrainer(model, task, both, arguments, settings.weights(task), other)


def test_training_without_labels_has_no_task_loss(setting, tokenizer, tmp_path):
    source, task, _ = setting
    rows = task.encode_texts(TEXTS, tokenizer, 16)
    settings = HealingSettings(1, 1e-3, batch_size=2)
    arguments = settings.arguments(tmp_path, save=False)
    model = settings.prepare(task.load_model(str(source)))
    teacher = Teacher(task.load_model(str(source)), task, rows)
    with pytest.raises(ValueError, match="none of the 2 rows has a label"):
        DistillTrainer(model, task, rows, arguments, None, teacher)
    run = DistillTrainer(model, task, rows, arguments, DistillationWeights(task=0), teacher)
    run.train()
    assert run.state.global_step == 1


@pytest.mark.parametrize("task", [RegressionTask(), ClassificationTask(["far", "near"])])
def test_cross_encoders_read_texts_as_they_are(task, tmp_path):
    folder = write_model(tmp_path, head=len(getattr(task, "names", "x")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [("a cat", "the dog"), ("fish", "a bird")]
    rows = task.encode_texts(texts, tokenizer, 16)
    assert [len(row) for row in rows.rows] == [1, 1]
    known = [Pair("a cat", "sings", "1" if isinstance(task, RegressionTask) else "near", 1)]
    both = task.encode(known, tokenizer, 16, "f") + rows
    assert both.labelled == 1
    absent = task.no_label
    assert (both.labels[1] == NO_CLASS) if isinstance(absent, int) else math.isnan(both.labels[1])
    assert math.isnan(NO_SCORE)
    batch = both.collate([both[i] for i in range(3)])
    model = task.load_model(str(folder))
    teacher = Teacher(task.load_model(str(folder)), task, both)
    weights = DistillationWeights(task=1, hidden=1, embedding=0, similarity=0, score=1)
    parts = task.losses(
        task.run(model.eval(), batch, True), teacher.outputs(batch), batch["labels"], weights
    )
    alone = task.task_loss(task.run(model, batch).vectors[:1], batch["labels"][:1])
    assert torch.allclose(parts["task"], alone)

"""Rows, batches, sampler, tasks, teacher cache and state files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_training import write_model, write_pairs
from transformers import AutoTokenizer

from slimkern.training import ClassificationTask, EmbeddingTask, RegressionTask, Teacher, predict
from slimkern.training.data import DataError, Pair, read_pairs
from slimkern.training.rows import LengthGroupedSampler
from slimkern.training.state_files import read_state, write_state
from slimkern.training.tasks import read_pooling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return read_pairs(write_pairs(tmp_path_factory.mktemp("data") / "train.csv"))


def test_sampler_is_a_function_of_seed_and_epoch():
    lengths = [i % 13 + 1 for i in range(101)]
    one, other = (LengthGroupedSampler(lengths, 8, seed=3, batches_per_group=4) for _ in range(2))
    other.set_epoch(0)
    assert list(one) == list(other)
    assert sorted(one) == list(range(101))
    other.set_epoch(1)
    assert list(one) != list(other)
    assert list(LengthGroupedSampler(lengths, 8, seed=4, batches_per_group=4)) != list(one)


def test_sampler_groups_lengths():
    lengths = torch.randint(1, 100, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthGroupedSampler(lengths, 16))
    padded = sum(16 * max(lengths[i] for i in order[n : n + 16]) for n in range(0, 640, 16))
    assert padded < 1.15 * sum(lengths)  # at random it is about 1.9


def test_sequences_are_tokenized_once(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [Pair("a cat", "a dog", 5.0, 1), Pair("a dog", "a cat", 0.0, 2)]
    rows = EmbeddingTask(5.0).encode(pairs, tokenizer, 16, "f")
    assert len(rows.sequences) == 2
    assert rows.rows == [(0, 1), (1, 0)]
    batch = rows.collate([rows[0], rows[1]])
    assert batch["sequences"].tolist() == [0, 1, 1, 0]
    assert batch["labels"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_do_not_depend_on_the_batch(folder, pairs, pooling):
    task = EmbeddingTask(5.0, pooling)
    model = task.load_model(str(folder)).eval().double()
    rows = task.encode(pairs, AutoTokenizer.from_pretrained(folder), 16, "f")
    together, alone = predict(model, task, rows, 48), predict(model, task, rows, 1)
    assert np.abs(together - alone).max() < 1e-6  # predictions are float32


def test_teacher_cache_equals_a_forward(folder, pairs):
    task = EmbeddingTask(5.0)
    model = task.load_model(str(folder))
    rows = task.encode(pairs, AutoTokenizer.from_pretrained(folder), 16, "f")
    seen = []
    stored = Teacher(model, task, rows, batch_size=7, progress=lambda *at: seen.append(at))
    live = Teacher(model, task, rows, memory=0)
    assert stored.stored_bytes > 0
    assert live.stored_bytes == 0
    assert seen[-1] == (len(rows.sequences), len(rows.sequences))
    batch = rows.collate([rows[i] for i in (5, 0, 11)])
    a, b = stored.outputs(batch), live.outputs(batch)
    assert torch.allclose(a.vectors, b.vectors, atol=1e-6)
    half = torch.finfo(torch.float16).eps / 2  # the rounding of what is stored
    assert ((a.tokens.float() - b.tokens).abs() <= half * b.tokens.abs() + 1e-5).all()
    assert not any(p.requires_grad for p in model.parameters())


def test_tasks_refuse_what_they_cannot_use(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(DataError, match="two sentences a row"):
        EmbeddingTask().encode([Pair("a", None, 1.0, 1)], tokenizer, 16, "f")
    with pytest.raises(ValueError, match="scale is 0"):
        EmbeddingTask(scale=0)
    with pytest.raises(ValueError, match="pooling is 'max'"):
        EmbeddingTask(pooling="max")
    with pytest.raises(ValueError, match="at least 2"):
        ClassificationTask(["only"])


def test_fresh_regression_head_starts_at_the_mean(folder):
    model = RegressionTask(mean=2.5).load_model(str(folder))
    assert model.classifier.bias.item() == 2.5
    model.classifier.bias.data.fill_(7.0)
    model.save_pretrained(folder / "with_head")
    again = RegressionTask(mean=2.5).load_model(str(folder / "with_head"), trained=True)
    assert again.classifier.bias == 7.0
    with pytest.raises(ValueError, match=r"classifier\.bias.* fine-tune it first"):
        RegressionTask(mean=2.5).load_model(str(folder), trained=True)


def test_classes_keep_their_names(folder):
    config = ClassificationTask(["far", "near"]).load_model(str(folder)).config
    assert config.id2label == {0: "far", 1: "near"}
    assert config.num_labels == 2


def test_pooling_is_read_from_the_folder(tmp_path):
    assert read_pooling(str(tmp_path)) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    path = tmp_path / "1_Pooling" / "config.json"
    path.write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    assert read_pooling(str(tmp_path)) == "cls"
    path.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        read_pooling(str(tmp_path))


def test_state_files_give_back_what_was_written(tmp_path):
    shared = torch.arange(6.0)
    state = {"step": 3, "a": {"x.y": shared, 7: [shared[2:], None, True]}, "s": "text"}
    write_state(state, tmp_path, "masks")
    back = read_state(tmp_path, "masks")
    assert back["step"] == 3
    assert back["s"] == "text"
    assert torch.equal(back["a"]["x.y"], shared)
    assert torch.equal(back["a"][7][0], shared[2:])
    assert back["a"][7][1:] == [None, True]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masks.json", "masks.safetensors"]
    with pytest.raises(TypeError, match=r"state\.f is a set"):
        write_state({"f": {1}}, tmp_path, "other")
    (tmp_path / "masks.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        read_state(tmp_path, "masks")
    (tmp_path / "masks.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks\.safetensors is missing"):
        read_state(tmp_path, "masks")

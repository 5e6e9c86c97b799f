"""Healing: defaults by length, frozen parts, averaged weights."""

from __future__ import annotations

import pytest
import torch
from tiny_training import StopAt, setting_of, trainer_of
from torch import nn

from slimkern.training import (
    AverageWeights,
    ClassificationTask,
    DistillTrainer,
    EmbeddingTask,
    HealingSettings,
    KeepBest,
    RegressionTask,
    Teacher,
    freeze_,
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return setting_of(tmp_path_factory)


def test_defaults_follow_the_length():
    short, middle, long = (HealingSettings.for_epochs(n) for n in (1, 4, 20))
    assert [s.learning_rate for s in (short, middle, long)] == pytest.approx([3e-4, 4.5e-4, 6e-4])
    assert HealingSettings() == HealingSettings.for_epochs(6)
    assert HealingSettings.for_epochs(14, learning_rate=1e-4, batch_size=8).learning_rate == 1e-4
    task = EmbeddingTask(5.0)
    assert [s.weights(task).task for s in (short, middle, long)] == [1, 0.75, 0.5]
    assert long.weights(task).hidden == 3
    assert long.weights(RegressionTask()) == RegressionTask.default_weights  # has no task loss
    assert long.weights(ClassificationTask(["a", "b"])).task == 0.5
    assert not short.dropout
    assert short.averaging().decay == 0.998
    assert HealingSettings(average=None).averaging() is None
    assert HealingSettings(average=0.9).averaging().decay == 0.9
    with pytest.raises(ValueError, match="epochs is 0"):
        HealingSettings.for_epochs(0)
    with pytest.raises(ValueError, match="freeze has 'heads'; accepted: embeddings, norms"):
        HealingSettings(freeze=("heads",))


class PreNorm(nn.Module):
    """A wrapper whose name says norm, and whose inner linear is none."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 4)


class MyRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def test_frozen_is_what_it_says():
    model = nn.ModuleDict(
        {"words": nn.Embedding(5, 4), "a": PreNorm(), "b": MyRMSNorm(), "c": nn.BatchNorm1d(4)}
    )

    def trained():
        return {name for name, p in model.named_parameters() if p.requires_grad}

    freeze_(model, ())
    assert len(trained()) == 8
    freeze_(model, ("norms",))
    assert trained() == {"words.weight", "a.inner.weight", "a.inner.bias"}
    freeze_(model, ("embeddings",))
    assert trained() == {"a.inner.weight", "a.inner.bias"}


def test_freezing_refuses():
    with pytest.raises(ValueError, match="freeze has 'layers'"):
        freeze_(nn.Linear(2, 2), ("layers",))
    with pytest.raises(ValueError, match=r"as \('norms',\)"):
        freeze_(nn.LayerNorm(2), "norms")
    with pytest.raises(ValueError, match="the model has no embeddings"):
        freeze_(nn.Linear(2, 2), ("embeddings",))
    with pytest.raises(ValueError, match="nothing to train"):
        freeze_(nn.LayerNorm(2), ("norms",))


def test_a_frozen_model_heals(setting, tmp_path):
    source, task, rows = setting
    settings = HealingSettings(1, 1e-3, batch_size=8, freeze=("embeddings", "norms"))
    model = settings.prepare(task.load_model(str(source)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    teacher = Teacher(task.load_model(str(source)), task, rows)
    arguments = settings.arguments(tmp_path, save=False)
    run = DistillTrainer(model, task, rows, arguments, settings.weights(task), teacher)
    run.train()
    for name, p in model.named_parameters():
        frozen = "embeddings." in name or "LayerNorm" in name
        # Mean pooling has no use for BERT's pooler, which gets no gradient at all.
        assert torch.equal(p, before[name]) == (frozen or "pooler" in name), name


def test_average_follows_its_equation():
    model = nn.Linear(3, 2, bias=False)
    average = AverageWeights(decay=0.75)
    with average.applied(model):
        pass  # Without an average nothing happens.
    expected = None
    for step in range(30):
        with torch.no_grad():
            model.weight.fill_(step)
        average.update(model)
        decay = min(0.75, (1 + step) / (10 + step))
        expected = step if expected is None else decay * expected + (1 - decay) * step
    # Each of the 30 updates rounds three times, by half an eps of numbers below 30.
    allowed = 30 * 3 * torch.finfo(torch.float32).eps / 2 * 30
    assert (average.weights["weight"] - expected).abs().max() <= allowed
    with average.applied(model):
        assert torch.equal(model.weight, average.weights["weight"])
    assert model.weight.eq(29).all()
    average.copy_to(model)
    assert torch.equal(model.weight, average.weights["weight"])


def test_average_is_wide_and_leaves_frozen_weights_out():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    average = AverageWeights(0.99)
    average.update(model)
    average.update(model)
    assert {n: w.dtype for n, w in average.weights.items()} == {"weight": torch.float32}
    with pytest.raises(ValueError, match="decay is 1"):
        AverageWeights(1)
    with pytest.raises(ValueError, match="every is 0"):
        AverageWeights(every=0)


def test_the_best_average_is_kept_and_training_goes_its_own_way(setting, tmp_path):
    seen = []

    def score(model):
        seen.append(model.encoder.layer[0].output.dense.weight.detach().clone())
        return [0.1, 0.9, 0.2][len(seen) - 1]

    average = AverageWeights(0.9, every=2)
    best = KeepBest(score, tmp_path / "best", average=average)
    run = trainer_of(setting, tmp_path / "a", average, best, epochs=3)
    run.train()
    plain = trainer_of(setting, tmp_path / "b", epochs=3)
    plain.train()
    assert average.updates == run.state.max_steps // 2
    for a, b in zip(run.model.parameters(), plain.model.parameters()):
        assert torch.equal(a, b)
    final = average.weights["encoder.layer.0.output.dense.weight"]
    assert torch.equal(seen[2], final)
    assert not torch.equal(final, run.model.encoder.layer[0].output.dense.weight)
    assert best.restore(run.model) == 0.9
    assert torch.equal(run.model.encoder.layer[0].output.dense.weight, seen[1])


@pytest.mark.parametrize("stop", [3, 13])
def test_average_resumes_exactly(setting, tmp_path, stop):
    straight, resumed = AverageWeights(0.9, every=2), AverageWeights(0.9, every=2)
    trainer_of(setting, tmp_path / "a", straight).train()
    first = AverageWeights(0.9, every=2)
    trainer_of(setting, tmp_path / "b", first, StopAt(stop)).train()
    trainer_of(setting, tmp_path / "b", resumed).train(resume_from_checkpoint=True)
    assert straight.updates == resumed.updates == 12
    for name, average in straight.weights.items():
        assert torch.equal(average, resumed.weights[name]), name


def test_average_waits_until_it_may(setting, tmp_path):
    average = AverageWeights(0.9, ready=lambda: run.state.global_step > 20)
    run = trainer_of(setting, tmp_path, average)
    run.train()
    assert average.updates == 4


def test_resume_without_an_average_is_an_error(setting, tmp_path):
    trainer_of(setting, tmp_path, StopAt(3)).train()
    with pytest.raises(FileNotFoundError, match=r"slimkern_average\.json"):
        trainer_of(setting, tmp_path, AverageWeights()).train(resume_from_checkpoint=True)

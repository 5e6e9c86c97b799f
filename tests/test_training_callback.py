"""SlimCallback in a Trainer: steps, logs, checkpoints, resume; the best epoch; Ctrl-C."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from tiny_training import WORDS, StopAt, setting_of, trainer_of, write_model
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import slimkern
from slimkern.training import (
    DistillationWeights,
    DistillTrainer,
    KeepBest,
    SlimCallback,
    StopOnInterrupt,
    TrainingSettings,
    predict,
)

CUT = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "pruning_scope": "local", "round_multiplier": 8}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return setting_of(tmp_path_factory)


def test_masks_grow_to_the_target_and_the_slim_model_is_the_masked_one(setting, tmp_path):
    slim = SlimCallback(**CUT, warm_epochs=1, cooldown_epochs=1, pruning_frequency=2)
    run = trainer_of(setting, tmp_path, slim, teacher=True)
    run.train()
    _, task, rows = setting
    assert slim.pruning.step == run.state.max_steps == 24
    assert slim.pruning.done
    logged = [e for e in run.state.log_history if "ffn_sparsity" in e]
    assert logged[0]["ffn_sparsity"] < logged[-1]["ffn_sparsity"] == 0.5
    assert logged[-1]["mha_sparsity"] == 0.5
    assert {"loss_task", "loss_hidden", "loss_embedding", "loss_similarity"} <= set(logged[0])
    assert "step 24" in str(slim.report())
    masked = predict(run.model, task, rows)
    small = slimkern.model_slim(run.model)
    assert small.encoder.layer[0].intermediate.dense.out_features == 32
    assert abs(predict(small, task, rows) - masked).max() < 1e-5


def test_schedule_counts_optimizer_steps(setting, tmp_path):
    slim = SlimCallback(**CUT, warm_epochs=1, cooldown_epochs=2)
    run = trainer_of(setting, tmp_path, slim, gradient_accumulation_steps=3)
    run.train()
    assert run.state.max_steps == 8  # 6 micro-batches an epoch, 3 to a step, 4 epochs
    assert slim.pruning.step == 8
    assert slim.pruning.report().last_step == 4


def test_accumulated_micro_batches_train_as_one_batch(setting, tmp_path):
    models = []
    for size, accumulation in ((8, 1), (4, 2)):
        run = trainer_of(
            setting,
            tmp_path / str(size),
            epochs=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        assert run.state.global_step == 6
        models.append(run.model)
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.allclose(a, b, atol=2e-5), name


@pytest.mark.parametrize("stop", [5, 6, 15])
def test_resume_is_exact(setting, tmp_path, stop):
    straight = trainer_of(setting, tmp_path / "a", SlimCallback(**CUT), teacher=True)
    straight.train()
    trainer_of(setting, tmp_path / "b", SlimCallback(**CUT), StopAt(stop), teacher=True).train()
    slim = SlimCallback(**CUT)
    resumed = trainer_of(setting, tmp_path / "b", slim, teacher=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 24
    assert slim.pruning.step == 24
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name


def test_resume_without_masks_is_an_error(setting, tmp_path):
    trainer_of(setting, tmp_path, StopAt(3)).train()
    with pytest.raises(FileNotFoundError, match=r"slimkern_pruning\.json"):
        trainer_of(setting, tmp_path, SlimCallback(**CUT)).train(resume_from_checkpoint=True)


def test_masks_of_another_step_are_an_error(setting, tmp_path):
    trainer_of(setting, tmp_path, SlimCallback(**CUT), StopAt(3)).train()
    for suffix in ("json", "safetensors"):
        shutil.copy(tmp_path / "checkpoint-3" / f"slimkern_pruning.{suffix}", tmp_path)
    trainer_of(setting, tmp_path, SlimCallback(**CUT), StopAt(4)).train()
    for suffix in ("json", "safetensors"):
        shutil.copy(tmp_path / f"slimkern_pruning.{suffix}", tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="masks are of step 3, its model is of step 4"):
        trainer_of(setting, tmp_path, SlimCallback(**CUT)).train(resume_from_checkpoint=True)


def test_in_a_plain_trainer_with_configs_of_the_user(tmp_path):
    source = write_model(tmp_path / "model", head=2)
    model = AutoModelForSequenceClassification.from_pretrained(source)
    configs = slimkern.parse_auto_slim_config(
        model, ffn2_sparsity=0.5, end_step=4, pruning_scope="local"
    )
    items = [{"input_ids": [2, 5 + i % len(WORDS), 3], "labels": i % 2} for i in range(16)]
    slim = SlimCallback(configs)
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=6, report_to=[], use_cpu=True)
    Trainer(model, arguments, train_dataset=items, callbacks=[slim]).train()
    assert slim.pruning.sparsity().ffn == 0.5


def test_obs_measures_on_batches_of_the_user(setting, tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(5, 17, (8, 6), generator=generator)} for _ in range(4)]
    slim = SlimCallback(
        **CUT, pruning_type="obs", warm_epochs=1, cooldown_epochs=1, pruning_frequency=3,
        calibration=batches,
    )  # fmt: skip
    run = trainer_of(setting, tmp_path / "obs", slim)
    run.train()
    _, task, rows = setting
    assert slim.pruning.done
    assert slim.pruning.sparsity().ffn == slim.pruning.sparsity().mha == 0.5
    masked = predict(run.model, task, rows)
    assert abs(predict(slimkern.model_slim(run.model), task, rows) - masked).max() < 1e-5
    with pytest.raises(ValueError, match="calibration="):
        trainer_of(setting, tmp_path, SlimCallback(**CUT, pruning_type="obs")).train()


def test_arguments_are_checked(setting, tmp_path):
    with pytest.raises(ValueError, match="complete in itself"):
        SlimCallback([{}], ffn2_sparsity=0.5)
    with pytest.raises(ValueError, match="warm_epochs is -1"):
        SlimCallback(ffn2_sparsity=0.5, warm_epochs=-1)
    slim = SlimCallback(**CUT, warm_epochs=3, cooldown_epochs=2)
    with pytest.raises(ValueError, match="leave no step of 24"):
        trainer_of(setting, tmp_path, slim).train()
    with pytest.raises(RuntimeError, match="has not begun"):
        SlimCallback(**CUT).report()
    used = SlimCallback(**CUT)
    trainer_of(setting, tmp_path, used, epochs=1).train()
    with pytest.raises(RuntimeError, match="make a new one"):
        trainer_of(setting, tmp_path, used, epochs=1).train()
    _, task, rows = setting
    model = task.load_model(str(setting[0]))
    arguments = TrainingSettings(1, 1e-3).arguments(tmp_path)
    with pytest.raises(ValueError, match="there is none"):
        DistillTrainer(model, task, rows, arguments, DistillationWeights())


def test_best_epoch_comes_back_and_patience_ends(setting, tmp_path):
    scores = iter([0.9, 0.1, 0.7, 0.3, 0.2, 0.1])
    weights = []
    ready = iter([False, True, True, True, True, True])

    def score(model):
        weights.append(model.encoder.layer[0].output.dense.weight.detach().clone())
        return next(scores)

    best = KeepBest(score, tmp_path / "best", lambda: next(ready), patience=2)
    run = trainer_of(setting, tmp_path, best, epochs=6)
    run.train()
    assert run.state.global_step == 5 * 6  # two epochs without improvement after the third
    assert best.restore(run.model) == 0.7
    assert torch.equal(run.model.encoder.layer[0].output.dense.weight, weights[2])
    assert [e["score"] for e in run.state.log_history if "score" in e] == [0.9, 0.1, 0.7, 0.3, 0.2]


def test_best_epoch_survives_an_interruption(setting, tmp_path):
    scores = iter([0.5, 0.9])
    first = KeepBest(lambda model: next(scores), tmp_path / "best", patience=3)
    trainer_of(setting, tmp_path, first, StopAt(14)).train()
    again = KeepBest(lambda model: 0.2, tmp_path / "best", patience=3)
    run = trainer_of(setting, tmp_path, again)
    run.train(resume_from_checkpoint=True)
    assert again.best == 0.9
    assert again.epochs_since == 2
    assert again.restore(run.model) == 0.9


def test_interrupt_finishes_the_step_and_saves(setting, tmp_path):
    class Press(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                os.kill(os.getpid(), signal.SIGINT)

    said = []
    before = signal.getsignal(signal.SIGINT)
    with StopOnInterrupt(said.append) as stop:
        run = trainer_of(setting, tmp_path, SlimCallback(**CUT), Press(), stop)
        run.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert stop.requested
    assert run.state.global_step == 8
    assert (tmp_path / "checkpoint-8" / "slimkern_pruning.safetensors").is_file()
    assert "saving a checkpoint" in said[0]

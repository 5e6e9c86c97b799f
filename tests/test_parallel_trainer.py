"""SlimCallback and DistillTrainer in several processes (accelerate launch, torchrun)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from parallel_cases import SIZE
from tiny_models import FAMILIES, text_inputs
from tiny_training import StopAt, setting_of, trainer_of

import slimkern
from slimkern.training import KeepBest, SlimCallback, StopOnInterrupt, callback

CUT = {"ffn2_sparsity": 0.5, "mha_sparsity": 0.5, "pruning_scope": "local", "round_multiplier": 8}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return setting_of(tmp_path_factory)


def trained(setting, folder, size, *callbacks, resume=False, **values):
    slim = SlimCallback(**CUT, warm_epochs=1, cooldown_epochs=1)
    trainer = trainer_of(
        setting, folder, slim, *callbacks, per_device_train_batch_size=size, **values
    )
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    return {
        "plan": slim.pruning.plan().to_json(),
        "steps": (slim.pruning.step, trainer.state.max_steps),
        "model": weights,
        "log": [e for e in trainer.state.log_history if "ffn_sparsity" in e],
    }


def two(setting, folder, values):
    return trained(setting, folder, 4, **values)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_as_one(pair, setting, tmp_path, accumulation):
    values = {"gradient_accumulation_steps": accumulation}
    wanted = trained(setting, tmp_path / "one", 8, **values)
    first, second = pair(two, setting, tmp_path / "two", values)
    assert first["plan"] == second["plan"] == wanted["plan"]
    assert first["steps"] == second["steps"] == wanted["steps"] == (24 // accumulation,) * 2
    for name, weight in wanted["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        assert torch.allclose(first["model"][name], weight, atol=2e-5), name


def interrupted(setting, folder, stop):
    """A run in one go, and one in two; the second part finds its masks beside the checkpoint."""
    whole = two(setting, folder / "whole", {"teacher": True})
    slim, stopping = SlimCallback(**CUT, warm_epochs=1, cooldown_epochs=1), StopAt(stop)
    values = {"teacher": True, "per_device_train_batch_size": 4}
    trainer_of(setting, folder / "parts", slim, stopping, **values).train()
    parts = trained(setting, folder / "parts", 4, resume=True, teacher=True)
    return whole, parts


def test_resume_is_exact(pair, setting, tmp_path):
    results = pair(interrupted, setting, tmp_path, 9)
    for whole, parts in results:
        assert whole["plan"] == parts["plan"] == results[0][0]["plan"]
        for name, weight in whole["model"].items():
            assert torch.equal(weight, parts["model"][name]), name
    (first, _), (second, _) = results
    parts = [n for n in first["log"][0] if n.startswith("loss_")]
    assert parts == ["loss_task", "loss_hidden", "loss_embedding", "loss_similarity"]
    for name in parts:  # the mean over the ranks, on every one
        assert [e.get(name) for e in first["log"]] == [e.get(name) for e in second["log"]]


def missing(setting, folder):
    """One rank does not find the masks that the other resumes from."""
    stopping = StopAt(3)
    slim = SlimCallback(**CUT)
    values = {"per_device_train_batch_size": 4}
    trainer_of(setting, folder, slim, stopping, **values).train()
    dist.barrier()
    if dist.get_rank() == 1:
        monkey = pytest.MonkeyPatch()
        monkey.setattr(callback, "read_beside", nothing_there)
    again = trainer_of(setting, folder, SlimCallback(**CUT), **values)
    kind, words = [
        (RuntimeError, "resuming the masks failed on rank 1: FileNotFoundError: gone"),
        (FileNotFoundError, "gone"),
    ][dist.get_rank()]
    try:
        with pytest.raises(kind, match=words):
            again.train(resume_from_checkpoint=True)
    finally:
        if dist.get_rank() == 1:
            monkey.undo()


def nothing_there(*_):
    raise FileNotFoundError("gone")


def test_a_checkpoint_that_one_rank_does_not_find_is_an_error_on_all(pair, setting, tmp_path):
    pair(missing, setting, tmp_path)


def kept_best(setting, folder):
    """Ranks that score differently keep rank 0's best; one that is interrupted stops all."""
    rank = dist.get_rank()
    scores = iter([[0.1, 0.9, 0.3, 0.2], [0.9, 0.1, 0.2, 0.3]][rank])
    best = KeepBest(lambda model: next(scores), folder / "best")
    values = {"per_device_train_batch_size": 4, "epochs": 3}
    trainer = trainer_of(setting, folder / "out", best, **values)
    trainer.train()
    weights = [e["score"] for e in trainer.state.log_history if "score" in e]
    restored = best.restore(trainer.model)
    stop = StopOnInterrupt(lambda said: None)
    stop.requested = rank == 1
    stopped = trainer_of(setting, folder / "stopped", stop, **values)
    stopped.train()
    return weights, restored, best.best_epoch, stopped.state.global_step


def test_rank_0_keeps_the_best_and_all_stop_together(pair, setting, tmp_path):
    assert pair(kept_best, setting, tmp_path) == [([0.1, 0.9, 0.3], 0.9, 2.0, 1)] * SIZE
    assert (tmp_path / "best" / "best.safetensors").is_file()


def accelerated():
    """A loop of the user's own on accelerate, two micro-batches a step."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = FAMILIES["bert"]("ForSequenceClassification")
    cut = {"pruning_scope": "local", "end_step": 3, "round_multiplier": 8}
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5, mha_sparsity=0.5, **cut)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    pruning = slimkern.prepare_pruning(wrapped, configs, optimizer)
    for step in range(8):
        with accelerator.accumulate(wrapped):
            batch = text_inputs(4, 9, seed=2 * step + accelerator.process_index)
            accelerator.backward(wrapped(**batch).logits.square().mean())
            optimizer.step()
            optimizer.zero_grad()
    assert type(wrapped).__name__ == "DistributedDataParallel"
    assert pruning.step == 4
    assert pruning.done
    weight = model.bert.encoder.layer[0].output.dense.weight
    return pruning.plan().to_json(), weight.detach().clone()


def test_a_loop_on_accelerate(pair):
    (first, weight), (second, other) = pair(accelerated)
    assert first == second
    assert torch.equal(weight, other)

"""Block patterns inside ``transformers.Trainer``: logged, saved with checkpoints, resumed."""

from __future__ import annotations

import pytest
import torch
from tiny_training import StopAt, setting_of, trainer_of

import slimkern
from slimkern.patterns.masks import block_masked
from slimkern.training import SlimCallback, predict

RULE = {"target_sparsity": 0.5, "end_step": 12, "pruning_frequency": 2}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    return setting_of(tmp_path_factory)


@pytest.mark.parametrize("pattern", ["4x1", "2:4"])
def test_masks_grow_are_logged_and_stay_in_the_slim_model(setting, tmp_path, pattern):
    slim = SlimCallback([{"pattern": pattern, "excluded_op_names": ["pooler"], **RULE}])
    run = trainer_of(setting, tmp_path, slim)
    run.train()
    _, task, rows = setting
    logged = [e["block_sparsity"] for e in run.state.log_history if "block_sparsity" in e]
    assert logged == sorted(logged)
    assert logged[0] == 0
    assert logged[-1] == 0.5
    assert "ffn_sparsity" not in run.state.log_history[0]
    masked = predict(run.model, task, rows)
    small = slimkern.model_slim(run.model)
    assert not block_masked(small)
    assert abs(predict(small, task, rows) - masked).max() < 1e-5


@pytest.mark.parametrize("more", [{}, {"pruning_type": "gradient", "regrow": True}])
def test_resume_is_exact(setting, tmp_path, more):
    configs = [{"pattern": "4x1", **RULE, **more}]
    straight = trainer_of(setting, tmp_path / "a", SlimCallback(configs))
    straight.train()
    trainer_of(setting, tmp_path / "b", SlimCallback(configs), StopAt(7)).train()
    slim = SlimCallback(configs)
    resumed = trainer_of(setting, tmp_path / "b", slim)
    resumed.train(resume_from_checkpoint=True)
    assert slim.pruning.step == 24
    assert slim.pruning.sparsity().blocks == pytest.approx(0.5, abs=0.01)
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name

"""Models that can't be saved, and damaged folders: a clear error, never something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoint_cases import slimmed, uneven_plan
from safetensors.torch import load_file, save_file
from torch import nn

from slimkern import folders
from slimkern.checkpoint import CheckpointError, load, save
from slimkern.surgery import mask_


def test_a_masked_model_is_refused(tmp_path):
    model = tiny_models.FAMILIES["bert"]()
    mask_(model, uneven_plan(model))
    with pytest.raises(CheckpointError, match="model_slim"):
        save(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_lost_its_plan_is_refused(tmp_path):
    model = slimmed("bert")
    del model.slim_plan
    with pytest.raises(CheckpointError, match="dense architecture"):
        save(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"anything": 1}

    with pytest.raises(CheckpointError, match="_extra_state"):
        save(Odd(2, 2), tmp_path / "slim")


def _rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder, its SHA-256 right."""
    about = json.loads((folder / "config.json").read_text())
    weights = folder / about["slimkern"]["weights"]
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    about["slimkern"]["sha256"] = folders.sha256(weights)
    (folder / "config.json").write_text(json.dumps(about))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x40
    path.write_bytes(data)


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


DAMAGE = {
    "no folder": (lambda f: f.rename(f.parent / "elsewhere"), "no folder"),
    "no plan": (lambda f: (f / "slim_plan.json").unlink(), "slim_plan.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "slim.safetensors").unlink(), "missing"),
    "truncated weights": (lambda f: _truncate(f / "slim.safetensors"), "damaged"),
    "empty weights": (lambda f: (f / "slim.safetensors").write_bytes(b""), "damaged"),
    "flipped bit": (lambda f: _flip(f / "slim.safetensors"), "SHA-256"),
    "another plan": (
        lambda f: _edit(f / "slim_plan.json", '"per_unit": 12', '"per_unit": 11'),
        "slim_plan.json: not the file that was saved",
    ),
    "no class": (
        lambda f: _edit(f / "config.json", '[\n    "BertModel"\n  ]', "7"),
        "no class of transformers",
    ),
    "dense sizes that are none": (
        lambda f: _edit(f / "config.json", '"dense": {}', '"dense": 3'),
        "config.json is damaged",
    ),
    "truncated plan": (lambda f: _truncate(f / "slim_plan.json"), "slim_plan.json is damaged"),
    "plan is a list": (lambda f: (f / "slim_plan.json").write_text("[]"), "plan"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "plain config": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "newer version": (
        lambda f: _edit(f / "config.json", '"version": 1', '"version": 2'),
        "version 2",
    ),
    "wrong weights name": (
        lambda f: _edit(f / "config.json", "slim.safetensors", "../slim.safetensors"),
        "damaged",
    ),
    "unknown class": (
        lambda f: _edit(f / "config.json", '"BertModel"', '"NoSuchModel"'),
        "NoSuchModel",
    ),
    "other sizes": (
        lambda f: _edit(f / "config.json", '"hidden_size": 48', '"hidden_size": 36'),
        "fit",
    ),
    "impossible sizes": (
        lambda f: _edit(f / "config.json", '"hidden_size": 48', '"hidden_size": "x"'),
        "config.json",
    ),
    "tensor missing": (
        lambda f: _rewrite(f, lambda t: t.pop("pooler.dense.bias")),
        "pooler.dense.bias is missing",
    ),
    "tensor too many": (
        lambda f: _rewrite(f, lambda t: t.update(extra=torch.zeros(1))),
        "extra is unknown",
    ),
    "tensor of another shape": (
        lambda f: _rewrite(f, lambda t: t.update({"pooler.dense.bias": torch.zeros(47)})),
        "pooler.dense.bias has shape",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_a_clear_error(damage, tmp_path):
    save(slimmed("bert"), tmp_path / "slim")
    change, message = DAMAGE[damage]
    change(tmp_path / "slim")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "slim")

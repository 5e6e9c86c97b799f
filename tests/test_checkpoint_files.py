"""A folder is written whole or not at all, and the source's other files travel along."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoint_cases import assert_same, slimmed, transformers, uneven_plan

from slimkern import checkpoint, folders
from slimkern.checkpoint import load, save
from slimkern.surgery import slim_

# Whole or not at all


def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    model = slimmed("bert")
    save(model, tmp_path / "slim")
    before = {p.name: p.read_bytes() for p in (tmp_path / "slim").iterdir()}

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    for where in ((checkpoint, "copy_companions"), (folders, "_flush"), (checkpoint, "save_file")):
        with monkeypatch.context() as patch:
            patch.setattr(*where, full_disk)
            with pytest.raises(OSError, match="No space"):
                save(model, tmp_path / "slim", source=tmp_path / "slim", overwrite=True)
            with pytest.raises(OSError, match="No space"):
                save(model, tmp_path / "fresh", source=tmp_path / "slim")
        assert [p.name for p in tmp_path.iterdir()] == ["slim"]
        assert {p.name: p.read_bytes() for p in (tmp_path / "slim").iterdir()} == before


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    save(slimmed("bert"), tmp_path / "slim")
    rename, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(folders.os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save(slimmed("roberta"), tmp_path / "slim", overwrite=True)
    assert type(load(tmp_path / "slim")).__name__ == "BertModel"
    assert [p.name for p in tmp_path.iterdir()] == ["slim"]


def test_overwriting(tmp_path):
    save(slimmed("bert"), tmp_path / "slim")
    with pytest.raises(FileExistsError, match="overwrite"):
        save(slimmed("roberta"), tmp_path / "slim")
    save(slimmed("roberta"), tmp_path / "slim", overwrite=True)
    assert type(load(tmp_path / "slim")).__name__ == "RobertaModel"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("all of it")
    with pytest.raises(FileExistsError, match="not a model"):
        save(slimmed("roberta"), tmp_path / "precious", overwrite=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "all of it"
    (tmp_path / "empty").mkdir()
    save(slimmed("bert"), tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="no folder"):
        save(slimmed("bert"), tmp_path / "file", overwrite=True)


def test_a_link_keeps_pointing_at_what_was_replaced(tmp_path):
    save(slimmed("bert"), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(slimmed("roberta"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert type(load(tmp_path / "real")).__name__ == "RobertaModel"


# What travels along


def _source(folder: Path) -> Path:
    for name in (
        *("tokenizer.json", "vocab.txt", "1_Pooling/config.json", "2_Dense/model.safetensors"),
        *("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "tf_model.h5"),
        *("2_Dense/pytorch_model.bin", "checkpoint-5/optimizer.pt", "checkpoint-5/tokenizer.json"),
        *("trainer_state.json", ".gitattributes", "adapter_config.json", "onnx/model.onnx"),
        *("config.json", "slim_plan.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"source's {name}")
    return folder


EXPECTED = {
    *("config.json", "slim_plan.json", "slim.safetensors"),
    *("tokenizer.json", "vocab.txt", "1_Pooling/config.json", "2_Dense/model.safetensors"),
}


def _files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_tokenizer_and_other_files_of_the_source_go_with_it(tmp_path):
    model = slimmed("bert")
    source = _source(tmp_path / "source")
    save(model, tmp_path / "slim", source=source)
    assert _files(tmp_path / "slim") == EXPECTED
    assert_same(model, load(tmp_path / "slim"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save(model, tmp_path / "other", source=tmp_path / "nowhere")


def test_the_source_is_found_and_its_place_is_not_written(tmp_path):
    tiny_models.FAMILIES["bert"]().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    model = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    slim_(model, uneven_plan(model))
    save(model, tmp_path / "slim")
    names = {"config.json", "slim_plan.json", "slim.safetensors", "tokenizer.json"}
    assert _files(tmp_path / "slim") == names
    for name in ("config.json", "slim_plan.json"):
        assert str(tmp_path) not in (tmp_path / "slim" / name).read_text()
    model.config._name_or_path = str(tmp_path / "gone")
    save(model, tmp_path / "again")
    assert _files(tmp_path / "again") == names - {"tokenizer.json"}


def test_what_travelled_along_stays_when_a_loaded_model_is_saved_again(tmp_path):
    source = _source(tmp_path / "source")
    save(slimmed("bert"), tmp_path / "slim", source=source)
    model = load(tmp_path / "slim")
    save(model, tmp_path / "slim", overwrite=True)
    assert _files(tmp_path / "slim") == EXPECTED
    assert_same(model, load(tmp_path / "slim"))
    assert str(tmp_path) not in (tmp_path / "slim" / "config.json").read_text()


def test_slim_models_in_the_source_folder_do_not_travel(tmp_path):
    model, source = slimmed("bert"), _source(tmp_path / "source")
    for name in ("a", "b", "b"):
        save(model, source / name, source=source, overwrite=True)
    assert _files(source / "a") == _files(source / "b") == EXPECTED


def test_nothing_is_pickled(tmp_path):
    save(slimmed("bert"), tmp_path / "slim")
    for path in (tmp_path / "slim").iterdir():
        assert path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_text())
        assert b"pickle" not in path.read_bytes()[:200]


# The real model


def test_a_real_model_with_its_tokenizer(minilm_dir, tmp_path):
    model = transformers.AutoModel.from_pretrained(minilm_dir).eval()
    slim_(model, uneven_plan(model))
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    sentences = ["A man is playing a flute.", "Two dogs run.", "Nothing of the kind."]
    encoded = [
        transformers.AutoTokenizer.from_pretrained(folder)(
            sentences, padding=True, return_tensors="pt"
        )
        for folder in (minilm_dir, tmp_path / "slim")
    ]
    assert torch.equal(encoded[0]["input_ids"], encoded[1]["input_ids"])
    with torch.no_grad():
        assert torch.equal(model(**encoded[0])[0], loaded(**encoded[1])[0])
    assert _files(tmp_path / "slim") >= {"tokenizer.json", "vocab.txt", "1_Pooling/config.json"}
    slim, dense = (
        sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        for folder in (tmp_path / "slim", minilm_dir)
    )
    assert slim < 0.8 * dense

"""Save and load: bit-equal, whole or not at all, and never something else."""

from __future__ import annotations

import copy
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from slimkern import checkpoint, folders
from slimkern.checkpoint import CheckpointError, load, save
from slimkern.discovery import discover
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.skeleton import build
from slimkern.surgery import mask_, slim_

transformers = pytest.importorskip("transformers")

FAMILIES = sorted(tiny_models.FAMILIES)
KEYS = ["input_ids", "attention_mask"]


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()


def uneven_plan(model: nn.Module, example=None) -> SlimPlan:
    """Another width in every layer; heads and channels from the middle and both ends."""
    groups = [g for g in discover(model, example).groups if not g.is_head]
    random = torch.Generator().manual_seed(3)
    entries = []
    for i, group in enumerate(groups):
        kept = max(1, group.num_units // 2 - i % 3)
        order = torch.randperm(group.num_units, generator=random)[:kept]
        entries.append(PlanEntry(group, tuple(sorted(order.tolist()))))
    return SlimPlan(tuple(entries))


def even_ffn_plan(model: nn.Module) -> SlimPlan:
    groups = [g for g in discover(model).groups if g.kind == "ffn" and not g.is_head]
    kept = tuple(range(1, 64, 2))
    return SlimPlan(tuple(PlanEntry(g, kept) for g in groups))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**tiny_models.text_inputs())[0]


def slimmed(name: str, task: str = "Model", plan=uneven_plan, **options) -> nn.Module:
    model = tiny_models.FAMILIES[name](task, **options)
    return slim_(model, plan(model))


def loose_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    inside = model.state_dict()
    return {n: b for n, b in model.named_buffers() if n not in inside}


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert type(a) is type(b)
    assert torch.equal(outputs(a), outputs(b))
    state, other = a.state_dict(), b.state_dict()
    assert list(state) == list(other)
    for name, value in state.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name
    for name, value in loose_buffers(a).items():
        assert torch.equal(value, loose_buffers(b)[name]), name
    assert not any(t.is_meta for t in [*b.parameters(), *b.buffers()])


@pytest.mark.parametrize(
    ("task", "dtype"),
    [
        ("Model", torch.bfloat16),
        ("ForSequenceClassification", torch.float32),
        ("ForMaskedLM", torch.float32),
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_uneven_round_trip(name, task, dtype, tmp_path):
    model = slimmed(name, task, dtype=dtype)
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert_same(model, loaded)
    assert loaded.slim_plan == model.slim_plan
    assert not loaded.training
    for key, value in model.config.to_dict().items():
        if key not in ("dtype", "architectures", "_name_or_path"):
            assert loaded.config.to_dict()[key] == value, key
    groups = [e.group for e in model.slim_plan.entries]
    for attribute in (a for g in groups for a in g.attributes):
        ours, theirs = (
            getattr(m.get_submodule(attribute.module), attribute.name) for m in (model, loaded)
        )
        assert ours == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plain_loader_refuses_an_uneven_model(name, tmp_path):
    model = slimmed(name, "ForSequenceClassification")
    save(model, tmp_path / "slim")
    for loader in (
        transformers.AutoModel,
        transformers.AutoModelForSequenceClassification,
        type(model),
    ):
        with pytest.raises((OSError, ValueError, RuntimeError)):
            loader.from_pretrained(tmp_path / "slim")
        with pytest.raises((OSError, ValueError, RuntimeError)):
            loader.from_pretrained(tmp_path / "slim", ignore_mismatched_sizes=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_alone_are_no_plain_model(name, tmp_path):
    def heads(model):
        return SlimPlan(tuple(PlanEntry(g, (0, 2)) for g in discover(model) if g.kind == "mha"))

    model = slimmed(name, plan=heads)
    save(model, tmp_path / "slim")
    assert_same(model, load(tmp_path / "slim"))
    with pytest.raises((OSError, ValueError, RuntimeError)):
        type(model).from_pretrained(tmp_path / "slim")


@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification", "ForMaskedLM"])
@pytest.mark.parametrize("name", FAMILIES)
def test_any_loader_takes_an_even_ffn_cut(name, task, tmp_path):
    model = slimmed(name, task, plan=even_ffn_plan)
    save(model, tmp_path / "slim")
    field = "hidden_dim" if name == "distilbert" else "intermediate_size"
    assert json.loads((tmp_path / "slim" / "config.json").read_text())[field] == 32
    assert_same(model, load(tmp_path / "slim"))
    plain = type(model).from_pretrained(tmp_path / "slim")
    assert getattr(plain.config, field) == 32
    assert torch.equal(outputs(model), outputs(plain))
    if task == "Model":
        auto = transformers.AutoModel.from_pretrained(tmp_path / "slim")
        assert torch.equal(outputs(model), outputs(auto))


def test_bit_equal_in_a_fresh_process(tmp_path):
    code = (
        "import sys, torch, slimkern; from safetensors.torch import load_file, save_file\n"
        "torch.set_num_threads(1)\n"
        "for folder in sys.argv[1:]:\n"
        "    inputs = load_file(folder + '/inputs')\n"
        "    with torch.no_grad(): y = slimkern.load(folder + '/slim')(**inputs)[0]\n"
        "    save_file({'y': y.contiguous()}, folder + '/outputs')\n"
    )
    made = {}
    for name in FAMILIES:
        model = slimmed(name, "ForSequenceClassification")
        made[name] = outputs(model)
        save(model, tmp_path / name / "slim")
        save_file(tiny_models.text_inputs(), tmp_path / name / "inputs")
    subprocess.run([sys.executable, "-c", code, *(str(tmp_path / n) for n in made)], check=True)
    for name, expected in made.items():
        assert torch.equal(load_file(tmp_path / name / "outputs")["y"], expected), name


@pytest.mark.parametrize("task", ["ForMaskedLM"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ties_are_ties_again(name, task, tmp_path):
    def identities(model):
        first: dict[int, str] = {}
        named = model.named_parameters(remove_duplicate=False)
        return {n: first.setdefault(id(p), n) for n, p in named}

    model = slimmed(name, task)
    save(model, tmp_path / "slim")
    ties = identities(model)
    assert any(n != first for n, first in ties.items())
    assert identities(load(tmp_path / "slim")) == ties


def test_slimmed_twice_and_saved_again(tmp_path):
    model = slimmed("bert", plan=even_ffn_plan)
    slim_(model, uneven_plan(model))
    save(model, tmp_path / "one")
    loaded = load(tmp_path / "one")
    assert_same(model, loaded)
    save(loaded, tmp_path / "two")
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    plan = (tmp_path / "two" / "slim_plan.json").read_text()
    assert SlimPlan.from_json(plan) == model.slim_plan
    assert model.slim_plan.entries[0].group.num_units in (tiny_models.FFN, tiny_models.HEADS)


def test_a_model_inside_the_one_that_was_slimmed(tmp_path):
    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = tiny_models.FAMILIES["bert"]()

        def forward(self, input_ids, attention_mask=None):
            return self.encoder(input_ids, attention_mask)[0].mean(1)

    model = Embedder()
    ffns = [g for g in discover(model, tiny_models.text_inputs()) if g.kind == "ffn"]
    slim_(model, SlimPlan(tuple(PlanEntry(g, tuple(range(48))) for g in ffns)))
    assert model.encoder.config.intermediate_size == 48
    save(model.encoder, tmp_path / "slim")
    assert_same(model.encoder, load(tmp_path / "slim"))
    assert transformers.AutoModel.from_pretrained(tmp_path / "slim").config.intermediate_size == 48


def test_a_model_around_a_slim_one(tmp_path):
    model = tiny_models.FAMILIES["bert"]("ForSequenceClassification")
    slim_(model.bert, uneven_plan(model.bert))
    save(model, tmp_path / "slim")
    loaded = load(tmp_path / "slim")
    assert_same(model, loaded)
    assert all(e.group.name.startswith("bert.") for e in loaded.slim_plan.entries)


def test_a_model_around_a_slim_one_is_slimmed_again_and_the_one_inside_too(tmp_path):
    model = tiny_models.FAMILIES["bert"]("ForSequenceClassification")
    slim_(model.bert, even_ffn_plan(model.bert))
    slim_(model, uneven_plan(model))
    slim_(model.bert, uneven_plan(model.bert))
    assert model.config.intermediate_size == 32
    save(model, tmp_path / "slim")
    assert_same(model, load(tmp_path / "slim"))
    save(model.bert, tmp_path / "inner")
    assert_same(model.bert, load(tmp_path / "inner"))


def test_a_model_that_does_not_tell_all_that_happened_to_it_is_refused(tmp_path):
    inner, x = tiny_models.mlp(6, 24, 6), torch.randn(2, 6)
    model = nn.Sequential(inner)
    everything = {"0.2": discover(model, x)["0.2"]}
    for keep in (12, 6, 3):
        group = discover(model, x)["0.2"]
        slim_(model, SlimPlan((PlanEntry(group, tuple(range(keep))),)))
        if keep == 12:
            inner.slim_plan = SlimPlan((PlanEntry(discover(inner, x)["2"], (0,)),))
    assert model.slim_plan["0.2"] == PlanEntry(everything["0.2"], (0, 1, 2))
    model.slim_plan = SlimPlan((PlanEntry(everything["0.2"], tuple(range(20))),))
    with pytest.raises(CheckpointError, match=r"slimmed apart: '0\.2': one plan leaves 20 units"):
        save(model, tmp_path / "slim")


def test_of_a_compiled_model_the_module_inside_is_saved(tmp_path):
    model = slimmed("bert")
    save(torch.compile(model, backend="eager"), tmp_path / "slim")
    assert_same(model, load(tmp_path / "slim"))


def test_a_dense_model_is_saved_as_any(tmp_path):
    model = tiny_models.FAMILIES["bert"]()
    save(model, tmp_path / "dense")
    assert torch.equal(outputs(load(tmp_path / "dense")), outputs(model))
    plain = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(outputs(plain), outputs(model))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_comes_back(attention, tmp_path):
    model = slimmed("bert", attention=attention)
    save(model, tmp_path / "slim")
    assert load(tmp_path / "slim").config._attn_implementation == attention


def test_buffers_that_no_file_holds_are_right(tmp_path):
    # A model cast to bf16 computes with rounded rotary frequencies, also after loading.
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_models.OTHERS["llama"]("ForCausalLM", dtype=dtype)
        assert loose_buffers(model)
        save(model, tmp_path / str(dtype))
        assert_same(model, load(tmp_path / str(dtype)))
    assert not (tmp_path / str(torch.float32) / checkpoint.BUFFERS_FILE).exists()


def test_building_an_architecture_draws_no_random_numbers_and_takes_no_memory(tmp_path):
    model = slimmed("bert")
    before = torch.random.get_rng_state()
    save(model, tmp_path / "slim")
    load(tmp_path / "slim")
    assert torch.equal(torch.random.get_rng_state(), before)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    twin = build(type(model), {"vocab_size": 2**20, "hidden_size": 1024, "num_attention_heads": 16})
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    assert grown < 2**20  # KiB: a quarter of the embedding table's 4 GiB
    assert all(p.is_meta for p in twin.parameters())
    assert twin.embeddings.position_ids.tolist() == [list(range(512))]
    assert nn.Linear(2, 2).weight.device.type == "cpu"


# What is refused


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


# Modules of one's own


class Stack(nn.Module):
    """Two linears in a row, twice, with a tied pair of norms and a buffer that no file holds."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, width), nn.GELU(), nn.Linear(width, 6), nn.LayerNorm(6),
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 6), nn.LayerNorm(6),
        )  # fmt: skip
        self.body[7].weight = self.body[3].weight
        self.register_buffer("scale", torch.arange(6.0), persistent=False)
        self.register_buffer("seen", torch.zeros(2))
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.body(x) * self.scale)


def _stack() -> tuple[Stack, torch.Tensor]:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    model = tiny_models.randomize(Stack())
    return slim_(model, uneven_plan(model, x)), x


def test_a_module_of_ones_own(tmp_path):
    model, x = _stack()
    save(model.double(), tmp_path / "slim")
    fresh = Stack().eval()
    loaded = load(tmp_path / "slim", model=fresh)
    assert loaded is fresh
    assert torch.equal(loaded(x.double()), model(x.double()))
    assert loaded.body[7].weight is loaded.body[3].weight
    assert loaded.slim_plan == model.slim_plan
    with pytest.raises(CheckpointError, match="model="):
        load(tmp_path / "slim")
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(tmp_path / "slim")


def test_a_module_that_does_not_fit_is_left_alone(tmp_path):
    model, _ = _stack()
    save(model, tmp_path / "slim")
    other = Stack()
    other.more = nn.Linear(2, 2)
    for wrong in (Stack(width=20), other, copy.deepcopy(model), nn.Linear(2, 2)):
        before = {n: (id(p), p.clone()) for n, p in wrong.named_parameters()}
        with pytest.raises(CheckpointError):
            load(tmp_path / "slim", model=wrong)
        for name, parameter in wrong.named_parameters():
            identity, value = before[name]
            assert id(parameter) == identity
            assert torch.equal(parameter, value)


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

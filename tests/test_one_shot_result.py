"""What one_shot returns: a model of its own, a plan that is saved with it; and what it refuses."""

from __future__ import annotations

import pytest
import torch
from calibration_cases import blocks, texts, vectors
from exactness import first_output
from tiny_models import FAMILIES, FFN, HEADS, VOCAB, randomize
from torch import Tensor, nn

import slimkern
from slimkern import one_shot


def plus(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return x + h


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def test_the_result_unpacks_and_says_what_was_done():
    model = FAMILIES["bert"]().train()
    stages = []
    result = one_shot(
        model, texts(), 0.5, round_multiplier=8, progress=lambda *step: stages.append(step)
    )
    small, plan = result
    assert small is result.model
    assert plan is result.plan
    assert result.predicted is None
    assert result.seconds > 0
    assert small.training
    assert small.config.intermediate_size == FFN // 2
    assert [s[1] for s in stages if s[0] == "slim and repair"] == [0, 1, 2, 3]
    assert {s[2] for s in stages} == {3}


def test_the_model_is_not_changed_and_shares_nothing():
    model = FAMILIES["bert"]("ForMaskedLM")
    model.bert.embeddings.requires_grad_(False)
    first_output(model(**texts()[0])).sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small, _ = one_shot(model, texts(), 0.5, 0.5, round_multiplier=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "slim_plan" not in vars(model)
    assert model.config.intermediate_size == FFN
    assert not storages(model) & storages(small)
    # Ties, flags and the absence of gradients:
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert [p.requires_grad for p in small.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert all(p.grad is None for p in small.parameters())
    assert any(p.grad is not None for p in model.parameters())
    first_output(small(**texts()[0])).sum().backward()  # it trains


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_saved_and_loaded_to_the_bit(name, tmp_path):
    model = FAMILIES[name]()
    small, plan = one_shot(
        model, texts(), 0.5, 0.5, round_multiplier=8, excluded_op_names=["no one"]
    )
    slimkern.save(small, tmp_path / "slim")
    back = slimkern.load(tmp_path / "slim")
    state = back.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    assert {e.group.name: (e.keep, e.error) for e in back.slim_plan} == {
        e.group.name: (e.keep, e.error) for e in plan
    }
    assert back.slim_plan.notes == plan.notes
    with torch.no_grad():
        a, b = (first_output(m(**texts()[0])) for m in (small, back))
    assert torch.equal(a, b)
    assert slimkern.SlimPlan.from_json(plan.to_json()) == plan


def test_an_own_module_with_added_biases_is_saved(tmp_path):
    def dense() -> nn.Module:
        model = blocks(plus)
        for linear in model.second:
            linear.bias = None
        return model

    small, _ = one_shot(dense(), vectors(), 0.5, round_multiplier=4, add_bias=True)
    assert all(linear.bias is not None for linear in small.second)
    slimkern.save(small, tmp_path / "slim")
    back = slimkern.load(tmp_path / "slim", model=dense())
    with torch.no_grad():
        assert torch.equal(back(vectors()[0]), small(vectors()[0]))


class Wrapped(nn.Module):
    """Somebody's embedding model around one of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = FAMILIES["bert"]()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        tokens = self.inner(input_ids=input_ids, attention_mask=attention_mask)[0]
        return (tokens * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


def test_a_model_inside_knows_its_errors():
    small, plan = one_shot(Wrapped(), texts(), 0.5, round_multiplier=8)
    inside = {e.group.name: e.error for e in small.inner.slim_plan}
    assert {f"inner.{name}": error for name, error in inside.items()} == {
        e.group.name: e.error for e in plan
    }
    assert all(error is not None for error in inside.values())


def test_a_slim_model_can_be_slimmed_again():
    """The plan left on the model speaks of the original layers, errors of both times included."""
    model = FAMILIES["bert"]()
    once, first = one_shot(model, texts(), 0.5, round_multiplier=8)
    twice, second = one_shot(once, texts(), 0.5, 0.5, round_multiplier=8)
    whole = {e.group.name: e for e in twice.slim_plan}
    for entry in second:
        name = entry.group.name
        assert whole[name].error == entry.error
        if entry.group.kind == "ffn":
            assert whole[name].keep == tuple(first[name].keep[i] for i in entry.keep)
            assert whole[name].group.num_units == FFN
        else:
            assert whole[name].keep == entry.keep
            assert whole[name].group.num_units == HEADS
    only_heads, _ = one_shot(once, texts(), mha_sparsity=0.5)
    for entry in only_heads.slim_plan:
        if entry.group.kind == "ffn":
            assert entry.error == first[entry.group.name].error


def test_what_torch_compile_returned_is_taken_apart():
    model = FAMILIES["bert"]()
    plain = one_shot(model, texts(), 0.5, round_multiplier=8)
    assert one_shot(torch.compile(model), texts(), 0.5, round_multiplier=8).plan == plain.plan


def test_inference_mode_around_it_does_not_matter():
    model = FAMILIES["bert"]()
    plain = one_shot(model, texts(), 0.5, 0.5, round_multiplier=8)
    with torch.inference_mode():
        small, plan = one_shot(model, texts(), 0.5, 0.5, round_multiplier=8)
    assert plan == plain.plan
    assert not any(p.is_inference() for p in small.parameters())


@pytest.mark.parametrize("memory", [0, 20_000])
def test_memory_does_not_matter(memory):
    """Everything on disk, some of it, nothing: the same bits."""
    model = FAMILIES["mpnet"]()
    one = one_shot(model, texts(), 0.5, 0.5, round_multiplier=8)
    two = one_shot(model, texts(), 0.5, 0.5, round_multiplier=8, memory=memory)
    assert one.plan == two.plan
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))


def test_garbage_in_padding_does_not_matter():
    model, clean, dirty = FAMILIES["bert"](), texts(), texts()
    generator = torch.Generator().manual_seed(9)
    for batch in dirty:
        noise = torch.randint(2, VOCAB, batch["input_ids"].shape, generator=generator)
        batch["input_ids"] = batch["input_ids"].where(batch["attention_mask"].bool(), noise)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(clean, dirty))
    one = one_shot(model, clean, 0.5, 0.5, round_multiplier=8)
    two = one_shot(model, dirty, 0.5, 0.5, round_multiplier=8)
    assert one.plan == two.plan
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters()))


@pytest.mark.parametrize(
    "targets",
    [
        {},
        {"ffn2_sparsity": 0.0, "mha_sparsity": 0.0},
        {"ffn2_sparsity": 0.5, "target_params": 1000},
        {"target_macs": 1e9, "target_speedup": 2},
    ],
    ids=str,
)
def test_exactly_one_target(targets):
    with pytest.raises(ValueError, match=r"give ffn2_sparsity and mha_sparsity .* or one of"):
        one_shot(FAMILIES["bert"](), texts(), **targets)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ffn2_sparsity": 1.0}, ValueError, "1.0"),
        ({"ffn2_sparsity": -0.1}, ValueError, "-0.1"),
        ({"mha_sparsity": float("nan")}, ValueError, "nan"),
        ({"ffn2_sparsity": 0.5, "criteria": "obs"}, TypeError, "criteria"),
        (
            {"ffn2_sparsity": 0.5, "criterion": "snip"},
            ValueError,
            "criterion='snip'; accepted: obs",
        ),
        ({"ffn2_sparsity": 0.5, "repair": "all"}, ValueError, "repair='all'; accepted: least_squ"),
        ({"ffn2_sparsity": 0.5, "chunk": 0}, ValueError, "chunk=0"),
        ({"ffn2_sparsity": 0.5, "damping": 0.0}, ValueError, "damping=0"),
        ({"ffn2_sparsity": 0.5, "ridge": -1.0}, ValueError, "ridge=-1"),
        ({"ffn2_sparsity": 0.5, "selection_tokens": 0}, ValueError, "selection_tokens=0"),
        ({"ffn2_sparsity": 0.5, "batch_size": 0}, ValueError, "batch_size"),
        ({"ffn2_sparsity": 0.5, "round_multiplier": 0}, ValueError, "round_multiplier"),
        ({"ffn2_sparsity": 0.5, "op_names": ["nobody"]}, ValueError, "nobody"),
        ({"target_params": 0}, ValueError, "target_params must be a positive number, got 0"),
        ({"target_macs": True}, ValueError, "target_macs must be a positive number, got True"),
        ({"target_speedup": 0.5}, ValueError, "target_speedup must be at least 1, got 0.5"),
        ({"target_macs": 1e9, "latency_shape": (8,)}, ValueError, "latency_shape must be"),
    ],
    ids=str,
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        one_shot(FAMILIES["bert"](), texts(), **options)


def test_a_masked_model_is_refused():
    model = FAMILIES["bert"]()
    groups = slimkern.discover(model, texts()[0])
    scores = slimkern.importance(model, groups)
    slimkern.mask_(model, slimkern.make_plan(groups, scores, multiple_of=8))
    with pytest.raises(ValueError, match="the model is masked"):
        one_shot(model, texts(), 0.5)


def test_a_model_without_targets_is_refused():
    with pytest.raises(ValueError, match="no FFN"):
        one_shot(randomize(nn.Sequential(nn.Linear(10, 10))), vectors(), 0.5)
    with pytest.raises(ValueError, match="no FFN"):
        one_shot(randomize(nn.Sequential(nn.Linear(10, 10))), vectors(), target_params=10)

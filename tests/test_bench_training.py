"""Training steps of the benchmark suite: all providers against fp64, and the masks' sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the encoder that is trained is transformers' BERT")

from bench import check, training_cases
from bench.providers import training
from bench.training_cases import FULL, SMOKE, SPARSITIES, TrainingWork, training_works
from bench.work import Outputs, Setting, Work
from slimkern.ops.masked_ffn import api
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.report.speed_schema import PRECISIONS, Precision

EAGER = [p for p in training.training_providers() if not p.name.startswith("torch.compile")]


def tiny(sparsity: float, *, optimizer: bool = True) -> TrainingWork:
    return training_cases.step(SMOKE, sparsity, optimizer=optimizer, smoke=True)


def bound(work: TrainingWork, precision: Precision = "fp32") -> float:
    """From plain torch's own error: that of the mask-multiplied model."""
    eager = training.MaskMultiply().prepare(work, Setting(precision))()
    return check.bound(work, precision, check.error(eager, check.reference(work)))


def shifted(plan: SlimPlan, group: int) -> SlimPlan:
    """The plan with one other unit kept in one of its groups."""
    entries = list(plan.entries)
    old = entries[group]
    other = next(u for u in range(old.group.num_units) if u not in old.keep)
    entries[group] = PlanEntry(old.group, tuple(sorted((*old.keep[1:], other))))
    return SlimPlan(tuple(entries))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "fp32-high"])
def test_all_providers_agree_with_the_reference(sparsity: float, precision: Precision) -> None:
    work, setting = tiny(sparsity), Setting(precision)
    limit = bound(work, precision)
    taken = [p for p in EAGER if p.refuses(work, setting) is None]
    assert len(taken) == (4 if sparsity == 0 else 3)
    for provider in taken:
        with torch.inference_mode():
            call = provider.prepare(work, setting)
            first, second = call(), call()
        assert check.error(first, check.reference(work)) <= limit, provider.name
        assert all(torch.equal(a, b) for a, b in zip(first, second)), provider.name


@pytest.mark.parametrize("group", range(4))
@pytest.mark.parametrize("provider", EAGER[1:], ids=lambda p: p.name)
def test_a_wrong_mask_is_found(provider: training.TrainingProvider, group: int) -> None:
    work = tiny(0.5)
    wrong = replace(work, plan=lambda: shifted(work.plan(), group))
    outputs = provider.prepare(wrong, Setting("fp32"))()
    assert check.error(outputs, check.reference(work)) > 100 * bound(work)


def test_a_wrong_gradient_of_a_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = api.weight_grads

    def wrong(*arguments: Any) -> list[torch.Tensor]:
        return [1.001 * gradient for gradient in right(*arguments)]

    monkeypatch.setattr(api, "weight_grads", wrong)
    work = tiny(0.5)
    outputs = training.SlimkernMasked().prepare(work, Setting("fp32"))()
    assert check.error(outputs, check.reference(work)) > 10 * bound(work)


@pytest.mark.parametrize(
    ("sparsity", "ffn", "heads"), [(0.0, 1536, 12), (0.25, 1152, 9), (0.5, 768, 6), (0.8, 320, 5)]
)
def test_what_the_label_keeps(sparsity: float, ffn: int, heads: int) -> None:
    assert FULL.kept(sparsity) == (ffn, heads)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_models_keep_what_the_label_says(sparsity: float) -> None:
    work = tiny(sparsity)
    kept = dict(zip(("ffn", "mha"), SMOKE.kept(sparsity)))
    assert len(work.plan()) == 2 * SMOKE.layers
    assert all(len(e.keep) == kept[e.group.kind] for e in work.plan())
    slim, masked, multiplied = work.build(), work.build(), work.build()
    training.AlreadySlim().form(slim, work)
    training.SlimkernMasked().form(masked, work)
    training.MaskMultiply().form(multiplied, work)
    name = "bert.encoder.layer.1.output.dense"
    weights = [m.get_submodule(name).weight for m in (slim, masked, multiplied)]
    assert weights[0].shape[1] == kept["ffn"]
    for weight in weights[1:]:
        assert weight.shape[1] == SMOKE.ffn
        assert int(weight.any(0).sum()) == kept["ffn"]


def test_the_works_are_those_of_the_table() -> None:
    works = training_works(smoke=False)
    assert len({work.case for work in works}) == len(works) == 5
    assert [w.shape for w in works if w.optimizer] == [
        "16x48, 0%",
        "16x48, 25%",
        "16x48, 50%",
        "16x48, 80%",
    ]
    assert sum(work.compiled for work in works) == 1
    assert all(work.smoke for work in training_works(smoke=True))
    dense = works[0]
    assert dense.values > 6 * sum(p.numel() for p in dense.build().parameters())
    assert works[3].flops < 0.3 * dense.flops


def test_the_values_count_the_parameters() -> None:
    step, bare = tiny(0.5), tiny(0.5, optimizer=False)
    slim = step.build()
    training.AlreadySlim().form(slim, step)
    parameters = sum(p.numel() for p in slim.parameters())
    assert step.values - bare.values == 5 * parameters


def test_the_optimizer_steps_where_the_work_says_so() -> None:
    step = training.SlimkernMasked().prepare(tiny(0.5), Setting("fp32"))
    bare = training.SlimkernMasked().prepare(tiny(0.5, optimizer=False), Setting("fp32"))
    assert isinstance(step, training.TrainingStep)
    assert isinstance(bare, training.TrainingStep)
    step()
    bare()
    assert bare.optimizer is None
    assert step.optimizer is not None
    state = step.optimizer.state
    assert len(state) == len(list(tiny(0.5).build().parameters()))
    assert all(float(s["step"]) == 1 for s in state.values())
    assert sum(bool(s["exp_avg"].any()) for s in state.values()) > 0.9 * len(state)


def test_refusals_say_why() -> None:
    masked, setting = tiny(0.5), Setting("fp32")
    assert "0 %" in str(training.DenseEager().refuses(masked, setting))
    assert "short list" in str(training.CompiledMaskMultiply().refuses(masked, setting))
    other = Work("op", "other", "M=1", nn.Identity, _no_inputs, 0.0, 0.0, 0, 0)
    for provider in training.training_providers():
        assert provider.refuses(other, setting) == "takes training steps only"


def _no_inputs() -> Outputs:
    return ()


def test_settings_of_the_process_are_restored() -> None:
    before = torch.get_float32_matmul_precision()
    with torch.inference_mode():
        call = training.AlreadySlim().prepare(tiny(0.8), Setting("fp32-medium"))
        call()
        assert torch.is_inference_mode_enabled()
    assert torch.get_float32_matmul_precision() == before


def test_an_unknown_provider_is_named() -> None:
    assert [p.name for p in training.training_providers(["already slim"])] == ["already slim"]
    with pytest.raises(ValueError, match=r"'nobody'.*accepted: dense eager"):
        training.training_providers(["nobody"])

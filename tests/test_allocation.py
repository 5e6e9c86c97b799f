"""Budgets: met, never exceeded, and said where they can't be met."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_cases import batches_of, blocks, encoder, texts, torch_encoder, vectors
from latency_cases import Clock, Forward, straight
from tiny_models import FAMILIES, FFN, HEAD_DIM, HEADS, mlp
from torch import Tensor, nn

import slimkern
from slimkern import allocation, one_shot, one_shot_family, timing
from slimkern.allocation import forward_of
from slimkern.calibration.batches import read_batches
from slimkern.costs import count_macs, count_parameters

SHAPE = (2, 16)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def macs(model: nn.Module) -> float:
    """Of linears, and of BERT's heads: two products of queries, keys and values each."""
    rows, tokens = SHAPE
    heads = sum(getattr(m, "num_attention_heads", 0) for m in model.modules())
    return count_macs(model, (), SHAPE).total({}) + heads * rows * tokens**2 * 2 * HEAD_DIM


def next_steps(model: nn.Module, result: Any, count: Any, multiple: int) -> list[float]:
    """What it would cost to widen each group that is cut by one level."""
    groups = [entry.group for entry in result.plan]
    costs = count(model, groups)
    steps = []
    for entry in result.plan:
        kept, full = len(entry.keep), entry.group.num_units
        if kept < full:
            wider = min(full, kept + (multiple if entry.group.kind == "ffn" else 1))
            steps.append(costs.of(entry.group.name, wider) - costs.of(entry.group.name, kept))
    return steps


@pytest.mark.parametrize("share", [0.95, 0.8])
@pytest.mark.parametrize("name", ["bert", "mpnet", "torch"])
def test_parameters(name, share):
    """As many as allowed: no group could be one level wider."""
    model, raw = encoder(name), batches_of(name)
    target = share * parameters(model)
    result = one_shot(model, raw, target_params=target, round_multiplier=8)
    assert parameters(result.model) == result.predicted.slim <= target
    assert (result.predicted.unit, result.predicted.dense) == ("parameters", parameters(model))
    steps = next_steps(model, result, count_parameters, 8)
    assert steps
    assert all(result.predicted.slim + step > target for step in steps)


@pytest.mark.parametrize("name", ["bert", "torch"])
def test_multiply_accumulates(name):
    model, raw = encoder(name), batches_of(name)
    target = 0.7 * macs(model)
    result = one_shot(model, raw, target_macs=target, latency_shape=SHAPE, round_multiplier=8)
    assert macs(result.model) == result.predicted.slim <= target
    assert result.predicted.shape == SHAPE
    assert result.predicted.ratio == pytest.approx(macs(model) / result.predicted.slim)
    steps = next_steps(model, result, lambda m, groups: count_macs(m, groups, SHAPE), 8)
    assert all(result.predicted.slim + step > target for step in steps)


def test_stacks_of_linears_stay_below():
    """Where two groups share a linear the tables bound its cost from above."""
    model = mlp(10, 24, 20, 16, 5)
    result = one_shot(model, vectors(), target_params=700, round_multiplier=4)
    assert parameters(result.model) == result.predicted.slim <= 700


@pytest.mark.parametrize("repair", ["least_squares", "none"])
def test_added_biases_are_counted(repair):
    model = blocks(lambda m, x, h: x + h)
    for linear in model.second:
        linear.bias = None
    target = parameters(model) - 200
    result = one_shot(
        model, vectors(), target_params=target, round_multiplier=1, add_bias=True, repair=repair
    )
    assert parameters(result.model) <= result.predicted.slim <= target
    assert target - parameters(result.model) <= 30 + 20  # ten biases per layer, a channel


@pytest.mark.parametrize("kind", ["target_params", "target_macs"])
def test_the_smallest_model_is_named(kind):
    model = FAMILIES["bert"]()
    options = {"round_multiplier": 16, "latency_shape": SHAPE}
    with pytest.raises(
        ValueError, match=rf"{kind}=1 can't be met: .* and the smallest one"
    ) as error:
        one_shot(model, texts(), **options, **{kind: 1})
    smallest = float(str(error.value).rsplit("smallest one ", 1)[1].split()[0])
    result = one_shot(model, texts(), **options, **{kind: smallest})
    assert result.predicted.slim == smallest
    assert {len(e.keep) for e in result.plan} == {16, 1}
    with pytest.raises(ValueError, match="can't be met"):
        one_shot(model, texts(), **options, **{kind: smallest - 1})


def test_a_budget_that_asks_for_nothing_changes_nothing():
    model = FAMILIES["bert"]()
    result = one_shot(model, texts(), target_params=parameters(model))
    assert result.predicted.ratio == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), result.model.parameters()))


def test_an_uneven_model_is_saved(tmp_path):
    model = FAMILIES["bert"]()
    target = 0.75 * parameters(model)
    small, plan = one_shot(model, texts(), target_params=target, round_multiplier=8)
    assert len({len(e.keep) for e in plan if e.group.kind == "ffn"}) > 1
    slimkern.save(small, tmp_path / "slim")
    back = slimkern.load(tmp_path / "slim")
    state = back.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    with torch.no_grad():
        assert torch.equal(small(**texts()[0])[0], back(**texts()[0])[0])


def test_one_kind_alone_by_its_names():
    model = FAMILIES["bert"]()
    target = 0.8 * parameters(model)
    plan = one_shot(
        model, texts(), target_params=target, round_multiplier=8, excluded_op_names=["attention"]
    ).plan
    assert {e.group.kind for e in plan} == {"ffn"}
    plan = one_shot(
        model, texts(), target_params=0.95 * parameters(model), op_names=["layer.[01].attention"]
    ).plan
    assert [e.group.name for e in plan] == [
        f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)
    ]


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock(straight)
    monkeypatch.setattr(timing, "time_interleaved", made)
    monkeypatch.setattr(allocation, "forward_of", lambda example, shape: Forward)
    return made


def test_a_family_from_one_table(clock, tmp_path):
    model, stages = FAMILIES["bert"](), []
    options = {"round_multiplier": 16, "latency_cache": tmp_path}
    family = one_shot_family(
        model, texts(), (1.2, 1.6, 2), progress=lambda *s: stages.append(s), **options
    )
    dense = clock.seconds(model)
    for target, result in zip((1.2, 1.6, 2), family, strict=True):
        assert dense / clock.seconds(result.model) >= target
        assert result.predicted.slim == pytest.approx(clock.seconds(result.model), rel=1e-9)
        assert result.predicted.dense == pytest.approx(dense, rel=1e-9)
        assert result.predicted.unit == "seconds"
        assert result.seconds > 0
    sizes = [parameters(result.model) for result in family]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    assert sum(stage == ("error curves", 6, 6) for stage in stages) == 1
    assert sum(stage == ("slim and repair", 6, 6) for stage in stages) == 3
    # Each alone is the same, and the table is read from disk: what is timed is its own widths.
    clock.runs, clock.timed = 0, []
    alone = one_shot(model, texts(), target_speedup=1.6, **options)
    assert alone.plan == family[1].plan
    assert clock.runs == 1
    by_seconds = one_shot(model, texts(), target_latency=dense / 1.6, **options)
    assert by_seconds.plan == family[1].plan


def test_a_table_that_is_off_is_corrected(clock, tmp_path):
    """What is cut in both kinds takes longer than the tables, measured kind by kind, say."""
    model = FAMILIES["bert"]()
    additive = clock.seconds

    def seconds(measured: nn.Module) -> float:
        layers = measured.encoder.layer
        ffn = sum(layer.output.dense.in_features for layer in layers) < 3 * FFN
        mha = sum(layer.attention.output.dense.in_features for layer in layers) < 3 * 12 * HEADS
        return additive(measured) * (1.1 if ffn and mha else 1.0)

    clock.seconds = seconds
    dense = seconds(model)
    result = one_shot(
        model, texts(), target_latency=dense / 1.5, round_multiplier=1, latency_cache=tmp_path
    )
    assert result.predicted.slim == pytest.approx(seconds(result.model), rel=0.02)
    assert seconds(result.model) <= 1.02 * dense / 1.5


def test_a_speedup_that_cannot_be_had(clock, tmp_path):
    with pytest.raises(ValueError, match=r"target_speedup=9 can't be met: .* times less\)"):
        one_shot(FAMILIES["bert"](), texts(), target_speedup=9, latency_cache=tmp_path)


@pytest.mark.parametrize("given", [2, 1.5, (), []])
def test_a_family_needs_several(given):
    with pytest.raises(ValueError, match="target_speedup must be a sequence"):
        one_shot_family(FAMILIES["bert"](), texts(), given)


def test_forwards_of_a_shape():
    model = FAMILIES["bert"]()
    (batch,) = read_batches(model, texts([(3, 5)]))
    seen: dict[str, Tensor] = {}
    handle = model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        output = forward_of(batch, (4, 12))(model)()
    handle.remove()
    assert output[0].shape[:2] == (4, 12)
    assert seen["attention_mask"].all()
    assert torch.equal(seen["input_ids"][3, 5:10], batch.inputs.kwargs["input_ids"][0])


def test_forwards_of_features_in_the_models_dtype():
    for model, raw in (
        (torch_encoder(torch.float64), torch.randn(3, 5, 12)),
        (mlp(10, 24, 5).bfloat16(), torch.randn(3, 10)),
    ):
        (batch,) = read_batches(model, [raw])
        with torch.no_grad():
            output = forward_of(batch, (4, 12))(model)()
        assert output.shape == (4, *raw.shape[1:-1], output.shape[-1])
        assert output.dtype == next(model.parameters()).dtype


def test_really_timed(tmp_path):
    """No stub: a tiny model, its table on disk. Which width it takes, the clock decides."""
    model = mlp(64, 512, 64, 32).eval()
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    result = one_shot(
        model, x, target_speedup=1.1, latency_shape=(256, 1), latency_cache=tmp_path,
        round_multiplier=128, batch_size=128,
    )  # fmt: skip
    assert result.predicted.unit == "seconds"
    assert result.predicted.slim > 0
    assert len(result.plan.entries[0].keep) in (128, 256, 384, 512)
    assert len(list(tmp_path.iterdir())) == 1

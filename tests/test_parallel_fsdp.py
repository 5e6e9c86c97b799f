"""Pruning of models that fully_shard has sharded: scores add up over shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from parallel_cases import (
    SIZE,
    adamw,
    assert_same_run,
    double_model,
    outcome,
    pruned,
    rules_of,
    run,
)
from pruning_cases import make
from tiny_models import FAMILIES, text_inputs
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import slimkern
from slimkern.criteria import _unit_scores, reduce_units
from slimkern.cuts import linear_of
from slimkern.discovery import Member
from slimkern.shards import add_shares_, check_shards, local

STEPS = 8


def one(criterion, **values):
    model = double_model()
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of(criterion, **values))
    run(model, optimizer, STEPS)
    return outcome(model, pruning)


def sharded(mesh=None, **values):
    model = double_model()
    mesh = init_device_mesh("cpu", (SIZE,)) if mesh is None else mesh
    for layer in model:
        fully_shard(layer, mesh=mesh, **values)
    return fully_shard(model, mesh=mesh, **values)


def whole(model):
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: weight.clone() for name, weight in state.items()}


def fsdp(criterion, values, placement=None, mesh=None):
    model = sharded(mesh, **({} if placement is None else {"shard_placement_fn": placement}))
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of(criterion, **values))
    run(model, optimizer, STEPS, rank=dist.get_rank(), size=SIZE)
    return {**outcome(model, pruning), "model": whole(model)}


@pytest.mark.parametrize("criterion", ["magnitude", "gradient", "snip", "snip_momentum"])
@pytest.mark.parametrize(
    "values", [{}, {"criterion_reduce_type": "sum", "pruning_scope": "global"}]
)
def test_two_processes_with_shards_are_one(pair, criterion, values):
    first, second = pair(fsdp, criterion, values)
    assert first["plan"] == second["plan"]
    for name, score in first["state"]["scores"].items():
        assert torch.equal(score, second["state"]["scores"][name]), name
    assert_same_run(first, one(criterion, **values), STEPS)


def columns(parameter):
    return Shard(parameter.dim() - 1)


def hybrid(shape, criterion):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "slices"))
    return fsdp(criterion, {}, mesh=mesh)


@pytest.mark.parametrize("criterion", ["magnitude", "snip_momentum"])
def test_slices_of_columns(pair, criterion):
    first, second = pair(fsdp, criterion, {}, columns)
    assert first["plan"] == second["plan"]
    assert_same_run(first, one(criterion), STEPS)


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_copies_of_slices(pair, shape):
    first, second = pair(hybrid, shape, "snip_momentum")
    assert first["plan"] == second["plan"]
    assert_same_run(first, one("snip_momentum"), STEPS)


def shares(shapes):
    """Scores of odd weights in slices against those of the whole; the last rank's may be empty."""
    mesh, found = init_device_mesh("cpu", (SIZE,)), []
    for out, units, size in shapes:
        generator = torch.Generator().manual_seed(out)
        weight = torch.randn(out, units * size, generator=generator)
        for tensor, role in ((weight, "consumer"), (weight.T.contiguous(), "producer")):
            member = Member("a", size, role)
            for cut in (0, 1):
                part = distribute_tensor(tensor, mesh, [Shard(cut)])
                for reduce_type in ("mean", "sum"):
                    share = _unit_scores(local(part), part, member, reduce_type)
                    add_shares_({"a": share}, {"a": part})
                    found.append((share, reduce_units(tensor, member, reduce_type), tensor.numel()))
    return found


def test_shares_add_up_to_the_scores_of_the_whole(pair):
    shapes = [(1, 1, 1), (1, 17, 3), (63, 1, 5), (17, 63, 1), (130, 7, 9)]
    for share, wanted, terms in (row for rows in pair(shares, shapes) for row in rows):
        assert share.shape == wanted.shape
        error = (share - wanted).abs().max()
        assert error <= terms * torch.finfo(torch.float32).eps * max(1, wanted.abs().max())


CUT = {"pruning_scope": "local", "end_step": 3, "round_multiplier": 8}


def of_hugging_face(masks_first):
    model = FAMILIES["bert"]("ForSequenceClassification")
    if masks_first:
        zero = {**CUT, "end_step": 0, "pruning_type": "magnitude"}
        slimkern.prepare_pruning(model, slimkern.parse_auto_slim_config(model, None, 0.25, **zero))
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():  # leaves whole copies of the root's parameters behind
        model(**text_inputs())
    configs = slimkern.parse_auto_slim_config(model, None, 0.5, 0.5, **CUT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hooks = [dict(m._forward_pre_hooks) for m in model.modules()]
    pruning = slimkern.prepare_pruning(model, configs, optimizer)
    assert [dict(m._forward_pre_hooks) for m in model.modules()] == hooks
    for step in range(4):
        batch = text_inputs(4, 9, seed=2 * step + dist.get_rank())
        model(**batch).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pruning.done
    masked = model.eval()(**text_inputs()).logits.detach()
    for doing in (
        lambda: slimkern.model_slim(model),
        lambda: slimkern.slim_(model, pruning.plan()),
        lambda: slimkern.one_shot(model, [text_inputs()], ffn2_sparsity=0.5),
    ):
        with pytest.raises(slimkern.SurgeryError, match=r"sharded over ranks\. Gather the full"):
            doing()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank():
        return masked, None
    plain = FAMILIES["bert"]("ForSequenceClassification")
    plain.load_state_dict(state)
    return masked, slimkern.slim_(plain, pruning.plan())(**text_inputs()).logits.detach()


@pytest.mark.parametrize("masks_first", [False, True])
def test_three_calls_on_a_sharded_model_and_the_way_out(pair, masks_first):
    (masked, slim), (other, _) = pair(of_hugging_face, masks_first)
    torch.testing.assert_close(masked, other)
    torch.testing.assert_close(slim, masked, rtol=1e-4, atol=1e-4)


def refusals(folder):
    model = sharded()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match=r"='max' keeps a score of every element, and '0\.fc2' is"):
        pruned(model, optimizer, rules_of("snip", criterion_reduce_type="max"))
    with pytest.raises(ValueError, match=r"solves for whole weights, and '0\.fc2\.weight' is shar"):
        pruned(model, optimizer, rules_of("obs"), batches=[torch.zeros(1, 5, 8)])
    with pytest.raises(slimkern.CheckpointError, match=r"'0\.q\.weight' is sharded over ranks"):
        slimkern.save(model, folder / "a", rank=None)
    mesh = init_device_mesh("cpu", (1, SIZE))
    twice = {"a": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)])}
    with pytest.raises(ValueError, match="tensor parallelism is not supported"):
        check_shards(twice)
    linear = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(2)))
    for layer in linear:
        fully_shard(layer)
    with pytest.raises(slimkern.SurgeryError, match="give fully_shard the block around it"):
        linear_of(linear, Member("0", 1, "producer"))


def test_what_needs_whole_weights_is_refused(pair, tmp_path):
    pair(refusals, tmp_path)
    assert not list(tmp_path.iterdir())


def sharded_later(swap):
    """Prepared on the plain model, and sharded then, as accelerate does."""
    model = double_model()
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of("snip_momentum"))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    if swap:
        optimizer.param_groups[0]["params"][:] = list(model.parameters())
    run(model, optimizer, STEPS, rank=dist.get_rank(), size=SIZE)
    found = outcome(model, pruning)
    return {**found, "model": whole(model)}


def stale():
    with pytest.raises(RuntimeError, match="this optimizer still holds the old ones"):
        sharded_later(False)


def test_a_model_may_be_sharded_after_it_was_prepared(pair):
    first, second = pair(sharded_later, True)
    assert first["plan"] == second["plan"]
    assert_same_run(first, one("snip_momentum"), STEPS)
    pair(stale)


def in_bfloat16():
    model = make()
    for layer in model:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruning = pruned(model, optimizer, rules_of("snip_momentum"))
    for step in range(STEPS):
        x = torch.randn(
            2, 5, 8, generator=torch.Generator().manual_seed(2 * step + dist.get_rank())
        )
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    dead = whole(model)["0.fc2.weight"].abs().sum(0) == 0
    return pruning.plan().to_json(), pruning.plan()["0.fc2"].keep, (~dead).nonzero().flatten()


def test_mixed_precision_of_fully_shard(pair):
    (first, keep, live), (second, *_) = pair(in_bfloat16)
    assert first == second
    assert live.tolist() == list(keep)
    assert len(keep) == 32

"""What processes tell each other: sums, agreements, errors; and who writes a folder."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from parallel_cases import SIZE, adamw, double_model, pruned, rules_of, run
from tiny_models import FAMILIES

import slimkern
from slimkern.parallel import Ranks, message_device, ranks_of


def messages():
    ranks = ranks_of()
    mine = {"a": torch.arange(3.0) * (ranks.rank + 1), "b": torch.full((2, 2), 1 / 3).bfloat16()}
    received = torch.tensor([[ranks.rank, 5], [6, 7]]).T  # no contiguous memory
    ranks.spread_([received])
    texts = [ranks.first("" if ranks.rank else "from rank 0, ü"), ranks.first("")]
    flags = [ranks.any(False), ranks.any(ranks.rank == 1)]
    return (ranks.rank, ranks.size), ranks.mean(mine), received, texts, flags


def test_messages(pair):
    for rank, (place, mean, received, texts, flags) in enumerate(pair(messages)):
        assert place == (rank, SIZE)
        assert torch.equal(mean["a"], torch.arange(3.0) * 1.5)
        assert torch.equal(mean["b"], torch.full((2, 2), 1 / 3).bfloat16())
        assert received.tolist() == [[0, 6], [5, 7]]
        assert texts == ["from rank 0, ü", ""]
        assert flags == [False, True]


def test_a_process_that_is_alone_sends_nothing():
    ranks = ranks_of()
    assert ranks == Ranks()
    assert ranks.alone
    tensor = torch.ones(2)
    assert ranks.mean({"a": tensor})["a"] is tensor
    assert ranks.first("x") == "x"
    assert ranks.any(True)
    ranks.agree("what", {"a": 1})
    ranks.spread_([tensor])
    with pytest.raises(KeyError), ranks.together("failing"):
        raise KeyError("a")
    with pytest.raises(ValueError, match="not initialised"):
        ranks_of(object())


def fail(ranks):
    with ranks.together("reading"):
        if ranks.rank == 0:
            raise KeyError("gone")


def failures():
    ranks = ranks_of()
    told = []
    kind, words = [
        (KeyError, "gone"),
        (RuntimeError, "reading failed on rank 0: KeyError: 'gone'"),
    ][ranks.rank]
    with pytest.raises(kind, match=words):
        fail(ranks)
    with ranks.together("reading"):
        told.append("all is well")
    values = {"same": 1, "long": "x" * 1000 + str(ranks.rank)}
    with pytest.raises(
        RuntimeError, match=r"disagree on numbers:\n  long: .*x0' and .*x1'"
    ) as error:
        ranks.agree("numbers", values)
    assert "same" not in str(error.value)
    ranks.agree("numbers", {"same": 1})
    return told


def test_an_error_on_one_rank_is_an_error_on_all(pair):
    assert pair(failures) == [["all is well"]] * SIZE


CUT = {"pruning_scope": "local", "end_step": 3, "round_multiplier": 8}


def disagreeing():
    rank, model = dist.get_rank(), FAMILIES["bert"]()
    optimizer = torch.optim.AdamW(model.parameters())
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5 + 0.25 * rank, **CUT)
    with pytest.raises(RuntimeError, match=r"disagree on what to prune(.|\n)*0\.5(.|\n)*0\.75"):
        slimkern.prepare_pruning(model, configs, optimizer)
    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.5, **CUT)
    words = ("failed on rank 1: TypeError: unknown key", "unknown key 'end_stop'")[rank]
    config = {**configs[0], "end_stop": 4} if rank else configs
    with pytest.raises((RuntimeError, TypeError)[rank], match=words):
        slimkern.prepare_pruning(model, config, optimizer)
    other = torch.optim.AdamW(FAMILIES["bert"]().parameters()) if rank else optimizer
    words = ("rank 1: ValueError: optimizer= holds none", "holds none of the weights")[rank]
    with pytest.raises((RuntimeError, ValueError)[rank], match=words):
        slimkern.prepare_pruning(model, configs, other)
    slimkern.mask_(model, _one_head_less(model, rank))
    with pytest.raises(RuntimeError, match=r"disagree on what to prune(.|\n)*masks"):
        slimkern.prepare_pruning(model, configs, optimizer)


def _one_head_less(model, gone):
    group = next(g for g in slimkern.discover(model) if g.kind == "ffn")
    keep = tuple(i for i in range(group.num_units) if i != gone)
    return slimkern.SlimPlan((slimkern.PlanEntry(group, keep),))


def test_ranks_that_disagree_are_an_error(pair):
    pair(disagreeing)


def half_resumed(state):
    model = double_model()
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of("snip_momentum"))
    if dist.get_rank() == 1:
        pruning.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"disagree on where the run stands(.|\n)*step: '0' and"):
        run(model, optimizer, 1)


def test_a_state_that_one_rank_has_loaded_is_an_error_at_the_next_step(pair):
    model = double_model()
    optimizer = adamw(model)
    pruning = pruned(model, optimizer, rules_of("snip_momentum"))
    run(model, optimizer, 2)
    pair(half_resumed, pruning.state_dict())


def own_runs():
    groups = [dist.new_group([rank]) for rank in range(SIZE)]
    rank = dist.get_rank()
    model = double_model(rank)
    optimizer = adamw(model)
    rules = rules_of("snip_momentum", target_sparsity=0.25 * (rank + 1))
    pruning = pruned(model, optimizer, rules, process_group=groups[rank])
    run(model, optimizer, 6 + rank)
    with pytest.raises(ValueError, match="not in"):
        pruned(model, optimizer, rules, process_group=groups[1 - rank])
    return pruning.sparsity().ffn


def test_processes_with_models_of_their_own_give_groups_of_their_own(pair):
    assert pair(own_runs) == [0.25, 0.5]


def saved(folder):
    rank, model = dist.get_rank(), FAMILIES["bert"]()
    slimkern.save(model, folder / "shared")
    slimkern.save(model, folder / "second", rank=1)
    slimkern.save(model, folder / f"own{rank}", rank=None)
    with pytest.raises(ValueError, match="rank is 2; accepted: 0 to 1"):
        slimkern.save(model, folder / "nobody", rank=2)
    dist.barrier()
    slimkern.load(folder / "shared")


def test_one_rank_writes(pair, tmp_path):
    pair(saved, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["own0", "own1", "second", "shared"]


def test_messages_lie_where_the_groups_backend_serves_them(monkeypatch):
    """NCCL has no messages in the CPU's memory; a group with two backends takes either."""
    gpu = SimpleNamespace(current_device=lambda: 3)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: gpu)
    cpu, second = torch.device("cpu"), torch.device("cuda", 1)
    for backends, wanted in (
        (
            "cuda:nccl",
            {None: torch.device("cuda", 3), cpu: torch.device("cuda", 3), second: second},
        ),
        ("cpu:gloo,cuda:nccl", {None: cpu, cpu: cpu, second: second}),
        ("cpu:gloo", {None: cpu, cpu: cpu, second: cpu}),
    ):
        monkeypatch.setattr(dist, "get_backend_config", lambda group, told=backends: told)
        for asked, given in wanted.items():
            assert message_device(None, asked) == given

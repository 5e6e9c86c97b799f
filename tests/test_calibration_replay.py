"""A forward that is resumed layer after layer computes what a whole one does, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_cases import ENCODERS, batches_of, blocks, encoder, prepared, vectors, whole
from tiny_models import FAMILIES, HIDDEN, mlp, randomize
from torch import Tensor, nn

from slimkern.calibration.batches import Batch
from slimkern.calibration.record import record
from slimkern.calibration.replay import Replay, Seen
from slimkern.calibration.store import Store

MEMORY = [0, 2**30]


def resumed(
    model: nn.Module, batches: list[Batch], sites: list[str], memory: int
) -> dict[tuple[str, int], Seen]:
    """What is seen at every site, each time one site further."""
    seen: dict[tuple[str, int], Seen] = {}
    with Store(memory) as store:
        replay = Replay(model, record(model, batches[0], set(sites)), batches, store, "t")
        for name in sites:
            here: dict[int, Seen] = {}
            replay.to(name, list(range(len(batches))), here.__setitem__)
            replay.arrive(name)
            seen.update({(name, index): what for index, what in here.items()})
    return seen


def assert_resumed_is_whole(model: nn.Module, raw: Any, memory: int, sums: bool = True) -> None:
    batches, sites = prepared(model, raw)
    seen, truth = resumed(model, batches, sites, memory), whole(model, batches, sites)
    assert set(seen) == set(truth)
    assert len(sites) >= 3
    for key, (x, y, *after) in truth.items():
        assert torch.equal(seen[key].x, x), key
        assert torch.equal(seen[key].y, y), key
        if sums:  # in fp32 for half precision, so that only the norm's input is rounded
            assert torch.equal(seen[key].target.to(y.dtype), after[0]), key


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", ENCODERS)
def test_every_family(name, memory):
    assert_resumed_is_whole(encoder(name), batches_of(name), memory)


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_padding_on_the_left(name):
    assert_resumed_is_whole(encoder(name), batches_of(name, side="left"), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("memory", MEMORY)
def test_other_dtypes(dtype, memory):
    assert_resumed_is_whole(encoder("bert", dtype), batches_of("bert"), memory)


def test_a_plain_stack_has_no_residual():
    model = mlp(10, 24, 20, 16, 5)
    batches, sites = prepared(model, vectors())
    for (_, index), seen in resumed(model, batches, sites, 0).items():
        assert seen.residual is None, index
        assert seen.target is seen.y, index


def plus(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return x + h


def into_the_stream(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    x += h
    return x


def into_the_output(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    h += x
    return h


def into_an_old_stream(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    x.view(-1).add_(1)  # the norm's own output, by another name
    return torch.add(input=x, other=h)


def by_its_data(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    x.data.mul_(2)
    return h + x


def asked_for_numbers(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return x + h if float(x.abs().max()) > 0 else h


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in-place activation and dropout"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(
    "join",
    [plus, into_the_stream, into_the_output, into_an_old_stream, by_its_data, asked_for_numbers],
)
def test_ways_to_write_a_residual(join, memory, inplace):
    model = blocks(join, inplace=inplace)
    assert_resumed_is_whole(model, vectors(), memory)


@pytest.mark.parametrize(
    "join", [lambda m, x, h: x + 0.5 * h, lambda m, x, h: torch.add(x, h, alpha=2)]
)
def test_a_scaled_output_is_its_own_target(join):
    model = blocks(join)
    batches, sites = prepared(model, vectors())
    for seen in resumed(model, batches, sites, 0).values():
        assert seen.residual is None
    assert_resumed_is_whole(model, vectors(), 0, sums=False)


def test_a_norm_that_is_called_in_every_block():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(10)
            self.first = nn.ModuleList(nn.Linear(10, 24) for _ in range(3))
            self.second = nn.ModuleList(nn.Linear(24, 10) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for first, second in zip(self.first, self.second):
                x = x + second(torch.relu(first(self.norm(x))))
            return self.norm(x)

    torch.manual_seed(0)
    assert_resumed_is_whole(randomize(Shared()), vectors(), 0)


def test_an_activation_that_all_blocks_share():
    """Its first calls are in modules that are not run again."""

    class Block(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.first, self.second, self.act = nn.Linear(10, 24), nn.Linear(24, 10), act

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.second(self.act(self.first(x))) + x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            act = nn.GELU()
            self.blocks = nn.Sequential(*(Block(act) for _ in range(3)))
            self.out = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.blocks(x))

    torch.manual_seed(0)
    assert_resumed_is_whole(randomize(Model()), vectors(), 0, sums=False)


def test_outputs_that_share_memory_and_lie_across():
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 10, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.conv(x).transpose(1, 2)
            return x, x[:, 0], x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = Embedded(), blocks(plus)

        def forward(self, x: Tensor) -> Tensor:
            x, first, again = self.embed(x)
            return self.body(x + again) + self.body.out(first)[:, None]

    model = randomize(Model()).double()
    for rows in (1, 5):  # one row of a batch lies contiguously, and shares its memory when saved
        raw = [torch.randn(rows, 4, 33, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
        for memory in MEMORY:
            assert_resumed_is_whole(model, raw, memory)


def test_only_what_is_needed_is_stored():
    """Behind each second linear of BERT: its output and the residual stream, nothing else."""
    model = FAMILIES["bert"]()
    batches, sites = prepared(model, batches_of("bert"))
    entries = sum(b.inputs.kwargs["input_ids"].numel() for b in batches)
    with Store(2**30) as store:
        replay = Replay(model, record(model, batches[0], set(sites)), batches, store, "t")
        for name in sites:
            replay.to(name, [0, 1, 2], lambda i, s: None)
            replay.arrive(name)
            assert store.held == 2 * entries * HIDDEN * 4, name
        for index in (0, 1, 2):
            store.drop(("t", index))
        assert store.held == 0

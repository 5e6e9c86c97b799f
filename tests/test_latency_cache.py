"""The latency tables on disk: found again for the same question, measured again for another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from latency_cases import Clock, Forward, all_levels, refuse, straight
from tiny_models import FAMILIES
from torch import nn

import slimkern
from slimkern import latency, latency_cache, machine, timing
from slimkern.latency import measure_latency


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock(straight)
    monkeypatch.setattr(timing, "time_interleaved", made)
    return made


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, tuple[slimkern.Group, ...]]:
    model = FAMILIES["bert"]()
    return model, slimkern.discover(model).groups


def test_a_hit_is_read_without_measuring(bert, clock, tmp_path):
    model, groups = bert
    arguments = {"levels": all_levels(groups), "cache": tmp_path, "key": "3x9"}
    first = measure_latency(model, groups, Forward, **arguments)
    assert measure_latency(model, groups, refuse, **arguments) == first
    # A model of the same structure with other weights takes the same time.
    other = FAMILIES["bert"]()
    assert measure_latency(other, groups, refuse, **arguments) == first
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


def test_what_decides_the_time_decides_the_file(bert, clock, tmp_path, monkeypatch):
    model, groups = bert
    levels = all_levels(groups)

    def files(model=model, levels=levels, **arguments) -> int:
        measure_latency(model, groups, Forward, levels=levels, cache=tmp_path, **arguments)
        return len(list(tmp_path.iterdir()))

    assert files() == 1
    assert files(threads=torch.get_num_threads()) == 1
    assert files(key="8x128") == 2
    assert files(threads=torch.get_num_threads() + 1) == 3
    assert files(levels={**levels, groups[0].name: (4, 1)}) == 3  # what is measured is the same
    assert files(levels={g.name: (g.num_units, 1) for g in groups}) == 4
    assert files(FAMILIES["bert"](dtype=torch.bfloat16)) == 5
    assert files(FAMILIES["bert"](hidden_act="relu")) == 6
    assert files(FAMILIES["bert"](attention="eager")) == 7
    here = machine.machine()
    monkeypatch.setattr(machine, "machine", lambda: {**here, "cpu": "another"})
    assert files() == 8
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "another"})
    assert files() == 9
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert files() == 10
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "version": 0}),
        lambda text: json.dumps({**json.loads(text), "question": {}}),
        lambda text: json.dumps({**json.loads(text), "fixed": float("nan")}),
        lambda text: json.dumps({**json.loads(text), "tables": {}}),
        lambda text: json.dumps({**json.loads(text), "tables": [1]}),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_file_is_measured_again_and_replaced(bert, clock, tmp_path, damage):
    model, groups = bert
    arguments = {"levels": all_levels(groups), "cache": tmp_path}
    first = measure_latency(model, groups, Forward, **arguments)
    (path,) = tmp_path.iterdir()
    whole = json.loads(path.read_text())
    path.write_bytes(damage(path.read_text()).encode("utf-8", "surrogateescape"))
    runs, clock.runs = clock.runs, 0
    assert measure_latency(model, groups, Forward, **arguments) == first
    assert clock.runs == runs
    again = json.loads(path.read_text())
    whole.pop("measured"), again.pop("measured")
    assert again == whole
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_lies_in_the_users_cache_folder(bert, clock, tmp_path, monkeypatch):
    from slimkern.cli.fetch import default_cache_dir

    model, groups = bert
    for base in (str(tmp_path), "", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", base)
        assert latency_cache.default_folder() == default_cache_dir() / "latency"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure_latency(model, groups, Forward, levels=all_levels(groups))
    assert len(list((tmp_path / "slimkern" / "latency").iterdir())) == 1


def test_a_table_that_tells_nothing_is_not_kept(bert, clock, tmp_path):
    model, groups = bert
    clock.of_width = lambda kind, width: 1.0
    levels = all_levels(groups)
    flat = measure_latency(model, groups, Forward, levels=levels, cache=tmp_path)
    assert flat.total({g.name: min(levels[g.name]) for g in groups}) == flat.total({})
    assert list(tmp_path.iterdir()) == []
    clock.of_width = straight
    told = measure_latency(model, groups, Forward, levels=levels, cache=tmp_path)
    assert told.total({}) > told.fixed
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_timed(bert, tmp_path):
    model, groups = bert
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        measure_latency(
            model, groups, refuse, levels=all_levels(groups), cache=tmp_path / "file" / "cache"
        )


def test_float32_precision_is_read_after_the_settings_were_mixed(monkeypatch):
    assert latency._precision()[0] in ("highest", "high", "medium")

    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert latency._precision()[0] == "mixed"


def test_the_cache_is_a_path_or_its_text(bert, clock, tmp_path: Path):
    model, groups = bert
    costs = measure_latency(model, groups, Forward, levels={}, cache=str(tmp_path))
    assert measure_latency(model, groups, refuse, levels={}, cache=tmp_path) == costs

"""A remembered launch passes what Triton's own launch passes, to the same compiled variant.

No GPU is needed: kernels are compiled for one, and a stand-in for the driver notes what would have
been launched. Interpreted kernels are not launched at all, so this is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")


def note(argument: Any) -> Any:
    """An argument as far as it is the same in the next launch: without its address."""
    if isinstance(argument, tuple | list):
        return [note(part) for part in argument]
    if hasattr(argument, "block_shape"):
        return [note(argument.base), argument.shape, argument.strides, argument.block_shape]
    if hasattr(argument, "data_ptr"):
        aligned = argument.data_ptr() % 16 == 0
        return [str(argument.dtype), list(argument.shape), argument.stride(), aligned]
    return repr(argument)


def noted_launches() -> dict[str, Any]:
    """In a process without the interpreter: what each of a row of launches gave the driver."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, ...]] = []

    class Launcher:
        def __init__(self, source, metadata):
            self.name = metadata.hash

        def __call__(self, *arguments):
            x, y, z, stream, _function, _packed, _metadata, _enter, _exit, *rest = arguments
            launches.append((self.name, (x, y, z), stream, *map(note, rest)))

    utils = SimpleNamespace(
        load_binary=lambda name, kernel, shared, device: (0, 0, 32, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232448, "warpSize": 32},
    )
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: -1,
            get_current_stream=lambda device: 7,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_active_torch_device=lambda: torch.device("cpu"),
            launcher_cls=Launcher,
            utils=utils,
        )
    )
    torch.cuda.current_device = lambda: -1
    slow = {"count": 0}
    run = JITFunction.run

    def counted(self, *args, **kwargs):
        slow["count"] += 1
        return run(self, *args, **kwargs)

    JITFunction.run = counted

    from slimkern.ops import _gemm, _gemm_configs, _launch

    _gemm_configs.capability = lambda tensor: 90
    found = {}
    memory = torch.zeros(64 * 80 + 16)
    whole, shifted = (memory[at : at + 64 * 64].view(64, 64) for at in (0, 1))
    rows = torch.arange(5)
    x, w = (torch.zeros(64, 64, dtype=torch.float16) for _ in range(2))
    y = torch.empty(64, 64, dtype=torch.float16)
    calls = {
        "copy": lambda: _gemm.gathered(whole, rows, None),
        "copy of unaligned memory": lambda: _gemm.gathered(shifted, rows, None),
        "copy of all": lambda: _gemm.gathered(whole, None, None),
        "by pointers": lambda: _gemm.product(whole[:9], whole, out=whole[9:18]),
        "by descriptors": lambda: _gemm.product(x, w, out=y),
        "by descriptors, activated": lambda: _gemm.product(x, w, out=y, activation="relu"),
        "group": lambda: _gemm.grouped_products([whole[:9], whole], [whole, whole], [None, None]),
    }
    for name, call in calls.items():
        slow["count"], start = 0, len(launches)
        call()
        first_was_slow = slow["count"]
        call()
        found[name] = {"slow": [first_was_slow, slow["count"]], "launches": launches[start:]}
    slow["count"], start, entries = 0, len(launches), len(_launch._found)
    for tokens in (10, 11, 13):  # of the kind of 9: no multiple of 16, in the same bucket
        _gemm.product(whole[:tokens], whole, out=whole[20 : 20 + tokens])
    found["sizes"] = {
        "slow": slow["count"],
        "launches": launches[start:],
        "more": len(_launch._found) - entries,
    }
    _launch._MOST, most = 3, 0
    _launch._found.clear()
    for call in calls.values():
        call()
        most = max(most, len(_launch._found))
    found["most"] = most
    return found


@pytest.fixture(scope="module")
def noted():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def launched(noted):
    return {name: row for name, row in noted.items() if name not in ("sizes", "most")}


def test_the_second_launch_is_remembered_and_says_the_same(noted):
    rows = launched(noted)
    assert len(rows) == 7
    for name, row in rows.items():
        assert row["slow"] == [1, 1], name
        first, second = row["launches"]
        assert first == second, name


def test_variants_are_told_apart(noted):
    variants = [row["launches"][0][0] for row in launched(noted).values()]
    assert len(set(variants)) == len(variants)


def test_sizes_that_change_are_remembered_as_one_and_passed_as_they_are(noted):
    row, before = noted["sizes"], noted["by pointers"]["launches"][0]
    assert (row["slow"], row["more"]) == (0, 0)
    assert len(row["launches"]) == 3
    for tokens, launch in zip((10, 11, 13), row["launches"], strict=True):
        assert launch[0] == before[0]
        assert launch.count(str(tokens)) == 1


def test_what_is_remembered_has_a_bound(noted):
    assert noted["most"] == 3


if __name__ == "__main__":
    print(json.dumps(noted_launches()))

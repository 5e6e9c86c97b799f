"""The machine and the versions: what stands above every figure."""

from __future__ import annotations

import torch

from slimkern import machine


def test_the_machine_is_described():
    here = machine.machine()
    assert here["cpu"]
    assert here["cores"] >= 1
    assert here["isa"] in ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
    line = machine.machine_line()
    assert here["cpu"] in line
    assert f"torch {torch.__version__}" in line
    assert machine.versions()["torch"] == torch.__version__
    assert machine.now().endswith("+00:00")

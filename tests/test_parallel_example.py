"""The example for several processes, by its own torchrun lines: masks as those of one process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import slimkern

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_parallel.py"
STEPS = "26"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process ends with."""
    folder = tmp_path_factory.mktemp("alone") / "slim"
    spec = importlib.util.spec_from_file_location("train_parallel", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--steps", STEPS, "--output", str(folder)])
    return folder


@pytest.mark.parametrize("how", [[], ["--shard"]])
def test_example(alone, tmp_path, how):
    folder = tmp_path / "slim"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(EXAMPLE), "--steps", STEPS, "--output", str(folder)]
    done = subprocess.run(
        [*command, *how],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"rank 1: FFN of 64 channels, saved to {folder}" in done.stdout
    assert (folder / "slim_plan.json").read_text() == (alone / "slim_plan.json").read_text()
    assert slimkern.load(folder).slim_plan == slimkern.load(alone).slim_plan

"""Two processes that run a test's functions together, and a training that both can share."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from pruning_cases import FFNS, HIDDEN, MHAS, make, rule
from torch import multiprocessing

from slimkern.pruning import Pruning
from slimkern.shards import is_sharded

SIZE = 2
PATIENCE = 120  # seconds: what takes longer hangs


class Pair:
    """Two processes in one gloo group that stay; calling it runs a function in both.

    A failure, or a hang, ends them: the next call starts new ones.
    """

    def __init__(self):
        self.processes, self.pipes, self.folder = [], [], None

    def __call__(self, task, *args, patience=PATIENCE):
        """The results of ``task(*args)`` by rank; ``task`` is a function of a test's module."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((task, args))
        deadline, results = time.monotonic() + patience, []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0, deadline - time.monotonic())):
                self.close()
                raise TimeoutError(f"rank {rank} has not answered in {patience} s; {results}")
            results.append(pipe.recv())
        failed = [f"rank {rank}:\n{told}" for rank, (good, told) in enumerate(results) if not good]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [told for _, told in results]

    def close(self):
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        if self.folder is not None:
            self.folder.cleanup()
        self.__init__()

    def _start(self):
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(SIZE):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, f"{self.folder.name}/store", there), daemon=True
            )
            process.start()
            self.processes.append(process)
            self.pipes.append(here)


def _serve(rank, store, pipe):
    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    os.environ.update(dict(zip(names, map(str, (rank, rank, SIZE, SIZE)))))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=patience
    )
    while True:
        task, args = pipe.recv()
        try:
            pipe.send((True, task(*args)))
        except BaseException:  # noqa: BLE001 - told to the test, which fails
            pipe.send((False, traceback.format_exc()))


def rules_of(criterion, **values):
    """FFN channels and heads, half of each, over 6 steps."""
    values = {"pruning_type": criterion, "end_step": 6, **values}
    return [rule(p, **values) for p in ("channelx1", "mha")]


def pruned(model, optimizer, rules, **values):
    """The training-time object of a model of ``pruning_cases``."""
    pairs = [(r, FFNS if r.pattern == "channelx1" else MHAS) for r in rules]
    return Pruning(model, pairs, optimizer, **values)


def double_model(seed=0):
    """A model in fp64, in which runs that round differently stay together."""
    return make(seed).double()


def adamw(model):
    """AdamW with an eps that keeps gradients which are zero but for rounding from being scaled up
    to the rate (those of a key's bias)."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def run(model, optimizer, steps, first=0, micro_batches=1, rank=0, size=1):
    """Train on this rank's share of global batches of 4 rows."""
    rows = slice(rank * 4 // size, (rank + 1) * 4 // size)
    for i in range(first, first + steps):
        for j in range(micro_batches):
            generator = torch.Generator().manual_seed(1000 * i + j)
            x = torch.randn(4, 5, HIDDEN, generator=generator, dtype=torch.float64)[rows]
            last = j == micro_batches - 1
            unsynced = nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
            with unsynced:
                (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_run(found, wanted, steps):
    """Masks equal, weights and scores to rounding.

    Sums of gradients of size 1 are reassociated (fp64): errors of up to 1e3 eps. :func:`adamw`
    passes them on to a weight by at most rate / eps = 10 per step. Scores are fp32.
    """
    assert found["plan"] == wanted["plan"]
    eps = torch.finfo(torch.float64).eps
    for name, weight in wanted["model"].items():
        assert (found["model"][name] - weight).abs().max() <= steps * 1e4 * eps, name
    for name, score in wanted["state"]["scores"].items():
        torch.testing.assert_close(found["state"]["scores"][name], score, rtol=1e-5, atol=0)
    assert found["state"]["step"] == wanted["state"]["step"]


def outcome(model, pruning):
    """What a run ended with, as plain data."""
    weights = {n: w.detach().clone() for n, w in model.state_dict().items() if not is_sharded(w)}
    return {"plan": pruning.plan().to_json(), "model": weights, "state": pruning.state_dict()}

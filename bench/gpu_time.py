"""Calls as CUDA graphs: what a GPU needs for a piece of work, without the host in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch

from bench.work import Outputs
from slimkern.timing import Interleaved, no_garbage_collection

REPLAY = 5e-4  # seconds: a graph holds as many calls as take about this long
ROUND = 5e-3  # seconds of one candidate in a round
FEWEST, MOST = 6, 15  # rounds
MOST_CALLS = 64


class Replay:
    """A call captured in a CUDA graph, several times over where it is short.

    Replays read and write the same memory, so that what fits stays in the L2 cache.

    Attributes:
        calls: in the graph.
        outputs: tensors that every replay writes.

    Raises:
        RuntimeError: the call can't be captured: it waits for the device, or allocates on it by
            another way than torch's.
    """

    def __init__(self, call: Callable[[], Outputs]) -> None:
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(warm)
        torch.cuda.synchronize()
        self._capture(call, 1)
        once = min(self._seconds() for _ in range(3))
        self.calls = max(1, min(MOST_CALLS, math.ceil(REPLAY / once)))
        if self.calls > 1:
            self._capture(call, self.calls)

    def _capture(self, call: Callable[[], Outputs], calls: int) -> None:
        """As ``torch.cuda.graph`` does it, which besides collects all garbage: seconds of a run."""
        self.outputs: Outputs = ()
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._graph.capture_begin()
            try:
                for _ in range(calls):
                    self.outputs = call()
            except BaseException:
                with suppress(RuntimeError):  # the capture is lost; its reason is the first error
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self) -> None:
        """One replay; does not wait for it."""
        self._graph.replay()

    def _seconds(self) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


class Direct:
    """A call as it is: launched from Python, or on a CPU."""

    calls = 1

    def __init__(self, call: Callable[[], Outputs]) -> None:
        self._call = call

    def __call__(self) -> None:
        self._call()


def time_in_turns(
    runs: Mapping[str, Replay | Direct], seconds: float, most: int = MOST, least: float = ROUND
) -> dict[str, list[float]]:
    """Seconds of one call, round by round, every run once in each round.

    Args:
        runs: warm.
        seconds: about how long all rounds may take together.
        most: rounds; the first one, by which their number is found, counts where it is the only.
        least: seconds of one candidate in a round.
    """
    turns = Interleaved(runs, min_seconds=least)
    first = turns.round()
    if most == 1:
        return {name: [value / runs[name].calls] for name, value in first.items()}
    spent = sum(turns.repeats[name] * value for name, value in first.items())
    rounds = min(most, max(FEWEST, int(seconds / max(spent, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    with no_garbage_collection():
        for _ in range(rounds):
            for name, value in turns.round().items():
                found[name].append(value / runs[name].calls)
    return found

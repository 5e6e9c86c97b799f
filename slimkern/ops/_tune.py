"""Configurations chosen by measurement, for those who ask for it: ``with tuning():``.

Without it the tables' default stands, which depends on sizes alone. With it each new problem is
timed once per configuration that the device can hold; what is found is kept in the folder of
Triton's own cache, for the GPU and the release of Triton that it was measured with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.testing import do_bench

from slimkern.ops._tile import INTERPRETED, Tile

_FILE = "slimkern_tile.json"
_active = False
_best: dict[str, Tile] = {}


@contextmanager
def tuning(active: bool = True) -> Iterator[None]:
    """Within it, kernels choose their configurations by measurement."""
    global _active
    before = _active
    _active = active
    try:
        yield
    finally:
        _active = before


def holds(tile: Tile, itemsize: int, shared: int, accumulators: int = 1) -> bool:
    """Whether a multiprocessor has the memory and the registers for a configuration.

    Args:
        tile: the configuration.
        itemsize: bytes of an element.
        shared: bytes of shared memory that one program may take.
        accumulators: how many tiles of float32 sums a program keeps.
    """
    operands = (tile.a + accumulators * tile.b) * tile.k * itemsize * tile.stages
    sums = accumulators * tile.a * tile.b // (32 * tile.warps)
    # 255 registers a thread, of which addresses and operands need a share.
    return operands <= shared and sums <= 160


def fastest(
    name: str,
    sizes: tuple[Any, ...],
    on: Tensor,
    tiles: Sequence[Tile],
    default: Tile,
    attempt: Callable[[Tile], None],
    accumulators: int = 1,
) -> Tile:
    """The configuration that took the least time, or ``default`` where nothing may be measured.

    Args:
        name: the kernel's.
        sizes: whatever else tells one problem from another; sizes by their bucket.
        on: a tensor on the device.
        tiles: the configurations.
        default: what is taken outside `tuning`, in a CUDA graph and in the interpreter.
        attempt: launches the kernel with a configuration.
        accumulators: as in `holds`.
    """
    if not _active or INTERPRETED.value or not on.is_cuda:
        return default
    properties = torch.cuda.get_device_properties(on.device)
    text = repr((name, sizes, on.dtype, properties.name, triton.__version__, tiles))
    key = hashlib.sha256(text.encode()).hexdigest()
    if key not in _best:
        cache = get_cache_manager(key)
        stored = cache.get_file(_FILE)
        if stored is not None:
            _best[key] = Tile(*json.loads(Path(stored).read_text()))
        elif torch.cuda.is_current_stream_capturing():
            return default
        else:
            shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
            size = on.element_size()
            fitting = [t for t in tiles if holds(t, size, shared, accumulators)] or [default]
            times = [do_bench(lambda t=t: attempt(t), warmup=5, rep=20) for t in fitting]
            _best[key] = fitting[times.index(min(times))]
            cache.put(json.dumps(_best[key]), _FILE, binary=False)
    return _best[key]

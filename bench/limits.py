"""The machine's own limits, and how long a piece of work would take if only they counted.

``measure`` finds how fast the machine multiplies in registers and how fast it reads working sets
of several sizes; ``floor`` turns that into a bound: no provider can do the work in less time, as
long as it computes the matrix products as products and touches every number once. The machine is
shared and its clock moves, so every figure is the best of many short windows spread over the
whole measurement.

What a bound leaves out makes it lower, never higher: that writing costs more than reading, that
products and traffic get into each other's way, that not everything is a matrix product.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from bench import probe
from bench.work import Setting, Work
from slimkern import cpu
from slimkern.report.speed_schema import Limit, Precision

KIB, MIB = 2**10, 2**20
_UNITS = ("fp32 FMA", "bf16 dot", "AMX bf16", "fp32 matmul", "tf32 matmul", "bf16 matmul")
_ONE = dict.fromkeys(_UNITS, 1)
_SIX = {"bf16 dot": 6, "AMX bf16": 6, "bf16 matmul": 6, "tf32 matmul": 3}
_THREE = {"bf16 dot": 3, "AMX bf16": 3, "bf16 matmul": 3}
PRODUCTS: dict[Precision, dict[str, int]] = {
    "fp32": _ONE | _SIX,
    "fp32-high": _ONE | _THREE,
    "fp32-medium": _ONE,
    "bf16": _ONE,
}
"""Precision -> unit -> how many of the unit's products make one product of that precision.

A float32 is the sum of three bf16 numbers: six of the nine products of two such sums are as
accurate as float32, and three of the four products of two-part sums are as accurate as ``high``
asks for. Of tf32 parts, two and three products are enough for float32."""

SECONDS = 2.0
ROUNDS = 8
_SLICES = (16 * KIB, 256 * KIB, 512 * KIB, MIB)  # of each thread: its own caches
_SETS = (4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)  # of all threads together
_CUDA_SETS = (16 * MIB, 64 * MIB, 256 * MIB, 1024 * MIB)


def measure(threads: int, device: str = "cpu") -> list[Limit]:
    """The machine's limits with ``threads`` threads, in about four seconds.

    On a CPU, from the probe: ``fp32 FMA``, the fastest of the fp32 loops, which follow by
    themselves (``fp32 FMA avx512``, ``fp32 FMA avx2`` and ``fp32 scalar``, of what the processor
    has); ``bf16 dot`` and ``AMX bf16`` where there are such units; and reading working sets that
    are shared out among the threads. The name says where a set of that size lies (``L1 read``,
    ``L2 read``, ``L3 read``, ``memory read``; only ``read`` where the system does not tell its
    caches). Sets are read forwards and backwards in turn, so that each pass first meets what the
    last one left in the caches: as much of it as any order can find there.

    On a GPU, from torch: ``fp32 matmul``, ``tf32 matmul``, ``bf16 matmul``, and copies (``L2
    copy``, ``memory copy``; bytes read and written). There a limit is what cuBLAS and a copy
    reach, not what the units could.

    Raises:
        ValueError: ``threads`` is under 1, or ``device`` is neither ``cpu`` nor ``cuda``.
        bench.probe.ProbeError: no C++ compiler, or the system refuses memory or threads.
        RuntimeError: ``device`` is ``cuda`` and torch sees no GPU.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; accepted: at least 1")
    if device == "cpu":
        return _measure_cpu(threads)
    if device != "cuda":
        raise ValueError(f"device is {device!r}; accepted: 'cpu' or 'cuda'")
    if not torch.cuda.is_available():
        raise RuntimeError("device is 'cuda', but torch.cuda.is_available() is False here")
    cache = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))
    return torch_limits("cuda", width=8192, sizes=_CUDA_SETS, cache=cache)


def bytes_of(work: Work, precision: Precision) -> float:
    """Bytes that must move at least once.

    Two for each value in ``bf16`` and ``fp32-medium`` (which may keep a float32 model's weights
    in bfloat16), four in ``fp32`` and ``fp32-high`` (two bf16 parts, or a float32).
    """
    return work.values * (2 if precision in ("bf16", "fp32-medium") else 4)


def floor(work: Work, setting: Setting, limits: Sequence[Limit]) -> tuple[float, str]:
    """Seconds that the limits alone would take, and the name of the one that binds.

    The larger of two times. Products: ``work.flops`` on the unit that is fastest in the
    precision; float32 may be computed in bf16 parts (``PRODUCTS``). Traffic: every byte once,
    at the fastest speed measured with a working set of the same size or the next smaller one, or
    with any larger one: a set that lies between two measured sizes may still fit into the cache
    of the smaller.

    Args:
        limits: of ``measure``, with the setting's threads and device.

    Raises:
        ValueError: ``limits`` lacks a unit or a speed of reading.
    """
    wanted = PRODUCTS[setting.precision]
    units = [(e["value"] / wanted[e["name"]], e["name"]) for e in limits if e["name"] in wanted]
    moves = [e for e in limits if e["unit"] == "byte/s"]
    if not units or not moves:
        named = ", ".join(e["name"] for e in limits) or "nothing"
        raise ValueError(
            f"limits has {named}; needed: one of {', '.join(wanted)}, and one in byte/s"
        )
    moved = bytes_of(work, setting.precision)
    smaller = [e["size"] for e in moves if e["size"] <= moved]
    size = max(smaller) if smaller else 0
    speed, level = max((e["value"], e["name"]) for e in moves if e["size"] >= size)
    peak, unit = max(units)
    return max((work.flops / peak, unit), (moved / speed, level))


def best_of(*runs: Sequence[Limit]) -> list[Limit]:
    """The best of several measurements with the same threads: of before and after a long run.

    Raises:
        ValueError: they did not measure the same limits.
    """
    keys = [[(e["name"], e["size"]) for e in run] for run in runs]
    if not runs or any(key != keys[0] for key in keys):
        raise ValueError(f"runs have the limits {keys}; accepted: the same ones in each")
    return [max(same, key=lambda e: e["value"]) for same in zip(*runs)]


def format_limits(limits: Sequence[Limit]) -> str:
    """One line for each limit, for a terminal."""
    lines = []
    for entry in limits:
        name = entry["name"]
        if entry["size"]:
            name += f", {_size(entry['size'])}"
        unit = "GFLOP/s" if entry["unit"] == "flop/s" else "GB/s"
        lines.append(f"{name:<24} {entry['value'] / 1e9:>10,.1f} {unit}")
    return "\n".join(lines)


def _size(size: int) -> str:
    return f"{size / MIB:.4g} MiB" if size >= MIB else f"{size / KIB:.4g} KiB"


def cache_sizes() -> dict[str, int]:
    """``L1``, ``L2`` and ``L3`` -> bytes of one such data cache; what is not known is missing.

    From the kernel's own table where there is one; ``sysconf`` else (which on some virtual
    machines multiplies the L3 by the cores of the host).
    """
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*")):
        try:
            kind, level, size = (
                (index / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K") and size[:-1].isdigit():
            found[f"L{level}"] = int(size[:-1]) * KIB
    return found or _sysconf_cache_sizes()


def _sysconf_cache_sizes() -> dict[str, int]:
    names = {"L1": "SC_LEVEL1_DCACHE_SIZE", "L2": "SC_LEVEL2_CACHE_SIZE"}
    names["L3"] = "SC_LEVEL3_CACHE_SIZE"
    known = getattr(os, "sysconf_names", {})
    sizes = {level: os.sysconf(name) for level, name in names.items() if name in known}
    return {level: size for level, size in sizes.items() if size > 0}


def working_sets(threads: int, caches: dict[str, int]) -> list[tuple[int, str]]:
    """The (size in bytes of all threads together, name) to be read, in rising order.

    The last one is at least four times the L3, so that most of it has to come from memory.
    """
    unit = threads * probe.PAGE
    last = max(_SETS[-1], 4 * caches.get("L3", 0), 4 * threads * _SLICES[-1])
    shared = [size for size in (*_SETS[:-1], last) if size > threads * _SLICES[-1]]
    sizes = [threads * part for part in _SLICES] + [size // unit * unit for size in shared]
    return [(size, _read_name(size, threads, caches)) for size in sizes]


def _read_name(size: int, threads: int, caches: dict[str, int]) -> str:
    if not caches:
        return "read"
    for level, part in (("L1", size // threads), ("L2", size // threads), ("L3", size)):
        if part <= caches.get(level, 0):
            return f"{level} read"
    return "memory read"


def _measure_cpu(threads: int) -> list[Limit]:
    has = [kind for kind, there in cpu.features().items() if there and kind in probe.KINDS]
    widest = [kind for kind in has if kind in ("scalar", "avx2", "avx512")][-1]
    sets = working_sets(threads, cache_sizes())
    measured = probe.load()
    stride = sets[-1][0] // threads
    best: dict[tuple[str, int], float] = {}
    with measured.buffer(stride, threads) as address:
        spell = SECONDS / ROUNDS / (len(has) + len(sets))
        for _ in range(ROUNDS):
            for kind in has:
                value = measured.flops(kind, threads, spell)
                best[kind, 0] = max(best.get((kind, 0), 0.0), value)
            for size, name in sets:
                # a pass over memory takes long: more time, for as many chances to be undisturbed
                time_for = 3 * spell if size >= _SETS[-2] else spell
                value = measured.read(widest, address, stride, size, threads, time_for)
                best[name, size] = max(best.get((name, size), 0.0), value)
    names = {"scalar": "fp32 scalar", "avx2": "fp32 FMA avx2", "avx512": "fp32 FMA avx512"}
    names |= {"avx512_bf16": "bf16 dot", "amx": "AMX bf16"}
    fp32 = max(best[kind, 0] for kind in has if names[kind].startswith("fp32"))
    limits = [Limit(name="fp32 FMA", unit="flop/s", value=fp32, size=0)]
    limits += [Limit(name=names[k], unit="flop/s", value=best[k, 0], size=0) for k in has[::-1]]
    limits += [Limit(name=n, unit="byte/s", value=best[n, s], size=s) for s, n in sets]
    return limits


def torch_limits(device: str, width: int, sizes: Sequence[int], cache: int) -> list[Limit]:
    """Matrix products of ``width`` x ``width`` and copies of working sets, as torch does them.

    Args:
        sizes: bytes of a working set: what is read and what is written.
        cache: bytes of the device's L2, for the names.
    """
    before = torch.get_float32_matmul_precision()
    kinds = (
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bf16", torch.bfloat16, "highest"),
    )
    limits = []
    try:
        for name, dtype, precision in kinds:
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            took = _fastest(partial(torch.mm, a, b, out=out), device)
            limits.append(
                Limit(name=f"{name} matmul", unit="flop/s", value=2.0 * width**3 / took, size=0)
            )
    finally:
        torch.set_float32_matmul_precision(before)
    for size in sizes:
        source = torch.ones(size // 8, dtype=torch.float32, device=device)
        target = torch.zeros_like(source)
        took = _fastest(partial(target.copy_, source), device)
        name = "L2 copy" if size <= cache else "memory copy"
        limits.append(Limit(name=name, unit="byte/s", value=size / took, size=size))
    return limits


def _fastest(call: Callable[[], object], device: str, calls: int = 5, rounds: int = 8) -> float:
    """Seconds of one call: the best of several rounds of several calls without a wait between."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    seconds = []
    for _ in range(rounds):
        wait()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        seconds.append((time.perf_counter() - begun) / calls)
    return min(seconds)

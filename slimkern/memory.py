"""How far the memory of the process rises while something runs."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_PROC = Path("/proc/self")


def unavailable(device: str = "cpu") -> str | None:
    """Why ``peak_growth`` can't tell on this system, or None where it can."""
    if device == "cuda":
        return None if torch.cuda.is_available() else "torch sees no GPU"
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} has no /proc/self/clear_refs: only Linux lets a peak start anew"
    try:
        _field("VmHWM")
        _restart_peak()
    except (OSError, ValueError) as error:
        return f"the peak of the resident memory can not be read and restarted here ({error})"
    return None


def peak_growth(call: Callable[[], Result], device: str = "cpu") -> tuple[Result, int | None]:
    """Runs ``call`` and tells how far the memory in use rose over what it was before, in bytes.

    On a CPU: the highest resident memory of the process during the call, less the resident memory
    before it, of all threads and libraries alike; a runtime's own arena counts as soon as it is
    touched. The heap's free pages are handed back to the system first (glibc's ``malloc_trim``),
    so that the call can't live on what others left; ``None`` where the system does not tell
    (``unavailable`` says why).

    What it can't see: memory that another allocator keeps for reuse, touched before the call (a
    second call in the same runtime seems free: measure the first one); free pieces of heap pages
    that are in use otherwise; pages that were swapped out, and file pages (mapped weights) that
    were in the process already. The kernel counts in batches of some dozen pages for each thread,
    so a few hundred KiB are noise. Garbage of the call that has not been collected at its end is
    part of the peak, as it is for a user. ``getrusage``'s maximum starts anew too.

    On a GPU: the highest memory of torch's allocator on the current device, less that before;
    the CUDA context and what libraries allocate by themselves are not in it.

    Raises:
        ValueError: ``device`` is neither ``cpu`` nor ``cuda``.
        RuntimeError: ``device`` is ``cuda`` and there is none.
    """
    if device == "cuda":
        return _cuda_growth(call)
    if device != "cpu":
        raise ValueError(f"device is {device!r}; accepted: 'cpu' or 'cuda'")
    if unavailable() is not None:
        return call(), None
    gc.collect()
    _trim_heap()
    _restart_peak()
    before = _field("VmRSS")
    result = call()
    return result, max(0, _field("VmHWM") - before)


def _cuda_growth(call: Callable[[], Result]) -> tuple[Result, int]:
    reason = unavailable("cuda")
    if reason is not None:
        raise RuntimeError(f"device is 'cuda', but {reason}")
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, max(0, torch.cuda.max_memory_allocated() - before)


def _restart_peak() -> None:
    """Sets ``VmHWM`` back to ``VmRSS`` (Linux 4.0; proc(5), ``clear_refs``)."""
    (_PROC / "clear_refs").write_text("5")


def _field(name: str) -> int:
    """A field of ``/proc/self/status``, in bytes.

    Raises:
        ValueError: there is no such field.
    """
    found = re.search(rf"^{name}:\s+(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"no {name} in {_PROC / 'status'}")
    return int(found.group(1)) * 1024


def _trim_heap() -> None:
    """Hands free heap pages back to the system; a C library other than glibc keeps them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))

"""``bench/peaks.cpp``, compiled on first use and called."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimkern.latency_cache import default_folder

SOURCE = Path(__file__).with_name("peaks.cpp")
HEADER = Path(__file__).with_name("windows.h")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-w"]
KINDS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")
"""What the probe has a loop for, under the names of ``slimkern.cpu.features``, in its order."""

PAGE = 4096
"""Bytes; what is read is made of whole ones."""


class ProbeError(RuntimeError):
    """The probe can't be compiled or can't run here; the message says why."""


class Probe:
    """The compiled probe. Every call runs its threads anew, unpinned, and returns the best window.

    Raises:
        ProbeError: from every method, where the system refuses memory or threads.
    """

    def __init__(self, library: Path) -> None:
        double, integer, pointer = ctypes.c_double, ctypes.c_int64, ctypes.c_void_p
        self._library = ctypes.CDLL(str(library))
        for name, result, arguments in (
            ("peaks_flops", double, [ctypes.c_int, ctypes.c_int, double]),
            ("peaks_buffer", pointer, [integer, ctypes.c_int]),
            ("peaks_free", None, [pointer]),
            (
                "peaks_read",
                double,
                [ctypes.c_int, pointer, integer, integer, ctypes.c_int, double],
            ),
        ):
            function = getattr(self._library, name)
            function.restype, function.argtypes = result, arguments

    def flops(self, kind: str, threads: int, seconds: float) -> float:
        """Multiply-adds in registers, flop/s of all threads; ``kind`` is one of ``KINDS``.

        fp32 for the first three kinds, bf16 with fp32 sums for the others. The processor must
        have the kind: an unknown instruction would end the process.
        """
        return _rate(self._library.peaks_flops(KINDS.index(kind), threads, seconds), kind, threads)

    @contextmanager
    def buffer(self, stride: int, threads: int) -> Iterator[int]:
        """The address of memory to read from, ``stride`` bytes for each thread."""
        address = self._library.peaks_buffer(stride, threads)
        if address is None:
            raise ProbeError(f"no {stride * threads / 2**20:.0f} MiB of memory to read from")
        try:
            yield address
        finally:
            self._library.peaks_free(address)

    def read(
        self, kind: str, address: int, stride: int, size: int, threads: int, seconds: float
    ) -> float:
        """Reads ``size`` bytes of a ``buffer`` again and again, byte/s of all threads.

        Each thread reads its own ``size / threads`` bytes: whole pages, at most ``stride``.
        """
        part = size // threads
        if part % PAGE or not PAGE <= part <= stride:
            raise ValueError(
                f"size is {size}; accepted: for each of {threads} threads, whole pages of {PAGE} "
                f"bytes, at least one and at most {stride} bytes"
            )
        number = KINDS.index(kind)
        rate = self._library.peaks_read(number, address, stride, part, threads, seconds)
        return _rate(rate, kind, threads)


def load(folder: Path | None = None) -> Probe:
    """The probe, compiled with ``CXX`` (or ``c++``) unless the same one lies in ``folder``.

    Args:
        folder: where the library lies under the hash of what made it; by default in slimkern's
            own part of the user's cache folder.

    Raises:
        ProbeError: there is no compiler, or it does not accept the source.
    """
    command = [*(shlex.split(os.environ.get("CXX", "")) or ["c++"]), *FLAGS]
    folder = default_folder().parent / "probe" if folder is None else folder
    made_of = [SOURCE.read_bytes(), HEADER.read_bytes(), repr([command, sys.platform]).encode()]
    name = hashlib.sha256(b"\0".join(made_of)).hexdigest()[:24]
    library = folder / f"peaks-{name}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".peaks-", dir=folder) as scratch:
            fresh = Path(scratch) / library.name
            _compile([*command, str(SOURCE), "-o", str(fresh)])
            os.replace(fresh, library)
    return Probe(library)


def _compile(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except OSError as error:
        raise ProbeError(
            f"the machine's limits are measured by a C++20 probe, and {command[0]!r} can not be "
            f"run ({error}); install g++ or clang++, or name one in CXX"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ProbeError(
            f"{shlex.join(command)} failed: {error.stderr.strip()[-800:] or error}"
        ) from error


def _rate(value: float, kind: str, threads: int) -> float:
    if value == -1:
        raise ProbeError(f"this compiler or system has no {kind} loop")
    if value < 0:
        raise ProbeError(f"the system refused one of {threads} threads")
    return float(value)

"""What this machine is, and which versions run on it: the line above every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import TypedDict

import torch


class Machine(TypedDict, total=False):
    """Where numbers were taken; :func:`machine` fills it in."""

    cpu: str
    """The processor's own name."""
    cores: int
    """Logical cores the process may use."""
    isa: str
    """``scalar, avx2, avx512, avx512_bf16, amx``: what slimkern's kernels use."""
    memory_gib: float
    gpu: str
    driver: str
    """Of the GPU, as its vendor numbers it."""
    system: str


def machine() -> Machine:
    """What this machine is: processor, cores the process may use, memory, ISA, GPU, system."""
    found = Machine(
        cpu=_cpu_model(),
        cores=_usable_cores(),
        isa=_isa(),
        system=f"{platform.system()} {platform.machine()}",
    )
    memory = _memory_gib()
    if memory is not None:
        found["memory_gib"] = memory
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
        driver = _gpu_driver()
        if driver is not None:
            found["driver"] = driver
    return found


def versions(*further: str) -> dict[str, str]:
    """The versions that decide the numbers, of what is installed. Nothing is imported for it.

    Args:
        further: names of distributions beside those that slimkern itself needs.
    """
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in (
        "slimkern",
        "torch",
        "transformers",
        "triton",
        "numpy",
        "safetensors",
        *further,
    ):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The date and time, ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine_line() -> str:
    """One line to print above numbers: machine, ISA, threads, torch, date."""
    here = machine()
    parts = [
        here["cpu"],
        f"{here['cores']} cores",
        f"ISA {here['isa']}",
        f"{torch.get_num_threads()} threads",
        f"torch {torch.__version__}",
        now(),
    ]
    if "gpu" in here:
        parts.insert(1, here["gpu"])
    return ", ".join(parts)


def _cpu_model() -> str:
    """The processor's name as the system tells it, or its architecture."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu_driver() -> str | None:
    """The version of the GPU's driver as its vendor's tool tells it; None without the tool."""
    if torch.version.hip is not None:
        version = Path("/sys/module/amdgpu/version")
        return version.read_text().strip() if version.exists() else None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _isa() -> str:
    from slimkern import cpu

    return str(cpu.isa())

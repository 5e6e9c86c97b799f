"""What this machine's processor has, and what of it the C++ kernels use.

The names of instruction sets, in rising order: ``scalar``, ``avx2``, ``avx512``, ``avx512_bf16``,
``amx``. The environment variable ``SLIMKERN_ISA`` names one to start with; it is read once, on
import, and a name that this machine does not accept is an error.
"""

from __future__ import annotations

from slimkern.ops import _native


def isa() -> str:
    """The instruction set whose kernels are used."""
    return _native.isa()


def set_isa(name: str) -> None:
    """Uses the kernels of instruction set ``name`` from now on, in all threads.

    Raises:
        ValueError: not one of `available_isas`.
    """
    _native.set_isa(name)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that slimkern has kernels for and that work here, in rising order."""
    return tuple(_native.available_isas())


def features() -> dict[str, bool]:
    """Every instruction set that slimkern knows -> whether processor and system provide it.

    One that is provided but not in `available_isas` has no kernels of its own yet: the next lower
    one serves it. For ``amx`` the process also has the system's permission to use the tiles.
    """
    found = _native.features()
    return {name: found[name] for name in ("scalar", "avx2", "avx512", "avx512_bf16", "amx")}


def threads() -> int:
    """Threads that a kernel uses: ``torch.get_num_threads()``; one in a forked process."""
    return _native.threads()

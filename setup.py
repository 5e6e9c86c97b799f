"""Builds ``slimkern._C``: one table of flags per source file, one ``build.ninja``.

Everything else about the package is declared in ``pyproject.toml``. The module knows no torch, so
the build needs none. ``CXX`` is honoured; without it, ``c++`` is used. The compiler itself is asked
for its target, so that a cross compiler builds for the machine it compiles for.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

BASE_FLAGS = [
    "-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra",
]  # fmt: skip
X86_FLAGS = ["-march=x86-64"]

AVX512_FLAGS = [
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c",
    "-mprefer-vector-width=512",
]  # fmt: skip
# File stem in csrc/isa/ -> flags on top of the baseline. A stem that is not here is not built.
ISA_FLAGS: dict[str, list[str]] = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "amx": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def compiler() -> list[str]:
    """The C++ compiler's command: ``CXX`` (which may carry arguments), or ``c++``."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def target(cxx: Sequence[str]) -> str:
    """The machine that the compiler compiles for, as it says itself (``x86_64-linux-gnu``)."""
    try:
        done = subprocess.run([*cxx, "-dumpmachine"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"slimkern needs a C++20 compiler: {shlex.join(cxx)!r} can not be run ({error}); "
            "install g++ or clang++, or name one in CXX"
        ) from error
    return done.stdout.strip()


def sources(machine: str, *, bindings: bool = True) -> dict[Path, list[str]]:
    """Source file -> its flags, for a target such as ``x86_64-linux-gnu``.

    A target that is not x86-64 gets the scalar file alone. ``bindings=False`` leaves out the files
    that need Python's headers.
    """
    x86 = machine.startswith(("x86_64", "amd64"))
    base = BASE_FLAGS + (X86_FLAGS if x86 else []) + openmp(machine) + [f"-I{CSRC}"]
    stems = list(ISA_FLAGS) if x86 else ["scalar"]
    ours = sorted(CSRC.glob("*.cpp"))
    plan = {path: list(base) for path in ours if not path.stem.startswith("bindings")}
    plan |= {CSRC / "isa" / f"{stem}.cpp": base + ISA_FLAGS[stem] for stem in stems}
    if bindings:
        import pybind11

        includes = [sysconfig.get_paths()[k] for k in ("include", "platinclude")]
        includes += [pybind11.get_include()]
        found = [f"-I{path}" for path in dict.fromkeys(includes)]
        plan |= {path: base + found for path in ours if path.stem.startswith("bindings")}
    return plan


def openmp(machine: str) -> list[str]:
    """Apple's compiler has no OpenMP: there the module runs on one thread."""
    return [] if "darwin" in machine else ["-fopenmp"]


def write_ninja(
    folder: Path, output: Path | None, *, bindings: bool = True, extra: Sequence[str] = ()
) -> list[Path]:
    """Writes ``folder/build.ninja`` and returns the object files it makes.

    Args:
        folder: where objects go; ``csrc/isa/avx2.cpp`` becomes ``folder/isa/avx2.o``.
        output: the shared library to link, or None to stop at the objects.
        bindings: as in `sources`.
        extra: flags for every compile and link (sanitizers).
    """
    from ninja.ninja_syntax import Writer

    cxx = compiler()
    machine = target(cxx)
    command = shlex.join(cxx)
    tail = shlex.join(extra)
    folder.mkdir(parents=True, exist_ok=True)
    objects: list[Path] = []
    with open(folder / "build.ninja", "w", encoding="utf-8") as stream:
        ninja = Writer(stream, width=100)
        ninja.rule(
            "cxx",
            f"{command} -MMD -MF $out.d $flags {tail} -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        shared = "-bundle -undefined dynamic_lookup" if "darwin" in machine else "-shared"
        link = shlex.join(openmp(machine))
        ninja.rule("link", f"{command} {shared} $in {link} {tail} -o $out")
        for source, flags in sources(machine, bindings=bindings).items():
            made = folder / source.relative_to(CSRC).with_suffix(".o")
            ninja.build(_escape(made), "cxx", _escape(source), variables={"flags": _join(flags)})
            objects.append(made)
        if output is not None:
            ninja.build(_escape(output), "link", [_escape(path) for path in objects])
    return objects


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _join(flags: Sequence[str]) -> str:
    return shlex.join(flags).replace("$", "$$")


def run_ninja(folder: Path) -> None:
    """Runs the ninja of the ``ninja`` package in ``folder``."""
    import ninja

    subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], check=True)


class NinjaBuildExt(build_ext):
    """Compiles with ninja: in parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        """Builds ``ext`` where setuptools wants it."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        write_ninja(folder, output)
        run_ninja(folder)


if __name__ == "__main__":
    listed = [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.cpp"))]
    headers = [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.h"))]
    setup(
        ext_modules=[Extension("slimkern._C", sources=listed, depends=headers)],
        cmdclass={"build_ext": NinjaBuildExt},
    )

"""Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and fuzzes them.

    python tests/sanitize.py [--seconds 20] [--seed 0]

The build is that of ``setup.py``, flag for flag, with the sanitizers on top; the drivers are
``tests/native/fuzz*.cpp``, which share the seconds. The exit status is that of the first driver
that fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tests" / "native"
SCALAR_ONLY = "-DSLIMKERN_SCALAR_ONLY"
SANITIZERS = [
    "-g1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]


def load_setup() -> ModuleType:
    """``setup.py`` as a module: its functions, without running the build."""
    spec = importlib.util.spec_from_file_location("slimkern_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_kernels(folder: Path, extra: Sequence[str] = ()) -> list[Path]:
    """Compiles the kernels in ``folder`` as setup.py does; returns the object files."""
    setup = load_setup()
    objects: list[Path] = setup.write_ninja(folder, None, bindings=False, extra=extra)
    setup.run_ninja(folder)
    return objects


def build_driver(
    folder: Path, name: str, objects: Sequence[Path], extra: Sequence[str] = ()
) -> Path:
    """Compiles ``tests/native/{name}.cpp``, links it to the kernels, returns the executable."""
    setup = load_setup()
    driver = folder / name
    cxx = setup.compiler()
    flags = ["-std=c++20", "-O1", f"-I{setup.CSRC}", *setup.openmp(setup.target(cxx)), *extra]
    command = [*cxx, *flags, str(NATIVE / f"{name}.cpp"), *map(str, objects), "-o", str(driver)]
    subprocess.run(command, check=True)
    return driver


def without_wide_kernels(folder: Path, objects: Mapping[str, Path]) -> list[Path]:
    """The objects of a target other than x86-64, from those that `build_kernels` made of this one.

    ``isa.cpp`` alone asks which files there are: it is compiled anew in ``folder``, the rest is
    taken as it is, and the files of wide instruction sets are left out, as they are there.
    """
    setup = load_setup()
    askers = [path for path in setup.CSRC.rglob("*.*") if SCALAR_ONLY[2:] in path.read_text()]
    assert askers == [setup.CSRC / "isa.cpp"]
    made = folder / "isa.o"
    cxx = setup.compiler()
    flags = setup.sources(setup.target(cxx), bindings=False)[askers[0]]
    subprocess.run([*cxx, *flags, SCALAR_ONLY, "-c", str(askers[0]), "-o", str(made)], check=True)
    narrow = {name: path for name, path in objects.items() if not name.startswith("isa/")}
    return [*({**narrow, "isa": made}.values()), objects["isa/scalar"]]


def main() -> int:
    """Builds, runs, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        objects = build_kernels(Path(folder), SANITIZERS)
        environment = os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1"}
        names = sorted(path.stem for path in NATIVE.glob("fuzz*.cpp"))
        for name in names:
            driver = build_driver(Path(folder), name, objects, SANITIZERS)
            command = [str(driver), str(arguments.seconds / len(names)), str(arguments.seed)]
            status = subprocess.run(command, env=environment).returncode
            if status != 0:
                return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

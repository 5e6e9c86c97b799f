"""Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and fuzzes them.

    python tests/sanitize.py [--seconds 20] [--seed 0]

The build is that of ``setup.py``, flag for flag, with the sanitizers on top; the driver is
``tests/native/fuzz.cpp``. The exit status is the driver's.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SANITIZERS = [
    "-g",
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


def build_fuzz(folder: Path, extra: Sequence[str]) -> Path:
    """Compiles the kernels and the driver in ``folder`` and returns the executable."""
    setup = load_setup()
    objects = setup.write_ninja(folder, None, bindings=False, extra=extra)
    setup.run_ninja(folder)
    fuzz = folder / "fuzz"
    cxx = setup.compiler()
    flags = ["-std=c++20", "-O1", f"-I{setup.CSRC}", *setup.openmp(setup.target(cxx)), *extra]
    source = ROOT / "tests" / "native" / "fuzz.cpp"
    command = [*cxx, *flags, str(source), *map(str, objects), "-o", str(fuzz)]
    subprocess.run(command, check=True)
    return fuzz


def main() -> int:
    """Builds, runs, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fuzz = build_fuzz(Path(folder), SANITIZERS)
        environment = os.environ | {"UBSAN_OPTIONS": "print_stacktrace=1"}
        command = [str(fuzz), str(arguments.seconds), str(arguments.seed)]
        return subprocess.run(command, env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())

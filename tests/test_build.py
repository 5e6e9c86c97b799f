"""The build: flags that stay in their files, other targets, the packages, and a broken module."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from sanitize import ROOT, SCALAR_ONLY, build_driver, load_setup, without_wide_kernels

setup = load_setup()
CROSS = "aarch64-linux-gnu-g++"

needs_binutils = pytest.mark.skipif(
    shutil.which("nm") is None or shutil.which("objdump") is None, reason="needs nm and objdump"
)


def output_of(*command, **keywords):
    done = subprocess.run(command, capture_output=True, text=True, **keywords)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def unoptimised(script, *compiler):
    """A compiler for builds that are not timed: the same one with -O0 after whatever it is given,
    which takes a third of the time. Returns the path of the script that it is."""
    script.write_text(f'#!/bin/sh\nexec {shlex.join(compiler)} "$@" -O0\n', encoding="utf-8")
    script.chmod(0o755)
    return str(script)


def is_x86(path):
    return "x86-64" in output_of("objdump", "-f", str(path))


@needs_binutils
def test_an_isa_file_exports_one_table_and_nothing_weak(kernel_objects):
    isas = {name: path for name, path in kernel_objects.items() if name.startswith("isa/")}
    assert set(isas) >= {"isa/scalar"}
    for name, path in isas.items():
        symbols = [line.split()[-2:] for line in output_of("nm", str(path)).splitlines()]
        exported = [symbol for kind, symbol in symbols if kind.isupper() and kind != "U"]
        assert len(exported) == 1, (name, exported)
        assert re.search(r"k(Scalar|Avx2|Avx512|Avx512Bf16|Amx)E", exported[0])
        assert not [symbol for kind, symbol in symbols if kind in "WwVvu"], name
        unknown = {symbol for kind, symbol in symbols if kind == "U"}
        assert unknown <= {"memcpy", "memset", "memmove", "__stack_chk_fail"}, name


@needs_binutils
def test_only_isa_files_use_wide_registers(kernel_objects):
    wide = {"isa/avx2": {"ymm"}, "isa/avx512": {"ymm", "zmm"}, "isa/avx512_bf16": {"ymm", "zmm"}}
    wide |= {"isa/amx": {"ymm", "zmm", "tmm"}}
    for name, path in kernel_objects.items():
        if not is_x86(path):
            pytest.skip("the compiler's target is not x86-64")
        used = set(re.findall(r"%([yzt]mm)\d", output_of("objdump", "-d", str(path))))
        assert used == wide.get(name, set()), name


@needs_binutils
def test_kernels_neither_allocate_nor_throw(kernel_objects):
    for name, path in kernel_objects.items():
        if name.startswith("isa/"):
            assert not re.search(r"_Znw|malloc|__cxa", output_of("nm", str(path))), name


BINDINGS = {"bindings.cpp", "bindings_training.cpp"}
ROOMS = {  # a file, or all files of a folder -> what it may include
    "dtypes.h": {"<cstdint>"},
    "kernel_table.h": {"<cstdint>", '"dtypes.h"'},
    "parallel.h": {"<cstdint>", "<omp.h>"},
    "isa.h": {'"kernel_table.h"'},
    "simd": {"<immintrin.h>", "<cstdint>", '"dtypes.h"'},
    "kernels": {"<cstdint>", '"kernel_table.h"'},
}


def test_csrc_includes_stay_in_their_rooms():
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT / "csrc").as_posix()
        room = ROOMS.get(name) or ROOMS.get(name.split("/")[0])
        if room is not None:  # within a folder, files may include each other
            included = re.findall(rf'#include (?!"{name.split("/")[0]}/)(\S+)', text)
            assert set(included) <= room, name
        if path.suffix != ".md":
            assert ("pybind11" in text) <= (name in BINDINGS), name
            assert ("#pragma omp" in text) <= (name == "parallel.h"), name
        if name.startswith(("simd/", "kernels/")):
            assert "std::" not in text, name
            assert "namespace {" in text, name


def test_each_target_gets_its_files():
    x86 = {path.name for path in setup.sources("x86_64-linux-gnu")}
    arm = setup.sources("aarch64-linux-gnu")
    wide = {"avx2.cpp", "avx512.cpp", "avx512_bf16.cpp", "amx.cpp"}
    assert {"scalar.cpp", *BINDINGS} | wide <= x86
    assert {path.name for path in arm} == x86 - wide
    assert not any(flag.startswith("-m") for flags in arm.values() for flag in flags)
    for path, flags in setup.sources("x86_64-linux-gnu").items():
        assert "-march=x86-64" in flags
        assert "-march=native" not in flags
        assert any(flag.startswith("-mavx") for flag in flags) == (path.name in wide)


def test_the_scalar_file_alone_works(kernel_objects, tmp_path):
    """What a target other than x86-64 builds, on this machine: the fuzz driver must be content."""
    objects = without_wide_kernels(tmp_path, kernel_objects)
    fuzz = build_driver(tmp_path, "fuzz", objects, [SCALAR_ONLY])
    assert "best isa scalar: clean" in output_of(str(fuzz), "0.5", "3")


@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} is not installed")
def test_cross_compiles_for_aarch64(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", unoptimised(tmp_path / "c++", CROSS))
    made = setup.write_ninja(tmp_path, tmp_path / "_C.so")
    setup.run_ninja(tmp_path)
    plain = {path.stem for path in (ROOT / "csrc").glob("*.cpp")}
    assert {path.stem for path in made} == plain | {"scalar"}
    header = (tmp_path / "_C.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF"
    assert int.from_bytes(header[18:20], "little") == 0xB7  # AArch64


def test_an_unusable_compiler_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler --with-arguments")
    assert setup.compiler() == ["no-such-compiler", "--with-arguments"]
    with pytest.raises(SystemExit, match=r"no-such-compiler.* can not be run.*name one in CXX"):
        setup.target(setup.compiler())


@pytest.mark.parametrize("module", ["slimkern.ops", "slimkern.cpu"])
def test_a_missing_module_names_the_build_command(module):
    code = f"import sys; sys.modules['slimkern._C'] = None; import {module}"
    _assert_names_the_build_command(code, ROOT)


def test_a_damaged_module_names_the_build_command(tmp_path):
    shutil.copytree(ROOT / "slimkern", tmp_path / "slimkern", ignore=ignore_native)
    (tmp_path / "slimkern" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF but not much")
    _assert_names_the_build_command("import slimkern.ops", tmp_path)


def _assert_names_the_build_command(code, tree):
    """``python -c`` in ``tree`` imports the package that lies there."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError: slimkern's C++ module slimkern._C is missing or broken" in done.stderr
    assert "pip install -e . --no-build-isolation" in done.stderr


def ignore_native(folder, names):
    return [name for name in names if name.startswith("_C.") or name == "__pycache__"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The sdist of this tree, and the wheel built from that sdist, without a network."""
    folder = tmp_path_factory.mktemp("packages")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for name in ("csrc", "slimkern"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore_native)
    build = "from setuptools import build_meta; build_meta.build_{}('..')"
    output_of(sys.executable, "-c", build.format("sdist"), cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    quick = {"CXX": unoptimised(folder / "c++", *setup.compiler())}
    output_of(sys.executable, "-c", build.format("wheel"), cwd=unpacked, env=os.environ | quick)
    (wheel,) = (folder / "unpacked").glob("*.whl")
    return sdist, wheel


def test_the_sdist_carries_the_sources(packages):
    with tarfile.open(packages[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp"):
            assert path.relative_to(ROOT).as_posix() in names
    assert {"setup.py", "slimkern/ops/indexed_linear/triton.py", "slimkern/py.typed"} <= names


def test_the_wheel_works_on_its_own(packages, tmp_path):
    with zipfile.ZipFile(packages[1]) as archive:
        archive.extractall(tmp_path)
    assert not list(tmp_path.rglob("*.cpp"))
    code = (
        "import slimkern, torch\n"
        "from slimkern.ops import indexed_linear\n"
        "rows = torch.tensor([0, 2])\n"
        "y = indexed_linear(torch.ones(4, 3), torch.ones(5, 3), None, rows, backend='cpu')\n"
        "print(slimkern.__file__, y.tolist() == [[3.0, 3.0]] * 4)\n"
    )
    printed = output_of(
        sys.executable, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    )
    assert printed.split() == [str(Path(tmp_path) / "slimkern" / "__init__.py"), "True"]

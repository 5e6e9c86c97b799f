"""What every test shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from interpreter import patch_once_a_launch
from parallel_cases import Pair
from sanitize import build_kernels

# Triton reads this when a kernel is decorated, so before the first import of one. Without a GPU the
# interpreter is the only way to run a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files of few tests that take long: the last file to start ends the run, so they are the first.
LONG = ["test_triton_compile.py", "test_build.py", "test_cli_one_shot.py", "test_cli_slim.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # xdist's: by the number of tests in a file
        config.option.loadscopereorder = False


def pytest_unconfigure() -> None:
    gc.unfreeze()  # of `light_garbage_collection`: extensions report at exit what was not freed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models on many threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def light_garbage_collection() -> None:
    """What was imported so far is no garbage: a collection, of which timing and measuring memory
    make many, need not go through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> None:
    """The tests of Triton's kernels spend their time in its interpreter."""
    patch_once_a_launch()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory is NaN: what a kernel forgets to write, or reads too early, shows."""
    empty = torch.empty

    def nan_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan_empty)


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes in a gloo group, for tests that train in parallel."""
    processes = Pair()
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def kernel_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The object files of the kernels, compiled as setup.py does: ``isa/avx2`` -> its path."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one build for all of them, in turns
        folder = folder.parent
    folder = folder / "objects"
    with FileLock(f"{folder}.lock"):
        made = build_kernels(folder)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in made}


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of all-MiniLM-L6-v2, real weights: in the user's cache, or downloaded once."""
    from slimkern.cli.fetch import fetch_demo_files

    return fetch_demo_files().model_dir

"""The suite as pytest runs it: options, the work that is on the list, what is said of the run.

python -m pytest bench --benchmark-json results.json            # everything
python -m pytest bench --smoke                                  # every bench alive, minutes
python -m pytest bench -k "model and slim" --providers "torch eager,onnxruntime"
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import cases, limits, training_cases
from bench.harness import Suite
from bench.providers import inference_providers
from bench.providers.training import training_providers
from slimkern import machine
from slimkern.report.speed_schema import SpeedResults

_SUITE = pytest.StashKey[Suite]()
_STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("slimkern")
    group.addoption("--smoke", action="store_true", help="small work, few rounds")
    group.addoption("--threads", type=int, default=1, help="of every provider's pool (default 1)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--providers", help="names, comma-separated; all by default")
    group.addoption(
        "--seconds-per-case",
        type=float,
        default=15.0,
        help="about how long the timed rounds of one piece of work may take (default 15)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED] = time.perf_counter()
    config.option.benchmark_quiet = True  # its table shows subjects only; bench.report shows all


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``test_model`` gets every work of level ``model``, and so on."""
    if "work" not in metafunc.fixturenames:
        return
    level = metafunc.function.__name__.removeprefix("test_")
    smoke = metafunc.config.getoption("smoke")
    listed = training_cases.training_works if level == "training" else cases.all_works
    works = [work for work in listed(smoke) if work.level == level]
    metafunc.parametrize("work", works, ids=[f"{work.name}-{work.shape}" for work in works])


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Iterator[Suite]:
    """What holds for the whole run; the limits are measured at both ends."""
    threads, device = pytestconfig.getoption("threads"), pytestconfig.getoption("device")
    smoke = pytestconfig.getoption("smoke")
    asked = pytestconfig.getoption("providers")
    names = [name.strip() for name in asked.split(",")] if asked else None
    made = Suite(
        providers=inference_providers(names),
        training_providers=training_providers(),
        threads=threads,
        device=device,
        seconds_per_case=0.2 if smoke else pytestconfig.getoption("seconds_per_case"),
        limits=limits.measure(threads, device),
    )
    pytestconfig.stash[_SUITE] = made
    yield made
    made.finish()


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """Everything about the run but its rows; nothing else about the machine is told."""
    made = config.stash.get(_SUITE, None)
    results = SpeedResults(
        title="slimkern's benchmark suite",
        command=_command(),
        date=machine.now(),
        machine=machine.machine(),
        versions=machine.versions(*PEERS),
        threads=config.getoption("threads"),
        seconds=round(time.perf_counter() - config.stash[_STARTED], 1),
        limits=made.limits if made else [],
        rows=made.lost if made else [],
        notes=[],
    )
    return {"slimkern": results}


PEERS = ("onnxruntime", "onnx", "openvino", "torch-pruning", "pytest-benchmark")


def _command() -> str:
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    return shlex.join(["python", "-m", "pytest", *arguments])


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_generate_json(benchmarks: Any) -> Any:
    """A benchmark whose test failed stays in the file: its rows say what is wrong."""
    for benchmark in benchmarks:
        benchmark.fixture.has_error = False
    return (yield)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    terminalreporter.write_line(machine.machine_line())
    terminalreporter.write_line("python -m bench.report RESULTS.json shows what was measured")

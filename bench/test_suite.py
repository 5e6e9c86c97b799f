"""The four levels of the suite; ``conftest.py`` says what work there is."""

from __future__ import annotations

from typing import Any

from bench.harness import Suite, measure
from bench.work import Work


def test_op(work: Work, suite: Suite, benchmark: Any) -> None:
    measure(work, suite, benchmark)


def test_layer(work: Work, suite: Suite, benchmark: Any) -> None:
    measure(work, suite, benchmark)


def test_model(work: Work, suite: Suite, benchmark: Any) -> None:
    measure(work, suite, benchmark)


def test_training(work: Work, suite: Suite, benchmark: Any) -> None:
    measure(work, suite, benchmark)

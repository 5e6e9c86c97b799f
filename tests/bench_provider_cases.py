"""What the tests of the benchmarks' providers share."""

from __future__ import annotations

import pytest
import torch

from bench import check
from bench.cases import all_works
from bench.providers import inference_providers
from bench.providers._common import missing
from bench.providers.base import Provider
from bench.work import Setting, Work

SMOKE = {work.case: work for work in all_works(smoke=True)}
PEERS = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "openvino": ("openvino",),
    "torch-pruning": ("torch_pruning",),
}


def provider(name: str) -> Provider:
    (found,) = inference_providers([name])
    absent = missing(*PEERS.get(name, ()))  # imports nothing: openvino's first import reports home
    if absent:
        pytest.skip(absent)
    return found


def smoke(part: str) -> list[Work]:
    found = [work for case, work in SMOKE.items() if part in case]
    assert found, f"no smoke work has {part!r} in its name"
    return found


def assert_right(given: Provider, work: Work, precision: str = "fp32") -> None:
    """The provider's output is within the derived bound of the fp64 reference."""
    setting = Setting(precision)
    assert given.refuses(work, setting) is None
    reference = check.reference(work)
    eager = provider("torch eager").prepare(work, setting)()
    bound = check.bound(work, precision, check.error_of(work, eager, reference))
    call = given.prepare(work, setting)
    with torch.inference_mode():  # as the harness does it
        assert check.error_of(work, call(), reference) <= bound
        assert check.error_of(work, call(), reference) <= bound

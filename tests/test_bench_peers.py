"""The peers of the benchmarks: right outputs, set up as promised, or an error that says why not."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from bench_provider_cases import SMOKE, assert_right, provider, smoke
from torch import Tensor, nn

from bench import check
from bench.providers import compiled, inference_providers
from bench.providers.base import ProviderError
from bench.work import Setting, Work


@pytest.mark.parametrize("name", ["hand-sliced", "torch-pruning"])
@pytest.mark.parametrize("part", ["model/tiny slim", "op/attention 24, 1 heads slim fwd+bwd"])
def test_other_cuts_give_the_same_outputs(name: str, part: str) -> None:
    (work,) = smoke(part)
    theirs = provider(name).prepare(work, Setting("fp32"))()
    ours = provider("torch eager").prepare(work, Setting("fp32"))()
    assert all(map(torch.equal, theirs, ours))


FORWARD = [case for case, work in SMOKE.items() if not work.backward]


@pytest.mark.parametrize("case", FORWARD)
def test_onnxruntime_is_right(case: str) -> None:
    assert_right(provider("onnxruntime"), SMOKE[case])


def test_onnxruntime_fuses_layers_of_different_widths_and_exports_once() -> None:
    given = provider("onnxruntime")
    (work,) = smoke("model/tiny slim")  # one head, then two
    assert_right(given, work)
    ids, mask = work.inputs()
    other = replace(work, shape="other", inputs=lambda: (ids[:2, :5], mask[:2, :5]))
    assert_right(given, other)
    other = replace(other, build=lambda: pytest.fail("exported again"))
    given.prepare(other, Setting("fp32"))


class Unusual(nn.Module):
    """A softmax that belongs to no attention."""

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


def test_onnxruntime_fails_where_nothing_fused() -> None:
    given = provider("onnxruntime")
    inputs = (torch.ones(4, 3),)
    work = Work("op", "unusual", "4", Unusual, lambda: inputs, 1, 1, 1, 1)
    with pytest.raises(ProviderError, match="fused 0 of 1 into Attention or MultiHeadAttention"):
        given.prepare(work, Setting("fp32"))


@pytest.mark.parametrize("case", FORWARD)
def test_openvino_is_right(case: str) -> None:
    given = provider("openvino")
    assert_right(given, SMOKE[case])
    if given.refuses(SMOKE[case], Setting("bf16")) is None:
        assert_right(given, SMOKE[case], "bf16")


def test_openvino_reports_nothing_to_its_makers() -> None:
    given = provider("openvino")
    given.prepare(smoke("op/linear 130->63/")[0], Setting("fp32"))
    assert sys.modules["openvino_telemetry"] is None


def test_frozen_weights_are_verified() -> None:
    compiled._check_frozen([(2, 9)], inputs=2)
    with pytest.raises(ProviderError, match="not frozen"):
        compiled._check_frozen([(11, 0)], inputs=2)
    with pytest.raises(ProviderError, match="not frozen"):
        compiled._check_frozen([(2, 9), (2, 9)], inputs=2)


@pytest.mark.skipif(compiled._compiler() is None, reason="torch.compile needs a C++ compiler")
def test_compiled_calls_are_right_and_stand_beside_each_other() -> None:
    given = provider("torch.compile")
    (work,) = (w for w in smoke("op/linear") if w.compiled)
    reference = check.reference(work)
    calls = [given.prepare(work, Setting(precision)) for precision in ("fp32", "bf16")]
    counted = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.inference_mode():
        errors = [check.error(call(), reference) for call in calls]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == counted
    assert errors[0] <= check.worst_case(work, "fp32")
    assert errors[1] <= check.worst_case(work, "bf16")


def test_compile_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    (work,) = (w for w in smoke("op/linear") if w.compiled)
    told = inference_providers(["torch.compile"])[0].refuses(work, Setting("fp32"))
    assert told is not None
    assert "C++ compiler" in told

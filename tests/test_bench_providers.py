"""Who does the work of the benchmarks: right outputs, settings restored, refusals with a reason."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bench_provider_cases import PEERS, SMOKE, assert_right, provider, smoke
from torch import Tensor, nn

import slimkern
from bench import check
from bench.providers import _common, inference_providers
from bench.providers._common import matmul_precision
from bench.work import Setting, Work
from slimkern.report.speed_schema import PRECISIONS


class Settings(nn.Module):
    """Says which matmul precision is active while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.seen: list[str] = []

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        self.seen.append(torch.get_float32_matmul_precision())
        return self.linear(x)[index]


SETTINGS = Settings()


def settings_work(backward: bool) -> Work:
    inputs = (torch.ones(4, 3), torch.tensor([2, 0]))
    return Work("op", "settings", "4", lambda: SETTINGS, lambda: inputs, 1, 1, 9, 9, backward)


def test_names_select_and_unknown_ones_are_refused_with_the_list() -> None:
    names = [p.name for p in inference_providers()]
    assert names[:4] == ["torch eager", "torch.compile", "onnxruntime", "openvino"]
    assert "slimkern scalar" in names
    chosen = inference_providers(["openvino", "torch eager"])
    assert [p.name for p in chosen] == ["torch eager", "openvino"]
    with pytest.raises(ValueError, match=r"'tensorflow'; accepted: torch eager, torch\.compile"):
        inference_providers(["tensorflow"])


def test_listing_providers_imports_no_runtime() -> None:
    runtimes = "onnxruntime onnx openvino torch_pruning transformers torch._inductor"
    code = (
        "import sys, bench.providers as p; p.inference_providers(); "
        f"print([m for m in {runtimes.split()} if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("work", SMOKE.values(), ids=list(SMOKE))
def test_eager_does_all_work(work: Work) -> None:
    for precision in ("fp32", "bf16"):
        call = provider("torch eager").prepare(work, Setting(precision))
        with torch.inference_mode():
            outputs = call()
        reference = check.reference(work)
        assert check.error(outputs, reference) <= check.worst_case(work, precision)


def test_backward_gives_y_dx_and_the_parameters_gradients() -> None:
    (work,) = smoke("FFN 24->51 fwd+bwd")
    module, (x,) = work.build(), work.inputs()
    x = x.clone().requires_grad_()
    y = module(x)
    (y * check.output_gradient(work, y)).sum().backward()
    expected = (y.detach(), x.grad, *(p.grad for p in module.parameters()))
    call = provider("torch eager").prepare(work, Setting("fp32"))
    for _ in range(2):  # gradients do not add up over calls
        for got, want in zip(call(), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_integers_get_no_gradient() -> None:
    y, dx, dw, db = provider("torch eager").prepare(settings_work(True), Setting("fp32"))()
    assert (y.shape, dx.shape, dw.shape, db.shape) == ((2, 2), (4, 3), (2, 3), (2,))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_matmul_precision_is_active_during_the_call_and_restored(
    precision: str, backward: bool
) -> None:
    expected = {"fp32-high": "high", "fp32-medium": "medium"}.get(precision, "highest")
    SETTINGS.float()
    with matmul_precision("high"):
        call = provider("torch eager").prepare(settings_work(backward), Setting(precision))
        assert torch.get_float32_matmul_precision() == "high"
        SETTINGS.seen.clear()
        call()
        assert torch.get_float32_matmul_precision() == "high"
    assert SETTINGS.seen == [expected]


def test_matmul_precision_is_restored_where_torch_cannot_name_it() -> None:
    knob = torch.backends.mkldnn.matmul
    if not hasattr(knob, "fp32_precision"):
        pytest.skip("this torch has only the older setting")
    before = torch.get_float32_matmul_precision()
    try:
        knob.fp32_precision = "bf16"
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        with matmul_precision("medium"):
            assert torch.get_float32_matmul_precision() == "medium"
        assert knob.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("name", PEERS)
def test_what_is_not_installed_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_common, "find_spec", lambda package: None)
    (given,) = inference_providers([name])
    (work,) = smoke("model/tiny slim")
    reason = given.refuses(work, Setting("fp32"))
    assert reason is not None
    assert "not installed: pip install 'slimkern[bench]'" in reason


@pytest.mark.parametrize(
    ("name", "part", "precision", "reason"),
    [
        ("torch.compile", "model/tiny dense", "fp32", "not on the compile list"),
        ("torch.compile", "op/linear 130->63/", "fp32-high", "same code as fp32"),
        ("onnxruntime", "model/tiny dense", "bf16", "no bfloat16"),
        ("onnxruntime", "model/tiny dense", "fp32-high", "no such setting"),
        ("onnxruntime", "model/tiny dense", "fp32-medium", "ARM only"),
        ("openvino", "model/tiny dense", "fp32-medium", "same as bf16"),
        ("openvino", "model/tiny dense", "fp32-high", "no such setting"),
        ("hand-sliced", "model/tiny dense", "fp32", "nothing was cut"),
        ("torch-pruning", "model/tiny dense", "fp32", "nothing was cut"),
        ("slimkern triton", "op/indexed", "fp32", "GPU only"),
        ("slimkern reference", "op/FFN 24->51/", "fp32", "no kernel for this work yet"),
        ("slimkern scalar", "op/indexed", "fp32-high", "as fp32: no products between"),
    ],
)
def test_refusals_have_a_reason(name: str, part: str, precision: str, reason: str) -> None:
    (given,) = inference_providers([name])
    told = given.refuses(smoke(part)[0], Setting(precision))
    assert told is not None
    assert reason in told


def test_scalar_code_is_not_given_large_work() -> None:
    work = replace(smoke("op/indexed")[0], flops=2e9)
    told = provider("slimkern scalar").refuses(work, Setting("fp32"))
    assert told is not None
    assert "scalar" in told
    (best,) = inference_providers([f"slimkern {slimkern.cpu.available_isas()[-1]}"])
    assert best.name == "slimkern scalar" or best.refuses(work, Setting("fp32")) is None


@pytest.mark.parametrize("isa", ["reference", *slimkern.cpu.available_isas()])
@pytest.mark.parametrize("level", ["op/indexed", "op/block-masked"])
def test_slimkern_does_masked_work_on_each_instruction_set(isa: str, level: str) -> None:
    before = slimkern.cpu.isa()
    for work in smoke(level):
        for precision in ("fp32", "bf16"):
            assert_right(provider(f"slimkern {isa}"), work, precision)
            assert slimkern.cpu.isa() == before


def test_slimkern_uses_the_instruction_set_it_is_named_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import slimkern.ops as ops

    seen = []
    own = ops.indexed_linear
    monkeypatch.setattr(
        ops, "indexed_linear", lambda *a, **k: (seen.append(slimkern.cpu.isa()), own(*a, **k))[1]
    )
    (work, *_) = smoke("op/indexed")
    for isa in slimkern.cpu.available_isas():
        provider(f"slimkern {isa}").prepare(work, Setting("fp32"))()
    assert seen == list(slimkern.cpu.available_isas())


@pytest.mark.parametrize("isa", slimkern.cpu.available_isas())
@pytest.mark.parametrize("level", ["op/linear", "op/FFN", "op/attention", "layer/", "model/"])
def test_slimkern_does_packed_and_fused_work_on_each_instruction_set(isa: str, level: str) -> None:
    before, given = slimkern.cpu.isa(), provider(f"slimkern {isa}")
    done = 0
    for work in smoke(level):
        for precision in PRECISIONS:
            if given.refuses(work, Setting(precision)) is None:
                assert_right(given, work, precision)
                assert slimkern.cpu.isa() == before
                done += 1
    assert done >= 3  # float32, medium and bf16 everywhere
    backward = [w for w in smoke(level) if w.backward]
    assert all("inference" in str(given.refuses(w, Setting("fp32"))) for w in backward)


def test_full_size_work_is_not_done_twice_by_the_same_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slimkern.cpu, "available_isas", lambda: ("scalar", "avx512", "amx"))
    work = replace(smoke("layer/")[0], smoke=False)
    told = provider("slimkern avx512").refuses(work, Setting("fp32"))
    assert told == "as amx: in float32 it has the same kernels"
    told = provider("slimkern scalar").refuses(work, Setting("bf16"))
    assert told == "rounds to bfloat16 in software: amx has instructions for it"


def test_precisions_that_come_to_the_same_products_are_measured_once() -> None:
    (work, *_) = smoke("layer/")
    told = provider("slimkern scalar").refuses(work, Setting("fp32-high"))
    assert told is not None
    assert "without AMX" in told

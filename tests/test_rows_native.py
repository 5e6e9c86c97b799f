"""The row kernels against float64 and against torch, on every instruction set of the machine."""

from __future__ import annotations

import math
import subprocess

import coefficients
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sanitize import ROOT, build_driver

TORCH = {
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}
# In float64 too, 1 + tanh(u) loses what 2 / (1 + exp(-2 u)) keeps.
EXACT = TORCH | {
    "gelu_tanh": lambda x: x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
}
ISAS = ["scalar", "avx2", "avx512", "avx512_bf16", "amx"]


@pytest.fixture(scope="module")
def accuracy(kernel_objects, tmp_path_factory):
    folder = tmp_path_factory.mktemp("accuracy")
    return build_driver(folder, "accuracy_rows", list(kernel_objects.values()))


@pytest.fixture
def run(accuracy):
    """``run(isa, function, x, cols)``: the function of float32 x, as the native driver has it."""

    def call(isa, function, x, cols=0):
        command = [str(accuracy), isa, function, str(cols)]
        done = subprocess.run(command, input=x.numpy().tobytes(), capture_output=True)
        if b"no kernels for" in done.stderr:
            pytest.skip(f"this machine has no kernels for {isa}")
        assert done.returncode == 0, done.stderr
        return torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy()).view_as(x)

    return call


def test_the_errors_are_within_their_bounds(accuracy):
    done = subprocess.run([str(accuracy)], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("driver", ["fuzz_rows", "fuzz_training"])
def test_random_blocks(driver, kernel_objects, tmp_path):
    fuzz = build_driver(tmp_path, driver, list(kernel_objects.values()))
    done = subprocess.run([str(fuzz), "3", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_constants_can_be_made_again():
    header = (ROOT / "csrc" / "kernels" / "elementary.inl.h").read_text(encoding="utf-8")
    assert coefficients.constants() in header


def dense_grid():
    magnitudes = torch.logspace(-30, 2, 60_001, base=2).repeat(2)
    magnitudes[:60_001] *= -1
    return torch.cat([torch.linspace(-12, 12, 240_001), magnitudes]).sort().values


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", list(EXACT))
def test_an_activation_is_as_accurate_as_torch(name, isa, run):
    """In each of 256 ranges the worst error is torch's and a rounding; two where exp is used."""
    x = dense_grid()
    want = EXACT[name](x.double())
    error, torchs = ((y.double() - want).abs() for y in (run(isa, name, x), TORCH[name](x)))
    roundings = 1 if name in ("relu", "squared_relu", "gelu") else 2
    for chunk in torch.arange(len(x)).chunk(256):
        more = roundings * 2**-24 * want[chunk].abs().max()
        assert error[chunk].max() <= torchs[chunk].max() + more, x[chunk][[0, -1]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", list(EXACT))
def test_odd_values(name, isa, run):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30, 3.4e38, -3.4e38] * 3)
    low = nan if "relu" not in name else 0.0
    want = TORCH[name](x.double()).float()
    want[x == inf], want[x == -inf] = inf, low  # torch's gelu(inf) depends on the vector's end
    torch.testing.assert_close(run(isa, name, x), want, equal_nan=True, rtol=2e-7, atol=1e-45)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 17, 63, 130, 384])
@pytest.mark.parametrize("mean", [0, 10, 1000])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_is_as_accurate_as_torch(norm, mean, cols, isa, run):
    x = torch.randn(200, cols, generator=torch.Generator().manual_seed(cols)) + mean
    exact = {"layer": F.layer_norm, "rms": F.rms_norm}[norm]
    want = exact(x.double(), (cols,), eps=1e-5)
    error, torchs = (
        (y.double() - want).abs().max()
        for y in (run(isa, norm, x, cols), exact(x, (cols,), eps=1e-5))
    )
    assert error <= torchs + 2**-24 * want.abs().max()

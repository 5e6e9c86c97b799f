"""How far the process's memory rises during a call."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimkern import memory
from slimkern.memory import peak_growth, unavailable

MB = 10**6
SIZE = 200 * MB
NOISE = 20 * MB  # other threads, the interpreter, and the kernel's counting in batches
ALL_OF_IT = pytest.approx(SIZE, abs=NOISE)

needs_peaks = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def touched(size=SIZE):
    """``size`` bytes that are really there."""
    return np.ones(size, dtype=np.uint8)


@needs_peaks
def test_memory_that_is_freed_within_the_call_counts():
    total, growth = peak_growth(lambda: int(touched()[::4096].sum(dtype=np.int64)))
    assert total == -(-SIZE // 4096)
    assert growth == ALL_OF_IT


@needs_peaks
def test_memory_that_stays_counts_and_the_result_is_handed_back():
    kept, growth = peak_growth(touched)
    assert kept.nbytes == SIZE
    assert growth == ALL_OF_IT


@needs_peaks
def test_memory_from_before_does_not_count():
    held = touched()
    touched(2 * SIZE)  # freed again: the highest point so far is not the call's
    assert peak_growth(lambda: None)[1] < NOISE
    assert held[-1] == 1


@needs_peaks
def test_the_highest_point_counts_not_the_sum():
    def call():
        for _ in range(3):
            touched()

    assert peak_growth(call)[1] == ALL_OF_IT


@needs_peaks
def test_small_pieces_freed_before_are_not_lived_on():
    pieces = [bytearray(60_000) for _ in range(1000)]  # below the size that is mapped by itself
    wall = bytearray(100)
    del pieces
    _, growth = peak_growth(lambda: [bytearray(60_000) for _ in range(1000)])
    assert wall == bytearray(100)
    if hasattr(memory.ctypes.CDLL(None), "malloc_trim"):
        assert growth > 40 * MB


@needs_peaks
def test_torch_tensors_count_and_errors_pass():
    _, growth = peak_growth(lambda: torch.ones(SIZE // 4).sum().item())
    assert growth == ALL_OF_IT
    with pytest.raises(ZeroDivisionError):
        peak_growth(lambda: 1 // 0)


def test_a_system_that_does_not_tell_is_none_with_the_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert "only Linux" in unavailable()
    assert peak_growth(lambda: 7) == (7, None)
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory, "_PROC", tmp_path / "none")
    assert "can not be read" in unavailable()
    assert peak_growth(lambda: 7) == (7, None)
    (tmp_path / "status").write_text("VmRSS:\t 12 kB\n")
    monkeypatch.setattr(memory, "_PROC", tmp_path)
    assert "no VmHWM" in unavailable()


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="device is 'xpu'"):
        peak_growth(lambda: None, "xpu")
    if not torch.cuda.is_available():
        assert unavailable("cuda") == "torch sees no GPU"
        with pytest.raises(RuntimeError, match="no GPU"):
            peak_growth(lambda: None, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu_torchs_allocator_is_asked():
    _, growth = peak_growth(lambda: torch.ones(SIZE // 4, device="cuda").sum().item(), "cuda")
    assert growth == ALL_OF_IT

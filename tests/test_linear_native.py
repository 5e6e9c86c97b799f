"""Packed linears: random shapes in every instruction set and math, and their errors."""

from __future__ import annotations

import subprocess

import pytest
from sanitize import SCALAR_ONLY, build_driver, without_wide_kernels


def run_fuzz(folder, objects, extra=()):
    driver = build_driver(folder, "fuzz_linear", objects, extra)
    done = subprocess.run([str(driver), "3", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_random_linears(kernel_objects, tmp_path):
    assert "clean" in run_fuzz(tmp_path, list(kernel_objects.values()))


def test_random_linears_of_the_scalar_file_alone(kernel_objects, tmp_path):
    """What a target other than x86-64 has: two kernels, and three on emulated tiles."""
    objects = without_wide_kernels(tmp_path, kernel_objects)
    assert "of 5 kernels" in run_fuzz(tmp_path, objects, [SCALAR_ONLY])


@pytest.fixture(scope="module")
def errors(kernel_objects, tmp_path_factory):
    """(isa, math, K) -> the largest and the mean error of an element, relative to |x| |w|."""
    folder = tmp_path_factory.mktemp("accuracy")
    driver = build_driver(folder, "accuracy_linear", list(kernel_objects.values()))
    done = subprocess.run([str(driver)], capture_output=True, text=True, check=True)
    print(done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()]
    return {(isa, math, int(k)): (float(most), float(mean)) for isa, math, k, most, mean in rows}


# Of an element's error, the largest and the mean over random rows. Rounding both operands costs
# 2^-8 each at most, sqrt(2/3) of 2^-9 on average, and it is random: K terms share sqrt(1/K) of it.
# Two parts leave out 2^-17 on average, three nothing. Float sums: 2^-24 for each of a run of 192,
# growing with its partial sums.
@pytest.mark.parametrize(
    ("math", "most", "mean"),
    [
        ("fp32", 1.5e-7, 1.5e-8),
        ("bf16", 2**-8 / 384**0.5 * 4, 2**-8 / 384**0.5),
        ("bf16x3", 2**-16 / 384**0.5 * 4, 2**-16 / 384**0.5),
        ("bf16x6", 1.5e-7, 1e-8),
    ],
)
def test_errors_of_each_math(errors, math, most, mean):
    measured = {k: value for k, value in errors.items() if k[1] == math and k[0] != "plain"}
    assert measured
    for key, value in measured.items():
        assert value[0] <= most, key
        assert value[1] <= mean, key


def test_float_and_six_products_are_as_good_as_plain_code(errors):
    for (isa, math, k), (_, mean) in errors.items():
        if math in ("fp32", "bf16x6"):
            assert mean <= errors["plain", "fp32", k][1], (isa, math)

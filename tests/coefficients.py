"""Makes the coefficients of ``csrc/kernels/elementary.inl.h`` again, and prints them.

    python tests/coefficients.py

Exponential. ``exp(x) = 2**n * exp(r)`` with ``n = round(x / ln 2)`` and ``|r| <= ln 2 / 2``. The
polynomial is ``1 + r + r**2 * q(r)``, q of degree 4. ``ln 2`` is the sum of a number of 16 bits,
whose product with n is exact, and the rest. n is kept with the exponent's bias in the low bits of a
float; 128, the highest n, makes an infinity.

Normal distribution. ``phi(a) = (1 - erf(a / sqrt 2)) / 2`` for ``a >= 0``, in 15 pieces of width
``STEP``: piece i is a polynomial of degree 5 in ``f = a / STEP - i``, ``|f| <= 1 / 2``. Beyond them
phi is less than 4e-9 and the sixteenth piece is zero. (The GELU of x is ``x - x * phi(x)`` for
``x >= 0`` and ``x * phi(-x)`` for ``x < 0``: nothing cancels.)

Interpolation at Chebyshev's nodes, with 40 digits, then each coefficient is rounded to float32:
what the polynomials lose against the best ones is far below that rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
from mpmath import mp, mpf

STEP = mpf(2) / 5
PIECES = 16
DEGREE = 5


def interpolate(f: Callable[[mpf], mpf], low: mpf, high: mpf, degree: int) -> list[mpf]:
    """Coefficients, lowest first, of the polynomial through f at Chebyshev's nodes."""
    n = degree + 1
    angles = [mp.pi * (2 * k + 1) / (2 * n) for k in range(n)]
    nodes = [(low + high) / 2 + (high - low) / 2 * mp.cos(angle) for angle in angles]
    matrix = mp.matrix(n, n)
    for i, node in enumerate(nodes):
        for j in range(n):
            matrix[i, j] = node**j
    return list(mp.lu_solve(matrix, mp.matrix([f(node) for node in nodes])))


def exponential() -> list[mpf]:
    """q of ``exp(r) = 1 + r + r**2 * q(r)``."""
    half = mpmath.log(2) / 2 * mpf("1.001")  # a close call of n may go the wrong way
    return interpolate(lambda r: mp.hyp1f1(1, 3, r) / 2, -half, half, 4)  # (exp(r) - 1 - r) / r**2


def normal() -> list[list[mpf]]:
    """``[coefficient][piece]`` of phi."""
    pieces = []
    for i in range(PIECES - 1):
        low = mpf(0) if i == 0 else mpf(-1) / 2
        phi = lambda f, i=i: mp.erfc((i + f) * STEP / mp.sqrt(2)) / 2  # noqa: E731
        pieces.append(interpolate(phi, low, mpf(1) / 2, DEGREE))
    pieces.append([mpf(0)] * (DEGREE + 1))
    return [[piece[k] for piece in pieces] for k in range(DEGREE + 1)]


def literal(value: mpf) -> str:
    """The float32 nearest to value, as C++ has it."""
    return f"{np.float32(value)!s}f" if value else "0.0f"


def table(name: str, values: list[mpf], width: int = 4, indent: str = "") -> str:
    """A C++ array, ``width`` numbers a line."""
    words = [literal(value) for value in values]
    lines = [", ".join(words[i : i + width]) + "," for i in range(0, len(words), width)]
    return f"{indent}{name}{{\n" + "".join(f"{indent}    {line}\n" for line in lines) + indent + "}"


def constants() -> str:
    """The C++ text of all constants."""
    with mp.workdps(40):
        high = mpmath.nint(mpmath.log(2) * 2**16) / 2**16
        lines = [
            f"constexpr float kLog2e = {literal(1 / mpmath.log(2))};",
            f"constexpr float kLn2High = {literal(high)};  // 16 bits",
            f"constexpr float kLn2Low = {literal(mpmath.log(2) - high)};",
            f"constexpr float kExpLowest = {literal(-126 * mpmath.log(2))};  // of a normal result",
            "constexpr float kExpHighest = 89.0f;  // its result is inf",
            table("constexpr float kExp[5] = ", exponential()) + ";",
            f"constexpr float kPhiInverseStep = {literal(1 / STEP)};",
            f"constexpr float kPhiEnd = {literal((PIECES - 1) * STEP)};",
            f"constexpr float kPhi[{DEGREE + 1}][{PIECES}] = {{",
            *(table("", values, indent="    ") + "," for values in normal()),
            "};",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(constants())

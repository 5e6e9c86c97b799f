"""Checks of single settings: each takes a key and a value, and returns the value completed.

A value that is not accepted raises ``ValueError`` naming the key, the value and what is.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def check_known(values: Iterable[str], known: Iterable[str]) -> None:
    """Raise ``TypeError`` for a key that is not known, suggesting the nearest one that is."""
    known = sorted(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"unknown key {key!r}{hint} Accepted: {', '.join(known)}")


def one_of(*accepted: str, reasons: Mapping[str, str] | None = None) -> Callable[[str, Any], str]:
    """A check for one of the ``accepted`` words.

    ``reasons`` tells why words with certain endings are not.
    """

    def check(key: str, value: Any) -> str:
        if value not in accepted:
            known = (reasons or {}).items()
            why = [r for end, r in known if isinstance(value, str) and value.endswith(end)]
            raise ValueError(
                f"{key}={value!r} is not accepted; accepted: {', '.join(accepted)}"
                + "".join(f" ({reason})" for reason in why)
            )
        return value

    return check


def fraction(key: str, value: Any) -> float:
    """``value`` as a float, or a ``ValueError`` that names ``key`` where it is not in [0, 1)."""
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not 0 <= value < 1:
        raise ValueError(f"{key} must be a number in [0, 1), got {value!r}")
    return float(value)


def whole(least: int) -> Callable[[str, Any], int]:
    """A check for a whole number of at least ``least``."""

    def check(key: str, value: Any) -> int:
        problem = f"{key} must be a whole number of at least {least}, got {value!r}"
        if isinstance(value, bool):
            raise ValueError(problem)
        try:
            number = operator.index(value)
        except TypeError as error:
            raise ValueError(problem) from error
        if number < least:
            raise ValueError(problem)
        return number

    return check


def names(key: str, value: Any) -> tuple[str, ...]:
    """One string or several; a single string is one entry, not its characters."""
    entries = (value,) if isinstance(value, str) else tuple(value)
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(f"{key} must hold strings, got {entry!r}")
    return entries


def patterns(key: str, value: Any) -> tuple[str, ...]:
    """Regular expressions: one string or several."""
    entries = names(key, value)
    for entry in entries:
        try:
            re.compile(entry)
        except re.error as error:
            raise ValueError(f"{key} holds {entry!r}, no regular expression: {error}") from error
    return entries


def op_types(key: str, value: Any) -> tuple[str, ...]:
    """Parts of class names, at least one."""
    entries = names(key, value)
    if not entries:
        raise ValueError(f"{key} is empty: no layer could be pruned")
    return entries


def flag(key: str, value: Any) -> bool:
    """``True`` or ``False``, and nothing that is like it."""
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be True or False, got {value!r}")
    return value


def off(instead: str) -> Callable[[str, Any], None]:
    """A key that is known, and refused unless it is switched off."""

    def check(key: str, value: Any) -> None:
        harmless = {"reg_coeff": 0.0} if key == "parameters" else {}
        if value and not (isinstance(value, Mapping) and dict(value) == harmless):
            raise ValueError(f"{key}={value!r} is not supported: {instead}")

    return check

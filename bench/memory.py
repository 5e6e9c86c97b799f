"""How far the memory of the process rises while something runs: slimkern's own, by its old name."""

from slimkern.memory import peak_growth, unavailable

__all__ = ["peak_growth", "unavailable"]

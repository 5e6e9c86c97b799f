"""What a provider is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from bench.work import Outputs, Setting, Work
from slimkern.report.speed_schema import Precision

Call = Callable[[], Outputs]


class Provider(ABC):
    """Runs work: another runtime, or slimkern with one instruction set.

    Attributes:
        name: as it stands in the tables, ``torch eager``.
        precisions: what it has a setting for.
    """

    name: str
    precisions: tuple[Precision, ...]

    @abstractmethod
    def refuses(self, work: Work, setting: Setting) -> str | None:
        """Why it can't (or shall not) run this here: not installed, no such kernel; or None.

        Cheap: nothing is built or converted.
        """

    @abstractmethod
    def prepare(self, work: Work, setting: Setting) -> Call:
        """Everything that is done once: load, convert, pack, compile.

        The call that is returned does the work once, as its users would do it, and returns torch
        tensors (for ``work.backward``, the gradients too) in the runtime's own dtype. Settings
        that are global to the process are set inside the call's own context and restored.

        Raises:
            ProviderError: it can't be prepared as promised, for example a fusion did not fire.
        """


P = TypeVar("P", bound=Provider)


def chosen(known: Sequence[P], names: Sequence[str] | None) -> list[P]:
    """Those of ``known`` that are named, in the order of ``known``; all for ``None``.

    Raises:
        ValueError: there is no provider of that name.
    """
    if names is None:
        return list(known)
    accepted = [provider.name for provider in known]
    unknown = [name for name in names if name not in accepted]
    if unknown:
        raise ValueError(
            f"names has {', '.join(map(repr, unknown))}; accepted: {', '.join(accepted)}"
        )
    return [provider for provider in known if provider.name in names]


def high_is_highest(work: Work, setting: Setting) -> str | None:
    """Why plain torch is not asked for ``fp32-high`` again: on a CPU it does what ``fp32`` does.

    Ops and layers are measured, so that this can be seen; models and steps would take minutes.
    """
    if setting.device != "cpu" or setting.precision != "fp32-high":
        return None
    if work.level in ("op", "layer"):
        return None
    return "as fp32: torch's own products on a CPU do not change with it (see ops and layers)"


class ProviderError(RuntimeError):
    """A provider could not be set up; the message says what is wrong."""

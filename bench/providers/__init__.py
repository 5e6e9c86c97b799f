"""Who does the work of ops, layers and models: torch, other runtimes, slimkern.

Importing this imports no other runtime; a provider does that when it is asked to prepare.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.providers.base import Provider, chosen
from bench.providers.compiled import Compiled
from bench.providers.eager import Eager
from bench.providers.onnxruntime_ import OnnxRuntime
from bench.providers.openvino_ import OpenVino
from bench.providers.slim_ import HandSliced, TorchPruning
from bench.providers.slimkern_ import slimkern_providers


def inference_providers(names: Sequence[str] | None = None) -> list[Provider]:
    """Providers of ops, layers and models, in the order in which they are shown.

    Args:
        names: only these; ``None`` for all. The order is always that of the tables.

    Raises:
        ValueError: there is no provider of that name.
    """
    known: list[Provider] = [
        Eager(),
        Compiled(),
        OnnxRuntime(),
        OpenVino(),
        HandSliced(),
        TorchPruning(),
        *slimkern_providers(),
    ]
    return chosen(known, names)

"""All works of levels op, layer and model, in the order in which they are measured.

Works of the same level and name have the same module, at other shapes. Nothing is built here.
"""

from __future__ import annotations

from bench.model_works import layer_works, model_works
from bench.op_works import op_works
from bench.work import Work


def all_works(smoke: bool) -> list[Work]:
    """The table of what is measured.

    Args:
        smoke: one tiny work of each kind, of odd sizes, instead of the real ones.
    """
    return [*op_works(smoke), *layer_works(smoke), *model_works(smoke)]

"""Discovery: what can be removed from a model exactly, read from its computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slimkern.discovery.forward import observe
from slimkern.discovery.groups import (
    Attribute,
    Between,
    Discovery,
    Group,
    Member,
    Refusal,
)
from slimkern.discovery.inputs import prepare
from slimkern.discovery.rehearsal import rehearse
from slimkern.discovery.resolve import resolve

__all__ = ["Attribute", "Between", "Discovery", "Group", "Member", "Refusal", "discover"]


def discover(model: nn.Module, example_inputs: Any = None) -> Discovery:
    """Find the weight slices of a model that can be removed together, exactly.

    One forward on fake tensors (no arithmetic, no memory for activations) follows which linear's
    output features run along which dimension of every tensor. A feature, or a block of them, can be
    removed where nothing mixes it with others between the linears that make it and the linear that
    consumes it: FFN channels (any operation entry by entry in between, gated forms included) and
    attention heads (of query, key, value and output projection). Names of modules play no part.

    What can't be removed is listed under ``refused`` with the reason: second linears whose input
    features are mixed, returned, added to a residual, consumed twice or combined with what can't be
    cut; linears that are called several times or not at all; and layers that multiply by a matrix
    but are no plain ``nn.Linear``. The width of the residual stream is never a target; linears that
    read it are not listed.

    A group ``is_head`` where its second linear's output reaches the model's outputs with no other
    linear, and no sum with an activation from further up (a residual), after it: the FFN of a bare
    encoder's last layer is none.

    Args:
        model: any module; it is left as it was, mode and attributes included.
        example_inputs: a tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments (a batch of a data loader will do). Only shapes and dtypes matter, and at
            least two tokens or rows are wanted. None: derived, for Hugging Face models.

    Returns:
        the groups in order of execution, named after their second linear, and the refusals.

    Raises:
        ValueError: ``example_inputs`` is needed or of a type that is not accepted; or the model is
            fused, and hides its linears.
        Exception: whatever the model's forward raises on these inputs.
    """
    fused = next((n for n, m in model.named_modules() if hasattr(type(m), "fused_from")), None)
    if fused is not None:
        raise ValueError(
            f"{fused!r} is fused, and computes without its linears: call slimkern.unfuse_(model) "
            "first"
        )
    with torch.inference_mode(False):  # in it, operations are not what they are elsewhere
        inputs = prepare(model, example_inputs)
        seen = observe(model, inputs)
        return rehearse(model, inputs, seen, resolve(model, seen))

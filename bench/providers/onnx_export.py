"""A module as an ONNX graph in which ONNX Runtime's transformer optimizer finds its patterns.

The patterns are those of torch's TorchScript exporter and of attention written out (matmul, mask,
softmax, matmul). With the newer exporter, or with ``scaled_dot_product_attention``, no attention
is fused (onnxruntime 1.31, torch 2.13, transformers 5.23), so both are chosen here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.providers.base import ProviderError

OPSET = 17  # the first with LayerNormalization
_WRITTEN_OUT = "written_out"


def export(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The ONNX graph of a module, for any batch and number of tokens.

    Every axis of an integer input is free, and every axis but the last of a floating one.

    Args:
        module: float32, in eval mode; returns one tensor.
        inputs: examples of its positional arguments.

    Returns:
        an ``onnx.ModelProto``; its inputs are named x0, x1, ..., its output y.
    """
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    names = [f"x{i}" for i in range(len(inputs))]
    free = {name: _free_axes(x) for name, x in zip(names, inputs)}
    with torch.no_grad():
        free["y"] = _free_axes(module(*inputs))
    buffer: Any = io.BytesIO()
    with _attention_written_out(module), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the exporter is the older one, and of its tracing
        torch.onnx.export(
            module,
            inputs,
            buffer,
            dynamo=False,
            input_names=names,
            output_names=["y"],
            dynamic_axes=free,
            opset_version=OPSET,
        )
    model = OnnxModel(onnx.load_from_string(buffer.getvalue()))
    _name_head_counts(model)
    _join_casts(model)
    return model.model


def _free_axes(tensor: Tensor) -> dict[int, str]:
    count = tensor.dim() - tensor.is_floating_point()
    return {axis: f"d{axis}" for axis in range(count)}


@contextmanager
def _attention_written_out(module: nn.Module) -> Iterator[None]:
    """Hugging Face's attention as plain products and a softmax, whatever the model's own is."""
    parts = [m for m in module.modules() if hasattr(m, "config")]
    configs: list[Any] = [
        c for c in (m.config for m in parts) if hasattr(c, "_attn_implementation")
    ]
    before = [config._attn_implementation for config in configs]
    if configs:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register(_WRITTEN_OUT, _written_out)
        AttentionMaskInterface.register(_WRITTEN_OUT, eager_mask)
    try:
        for config in configs:
            config._attn_implementation = _WRITTEN_OUT
        yield
    finally:
        for config, value in zip(configs, before):
            config._attn_implementation = value


def _written_out(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(d) + mask) v: q, k, v [B, heads, T, d] -> [B, T, heads, d].

    A division, not a product: without a mask, the optimizer has no other pattern. The mask is
    added; one of booleans (True: seen) becomes 0 and the lowest float.
    """
    root = int(query.shape[-1]) ** 0.5  # a constant of the graph
    if scaling is not None and abs(scaling * root - 1.0) > 1e-6:
        raise ProviderError(f"attention scores are scaled by {scaling}; only 1/sqrt(d) is fused")
    scores = query @ key.transpose(2, 3) / root
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            lowest = torch.finfo(scores.dtype).min
            attention_mask = (1.0 - attention_mask.to(scores.dtype)) * lowest
        scores = scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _name_head_counts(model: Any) -> None:
    """Write the number of heads where ``view(batch, tokens, -1, d)`` leaves it to be inferred.

    The optimizer reads it there. One number for the whole model, which it takes as an argument,
    does not do where layers keep different numbers of heads.
    """
    from onnx import helper

    for node in model.get_nodes_by_op_type("Reshape"):
        shape, add = model.get_parent(node, 1), model.get_parent(node, 0)
        if shape is None or shape.op_type != "Concat" or len(shape.input) != 4:
            continue
        heads, d = (model.get_constant_value(name) for name in shape.input[2:])
        width = _width(model, add)
        if heads is None or d is None or width is None or int(heads[0]) != -1:
            continue
        name = f"{node.name}_heads"
        model.add_initializer(helper.make_tensor(name, 7, [1], [width // int(d[0])]))
        shape.input[2] = name


def _width(model: Any, add: Any) -> int | None:
    """Output features of a linear, given the addition of its bias; None for another node."""
    if add is None or add.op_type != "Add":
        return None
    for name in add.input:
        bias = model.get_constant_value(name)
        if bias is not None and bias.ndim == 1:
            return int(bias.shape[0])
    return None


def _join_casts(model: Any) -> None:
    """A mask of 0 and 1 that is cast to booleans and then to floats: cast once, as the optimizer's
    patterns have it. Exact for such masks, which are all that the works have."""
    from onnx import TensorProto

    for node in model.get_nodes_by_op_type("Cast"):
        before = model.get_parent(node, 0)
        if before is not None and before.op_type == "Cast":
            (to,) = (a.i for a in before.attribute if a.name == "to")
            if to == TensorProto.BOOL:
                node.input[0] = before.input[0]

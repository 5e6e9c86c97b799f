"""onnxruntime: the exported graph through its transformer optimizer, checked to have fused.

One fusion is left out on a CPU: ``SkipLayerNormalization``, whose CPU kernel takes several times
as long as the addition and the ``LayerNormalization`` that it replaces (onnxruntime 1.31: 47 ms
against 9 of a forward of 187 ms, 12 layers of width 384, 1024 tokens).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench.providers._common import missing, placed_inputs, wrong_device
from bench.providers.base import Call, Provider, ProviderError
from bench.work import Outputs, Setting, Work
from slimkern.report.speed_schema import PRECISIONS

_OWN_FUSIONS = ("SkipLayerNormFusion", "EmbedLayerNormFusion")  # of the session, by their names
_REFUSED = {
    "fp32-high": "no such setting: a session multiplies float32 in float32",
    "fp32-medium": "its bfloat16 products of float32 models are for ARM only",
    "bf16": "no bfloat16 matrix products on a CPU",
}


class OnnxRuntime(Provider):
    """ONNX Runtime's sessions, as its guide to transformer models sets them up."""

    name = "onnxruntime"
    precisions = PRECISIONS

    def __init__(self) -> None:
        self._graph: tuple[tuple[str, str], bytes] | None = None

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if setting.precision in _REFUSED:
            return _REFUSED[setting.precision]
        if work.backward:
            return "inference only"
        absent = missing("onnxruntime", "onnx")
        if absent or (setting.device == "cpu"):
            return absent
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return "this build of onnxruntime has no CUDA provider"
        return wrong_device(setting)

    def prepare(self, work: Work, setting: Setting) -> Call:
        session = self._session(self._optimized(work, setting), setting)
        inputs = placed_inputs(work, Setting("fp32", setting.threads, "cpu"))
        return _call(session, [x.contiguous() for x in inputs])

    def _optimized(self, work: Work, setting: Setting) -> bytes:
        """The optimized graph, for any batch and tokens; made once per module."""
        from bench.providers.onnx_export import export

        key = (work.level, work.name)
        if self._graph is None or self._graph[0] != key:
            self._graph = None  # before the next is made: a graph holds all the weights
            exported = export(work.build(), work.inputs())
            self._graph = (key, _optimize(exported, setting.device))
        return self._graph[1]

    def _session(self, graph: bytes, setting: Setting) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # Its threads do not spin while another provider is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        kind = "CUDAExecutionProvider" if setting.device == "cuda" else "CPUExecutionProvider"
        off = list(_OWN_FUSIONS) if setting.device == "cpu" else []
        session = ort.InferenceSession(graph, options, providers=[kind], disabled_optimizers=off)
        if session.get_providers()[0] != kind:
            raise ProviderError(f"asked for {kind}, got {session.get_providers()}")
        taken = session.get_session_options().intra_op_num_threads
        if taken != setting.threads:
            raise ProviderError(f"asked for {setting.threads} threads, got {taken}")
        return session


def _optimize(exported: Any, device: str) -> bytes:
    """Runs the transformer optimizer and checks what it has fused.

    Raises:
        ProviderError: a softmax, a GELU or a LayerNorm of the graph was not fused.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    before = _operators(exported)
    options = FusionOptions("bert")
    if device == "cpu":
        options.enable_skip_layer_norm = False
        options.enable_bias_skip_layer_norm = False
        options.enable_embed_layer_norm = False
    with _quiet("fusion_attention", "onnxruntime.transformers"):
        model = optimize_model(
            exported,
            model_type="bert",
            num_heads=0,  # read from the graph, where they may differ by layer
            hidden_size=0,
            optimization_options=options,
            opt_level=0,
            use_gpu=device == "cuda",
        )
    _check_fused(before, _operators(model.model))
    return model.model.SerializeToString()


def _operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


_FUSIONS = {
    "Softmax": ("Attention", "MultiHeadAttention"),
    "Erf": ("Gelu", "BiasGelu"),
    "LayerNormalization": (
        "LayerNormalization",
        "SkipLayerNormalization",
        "EmbedLayerNormalization",
    ),
}


def _check_fused(before: Counter[str], after: Counter[str]) -> None:
    """As many fused operators as there were of the operator that each of them holds."""
    for plain, fused in _FUSIONS.items():
        found = sum(after[name] for name in fused)
        if found != before[plain]:
            raise ProviderError(
                f"the optimizer fused {found} of {before[plain]} into {' or '.join(fused)}"
            )


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """The optimizer warns of every layer whose heads do not fill the hidden size, and fuses it."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before):
            logger.setLevel(level)


def _call(session: Any, inputs: list[torch.Tensor]) -> Call:
    """A run on inputs and an output that are bound once: nothing is copied."""
    (described,) = session.get_outputs()
    arrays = [x.numpy() for x in inputs]
    names = [x.name for x in session.get_inputs()]
    (first,) = session.run([described.name], dict(zip(names, arrays)))
    output = torch.empty(first.shape, dtype=torch.float32)
    binding = session.io_binding()
    for name, array in zip(names, arrays):
        binding.bind_cpu_input(name, array)
    binding.bind_output(described.name, "cpu", 0, np.float32, list(first.shape), output.data_ptr())

    def call() -> Outputs:
        session.run_with_iobinding(binding)
        return (output,)

    call.keeps = (arrays, output)  # type: ignore[attr-defined]  # what the binding points to
    return call

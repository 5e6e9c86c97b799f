"""openvino: converted from the module, compiled for each shape, and asked what it made of it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import nn

from bench.providers._common import missing, placed_inputs
from bench.providers.base import Call, Provider, ProviderError
from bench.work import Outputs, Setting, Work
from slimkern.report.speed_schema import PRECISIONS

_REFUSED = {
    "fp32-high": "no such setting: float32 products are float32, or bfloat16 by a hint",
    "fp32-medium": "the same as bf16: a float32 model with the hint bf16",
}
_HINTS = {"fp32": "f32", "bf16": "bf16"}
_PRODUCTS = ("FullyConnected", "MatMul")


class OpenVino(Provider):
    """OpenVINO's CPU plugin with the latency hint and static shapes.

    ``bf16`` is its hint on a float32 model, which is how bfloat16 is used there: inputs and
    outputs stay float32.

    Attributes:
        notes: case -> attention that was not fused there, though it runs.
    """

    name = "openvino"
    precisions = PRECISIONS

    def __init__(self) -> None:
        # Nothing is reported to OpenVINO's makers: what would do so is not to be found, if this
        # comes before the first import, which reports already.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
        self.notes: dict[str, str] = {}
        self._model: tuple[tuple[str, str], nn.Module, Any] | None = None

    def refuses(self, work: Work, setting: Setting) -> str | None:
        if setting.precision in _REFUSED:
            return _REFUSED[setting.precision]
        if work.backward:
            return "inference only"
        if setting.device != "cpu":
            return "runs on the CPU only"
        absent = missing("openvino")
        if absent or setting.precision == "fp32":
            return absent
        able = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return None if "BF16" in able else f"no bfloat16 unit; it has {', '.join(able)}"

    def prepare(self, work: Work, setting: Setting) -> Call:
        inputs = placed_inputs(work, Setting("fp32"))
        model = self._converted(work, inputs).clone()
        model.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
        compiled = _core().compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "NUM_STREAMS": 1,
                "INFERENCE_NUM_THREADS": setting.threads,
                "INFERENCE_PRECISION_HINT": _HINTS[setting.precision],
                "ENABLE_CPU_PINNING": False,  # no other provider's threads are bound to a core
            },
        )
        self._verify(compiled, work, setting)
        return _call(compiled, inputs)

    def _converted(self, work: Work, inputs: tuple[torch.Tensor, ...]) -> Any:
        """The model for any shape, converted once per module, whose weights it shares."""
        key = (work.level, work.name)
        if self._model is None or self._model[0] != key:
            self._model = None
            import openvino

            module = work.build()
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tracing; outputs are checked for each shape
                model = openvino.convert_model(module, example_input=inputs)
            self._model = (key, module, model)
        return self._model[2]

    def _verify(self, compiled: Any, work: Work, setting: Setting) -> None:
        """Threads, precision and fusions as they are in the compiled model.

        Raises:
            ProviderError: the threads or the precision of a product are not as asked.
        """
        asked = _HINTS[setting.precision]
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if (threads, hint) != (setting.threads, asked):
            raise ProviderError(
                f"asked for {setting.threads} threads and {asked}, got {threads} and {hint}"
            )
        kinds: Counter[str] = Counter()
        for operation in compiled.get_runtime_model().get_ops():
            told = operation.get_rt_info()
            kind, precision = (str(told[k].value) for k in ("layerType", "runtimePrecision"))
            kinds[kind] += 1
            if kind in _PRODUCTS and precision != asked:
                raise ProviderError(f"a {kind} runs in {precision}, asked for {asked}")
        if kinds["Softmax"]:
            self.notes[work.case] = f"{kinds['Softmax']} attentions were not fused"


@cache
def _core() -> Any:
    """OpenVINO's entry, made once."""
    import openvino

    return openvino.Core()


def _call(compiled: Any, inputs: tuple[torch.Tensor, ...]) -> Call:
    """An inference on inputs that are bound once; the output is the request's own memory."""
    import openvino

    request = compiled.create_infer_request()
    arrays = [x.contiguous().numpy() for x in inputs]
    for index, array in enumerate(arrays):
        request.set_input_tensor(index, openvino.Tensor(array, shared_memory=True))
    request.infer()
    output = torch.from_numpy(request.get_output_tensor(0).data)

    def call() -> Outputs:
        request.infer()
        return (output,)

    call.keeps = (compiled, arrays)  # type: ignore[attr-defined]  # what the request points to
    return call

"""Architectures without memory: what a model would be, before it is given any weights.

Parameters live on the meta device, buffers are real: position ids and rotary frequencies are in no
file, and are what the architecture's own code makes of its configuration.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.cuts import SurgeryError
from slimkern.plan import SlimPlan
from slimkern.surgery import FFN_FIELDS, slim_


def build(kind: Any, config: dict[str, Any], attention: str | None = None) -> nn.Module:
    """A transformers architecture, its parameters on the meta device. No random state is used.

    Args:
        kind: the model class.
        config: its configuration as JSON data.
        attention: ``eager`` or ``sdpa`` sets the attention implementation; others are left to
            transformers, as another machine may not have them.

    Raises:
        ValueError: the configuration does not describe the class.
    """
    from huggingface_hub.errors import StrictDataclassError

    wrong = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError)
    try:
        parsed = kind.config_class.from_dict(config)
        if attention in ("eager", "sdpa"):
            parsed._attn_implementation = attention
        with torch.random.fork_rng(devices=[]), _parameters_on_meta():
            model: nn.Module = kind._from_config(parsed)
    except (*wrong, StrictDataclassError) as error:
        raise ValueError(f"the configuration describes no {kind.__name__}: {error}") from error
    return model


_building = threading.RLock()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made meanwhile by this thread have meta parameters, but real buffers.

    Under ``torch.device("meta")`` the buffers that no file holds (position ids, rotary
    frequencies) would have no values, and nothing would bring them back. A parameter's own memory
    is released unwritten: initialisation runs on the meta tensor.
    """
    with _building:
        plain, owner = nn.Module.register_parameter, threading.get_ident()

        def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and not param.is_meta and threading.get_ident() == owner:
                param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            plain(module, name, param)

        nn.Module.register_parameter = register  # type: ignore
        try:
            yield
        finally:
            nn.Module.register_parameter = plain  # type: ignore[method-assign]


def describe(
    model: Any, plan: SlimPlan, kind: Any = None
) -> tuple[dict[str, Any], dict[str, Any], bool, nn.Module] | None:
    """How to write the configuration of a Hugging Face model.

    Args:
        model: slim or dense.
        plan: what was removed of it.
        kind: the model class; None: the model's own.

    Returns:
        the configuration to write; the fields that make it the dense one; whether it alone
        describes the model; and the model rebuilt from it, without memory for parameters. ``None``
        where the model is not its dense architecture cut by the plan.
    """
    config = json.loads(model.config.to_json_string())
    kind = kind or type(model)
    config["architectures"] = [kind.__name__]
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    config["dtype"] = str(floating).removeprefix("torch.")
    sizes = shapes(model)
    whole = all(len(e.keep) == e.group.num_units for e in plan.entries if e.group.kind != "ffn")
    for dense in _dense_fields(model.config, plan):
        twin = build(kind, {**config, **dense})
        try:
            slim_(twin, plan)
        except SurgeryError:
            continue
        add_biases(twin, sizes)
        if shapes(twin) == sizes:
            plain = whole and shapes(build(kind, config)) == sizes
            return (config, dense, True, twin) if plain else ({**config, **dense}, {}, False, twin)
    return None


def _dense_fields(config: Any, plan: SlimPlan) -> Iterator[dict[str, int]]:
    """Candidates for the configuration fields that surgery has set to the slim FFN width."""
    yield {}
    widths = sorted({e.group.num_units for e in plan.entries if e.group.kind == "ffn"})
    for name in FFN_FIELDS:
        for width in widths:
            if isinstance(getattr(config, name, None), int) and getattr(config, name) != width:
                yield {name: width}


def add_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Linears without a bias get one, without memory, where ``names`` of saved tensors hold it: a
    one-shot repair may have added it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for owner, _, leaf in (name.rpartition(".") for name in names):
        linear = modules.get(owner)
        if leaf == "bias" and type(linear) is nn.Linear and linear.bias is None:
            bias = torch.empty(linear.out_features, dtype=linear.weight.dtype, device="meta")
            linear.bias = nn.Parameter(bias)


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of a module's structure, its parameters and buffers without memory; ties are kept."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo.update({id(b): b.detach().to("meta") for b in model.buffers()})
    return copy.deepcopy(model, memo)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of everything in the state dict, by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def misfits(model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str]) -> list[str]:
    """Where tensors to load are not those of a cut model: one phrase each."""
    have = {name: tuple(value.shape) for name, value in tensors.items()}
    have.update({name: have[kept] for name, kept in tied.items() if kept in have})
    want = shapes(model)
    wrong = [f"{n} is missing" for n in want if n not in have]
    wrong += [f"{n} is unknown to the model" for n in have if n not in want]
    wrong += [
        f"{n} has shape {have[n]}, the cut model {want[n]}"
        for n in want
        if n in have and have[n] != want[n]
    ]
    return wrong


def _loose_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that are in no state dict, by name."""
    inside = model.state_dict(keep_vars=True)
    return {name: value for name, value in model.named_buffers() if name not in inside}


def differing_buffers(model: nn.Module, twin: nn.Module) -> dict[str, Tensor]:
    """Non-persistent buffers whose values the architecture does not give by itself: a model cast
    to bf16 has rounded rotary frequencies, and would compute with them again."""
    fresh, differing = _loose_buffers(twin), {}
    for name, value in _loose_buffers(model).items():
        if name in fresh:
            own = value.detach().cpu().contiguous()
            if own.dtype != fresh[name].dtype or not torch.equal(own, fresh[name]):
                differing[name] = own.clone()
    return differing


def fill(
    model: nn.Module, tensors: dict[str, Tensor], buffers: dict[str, Tensor], tied: dict[str, str]
) -> None:
    """Put tensors into a model as they are, and tie what was tied.

    A parameter on the meta device gets the tensor itself; dtypes are those of the tensors.
    """
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    model.load_state_dict({n: t.to(device) for n, t in tensors.items()}, strict=False, assign=True)
    for name, kept in tied.items():
        _store(model, name)[name.rpartition(".")[2]] = _store(model, kept)[kept.rpartition(".")[2]]
    for name, value in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = value.to(device)


def _store(model: nn.Module, name: str) -> dict[str, Any]:
    """The dictionary of the module that holds a parameter or buffer."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    return module._parameters if leaf in module._parameters else module._buffers

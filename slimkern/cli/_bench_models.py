"""The models that ``slimkern bench`` times: read from folders, built from a configuration, cut."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from slimkern import checkpoint, skeleton
from slimkern.cli.inspect import load_structure
from slimkern.copies import sharing_copy
from slimkern.discovery import discover
from slimkern.fuse import FuseError, fuse_, fused_blocks
from slimkern.masks import told_plan
from slimkern.plan import SlimPlan, make_plan
from slimkern.surgery import slim_
from slimkern.targets import reasons

_POSITIONS = ("position_embeddings", "wpe")
_WHAT = {"ffn": ("ffn2_sparsity", "FFN channels"), "mha": ("mha_sparsity", "heads")}


@dataclass(frozen=True)
class Candidate:
    """A model that is timed.

    Attributes:
        name: as it stands in the table: dense, slim, fused.
        model: in float32 and evaluation mode, on the CPU; never fused itself.
        origin: where its structure and its weights come from.
        fused: whether a fused copy is what is timed.
    """

    name: str
    model: nn.Module
    origin: str
    fused: bool = False


def candidates(values: Mapping[str, Any]) -> list[Candidate]:
    """What there is to time, the dense model first; the only place that knows which there are.
    The last of dense and slim is fused too, where that can be.

    Args:
        values: the command's options by parameter name: ``model``, ``dense``, ``slim``,
            ``ffn2_sparsity``, ``mha_sparsity``, ``round_multiplier``, ``random``.

    Raises:
        ValueError: an argument leads to no model, or to one that does not fit the others.
    """
    _quiet()
    *others, last = _plain(values)
    try:
        fused = fuse_(sharing_copy(last.model))
    except FuseError:
        return [*others, replace(last, origin=f"{last.origin}; nothing in it can be fused")]
    kinds = Counter(block.kind.replace("_", " ") for block in fused_blocks(fused)).items()
    told = f"{last.name}, {', '.join(f'{n} x {kind}' for kind, n in kinds)} in one call each"
    return [*others, last, Candidate("fused", last.model, told, True)]


def _plain(values: Mapping[str, Any]) -> list[Candidate]:
    """The dense model, and the slim one if there is one."""
    slim = _slim(values["model"])
    if slim is not None:
        _check_slim_model(values)
        slim_folder, argument, name = values["model"], "--dense", values["dense"]
    else:
        _check_dense_model(values)
        slim_folder, argument, name = values["slim"], "MODEL", values["model"]
        slim = None if slim_folder is None else _slim(slim_folder)
        if slim_folder is not None and slim is None:
            raise ValueError(
                f"--slim is {str(slim_folder)!r}; accepted: a slim model that slimkern.save wrote"
            )
    if slim is None:
        dense, origin = _read(argument, name, None, values["random"])
        return [Candidate("dense", dense, origin), *_cut(dense, values)]
    if name is None:
        dense, origin = _dense_of(slim, slim_folder), "what slim was cut from, random weights"
    else:
        dense, origin = _read(argument, name, type(slim), values["random"])
        _check_pair(argument, name, dense, slim)
    told = f"{short_name(slim_folder)}: {widths(told_plan(slim))}"
    return [Candidate("dense", dense, origin), Candidate("slim", slim, told)]


def short_name(name: str | Path) -> str:
    """A folder's own name, or the hub name."""
    return Path(name).resolve().name if Path(name).is_dir() else str(name)


def widths(plan: SlimPlan) -> str:
    """What a plan leaves, in words: ``FFN channels 320 of 1536, heads 4-6 of 12``."""
    said = []
    for kind, (_, what) in _WHAT.items():
        entries = [e for e in plan.entries if e.group.kind == kind]
        if entries:
            kept = _span([len(e.keep) for e in entries])
            said.append(f"{what} {kept} of {_span([e.group.num_units for e in entries])}")
    return ", ".join(said) or "nothing cut"


def longest(model: nn.Module) -> int | None:
    """How many tokens the model takes at most; ``None`` where it does not say."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # RoBERTa's kin count positions from behind the padding's.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return getattr(model.config, "max_position_embeddings", None)


def inputs(model: nn.Module, shape: tuple[int, int]) -> dict[str, Any]:
    """Random tokens without padding, (batch, tokens), the same for every model of a vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, shape, generator=random)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    names = signature(model.forward).parameters
    return {name: value for name, value in given.items() if name in names}


def forward(model: nn.Module, given: Mapping[str, Any]) -> Tensor:
    """The first of the model's outputs."""
    output: Tensor = model(**given, return_dict=True)[0]
    return output


def _slim(folder: str | Path) -> nn.Module | None:
    """The slim model of a folder, in float32; ``None`` where nothing was cut, or it is no such."""
    if not (Path(folder) / checkpoint.PLAN_FILE).is_file():
        return None
    model = checkpoint.load(folder)
    return model.float() if told_plan(model).entries else None


def _check_slim_model(values: Mapping[str, Any]) -> None:
    for name in ("slim", "ffn2_sparsity", "mha_sparsity"):
        if values[name]:
            raise ValueError(
                f"{_flag(name)} is given, but MODEL is {values['model']!r}, a slim model: it is "
                "timed as it is; accepted: --dense, the model it was cut from"
            )


def _check_dense_model(values: Mapping[str, Any]) -> None:
    if values["dense"] is not None:
        raise ValueError(
            f"--dense is given, but MODEL is {values['model']!r}, which is no slim model's folder; "
            "accepted: --slim, the folder of what became of it"
        )
    if values["slim"] is None:
        return
    for name in ("ffn2_sparsity", "mha_sparsity"):
        if values[name]:
            raise ValueError(f"--slim and {_flag(name)} are both given; accepted: one of them")


def _read(argument: str, name: str, kind: Any, random: bool) -> tuple[nn.Module, str]:
    """A dense model of a folder or hub name, in float32, and where its weights come from."""
    try:
        structure = load_structure(name)
    except checkpoint.CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(str(error).replace("MODEL", argument, 1)) from error
    if told_plan(structure).entries:
        raise ValueError(f"{argument} is {name!r}, a slim model; accepted: a dense one")
    if (Path(name) / checkpoint.PLAN_FILE).is_file():  # saved by slimkern, nothing cut
        return _text_model(
            argument, name, structure.float()
        ), f"{short_name(name)}, its own weights"
    kind = kind or type(structure)
    if random:
        model, origin = _random(kind, structure.config), "random weights"
    else:
        try:
            model = kind.from_pretrained(name, dtype=torch.float32)
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{argument} is {name!r}: its weights could not be read ({_first(error)}); "
                "--random gives it random ones, which are as fast"
            ) from error
        origin = "its own weights"
    return _text_model(argument, name, model.float().eval()), f"{short_name(name)}, {origin}"


def _text_model(argument: str, name: str, model: Any) -> nn.Module:
    """The model, if it can be called on token ids alone."""
    takes = getattr(model, "main_input_name", None)
    if takes != "input_ids" or getattr(model.config, "is_encoder_decoder", False):
        what = "an encoder-decoder" if takes == "input_ids" else f"a model of {takes}"
        raise ValueError(
            f"{argument} is {name!r}, {what}; accepted: encoders and decoders of token ids"
        )
    plain: nn.Module = model
    return plain


def _random(kind: Any, config: Any) -> nn.Module:
    """The architecture with the random weights that its training would begin with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind._from_config(copy.deepcopy(config))
    return model.float().eval()


def _dense_of(slim: Any, name: str) -> nn.Module:
    """What a slim model was cut from, with random weights."""
    described = skeleton.describe(slim, told_plan(slim))
    if described is None:
        raise ValueError(
            f"MODEL is {name!r}, whose plan does not tell what it was cut from; accepted: --dense"
        )
    config, dense, _, _ = described
    parsed = type(slim).config_class.from_dict({**config, **dense})
    parsed._attn_implementation = slim.config._attn_implementation
    return _random(type(slim), parsed)


def _check_pair(argument: str, name: str, dense: nn.Module, slim: nn.Module) -> None:
    """Refuse a dense model that the slim one was not cut from: they would not do the same work."""
    described = skeleton.describe(slim, told_plan(slim))
    if described is None:
        return
    config, fields, _, _ = described
    want = skeleton.shapes(skeleton.build(type(slim), {**config, **fields}))
    have = skeleton.shapes(dense)
    for key in sorted(want.keys() | have.keys()):
        if want.get(key) != have.get(key):
            raise ValueError(
                f"{argument} is {name!r}, which the slim model was not cut from: {key} is "
                f"{have.get(key, 'not there')}, and should be {want.get(key, 'not there')}"
            )


def _cut(dense: nn.Module, values: Mapping[str, Any]) -> list[Candidate]:
    """What the dense model would be after the cut that is asked for: the units are drawn."""
    sparsities = {kind: values[argument] for kind, (argument, _) in _WHAT.items()}
    if not any(sparsities.values()):
        return []
    found = discover(dense)
    random = torch.Generator().manual_seed(0)
    scores = {
        g.name: torch.rand(g.num_units, generator=random)
        for g in found.groups
        if not g.is_head and sparsities[g.kind]
    }
    kinds = {g.kind for g in found.groups if g.name in scores}
    for kind, (argument, what) in _WHAT.items():
        if sparsities[kind] and kind not in kinds:
            raise ValueError(
                f"{_flag(argument)} is {sparsities[kind]:g}, but no {what} of MODEL can be "
                f"removed: {reasons(found)}"
            )
    multiple = values["round_multiplier"]
    plan = make_plan(
        found.groups, scores, sparsities["ffn"], sparsities["mha"], multiple_of=multiple
    )
    if all(len(e.keep) == e.group.num_units for e in plan.entries):
        asked = " ".join(f"{_flag(a)} {sparsities[k]:g}" for k, (a, _) in _WHAT.items())
        raise ValueError(
            f"{asked} with --round-multiplier {multiple} removes nothing from MODEL "
            f"({widths(plan)}); accepted: a larger sparsity or a smaller multiplier"
        )
    slim = slim_(copy.deepcopy(dense), plan)
    return [Candidate("slim", slim, f"what a cut would leave, units drawn: {widths(plan)}")]


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _first(error: BaseException) -> str:
    """An error's first sentence."""
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".")


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)

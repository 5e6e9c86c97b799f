"""``slimkern inspect``: what of a model can be removed, and what can't, and why."""

from __future__ import annotations

import json
import os
import re
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from slimkern.discovery.groups import Discovery, Group


def inspect(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the groups that can be removed, what is refused and why, and the parameters.

    Only the configuration is read: no weights are loaded, unless the folder is a slim model's.
    """
    loaded = load_structure(model)
    from slimkern.discovery import discover

    found = discover(loaded)
    described = describe(model, loaded, found)
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        _print(described)


def load_structure(name: str) -> nn.Module:
    """The model of a folder or hub name, without memory for its weights where that is possible.

    Raises:
        ValueError: the name leads to no model, or to one that transformers does not know.
        CheckpointError: the folder is a damaged slim model's.
    """
    import transformers
    from transformers.utils import logging

    from slimkern.checkpoint import CONFIG_FILE, PLAN_FILE, load
    from slimkern.skeleton import build

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)  # its retries: the error below says it once
    if (Path(name) / PLAN_FILE).is_file():
        return load(name)
    is_path = Path(name).exists() or name.startswith((".", "~", os.sep))
    if is_path and not (Path(name) / CONFIG_FILE).is_file():
        raise ValueError(f"MODEL is {name!r}, where there is no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"MODEL is {name!r}: its configuration could not be read; accepted: a folder with a "
            "config.json, or the name of a model on the hub or in its cache"
        ) from error
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        if type(config) not in transformers.AutoModel._model_mapping:
            raise ValueError(f"MODEL is {name!r}: transformers has no class for its configuration")
        kind = transformers.AutoModel._model_mapping[type(config)]
    return build(kind, json.loads(config.to_json_string()))


def describe(name: str, model: nn.Module, found: Discovery) -> dict[str, Any]:
    """Everything that the command shows, as JSON data."""
    return {
        "model": name,
        "architecture": type(model).__name__,
        "parameters": parameters(model, found),
        "groups": [_group(model, group) for group in found.groups],
        "refused": [{"name": r.name, "reason": r.reason} for r in found.refused],
    }


def parameters(model: nn.Module, found: Discovery) -> dict[str, int]:
    """Counts of parameters; a tied one counts once.

    ``total`` is ``embeddings`` plus ``layers``; ``removable`` is what of the layers belongs to
    units that can be removed.
    """
    from torch import nn

    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    sizes = {id(p): p.numel() for p in model.parameters()}
    in_tables = sum(n for i, n in sizes.items() if i in tables)
    owned = {i for group in found.groups for i in _owned(model, group)}
    return {
        "total": sum(sizes.values()),
        "embeddings": in_tables,
        "layers": sum(sizes.values()) - in_tables,
        "removable": sum(sizes[i] for i in owned if i not in tables),
    }


def _owned(model: nn.Module, group: Group) -> dict[int, int]:
    """The parameters that are cut with the units of a group: identity -> elements."""
    owned = {}
    for member in (*group.producers, *group.consumers):
        module = model.get_submodule(member.name)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" or member.role != "consumer":
                owned[id(parameter)] = parameter.numel()
    for between in group.between:
        parameter = model.get_parameter(between.name)
        owned[id(parameter)] = parameter.numel()
    return owned


def _group(model: nn.Module, group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "kind": group.kind,
        "units": group.num_units,
        "unit_size": group.consumers[0].unit_size,
        "parameters_per_unit": sum(_owned(model, group).values()) // group.num_units,
        "producers": [m.name for m in group.producers],
        "consumers": [m.name for m in group.consumers],
        "is_head": group.is_head,
    }


def _print(described: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("group", no_wrap=True)
    table.add_column("layers", overflow="fold")
    table.add_column("units", no_wrap=True)
    table.add_column("params a unit", justify="right")
    for (pattern, kind, units, unit_size, per_unit, is_head), names in _alike(described).items():
        label = f"{units:,} FFN channels" if kind == "ffn" else f"{units:,} heads of {unit_size}"
        pattern += " (model head)" if is_head else ""
        table.add_row(escape(pattern), _ranges(names), label, f"{per_unit:,}")
    console.print(f"{escape(described['model'])}: {described['architecture']}", soft_wrap=True)
    if described["groups"]:
        console.print(table)
    counts = described["parameters"]
    layers = max(1, counts["layers"])
    console.print(
        f"parameters  {counts['total']:,} in all: {counts['embeddings']:,} in embedding tables, "
        f"{counts['layers']:,} in the layers; {counts['removable']:,} of these "
        f"({counts['removable'] / layers:.0%}) belong to units that can be removed",
        soft_wrap=True,
        highlight=False,
    )
    for refusal in described["refused"]:
        line = f"refused  {refusal['name']}: {refusal['reason']}"
        console.print(escape(line), soft_wrap=True, highlight=False)
    if not described["groups"]:
        console.print("nothing can be removed from this model", highlight=False)


def _alike(described: dict[str, Any]) -> dict[tuple[Any, ...], list[int]]:
    """Groups that differ in the layer's number only: what they share -> the numbers.

    The number is the first in the name; a name without one stands for itself.
    """
    rows: dict[tuple[Any, ...], list[int]] = {}
    for group in described["groups"]:
        first = re.search(r"(?<=\.)\d+(?=\.)", "." + group["name"] + ".")
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", "." + group["name"] + ".", count=1).strip(".")
        shared = (group["kind"], group["units"], group["unit_size"], group["parameters_per_unit"])
        numbers = rows.setdefault((pattern, *shared, group["is_head"]), [])
        if first is not None:
            numbers.append(int(first.group()))
    return rows


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)

"""``save`` and ``load``: a slim model as a folder of safetensors and JSON. Nothing is pickled.

The folder holds

* ``config.json``: the configuration of the architecture, and under ``slimkern`` what :func:`load`
  needs besides (the name and SHA-256 of the weights file, tied names);
* ``slim_plan.json``: which units of which groups stayed;
* the weights: ``model.safetensors`` where the configuration alone describes the model (nothing but
  the FFN was cut, evenly), so that any loader takes it; ``slim.safetensors`` otherwise. No other
  loader looks for that name, so that none can put the weights into layers of other sizes;
* tokenizer and other files of the folder that the dense model came from.

``per_layer_config`` of transformers is never written: none of the supported architectures (BERT,
RoBERTa, XLM-R, ELECTRA, DistilBERT, MPNet) reads it; they would build layers of equal width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slimkern import skeleton
from slimkern.cuts import SurgeryError
from slimkern.folders import copy_companions, sha256, whole_folder
from slimkern.masks import is_masked, told_plan
from slimkern.nn import plain_class
from slimkern.parallel import ranks_of, unwrapped
from slimkern.plan import SlimPlan
from slimkern.shards import WAY_OUT, is_sharded
from slimkern.surgery import is_hugging_face, slim_

CONFIG_FILE, PLAN_FILE = "config.json", "slim_plan.json"
PLAIN_WEIGHTS, SLIM_WEIGHTS = "model.safetensors", "slim.safetensors"
BUFFERS_FILE = "slim_buffers.safetensors"
_KEY, _VERSION = "slimkern", 1


class CheckpointError(ValueError):
    """A model can't be saved as it is, or a folder is damaged or no slim model's; says which."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
    rank: int | None = 0,
) -> Path:
    """Write a slim (or dense) model to ``folder``, all of it or nothing.

    A Hugging Face model is first rebuilt on the meta device from what will be written: a folder
    that :func:`load` could not read is never left behind.

    Args:
        model: a slim model: what ``slim_``, ``model_slim`` or :func:`load` returned. Of a compiled
            or wrapped one, the module inside is saved; of a fused one, the slim model that it was.
        folder: the folder to create. It must not exist, or be empty, unless ``overwrite``.
        source: the folder whose tokenizer and other files go with it; by default the folder, or
            the cached files of the hub name, that the model was loaded from.
        overwrite: replace a folder that holds a model.
        rank: where ``torch.distributed`` runs, the process that writes; the others check the model
            and return at once. ``None``: each one that calls writes, to a folder of its own.

    Returns:
        the folder.

    Raises:
        CheckpointError: the model is still masked or sharded, has lost its plan, or has state that
            is no tensor.
        ValueError: there is no such ``rank``.
        FileExistsError: the folder is there.
        FileNotFoundError: ``source`` is no folder.
    """
    model, ranks = unwrapped(model), ranks_of()
    if rank is not None and not 0 <= rank < ranks.size:
        raise ValueError(f"rank is {rank}; accepted: 0 to {ranks.size - 1}, or None")
    if is_masked(model):
        raise CheckpointError(
            "the model is masked: its weights are still full size. Call slimkern.model_slim(model) "
            "first, or save the masked model itself with torch or save_pretrained"
        )
    folder = Path(folder)
    if rank is not None and rank != ranks.rank:
        return folder
    try:
        plan = told_plan(model)
    except ValueError as error:
        raise CheckpointError(f"the model and a module in it were slimmed apart: {error}") from None
    companions = _source_folder(model, source)
    tensors, tied = _tensors(model)
    config, about, buffers = _description(model, plan)
    about["tied"] = tied
    replaces = (CONFIG_FILE, PLAN_FILE) if overwrite else None
    with whole_folder(folder, replaces) as fresh:
        save_file(tensors, fresh / about["weights"], metadata={"format": "pt"})
        about["sha256"] = sha256(fresh / about["weights"])
        if buffers:
            save_file(buffers, fresh / BUFFERS_FILE, metadata={"format": "pt"})
        (fresh / PLAN_FILE).write_text(plan.to_json() + "\n", encoding="utf-8")
        about["plan_sha256"] = sha256(fresh / PLAN_FILE)
        text = json.dumps({**config, _KEY: about}, indent=2, sort_keys=True)
        (fresh / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        if companions is not None:
            copy_companions(companions, fresh, other=PLAN_FILE)
    return folder


def _description(
    model: nn.Module, plan: SlimPlan
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """The configuration, what :func:`load` needs besides, and the buffers that it could not know.

    Raises:
        CheckpointError: the model is not what would be loaded.
    """
    about: dict[str, Any] = {"version": _VERSION, "weights": SLIM_WEIGHTS, "buffers": []}
    if not is_hugging_face(model):
        return {"architectures": [plain_class(model).__name__]}, about, {}
    described = skeleton.describe(model, plan, plain_class(model))
    if described is None:
        raise CheckpointError(
            f"this {type(model).__name__} is not its dense architecture cut by its plan "
            f"({len(plan)} groups): save the module that was slimmed, or one that contains it"
        )
    config, dense, plain, twin = described
    buffers = skeleton.differing_buffers(model, twin)
    about["weights"] = PLAIN_WEIGHTS if plain else SLIM_WEIGHTS
    about["dense"] = dense
    about["attention"] = getattr(model.config, "_attn_implementation", None)
    about["buffers"] = sorted(buffers)
    return config, about, buffers


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The slim model of a folder that :func:`save` wrote; its outputs are equal bit by bit.

    The dense architecture is built without memory for its parameters (on the meta device), cut by
    the plan, and only then given the weights, in the dtype they were saved in.

    Args:
        folder: what :func:`save` wrote.
        model: a fresh dense instance, for a module that transformers has no class for. It is cut
            in place, filled on the device where it is, and returned. Everything is checked first:
            where an error is raised, it has not been changed.

    Returns:
        the model; in evaluation mode, unless ``model`` was given.

    Raises:
        CheckpointError: the folder is damaged, half written or none of slimkern's; or ``model``
            is needed, or does not fit the plan or the weights.
    """
    folder = Path(folder)
    config, about, plan = _read_description(folder)
    tensors = _read_tensors(folder / about["weights"])
    if sha256(folder / about["weights"]) != about["sha256"]:
        raise CheckpointError(f"{folder / about['weights']}: not the file that was saved (SHA-256)")
    buffers = _read_tensors(folder / BUFFERS_FILE) if about["buffers"] else {}
    built = model is None
    if model is None:
        kind = _class_of(config)
        try:
            model = skeleton.build(
                kind, {**config, **about.get("dense", {})}, about.get("attention")
            )
        except ValueError as error:
            raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error}") from error
    try:
        # A given model is cut for real only after a twin without memory has passed every check.
        trial = slim_(model if built else skeleton.meta_twin(model), plan)
    except SurgeryError as error:
        raise CheckpointError(f"{folder}: the plan does not fit the model: {error}") from error
    skeleton.add_biases(trial, tensors)
    _check_tensors(trial, tensors, about["tied"], folder)
    if not built:
        skeleton.add_biases(slim_(model, plan), tensors)
    skeleton.fill(model, tensors, buffers, about["tied"])
    if built:
        # As after from_pretrained: a later save finds the tokenizer and the other files there.
        model.config._name_or_path = str(folder)  # type: ignore[union-attr]
    return model.eval() if built else model


def _source_folder(model: nn.Module, source: str | Path | None) -> Path | None:
    """Where the files that travel with the model lie, if anywhere."""
    if source is not None:
        if not Path(source).is_dir():
            raise FileNotFoundError(f"source is {str(source)!r}, which is no folder")
        return Path(source)
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    try:
        return Path(str(cached_file(name, CONFIG_FILE, local_files_only=True))).parent
    except OSError:  # not in the cache, or the folder it came from is gone
        return None


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state to write, each tied tensor once, and ``{name left out: name written}``."""
    written: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    storages: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{name!r} is a {type(value).__name__}; only tensors are saved")
        if is_sharded(value):
            raise CheckpointError(f"{name!r} is sharded over ranks. {WAY_OUT}")
        if value.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device: it has no values to save")
        if id(value) in first:
            tied[name] = first[id(value)]
            continue
        first[id(value)] = name
        plain = value.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        # Two views of one storage that are not the same tensor: each is written in full.
        written[name] = plain.clone() if storage and storage in storages else plain
        storages.add(storage)
    return written, tied


def _class_of(config: dict[str, Any]) -> Any:
    """transformers' class that a configuration names."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "?"
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise CheckpointError(f"loading a {name} without model= needs transformers") from error
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"{name} is no class of transformers {transformers.__version__}: pass model=, a fresh "
            "dense instance"
        )
    return kind


def _read_description(folder: Path) -> tuple[dict[str, Any], dict[str, Any], SlimPlan]:
    """``config.json``, its part under ``slimkern``, and the plan."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder")
    missing = [n for n in (CONFIG_FILE, PLAN_FILE) if not (folder / n).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}: it is not what slimkern.save wrote"
        )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        about = config.pop(_KEY)
        version, weights = about["version"], about["weights"]
        types = [(about["sha256"], str), (about["tied"], dict), (about["buffers"], list)]
        types += [(about.get("dense", {}), dict), *((v, str) for v in about["tied"].values())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: {error!r}") from error
    if version != _VERSION:
        raise CheckpointError(f"{folder}: version {version!r}; this slimkern reads {_VERSION}")
    if weights not in (PLAIN_WEIGHTS, SLIM_WEIGHTS) or not all(isinstance(*t) for t in types):
        raise CheckpointError(f"{folder / CONFIG_FILE} is damaged: its slimkern part is wrong")
    try:
        plan = SlimPlan.from_json((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / PLAN_FILE} is damaged: {error}") from error
    digest = sha256(folder / PLAN_FILE)
    if about.get("plan_sha256", digest) != digest:
        raise CheckpointError(f"{folder / PLAN_FILE}: not the file that was saved (SHA-256)")
    return config, about, plan


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder is half written or damaged")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _check_tensors(
    model: nn.Module, tensors: dict[str, Tensor], tied: dict[str, str], folder: Path
) -> None:
    """Refuse weights that are not exactly those of the cut model."""
    wrong = skeleton.misfits(model, tensors, tied)
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{folder}: weights and model disagree: {'; '.join(wrong[:3])}{more}")

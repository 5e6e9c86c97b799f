"""Integer attributes of modules that state how many units a group has.

Which weights belong together is read from the computation. Which plain Python integers repeat their
sizes is not visible there: these are looked up by the names that libraries use for them, and only
where the value agrees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from slimkern.discovery.groups import Attribute
from slimkern.discovery.record import Call

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "num_key_value_heads")
_HEADS_WIDTH = ("all_head_size", "inner_dim", "embed_dim", "attn_dim", "dim")
_FFN_WIDTH = (
    "intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "n_inner", "inner_dim", "inner_size",
    "intermediate_dim", "dim_feedforward", "hidden_features",
)  # fmt: skip


def head_attributes(
    model: nn.Module,
    makers: Sequence[Call],
    takers: Sequence[Call],
    params: Iterable[tuple[str, int]],
    live: int,
) -> tuple[Attribute, ...]:
    """Counts of heads and widths of all heads.

    Looked for on the modules from the one that owns query, key and value up to the one that owns
    the output projection too, and around a per-head parameter.
    """
    places: list[tuple[str, int]] = []
    before = -1
    for taker in takers:
        mine = [m for m in makers if before < m.index < taker.index]
        before = taker.index
        inner = _parent([m.name for m in mine])
        outer = _parent([taker.name, *(m.name for m in mine)])
        places += [(p, mine[0].out.size) for p in _upwards(inner, outer)]
    for name, _ in params:
        owner = name.rpartition(".")[0]
        places += [(p, 0) for p in _upwards(owner, owner.rpartition(".")[0])]
    found: dict[tuple[str, str], Attribute] = {}
    for place, width in places:
        module = model.get_submodule(place)
        for name in (*_HEADS, *_HEADS_WIDTH):
            want = live if name in _HEADS else width
            if want and _integer(module, name) == want:
                per_unit = 1 if name in _HEADS else want // live
                found[place, name] = Attribute(place, name, per_unit)
    return tuple(found.values())


def ffn_attributes(
    model: nn.Module, makers: Sequence[Call], takers: Sequence[Call], live: int
) -> tuple[Attribute, ...]:
    """The FFN's width, where the module that directly owns its linears states it."""
    names = [c.name for c in (*makers, *takers)]
    place = _parent(names)
    if any(n.rpartition(".")[0] != place for n in names):
        return ()
    module = model.get_submodule(place)
    return tuple(Attribute(place, n, 1) for n in _FFN_WIDTH if _integer(module, n) == live)


def _integer(module: nn.Module, name: str) -> int | None:
    value = module.__dict__.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _parent(names: Sequence[str]) -> str:
    """The deepest module that contains all of ``names``."""
    parts = [n.split(".")[:-1] for n in names]
    common = []
    for level in zip(*parts):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _upwards(inner: str, outer: str) -> list[str]:
    """Module names from ``inner`` up to its ancestor ``outer``."""
    names = [inner]
    while names[-1] != outer and names[-1]:
        names.append(names[-1].rpartition(".")[0])
    return names

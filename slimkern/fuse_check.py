"""Whether a block's description and its packed kernels compute what a module computes.

Two questions, each with its own answer. Is the equation the module's? A copy in float64, with
random weights, must agree with the equation to the rounding of float64; that finds the activation
too. Are the kernels exact enough? With the module's own weights, their output must be as close to
that of a float64 copy as plain PyTorch's in the same precision may be.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimkern import accuracy
from slimkern.discovery.block import Block
from slimkern.fuse_samples import SEQUENCES, TOKENS, MismatchError, Sample, samples_for
from slimkern.nn.fused import install
from slimkern.nn.packs import Packs, weights_of
from slimkern.ops import Packed, choose_math
from slimkern.ops._packed import HARDWARE, PACKED_BACKENDS

_ACTIVATIONS = ("gelu", "relu", "silu", "gelu_tanh", "quick_gelu", "squared_relu", "none")
# How packs compute -> the bound on their error.
_BOUNDS = {"bf16x6": "fp32", "bf16x3": "fp32-high", "tf32": "fp32-high", "bf16": "fp32-medium"}
_NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# Two float64 computations of one equation differ by 2^-53 times what the block amplifies: 2^17
# leaves room, and is nothing beside what distinguishes two activations, or float32.
_SAME = 2.0**-36
# fc1 as it is, and with outputs so large that an activation with a ceiling shows it.
_SCALES = (1.0, 64.0)


@torch.no_grad()
def fitting(module: nn.Module, proposals: Sequence[Block], precision: str) -> Packs:
    """The first proposal that computes what ``module`` does, packed.

    Args:
        module: is not changed.
        proposals: descriptions of the module; their activation is found out.
        precision: ``highest``, ``high`` or ``medium``.

    Raises:
        MismatchError: none does, or the kernels can't; says why.
    """
    dtype, device = _check_weights(module, proposals[0])
    try:
        exact = copy.deepcopy(module).to("cpu", torch.float64).eval()
    except Exception as error:
        raise MismatchError(f"it can't be copied to be compared: {_short(error)}") from error
    block = _identified(copy.deepcopy(exact), proposals)
    packs = Packs(block, precision)
    try:
        packed = packs.fresh(module)
    except RuntimeError as error:
        raise MismatchError(_short(error.__cause__ or error)) from error
    _check_kernels(module, exact, packs, packed, dtype, device)
    return packs


@torch.no_grad()
def check_embeddings(module: nn.Module, call: str) -> None:
    """Refuse embeddings whose fused form computes something else.

    Raises:
        MismatchError: it does; says why.
    """
    dtype, device = _one_kind(list(module.parameters()))
    fused: Any = copy.copy(module)
    plain: Any = copy.copy(module)
    install(fused, call, None)
    fused.training = plain.training = False
    vocabulary, hidden = plain.word_embeddings.weight.shape
    random = torch.Generator().manual_seed(0)
    places = min(TOKENS, len(plain.position_embeddings.weight) // 2)
    ids = torch.randint(vocabulary, (SEQUENCES, places), generator=random)
    padding = plain.word_embeddings.padding_idx
    if padding is not None:
        ids[-1, -1] = padding
    ids = ids.to(device)
    try:
        want, found = plain.forward(ids), fused.forward(ids)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise MismatchError(f"it can't be called on token ids: {_short(error)}") from error
    # To first order each of the two rounds as often as numbers are added on the way: three rows,
    # the mean and the variance; plain bfloat16 rounds after every operation.
    units = 2 * hidden + 6 if dtype == torch.float32 else 8
    bound = 2 * units * torch.finfo(dtype).eps / 2
    off = accuracy.relative_error(found, want.double())
    if not off <= bound:
        raise MismatchError(
            f"on a sample its fused output differs by {off:.2g}, rounding is {bound:.2g}"
        )


@torch.no_grad()
def identified(module: nn.Module, proposals: Sequence[Block]) -> Block:
    """The first proposal that computes what ``module`` does, in evaluation and in training.

    Dropouts that are modules are left out. Raises MismatchError, with the reason, if none does.
    """
    parts = [module.get_submodule(n) for n in (*proposals[0].linears(), *proposals[0].norms())]
    if any(p.is_meta or not p.is_floating_point() for part in parts for p in part.parameters()):
        raise MismatchError("its weights have no floating values to compare")
    try:
        exact = copy.deepcopy(module).to("cpu", torch.float64).eval()
    except Exception as error:
        raise MismatchError(f"it can't be copied to be compared: {_short(error)}") from error
    block = _identified(exact, proposals)
    for part in exact.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    samples = list(samples_for(block, *_sizes(exact, block), torch.float64))
    with torch.random.fork_rng(devices=[]):
        wanted = [s.output(exact.train(), block.call) for s in samples]
    if not _same(exact, block, samples, wanted):
        raise MismatchError("in training it computes something else than in evaluation")
    return block


def _check_weights(module: nn.Module, block: Block) -> tuple[torch.dtype, torch.device]:
    """The dtype of the weights, and the device that they are on."""
    parts = [module.get_submodule(n) for n in (*block.linears(), *block.norms())]
    return _one_kind([p for part in parts for p in part.parameters(recurse=False)])


def _one_kind(held: Sequence[Tensor]) -> tuple[torch.dtype, torch.device]:
    """The dtype and the device of parameters, one for all."""
    devices = {str(p.device): p.device for p in held}
    names = ", ".join(sorted(devices))
    if len(devices) > 1:
        raise MismatchError(f"its weights are on {names}; accepted: one device for all")
    device = held[0].device
    try:
        hardware = HARDWARE[PACKED_BACKENDS.choose(None, device)]
    except ValueError as error:
        raise MismatchError(f"its weights are on {names}; accepted: cpu, cuda") from error
    kinds = {p.dtype for p in held}
    try:
        for kind in kinds:
            choose_math(kind, None, hardware)
        if len(kinds) > 1:
            raise TypeError
    except TypeError as error:
        known = "float32 or torch.bfloat16" if hardware == "cpu" else "float32, bfloat16 or float16"
        found = ", ".join(sorted(map(str, kinds)))
        raise MismatchError(
            f"its weights have dtype {found}; accepted: torch.{known}, one for all"
        ) from error
    return held[0].dtype, device


def _sizes(module: nn.Module, block: Block) -> tuple[int, int]:
    """Hidden size, and the number of heads (0 without attention)."""
    first: Any = module.get_submodule(block.linears()[0])
    heads = 0 if block.attention is None else first.out_features // block.attention.head_dim
    return first.in_features, heads


def _identified(exact: nn.Module, proposals: Sequence[Block]) -> Block:
    """The description that is the module's: proposals with each activation, on random weights."""
    _randomize(exact)
    hidden, heads = _sizes(exact, proposals[0])
    samples = list(samples_for(proposals[0], hidden, heads, torch.float64))
    left = [
        (replace(b, ffn=replace(b.ffn, activation=name)) if b.ffn is not None else b)
        for b in proposals
        for name in (_ACTIVATIONS if b.ffn is not None else ("",))
    ]
    for scale in _SCALES:
        if proposals[0].ffn is not None:
            first = exact.get_submodule(proposals[0].ffn.fc1)
            for parameter in first.parameters():
                parameter.mul_(scale)
        try:
            wanted = [s.output(exact, proposals[0].call) for s in samples]
        except MismatchError:
            raise
        except Exception as error:
            raise MismatchError(f"it can't be called on hidden states: {_short(error)}") from error
        left = [b for b in left if _same(exact, b, samples, wanted)]
    if not left:
        parts = "attention" if proposals[0].ffn is None else "FFN, activation"
        raise MismatchError(
            f"{type(exact).__name__} computes something else than its kind of block does "
            f"({parts} or order of parts is not known)"
        )
    return left[0]


def _same(
    exact: nn.Module, block: Block, samples: Sequence[Sample], wanted: Sequence[Tensor]
) -> bool:
    weights = weights_of(exact, block)
    return all(
        accuracy.relative_error(s.equation(block, weights), y) <= _SAME
        for s, y in zip(samples, wanted)
    )


def _randomize(module: nn.Module) -> None:
    """Weights in which every part matters: of variance 1 / 3 per input, norms around one."""
    random = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            bound = max(parameter.shape[-1], 1) ** -0.5
            parameter.uniform_(-bound, bound, generator=random)
        else:
            parameter.uniform_(0.5, 1.5, generator=random)


def _check_kernels(
    module: nn.Module,
    exact: nn.Module,
    packs: Packs,
    packed: Packed,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse kernels that are further from float64 than plain PyTorch may be."""
    fused: Any = copy.copy(module)
    install(fused, packs.block.call, packs)
    fused.training = False
    block = packs.block
    kind = _NARROW.get(dtype) or _BOUNDS.get(packed.math, "fp32")
    hidden, heads = _sizes(module, block)
    for narrow in samples_for(block, hidden, heads, dtype):
        # The very numbers of the narrower sample; only the mask's own least number is another.
        mask = narrow.mask
        if mask is not None:
            mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(
                mask < 0, torch.finfo(torch.float64).min
            )
        bias = None if narrow.bias is None else narrow.bias.double()
        wide = replace(narrow, x=narrow.x.double(), mask=mask, bias=bias)
        want = wide.output(exact, block.call)
        if not bool(want.isfinite().all()):
            raise MismatchError("its own output on a sample is not finite")
        error = accuracy.relative_error(narrow.on(device).output(fused, block.call), want)
        bound = accuracy.rounding_bound(lambda s=wide: s.output(exact, block.call), want, kind)  # type: ignore[misc]
        if not error <= bound:
            raise MismatchError(
                f"on a sample its fused output differs from that in float64 by {error:.2g}, "
                f"plain PyTorch's by at most {bound:.2g}"
            )


def _short(error: BaseException) -> str:
    """An error as a part of a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

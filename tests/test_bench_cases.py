"""The table of works: what is in it, that its figures are right, that slim is slim."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", reason="layers and models are Hugging Face's")

from bench import check, op_cases, slims
from bench.cases import all_works
from bench.model_works import BGE_SMALL, UNEVEN_FFN, UNEVEN_HEADS, even
from bench.modules import BlockMaskedLinear, IndexedLinear
from bench.work import Work
from slimkern.ops.indexed_linear import indexed_linear


@lru_cache(maxsize=1)
def smoke() -> tuple[Work, ...]:
    return tuple(all_works(smoke=True))


@lru_cache(maxsize=1)
def full() -> tuple[Work, ...]:
    return tuple(all_works(smoke=False))


def smoke_cases(*tags: str) -> list[pytest.param]:
    return [pytest.param(w, id=w.case) for w in smoke() if set(tags) <= w.tags]


SMALL = [
    w
    for w in full()
    if w.shape in ("M=1", "M=16", "1x16")
    and not w.name.startswith("MiniLM")  # real weights are downloaded
    and (w.level != "model" or w.name.endswith("uneven"))
]


def test_every_case_is_there_once_and_none_of_the_smoke_run_in_the_full_one():
    for works in (smoke(), full()):
        assert max(Counter(w.case for w in works).values()) == 1
    assert all(w.smoke for w in smoke())
    assert not any(w.smoke for w in full())


def test_all_kinds_levels_and_shapes_are_there():
    for works in (smoke(), full()):
        assert [level for level in ("op", "layer", "model") if any(w.level == level for w in works)]
        tags = {tag for w in works for tag in w.tags}
        assert {"linear", "indexed", "blocks", "ffn", "attention", "layer", "model", "slim"} <= tags
        assert any(w.backward for w in works)
        assert any(w.compiled for w in works)
    shapes = {w.shape for w in full()}
    assert shapes >= {f"M={m}" for m in (1, 16, 128, 1024, 4096)}
    for name in ("MiniLM-L6 dense", "MiniLM-L6 slim", "bge-small shape slim 308"):
        found = {w.shape for w in full() if w.name == name}
        assert {"8x128", "32x32", "1x128", "1x16"} <= found
    assert {w.shape for w in full() if "padded" in w.tags} == {"8x128 padded"}


def test_uneven_widths_have_the_totals_of_the_even_ones():
    slim = even("slim", BGE_SMALL, 320, 5)
    assert sum(UNEVEN_FFN) == sum(slim.ffn)
    assert sum(UNEVEN_HEADS) == sum(slim.heads)
    flops = {w.name: w.flops for w in full() if w.level == "model" and w.shape == "8x128"}
    assert flops["bge-small shape slim uneven"] == flops["bge-small shape slim"]


def test_nothing_is_built_before_it_is_asked_for():
    code = """
import sys
from bench.cases import all_works
assert len(all_works(False)) > 50
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_works_of_one_name_have_the_same_module():
    builders: dict[tuple[str, str], set[str]] = {}
    for work in full():
        build = work.build
        what = id(build) if isinstance(build, slims.SlimBuild) else (build.func, build.args)
        if work.level == "op" and {"linear", "indexed"} & work.tags:
            what = (build.func, build.args[0].id.split("-", 1)[1])  # all of the shape but M
        builders.setdefault((work.level, work.name), set()).add(str(what))
    assert {len(found) for found in builders.values()} == {1}


@pytest.mark.parametrize("work", smoke_cases())
def test_weights_and_inputs_are_the_same_at_every_call(work):
    first, second = work.build(), work.build()
    assert not first.training
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert a.dtype == torch.float32, name
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr(), name
    for a, b in zip(work.inputs(), work.inputs()):
        assert torch.equal(a, b)
        assert a.dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("work", smoke_cases())
def test_plain_pytorch_is_right_in_every_precision(work):
    exact, inputs = check.reference(work), work.inputs()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        module = work.build().to(dtype)
        outputs = check.run_module(work, module, check.cast(inputs, dtype))
        found = check.error(outputs, exact)
        assert found <= check.worst_case(work, precision)
        # It is itself as independent of the reference as any other implementation is.
        assert found <= check.bound(work, precision, 0.0)


@pytest.mark.parametrize("work", [*smoke_cases(), *(pytest.param(w, id=w.case) for w in SMALL)])
def test_flops_are_those_of_the_products(work):
    module, inputs = work.build(), work.inputs()
    parts = [inputs]
    if work.attended is not None:  # each sequence alone, without its padding
        sizes = enumerate(work.attended().sum(1).tolist())
        parts = [tuple(t[i : i + 1, :size] for t in inputs) for i, size in sizes]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for part in parts:
            leaves = [t.requires_grad_() if t.is_floating_point() else t for t in part]
            y = module(*leaves)
            if work.backward:
                y.sum().backward()
    share = 1.0
    if isinstance(module, BlockMaskedLinear):  # eager does them all
        share = module.mask[:: module.block[0], :: module.block[1]].mean().item()
    assert work.flops == pytest.approx(share * counter.get_total_flops(), rel=1e-6)


@pytest.mark.parametrize("work", smoke_cases())
def test_values_are_weights_inputs_and_outputs(work):
    module, inputs = work.build(), work.inputs()
    y = module(*inputs)
    own = dict(module.named_parameters())
    if isinstance(module, IndexedLinear):
        rows = module.rows if module.rows is not None else torch.arange(module.weight.shape[0])
        cols = module.cols if module.cols is not None else torch.arange(module.weight.shape[1])
        read = len(rows) * len(cols) + len(rows)
    else:
        read = sum(p.numel() for n, p in own.items() if "_embeddings" not in n)
    if work.level == "model":
        tokens, width = inputs[0].shape, y.shape[-1]
        read += (tokens.numel() + tokens[1] + 1) * width  # words, positions, one kind of sentence
    moved = sum(t.numel() for t in inputs) + y.numel()
    written = sum(p.numel() for p in own.values()) + moved if work.backward else 0
    assert work.values == read + moved + written


@pytest.mark.parametrize("work", smoke_cases("slim"))
def test_slim_by_slimkern_by_hand_and_by_torch_pruning_is_the_same(work):
    want = check.reference(work)[0]
    modules = {"hand": slims.hand_sliced(work)}
    if slims.torch_pruning_missing() is None:
        modules["torch-pruning"] = slims.torch_pruned(work)
    sizes = sorted(p.shape for p in work.build().parameters())
    for name, module in modules.items():
        assert not module.training, name
        assert sorted(p.shape for p in module.parameters()) == sizes, name
        y = module.double()(*check.cast(work.inputs(), torch.float64))
        torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12, msg=name)


def test_torch_pruning_says_when_it_is_missing(monkeypatch):
    monkeypatch.setattr(slims, "find_spec", lambda name: None)
    assert slims.torch_pruning_missing() == "torch-pruning is not installed"


def test_a_dense_work_is_not_cut():
    dense = next(w for w in smoke() if w.level == "model" and "slim" not in w.tags)
    with pytest.raises(ValueError, match="is no slim work"):
        slims.hand_sliced(dense)


def test_a_plan_of_another_number_of_layers_is_refused():
    slim = next(w for w in smoke() if w.level == "model" and "slim" in w.tags)
    with pytest.raises(ValueError, match="3 widths"):
        slims.plan_of(slim.dense(), slim.inputs(), (1, 2, 3), (1, 1))


def test_slim_keeps_the_largest_units():
    slim = next(w for w in smoke() if w.level == "model" and "slim" in w.tags)
    dense, plan = slim.dense(), slim.plan()
    assert [len(e.keep) for e in plan] == [31, 17, 1, 2]
    entry = plan.entries[0]
    norms = _norms(dense, entry.group.producers[0].name, entry.group.consumers[0].name)
    kept = norms[list(entry.keep)]
    assert kept.min() >= norms.sort(descending=True).values[len(entry.keep) - 1] * 0.8
    assert kept.mean() > norms.mean()


def _norms(module: nn.Module, first: str, second: str) -> Tensor:
    """Size of each channel over both of its layers."""
    w1, w2 = (module.get_parameter(f"{name}.weight").detach() for name in (first, second))
    return (w1.square().sum(1) + w2.square().sum(0)).sqrt()


@pytest.mark.parametrize("work", smoke_cases("indexed"))
def test_slimkerns_op_does_an_indexed_work(work):
    class Kernel(nn.Module):
        def __init__(self, module: IndexedLinear) -> None:
            super().__init__()
            self.weight, self.bias = module.weight, module.bias
            self.rows, self.cols = module.rows, module.cols

        def forward(self, x: Tensor) -> Tensor:
            return indexed_linear(x, self.weight, self.bias, self.rows, self.cols)

    exact, module = check.reference(work), work.build()
    eager = check.error(check.run_module(work, module, work.inputs()), exact)
    outputs = check.run_module(work, Kernel(module), work.inputs())
    assert check.error(outputs, exact) <= check.bound(work, "fp32", eager)


def test_the_smoke_run_takes_shapes_of_the_tests():
    tests = op_cases.cases("test")
    assert set(op_cases.cases("smoke")) <= set(tests)
    assert len(op_cases.cases("smoke")) == 3
    assert not set(op_cases.cases("bench")) & set(tests)

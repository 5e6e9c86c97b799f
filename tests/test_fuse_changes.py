"""What happens to a fused model after ``fuse_``: new parameters, copies, threads, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fuse_cases import FAMILIES, assert_as_exact, fused_copy, inputs, layer_of, run, tiny

import slimkern
from slimkern.masks import told_plan

pytest.importorskip("transformers")

GIVEN = inputs()


def first_linear(model):
    return layer_of(model).attention.self.query


@torch.no_grad()
def _step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()


def _load(model):
    model.load_state_dict({n: 1.01 * t if t.is_floating_point() else t
                           for n, t in model.state_dict().items()})  # fmt: skip


def _load_assign(model):
    model.load_state_dict({n: 1.01 * t if t.is_floating_point() else t.clone()
                           for n, t in model.state_dict().items()}, assign=True)  # fmt: skip


def _replace_parameter(model):
    linear = first_linear(model)
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 1.5)


def _replace_data(model):
    linear = first_linear(model)
    linear.weight.data = linear.weight.data * 1.5


def _replace_module(model):
    linear = first_linear(model)
    torch.manual_seed(5)
    layer_of(model).attention.self.query = torch.nn.Linear(linear.in_features, linear.out_features)


CHANGES = [_step, _load, _load_assign, _replace_parameter, _replace_data, _replace_module]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_a_changed_parameter_is_packed_again(change):
    plain = tiny("bert")
    fused = fused_copy(plain)
    before = run(fused, GIVEN)
    pack = layer_of(fused).packs.packed
    assert torch.equal(run(fused, GIVEN), before)
    assert layer_of(fused).packs.packed is pack  # nothing changed, nothing was made
    change(fused)
    change(plain)
    after = run(fused, GIVEN)
    assert layer_of(fused).packs.packed is not pack
    assert (after - before).abs().max() > 1e-3
    assert_as_exact(fused, plain, GIVEN, "fp32")
    assert torch.equal(run(slimkern.unfuse_(fused), GIVEN), run(plain, GIVEN))


def test_a_model_follows_its_dtype_or_says_why_not():
    fused = fused_copy(tiny("bert"))
    fused.to(torch.bfloat16)
    assert_as_exact(fused, tiny("bert").to(torch.bfloat16), GIVEN, "bf16")
    assert {b.math for b in slimkern.fused_blocks(fused)} == {"bf16"}
    fused.to(torch.float32)
    assert run(fused, GIVEN).dtype == torch.float32
    for dtype in (torch.float64, torch.float16):
        fused.to(dtype)
        with pytest.raises(RuntimeError, match=rf"{dtype}.*unfuse_"):
            run(fused, GIVEN)
    fused.to(torch.float32).to("meta")
    with pytest.raises(RuntimeError, match=r"encoder.layer.0 .*meta.*unfuse_"):
        layer_of(fused)(torch.zeros(1, 3, 48))


def test_the_pack_follows_the_instruction_set():
    plain, before = tiny("bert"), slimkern.cpu.isa()
    fused = fused_copy(plain, "medium")
    try:
        for isa in slimkern.cpu.available_isas():
            slimkern.cpu.set_isa(isa)
            assert_as_exact(fused, plain, GIVEN, "fp32-medium")
            assert layer_of(fused).packs.packed.isa == isa
    finally:
        slimkern.cpu.set_isa(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles(family):
    fused = fused_copy(tiny(family), "medium")
    want = run(fused, GIVEN)
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert type(layer_of(other)) is type(layer_of(fused))
        assert layer_of(other).packs.packed is None  # not before it is called
        assert torch.equal(run(other, GIVEN), want)
        _step(other)
        assert (run(other, GIVEN) - want).abs().max() > 1e-3
    assert torch.equal(run(fused, GIVEN), want)
    plain = slimkern.unfuse_(copy.deepcopy(fused))
    assert torch.equal(run(plain, GIVEN), run(tiny(family), GIVEN))


def test_a_pickle_is_read_by_a_process_that_has_fused_nothing(tmp_path):
    torch.save(fused_copy(tiny("mpnet")), tmp_path / "fused.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); "
        "print(type(m.encoder).__name__, type(m.encoder.layer[0]).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "fused.pt")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["FusedMPNetEncoder", "FusedMPNetLayer"]


@pytest.mark.parametrize("kind", ["slim", "dense"])
def test_saving_a_fused_model_saves_the_plain_one(kind, tmp_path):
    plain = tiny("bert", "uneven" if kind == "slim" else "dense")
    fused = fused_copy(plain)
    files = {}
    for name, model in (("plain", plain), ("fused", fused)):
        folder = slimkern.save(model, tmp_path / name)
        files[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files["plain"] == files["fused"]
    loaded = slimkern.load(tmp_path / "fused")
    assert not slimkern.fused_blocks(loaded)
    assert torch.equal(run(loaded, GIVEN), run(plain, GIVEN))
    assert told_plan(fused) == told_plan(plain)
    assert_as_exact(slimkern.fuse_(loaded), plain, GIVEN, "fp32")


def test_saving_a_fused_module_that_is_no_hugging_face_model(tmp_path):
    import tiny_models

    fused = fused_copy(tiny_models.mlp(10, 24, 10))
    folder = slimkern.save(fused, tmp_path / "mlp")
    assert '"Sequential"' in (folder / "config.json").read_text()
    loaded = slimkern.load(folder, tiny_models.mlp(10, 24, 10))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), fused.parameters()))


def test_threads_share_a_fused_model():
    fused = fused_copy(tiny("mpnet"))
    cases = [inputs(seed=seed, batch=1 + seed % 3, length=5 + seed) for seed in range(8)]
    want = [run(fused, given) for given in cases]
    fresh = copy.deepcopy(fused)  # its pack is made by whoever comes first
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda given: run(fresh, given), cases))
            assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_torch_compile_sees_one_graph(family):
    fused = fused_copy(tiny(family))
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for given in (inputs(), inputs(False)):
        want = run(fused, given)
        with torch.inference_mode():
            got = compiled(**given)[0][given["attention_mask"].bool()]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ragged = inputs()
    ragged["attention_mask"] = torch.eye(9).expand(3, 1, 9, 9).bool()
    with torch.inference_mode(), pytest.raises(ValueError, match="every query"):
        compiled(**ragged)


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        plain = tiny("bert", "dense")
        fused = fused_copy(plain)
        y = run(fused, GIVEN)
    assert torch.equal(run(fused, GIVEN), y)
    with torch.inference_mode():
        fused.load_state_dict(tiny("bert", "dense").state_dict(), assign=True)
    assert_as_exact(fused, tiny("bert", "dense"), GIVEN, "fp32")


class _Adapted(torch.nn.Module):
    """A linear with an addition of low rank, as adapters wrap one."""

    def __init__(self, base):
        super().__init__()
        self.base, self.low = base, torch.nn.Linear(base.in_features, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.low(x)


def _adapt(model):
    attention = layer_of(model).attention.self
    attention.query = _Adapted(attention.query)


def _parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(first_linear(model))


@pytest.mark.parametrize("change", [_adapt, _parametrize])
def test_parts_that_compute_something_else_are_an_error(change):
    fused = fused_copy(tiny("bert"))
    run(fused, GIVEN)
    change(fused)
    with pytest.raises(RuntimeError, match=r"query is now \w+; accepted: Linear.*unfuse_"):
        run(fused, GIVEN)
    run(slimkern.unfuse_(fused), GIVEN)

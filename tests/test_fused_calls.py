"""The fused ops as they are called: refusals, packs, precision, registration, torch.compile."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fused_cases import Shape, cast, make_weights, make_x
from test_fused_ops import CALL, KINDS, LAYERS, PACK

from slimkern import cpu, ops
from slimkern.ops import _math, _native

SHAPE = Shape(2, 17, hidden=33, heads=4, kv_heads=2, head_dim=8, channels=20)
OPS = {"linear": "packed_linear"}


def packed_of(kind, dtype=torch.float32, **keywords):
    return PACK[kind](cast(make_weights(kind, SHAPE), dtype), **keywords)


@pytest.fixture
def restore():
    before = cpu.isa()
    yield
    cpu.set_isa(before)


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(len(cpu.available_isas()) < 2, reason="one instruction set only")
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_for_another_instruction_set(kind, restore):
    first, last = cpu.available_isas()[0], cpu.available_isas()[-1]
    cpu.set_isa(last)
    packed = packed_of(kind)
    assert packed.isa == last
    cpu.set_isa(first)
    message = f"packed was made for instruction set {last}, and {first} is in use: pack the weights"
    with pytest.raises(ValueError, match=message):
        CALL[kind](make_x(SHAPE, torch.float32), packed)
    cpu.set_isa(last)
    CALL[kind](make_x(SHAPE, torch.float32), packed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_names_unfuse(kind):
    x = make_x(SHAPE, torch.float32).requires_grad_()
    packed = packed_of(kind)
    with pytest.raises(RuntimeError, match=r"no gradient and x requires one.*unfuse_"):
        CALL[kind](x, packed)
    with torch.no_grad():
        assert not CALL[kind](x, packed).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_as_good(kind):
    packed, x = packed_of(kind), make_x(SHAPE, torch.float32)
    want = CALL[kind](x, packed)
    for other in (copy.deepcopy(packed), replace(packed, data=packed.data.clone())):
        assert other.data.data_ptr() != packed.data.data_ptr()
        assert torch.equal(CALL[kind](x, other), want)
    shifted = torch.empty(packed.nbytes + 64, dtype=torch.uint8)[4:-60].copy_(packed.data)
    with pytest.raises(ValueError, match="packed does not begin at a multiple of 64 bytes"):
        CALL[kind](x, replace(packed, data=shifted))


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_packs(kind):
    packed, x = packed_of(kind), make_x(SHAPE, torch.float32)
    for data, message in (
        (packed.data[:-64], "packed holds [0-9]+ bytes; accepted: [0-9]+"),
        (packed.data[:16], "packed holds 16 bytes, not the weights of a block"),
        (packed.data[:0], "packed holds 0 bytes, not the weights"),
        (torch.zeros_like(packed.data), "packed was not made by one of the pack functions"),
    ):
        with pytest.raises(ValueError, match=message):
            CALL[kind](x, replace(packed, data=data))
    for data in (packed.data.view(torch.int8), packed.data[None], packed.data[::2]):
        with pytest.raises(TypeError, match="packed is no vector of bytes"):
            CALL[kind](x, replace(packed, data=data))


def test_a_pack_of_another_kind():
    for kind in KINDS:
        for other in set(KINDS) - {kind}:
            packed = replace(packed_of(other), in_features=33)
            with pytest.raises(TypeError, match=f"packed holds {other}; .* accepts: {kind}"):
                CALL[kind](make_x(SHAPE, torch.float32), packed)
            if {kind, other} == set(LAYERS):
                continue  # one function computes both, by what the pack says
            message = "packed holds an? .*; accepted: an? "
            with pytest.raises(ValueError, match=message):
                CALL[kind](make_x(SHAPE, torch.float32), replace(packed, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_x_must_fit(kind):
    packed = packed_of(kind)
    for x, error, message in (
        (torch.zeros(2, 17, 32), ValueError, r"x has shape \(2, 17, 32\); .* dimension of 33"),
        (torch.zeros(()), ValueError, r"x has shape \(\); .* accepts: a last dimension of 33"),
        (torch.zeros(2, 17, 33).double(), TypeError, "x has dtype torch.float64; accepted: "),
        (torch.zeros(2, 17, 33).half(), TypeError, "x has dtype torch.float16; accepted: "),
        (torch.zeros(2, 17, 33, device="meta"), ValueError, "x is on meta; .* accepts: cpu"),
    ):
        with pytest.raises(error, match=message):
            CALL[kind](x, packed)
    with pytest.raises(ValueError, match=r"accepted: |accepts: "):
        CALL[kind](torch.zeros(17, 33)[None, None] if kind in LAYERS else torch.zeros(7), packed)


@pytest.mark.parametrize("kind", LAYERS)
def test_masks_must_fit(kind):
    packed, x = packed_of(kind), torch.zeros(2, 17, 33)
    for mask, error, message in (
        (torch.tensor([17, 18]), ValueError, "mask has a length of 18; accepted: 0 to 17"),
        (torch.tensor([-1, 3]), ValueError, "mask has a length of -1; accepted: 0 to 17"),
        (torch.tensor([1, 2, 3]), ValueError, r"shape \(3,\); accepted: lengths \[2\]"),
        (torch.ones(2, 17).long(), ValueError, r"torch.int64 and shape \(2, 17\); .* lengths"),
        (torch.ones(2, 16).bool(), ValueError, r"mask has shape \(2, 16\); accepted: \[2, 17\]"),
        (torch.ones(2, 1, 17), ValueError, r"mask has shape \(2, 1, 17\); accepted"),
        (torch.ones(2, 17).int(), TypeError, "mask has dtype torch.int32; accepted: torch.int64"),
        (torch.ones(2, 17, device="meta"), ValueError, "a mask is on meta; .* accepts: cpu"),
    ):
        with pytest.raises(error, match=message):
            CALL[kind](x, packed, mask)
    for bias, error, message in (
        (torch.zeros(3, 17, 17), ValueError, "head_bias has 3 heads; accepted: 4"),
        (torch.zeros(4, 17, 16), ValueError, r"shape \(4, 17, 16\); accepted: \[heads, 17, 17\]"),
        (torch.zeros(4, 17, 17).long(), TypeError, "head_bias has dtype torch.int64 on cpu"),
    ):
        with pytest.raises(error, match=message):
            CALL[kind](x, packed, None, bias)


def test_weights_must_fit():
    weights = cast(make_weights("encoder_layer", SHAPE), torch.float32)
    attention, ffn = weights.attention, weights.ffn
    linear = ops.LinearWeights
    for build, error, message in (
        (lambda: ops.pack_linear(torch.zeros(5)), ValueError, r"weight of shape \(5,\)"),
        (lambda: ops.pack_linear(torch.zeros(5, 3), torch.zeros(3)), ValueError, "bias of shape"),
        (lambda: ops.pack_linear(torch.zeros(5, 3).half()), TypeError, "weights have dtype"),
        (
            lambda: ops.pack_linear(torch.zeros(5, 3), torch.zeros(5).bfloat16()),
            TypeError,
            "linear has dtype torch.bfloat16; accepted: torch.float32",
        ),
        (lambda: ops.pack_linear(torch.zeros(5, 3), math="fp8"), ValueError, "math is 'fp8'"),
        (
            lambda: ops.pack_linear(torch.zeros(5, 3, device="meta")),
            ValueError,
            "linear is on meta; accepted: cpu",
        ),
        (
            lambda: ops.pack_ffn(replace(ffn, fc2=linear(torch.zeros(33, 19)))),
            ValueError,
            r"weight is \[33, 19\]; accepted: \[33, 20\]",
        ),
        (lambda: ops.pack_ffn(replace(ffn, activation="tanh")), ValueError, "activation is 'tanh'"),
        (
            lambda: ops.pack_ffn(replace(ffn, post=ops.NormWeights(torch.zeros(5)))),
            ValueError,
            "the norm's size is 5; accepted: 33 to 33",
        ),
        (
            lambda: ops.pack_ffn(replace(ffn, post=ops.NormWeights(kind="batch"))),
            ValueError,
            "ffn_post's kind is 'batch'; accepted: none, layer, rms",
        ),
        (
            lambda: ops.pack_attention_block(replace(attention, head_dim=7)),
            ValueError,
            "query, key and value have 32, 16, 16 rows; accepted: multiples of head_dim, 7",
        ),
        (
            lambda: ops.pack_attention_block(replace(attention, key=linear(torch.zeros(24, 33)))),
            ValueError,
            "query, key and value have 32, 24, 16 rows",
        ),
        (
            lambda: ops.pack_attention_block(replace(attention, query=linear(torch.zeros(24, 33)))),
            ValueError,
            "heads is 3; accepted: a multiple of kv_heads, 2",
        ),
    ):
        with pytest.raises(error, match=message):
            build()


def test_precision_is_torchs_own(precision, monkeypatch):
    monkeypatch.setattr(_native, "maths", lambda: ["fp32", "bf16", "bf16x3", "bf16x6"])
    wanted = {"highest": "bf16x6", "high": "bf16x3", "medium": "bf16"}
    for name, math in wanted.items():
        precision(name)
        assert _math.current_precision() == name
        assert ops.choose_math(torch.float32) == math
        assert ops.choose_math(torch.bfloat16) == "bf16"
    precision("highest")
    for name, math in wanted.items():
        assert ops.choose_math(torch.float32, name) == math
    monkeypatch.setattr(_native, "maths", lambda: ["fp32", "bf16"])
    without = {"highest": "fp32", "high": "fp32", "medium": "bf16"}
    for name, math in without.items():
        assert ops.choose_math(torch.float32, name) == math
    with pytest.raises(ValueError, match="precision is 'tf32'; accepted: None, highest, high"):
        ops.choose_math(torch.float32, "tf32")
    with pytest.raises(TypeError, match=r"weights have dtype torch\.float16; accepted"):
        ops.choose_math(torch.float16)


@pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision"),
    reason="this release of torch has one setting only",
)
def test_precision_when_both_settings_were_used():
    """Torch's older getter raises then; in a process of its own, because it can't be undone."""
    code = (
        "import torch\n"
        "from slimkern.ops import _math\n"
        "torch.set_float32_matmul_precision('high')\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'\n"
        "print(_math.current_precision())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "medium"


def test_the_pack_says_what_it_is(precision):
    precision("medium")
    packed = packed_of("encoder_layer")
    assert (packed.kind, packed.isa, packed.math) == ("encoder_layer", cpu.isa(), "bf16")
    assert (packed.in_features, packed.out_features) == (33, 33)
    assert packed.data.dtype == torch.uint8
    assert packed.nbytes == packed.data.numel() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    packed = packed_of(kind)
    op = getattr(torch.ops.slimkern, OPS.get(kind, kind)).default
    x = make_x(SHAPE, torch.float32)
    if kind in LAYERS:
        bias = torch.randn(4, 17, 17)
        calls = [
            (x, [packed.data], "", None, None, "cpu"),
            (x.transpose(0, 1), [packed.data], "", torch.ones(17, 2).bool(), None, "cpu"),
            (x, [packed.data], "", torch.tensor([3, 17]), bias, "cpu"),
        ]
    else:
        extra = (20,) if kind == "linear" else ()
        calls = [
            (rows, [packed.data], "", *extra, "cpu") for rows in (x[0], x[:, 1], x[0].bfloat16())
        ]
    for call in calls:
        checked = torch.library.opcheck(op, call)
        assert set(checked.values()) == {"SUCCESS"}, checked


class Model(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.packed = kind, packed_of(kind)

    def forward(self, x, *masks):
        return CALL[self.kind](x * 1.5, self.packed, *masks) + 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_fullgraph(kind, compiler):
    torch._dynamo.reset()
    model, x = Model(kind), make_x(SHAPE, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    masks = (torch.tensor([17, 4]),) if kind in LAYERS else ()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x, *masks), model(x, *masks))


def test_compile_with_dynamic_sizes():
    torch._dynamo.reset()
    model = Model("encoder_layer")
    frames = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=frames)
    with torch.no_grad():
        for B, T in ((2, 17), (3, 20), (5, 9)):
            x = torch.randn(B, T, 33)
            torch.testing.assert_close(compiled(x), model(x))
    assert frames.frame_count == 1


def test_a_layer_is_one_call_of_little_python():
    """Calls of the interpreter per layer; time itself is the benchmarks' business."""
    packed, x = packed_of("encoder_layer"), make_x(SHAPE, torch.float32)
    calls = []

    def count(frame, event, argument):
        if event in ("call", "c_call"):
            calls.append(getattr(argument, "__name__", frame.f_code.co_name))

    with torch.inference_mode():
        ops.encoder_layer(x, packed)
        sys.setprofile(count)
        try:
            ops.encoder_layer(x, packed)
        finally:
            sys.setprofile(None)
    assert len(calls) < 60, calls


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system has no /proc")
def test_no_leak():
    packed, x = packed_of("encoder_layer"), make_x(SHAPE, torch.float32)
    lengths = torch.tensor([3, 17])

    def resident():
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with torch.inference_mode():
        for _ in range(200):
            ops.encoder_layer(x, packed, lengths)
        before = resident()
        for _ in range(5000):
            ops.encoder_layer(x, packed, lengths)
    assert resident() - before < 2**20  # a leak of 200 bytes a call would be this much

import pickle

import pytest
import torch
from torch.nn import functional as F

from lgvit_fast import _extension
from lgvit_fast.ops import linear
from lgvit_fast.ops.linear import CANDIDATES, PackedLinear, fastest, inference_linear, why_not

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
needs_packed = pytest.mark.skipif(
    why_not("packed", torch.float32) is not None, reason=str(why_not("packed", torch.float32))
)


@pytest.mark.parametrize("gemm", CANDIDATES)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_every_gemm_computes_the_layer(gemm, activation, dtype, bias):
    weight = (torch.randn(100, 96) * 0.1).to(dtype)
    vector = torch.randn(100).to(dtype) if bias else None
    if why_not(gemm, dtype) is not None:
        with pytest.raises(ValueError, match="cannot run: oneDNN"):
            PackedLinear(weight, vector, activation, gemm)
        return
    layer = PackedLinear(weight, vector, activation, gemm)
    inputs = [torch.randn(0, 96), torch.randn(1, 96), torch.randn(3, 5, 96)]
    inputs += [torch.randn(4, 6, 100)[:, 1::2, 2:98], torch.randn(96, 7).t()]
    for x in inputs:
        x = x.to(dtype)
        expected = F.linear(x.double(), weight.double(), vector.double() if bias else None)
        if activation:
            expected = F.gelu(expected)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                out = layer(x)
            assert out.dtype == dtype and out.shape == expected.shape
            if x.numel():
                error = (out.double() - expected).abs().max() / expected.abs().max()
                assert error <= TOLERANCE[dtype]


@needs_packed
@pytest.mark.parametrize("gemm", CANDIDATES)
def test_the_plain_weight_comes_back(gemm):
    weight = torch.randn(33, 20)
    assert torch.equal(PackedLinear(weight, gemm=gemm).weight, weight)


@needs_packed
def test_compiles_into_one_graph():
    layer = PackedLinear(torch.randn(32, 16), torch.randn(32), "gelu", "packed")
    x = torch.randn(5, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.skipif(
    _extension.why_missing(torch.device("cpu")) is not None, reason="no compiled CPU kernels"
)
def test_the_choice_is_kept_and_can_be_overridden(monkeypatch):
    monkeypatch.delenv("LGVIT_LINEAR", raising=False)
    choice = fastest(64, 48, torch.float32)
    assert choice in CANDIDATES
    assert all(fastest(64, 48, torch.float32) == choice for _ in range(5))
    state = torch.get_rng_state()
    fastest(65, 48, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)  # measuring draws no random numbers
    for name in CANDIDATES:
        monkeypatch.setenv("LGVIT_LINEAR", name)
        for dtype in TOLERANCE:  # what the processor cannot do gives way
            expected = "linear" if why_not(name, dtype) else name
            assert fastest(64, 48, dtype) == expected
            assert PackedLinear(torch.randn(64, 48).to(dtype)).gemm == expected
    monkeypatch.setenv("LGVIT_LINEAR", "blas")
    with pytest.raises(ValueError, match="LGVIT_LINEAR must be"):
        fastest(64, 48, torch.float32)


def test_without_the_extension_it_is_linear(monkeypatch):
    monkeypatch.setattr(_extension, "why_missing", lambda device=None: "not built")
    assert fastest(64, 48, torch.float32) == "linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.ones(3)}, r"\[N, K\]"),
        ({"weight": torch.ones(3, 4, dtype=torch.int32)}, "float32 or bfloat16"),
        ({"weight": torch.ones(3, 4), "bias": torch.ones(4)}, "bias"),
        ({"weight": torch.ones(3, 4), "activation": "relu"}, "activation='relu'"),
        ({"weight": torch.ones(3, 4), "gemm": "blas"}, "gemm='blas'"),
    ],
    ids=["shape", "dtype", "bias", "activation", "gemm"],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedLinear(**arguments)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("dtype", "packed"), [(torch.float32, True), (torch.bfloat16, True), (torch.float64, False)]
)
def test_a_linear_layer_for_inference_is_packed_where_it_can_be(dtype, packed, activation):
    weight, bias, x = (torch.randn(*shape).to(dtype) for shape in ((12, 8), (12,), (3, 8)))
    layer = inference_linear(weight, bias, activation)
    assert isinstance(layer, PackedLinear) == packed
    expected = F.linear(x.double(), weight.double(), bias.double())
    expected = F.gelu(expected) if activation else expected
    tolerance = {torch.float64: 1e-12, **TOLERANCE}[dtype]
    torch.testing.assert_close(layer(x).double(), expected, atol=5 * tolerance, rtol=tolerance)


@needs_packed
def test_a_packed_layer_is_loaded_where_its_gemm_is_missing(monkeypatch):
    weight, x = torch.randn(12, 8), torch.randn(3, 8)
    content = pickle.dumps(PackedLinear(weight, gemm="packed"))
    monkeypatch.setenv("LGVIT_LINEAR", "linear")
    monkeypatch.setattr(linear, "why_not", lambda gemm, dtype: "no" if gemm == "packed" else None)
    loaded = pickle.loads(content)
    assert loaded.gemm == "linear"
    torch.testing.assert_close(loaded(x), F.linear(x, weight))
    with pytest.raises(ValueError, match="gemm='packed' cannot run: no"):
        PackedLinear(weight, gemm="packed")

"""Clamped SwiGLU and biases of the experts: the kernels against the float64 oracle, the oracle against torch."""

from __future__ import annotations

import copy

import pytest
import torch

from kt_sft import native
from kt_sft.ops import Activation, ExpertBiases, ExpertsLora, moe_experts, pack_experts
from kt_sft.ops.activation import SILU
from kt_sft.ops.reference import moe_experts_reference
from tests.conftest import rms_ratio
from tests.ops.test_experts import GRAD_RMS, OUT_RMS

# Beyond the limit are some per cent of the random values. A value that rounding of the adapters' products moves over it
# has another slope: the limit and the adapters' scaling keep these few.
CLAMPED = Activation("clamped_swiglu", alpha=1.702, limit=3.0)
SCALING = 0.05
ACTIVATIONS = {"silu": SILU, "clamped_swiglu": CLAMPED}


class Layer:
    """Random experts with biases, tokens and adapters."""

    def __init__(self, activation, E=4, K=2, D=64, F=96, T=33, R=8, fmt="bf16", bias=True):
        shapes = {"gate": (E, F, D), "up": (E, F, D), "down": (E, D, F)}
        biases = ExpertBiases(gate=torch.randn(E, F), up=torch.randn(E, F), down=torch.randn(E, D)) if bias else None
        weights = [torch.randn(s) / s[-1] ** 0.5 for s in shapes.values()]
        self.packed = pack_experts(*weights, fmt, activation=activation, biases=biases)
        self.ids = torch.randn(T, E).topk(K, -1).indices
        self.grad_out = torch.randn(T, D).bfloat16()
        factors = {}
        for name, (_, out, width) in shapes.items() if R else ():
            factors[f"{name}_a"] = torch.randn(E, R, width) / width**0.5
            factors[f"{name}_b"] = torch.randn(E, out, R) / out**0.5
        x, topk = torch.randn(T, D).bfloat16(), torch.softmax(torch.randn(T, K), -1)
        self.inputs = {n: t.requires_grad_() for n, t in {"x": x, "topk": topk, **factors}.items()}

    def run(self, policy="retain", **options):
        for tensor in self.inputs.values():
            tensor.grad = None
        x, topk, factors = self._split(self.inputs)
        lora = ExpertsLora(**factors, scaling=SCALING) if factors else None
        out = moe_experts(x, self.ids, topk, self.packed, lora, activation_policy=policy, **options)
        out.backward(self.grad_out)
        return {"out": out.detach(), **{n: t.grad for n, t in self.inputs.items()}}

    def reference(self):
        inputs = {n: t.detach().double().requires_grad_() for n, t in self.inputs.items()}
        x, topk, factors = self._split(inputs)
        weights = [w.double() for w in self.packed.dequantize()]
        out = moe_experts_reference(
            x, self.ids, topk, *weights, factors, SCALING,
            activation=self.packed.activation, biases=doubled(self.packed.biases),
        )  # fmt: skip
        out.backward(self.grad_out.double())
        return {"out": out.detach(), **{n: t.grad for n, t in inputs.items()}}

    @staticmethod
    def _split(inputs):
        return inputs["x"], inputs["topk"], {n: t for n, t in inputs.items() if n not in ("x", "topk")}


def doubled(biases):
    return biases and ExpertBiases(gate=biases.gate.double(), up=biases.up.double(), down=biases.down.double())


def assert_close(got, expected, factor=1.0):
    ratios = {name: rms_ratio(got[name], expected[name]) for name in expected}
    bad = {n: r for n, r in ratios.items() if not r <= factor * (OUT_RMS if n == "out" else GRAD_RMS)}
    assert not bad, f"RMS ratios too large: {bad}"


SHAPES = {
    "rank_8": {},
    "rank_0_int8": {"R": 0, "fmt": "int8"},
    "odd_sizes": {"E": 5, "D": 50, "F": 71, "T": 19},
    "one_row": {"T": 1, "K": 1},
    "segments_and_idle_experts": {"E": 9, "K": 1, "T": 700, "D": 40, "F": 40},
}


@pytest.mark.parametrize("policy", ["retain", "recompute"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_reference(isa, activation, shape, policy):
    layer = Layer(ACTIVATIONS[activation], **SHAPES[shape])
    assert_close(layer.run(policy), layer.reference())


def test_activation_without_biases(isa):
    layer = Layer(CLAMPED, bias=False)
    assert_close(layer.run(), layer.reference())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_products(isa, activation):
    if not native.computes_int8():
        pytest.skip(f"{isa} has no int8 products")
    layer = Layer(ACTIVATIONS[activation], fmt="int8", T=120, D=256, F=192)
    assert_close(layer.run(compute_type="int8"), layer.reference(), factor=2.5)


def test_the_side_of_a_bound_survives_bf16(isa):
    """Slopes at the bounds, and for values that rounding to bf16 would move onto or over a bound."""
    limit = 1.2  # not a bf16 value: its neighbours are 1.1953125 and 1.203125
    values = [1.2, 1.19999, 1.20001, 1.2016, 1.1985, -1.2, -1.20001, -1.19999, 5.0, -5.0]
    activation = Activation("clamped_swiglu", alpha=1.702, limit=limit)
    F = len(values)
    biases = ExpertBiases(gate=torch.tensor([values]), up=torch.tensor([values[::-1]]), down=torch.zeros(1, F))
    eye = torch.eye(F)[None]
    for policy in ("retain", "recompute"):
        # Without an input, G and U are the biases; the gradient of the input is dG + dU.
        packed = pack_experts(eye, torch.zeros(1, F, F), eye, "bf16", activation=activation, biases=biases)
        x = torch.zeros(1, F, requires_grad=True)
        out = moe_experts(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), packed, activation_policy=policy)
        out.backward(torch.ones(1, F))
        gate, up = biases.gate.clone().requires_grad_(), biases.up
        activation(gate, up).backward(torch.ones(1, F))
        assert torch.equal(x.grad == 0, gate.grad == 0)
        assert (gate.grad == 0).sum() == 3  # 1.20001, 1.2016 and 5
        torch.testing.assert_close(x.grad, gate.grad, rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_oracle(activation):
    layer = Layer(ACTIVATIONS[activation], E=3, D=4, F=5, R=2, T=4)
    inputs = {n: t.detach().double().requires_grad_() for n, t in layer.inputs.items()}
    weights = [torch.randn(s, dtype=torch.float64) for s in ((3, 5, 4), (3, 5, 4), (3, 4, 5))]
    biases = doubled(layer.packed.biases)

    def run(*tensors):
        x, topk, factors = Layer._split(dict(zip(inputs, tensors, strict=True)))
        return moe_experts_reference(
            x, layer.ids, topk, *weights, factors, activation=ACTIVATIONS[activation], biases=biases
        )

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_same_bits_for_any_number_of_threads(isa):
    layer, runs = Layer(CLAMPED, E=6, T=150, D=96, F=160), []
    for threads in (1, 3):
        native.set_num_threads(threads)
        runs.append(layer.run())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_copies_keep_activation_and_biases():
    layer = Layer(CLAMPED)
    expected = layer.run()["out"]
    layer.packed = copy.deepcopy(layer.packed)
    assert layer.packed.activation == CLAMPED
    assert torch.equal(layer.run()["out"], expected)
    other = layer.packed.with_(activation=SILU)
    assert other.storage is layer.packed.storage and torch.equal(other.biases.up, layer.packed.biases.up)
    layer.packed = other
    assert rms_ratio(layer.run()["out"], expected) > 0.1


def test_what_does_not_fit_is_refused():
    weights = [torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.randn(2, 3, 4)]
    good = {"gate": torch.zeros(2, 4), "up": torch.zeros(2, 4), "down": torch.zeros(2, 3)}
    pack_experts(*weights, biases=ExpertBiases(**good))
    for name, value, message in (
        ("up", torch.zeros(2, 3), r"up bias: expected a float tensor of shape \(2, 4\), got torch.float32 \(2, 3\)"),
        ("down", torch.zeros(2, 3).int(), r"down bias: expected a float tensor of shape \(2, 3\), got torch.int32"),
        ("gate", torch.full((2, 4), float("nan")), "gate bias: expected finite values, got NaN or Inf"),
    ):
        with pytest.raises(ValueError, match=message):
            pack_experts(*weights, biases=ExpertBiases(**{**good, name: value}))
    with pytest.raises(ValueError, match="activation: expected silu or clamped_swiglu, got 'gelu'"):
        Activation("gelu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation: expected a finite alpha and a limit of at least 0, got 1\.0"):
        Activation("clamped_swiglu", limit=-1.0)

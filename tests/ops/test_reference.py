"""The oracle against torch's numerical differentiation, in float64 on tiny shapes."""

import torch

from kt_sft.ops.reference import moe_experts_reference

E, K, D, F, R, T = 3, 2, 4, 5, 2, 4


def _inputs():
    factors = {
        "gate_a": (E, R, D), "gate_b": (E, F, R), "up_a": (E, R, D),
        "up_b": (E, F, R), "down_a": (E, R, F), "down_b": (E, D, R),
    }  # fmt: skip
    lora = {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in factors.items()}
    weights = [torch.randn(s, dtype=torch.float64) for s in ((E, F, D), (E, F, D), (E, D, F))]
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    topk = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    ids = torch.randn(T, E).topk(K).indices
    return x, ids, topk, weights, lora


def test_gradcheck_of_every_input():
    x, ids, topk, weights, lora = _inputs()
    mask = torch.randint(0, 2, (T, K, F)).double() * 2

    def run(x, topk, *factors):
        return moe_experts_reference(x, ids, topk, *weights, dict(zip(lora, factors, strict=True)), 0.5, x * 2, mask)

    assert torch.autograd.gradcheck(run, (x, topk, *lora.values()))


def test_equals_a_loop_over_tokens():
    x, ids, topk, (gate, up, down), lora = _inputs()
    got = moe_experts_reference(x, ids, topk, gate, up, down, lora, 0.5)
    for t in range(T):
        expected = torch.zeros(D, dtype=torch.float64)
        for k in range(K):
            e = ids[t, k]
            dense = {
                n: w[e] + 0.5 * lora[f"{n}_b"][e] @ lora[f"{n}_a"][e]
                for n, w in (("gate", gate), ("up", up), ("down", down))
            }
            h = torch.nn.functional.silu(dense["gate"] @ x[t]) * (dense["up"] @ x[t])
            expected = expected + topk[t, k] * (dense["down"] @ h)
        torch.testing.assert_close(got[t], expected)

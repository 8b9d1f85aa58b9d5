"""What a call of one layer costs besides its arithmetic: one token on a layer of almost nothing.

    python -m benchmarks.overhead

Every row is a call from Python to the kernels and back: checks, buffers, autograd, the products. The output is
compared with the float32 oracle first. Microseconds: median with the 20th and 80th percentile, in the best of three
rounds over all kinds.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from benchmarks.ours import Ours
from benchmarks.shapes import TINY, make_inputs
from kt_sft import native
from kt_sft.nn.experts import KtExperts
from kt_sft.nn.lora import ExpertsLinearLora
from kt_sft.ops import moe_experts, submit_experts
from kt_sft.ops.reference import moe_experts_reference

ROUNDS = 3  # of every kind of call the best


class Cost(NamedTuple):
    """Of one kind of call, in microseconds."""

    what: str
    threads: int
    median: float
    p20: float
    p80: float


def _time(call: Callable[[], object], calls: int) -> tuple[float, float, float]:
    for _ in range(50):
        call()
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    samples.sort()
    return tuple(samples[int(calls * q)] * 1e6 for q in (0.5, 0.2, 0.8))  # type: ignore[return-value]


def _module(layer: Ours, rank: int) -> KtExperts:
    experts = KtExperts(num_experts=TINY.E, hidden_size=TINY.D, intermediate_size=TINY.F)
    experts.packed = layer.packed
    if rank:
        for name in experts.names:
            base = experts.get_submodule(name)
            experts.set_submodule(name, ExpertsLinearLora(base, "default", rank, rank, LoraConfig()))
    return experts


def _calls() -> dict[str, tuple[bool, Callable[[], object]]]:
    """What is measured: whether gradients are on, and the call."""
    x, ids, weights, grad_out = make_inputs(TINY, 1, seed=1)
    layer = Ours(TINY, "bf16")
    packed, out = layer.packed, torch.empty(1, TINY.D)
    expected = moe_experts_reference(x.float(), ids, weights, *(w.float() for w in packed.dequantize()))
    ratio = ((layer.forward(x, ids, weights).float() - expected).norm() / expected.norm()).item()
    if not ratio < 1e-2:
        raise SystemExit(f"refusing to report: the output differs from the reference by {ratio:.3g}")
    plain, adapted = _module(layer, 0), _module(layer, 8)
    factors = [p for p in adapted.parameters()]
    xd, wd = x, weights
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    return {
        "native forward": (
            False, lambda: native.forward(*packed.native_args(), xd, ids, wd, {}, None, False, out)
        ),
        "moe_experts, no grad": (False, lambda: moe_experts(xd, ids, wd, packed)),
        "moe_experts, forward": (True, lambda: moe_experts(x, ids, weights, packed)),
        "moe_experts, forward + backward": (
            True, lambda: torch.autograd.grad(moe_experts(x, ids, weights, packed), (x, weights), grad_out)
        ),
        "submit + wait, no grad": (False, lambda: submit_experts(xd, ids, wd, packed).wait()),
        "experts module, no grad": (False, lambda: plain(xd, ids, wd)),
        "experts module + LoRA, no grad": (False, lambda: adapted(xd, ids, wd)),
        "experts module + LoRA, forward + backward": (
            True, lambda: torch.autograd.grad(adapted(x, ids, weights), (x, weights, *factors), grad_out)
        ),
    }  # fmt: skip


def measure(threads: tuple[int, ...] = (1,), calls: int = 2000) -> list[Cost]:
    """Costs of every kind of call with each number of kernel threads; raises SystemExit on a wrong result."""
    before, costs = native.num_threads(), dict[tuple[str, int], Cost]()
    kinds = _calls()
    try:
        for _, count in itertools.product(range(ROUNDS), threads):
            native.set_num_threads(count)
            for what, (grad, call) in kinds.items():
                with torch.set_grad_enabled(grad):
                    cost = Cost(what, count, *_time(call, calls))
                costs[what, count] = min(cost, costs.get((what, count), cost), key=lambda cost: cost.median)
    finally:
        native.set_num_threads(before)
    return list(costs.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default=f"1,{native.num_threads()}", help="default: %(default)s")
    parser.add_argument("--calls", type=int, default=2000)
    args = parser.parse_args()
    threads = tuple(sorted({int(t) for t in args.threads.split(",")}))
    table = Table("call", "threads", "us", "p20", "p80", title=f"T = 1, {TINY}")
    for cost in measure(threads, args.calls):
        table.add_row(cost.what, str(cost.threads), *(f"{us:.1f}" for us in cost[2:]))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

"""What the profiler sees of a call: copies beside other work, and no wait for the device or a stream as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from kt_sft.ops import ExpertsLora, moe_experts, submit_experts
from tests.ops.test_experts import Case

CALL = "the call under test"


class Span(NamedTuple):
    """Of one event, in microseconds."""

    name: str
    start: float
    end: float


class Seen(NamedTuple):
    """What was started during the call: by the host (runtime functions), and on the device."""

    host: list[Span]
    device: list[Span]


def profiled(call: Callable[[], Any]) -> Seen:
    """The events between beginning and end of ``call``; the profiler's own waiting lies outside."""
    call()  # memory is allocated, kernels are loaded
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(CALL):
            call()
        torch.cuda.synchronize()
    sides: dict[bool, list[Span]] = {True: [], False: []}
    for event in profiler.events():
        span = Span(event.name, event.time_range.start, event.time_range.end)
        sides[event.device_type == DeviceType.CUDA].append(span)
    (whole,) = [span for span in sides[False] if span.name == CALL]
    seen = Seen([s for s in sides[False] if whole.start <= s.start <= whole.end], sides[True])
    if not any(s.name.startswith("cudaMemcpy") for s in seen.host) or not seen.device:
        pytest.skip("the profiler sees neither CUDA's functions nor what the device does (no access to CUPTI)")
    return seen


def shared_time(some: list[Span], others: list[Span]) -> float:
    """Share of the time of ``some`` (disjoint) in which one of ``others`` (disjoint) runs as well."""
    both = sum(max(0.0, min(a.end, b.end) - max(a.start, b.start)) for a in some for b in others)
    return both / sum(a.end - a.start for a in some)


def test_shared_time():
    """The measure itself."""
    assert shared_time([Span("", 0, 10), Span("", 20, 30)], [Span("", 5, 25)]) == 0.5


@pytest.mark.parametrize("submitted", [False, True])
@pytest.mark.parametrize("policy", ["retain", "recompute"])
def test_nothing_waits_for_the_whole_device(policy, submitted):
    """Neither forward nor backward: they wait for an event, the one behind the inputs' copies."""
    layer = Case(T=500)
    inputs = {name: t.detach().cuda().requires_grad_() for name, t in layer.inputs().items()}
    lora = ExpertsLora(**{n: inputs[n] for n in layer.factors}, scaling=layer.scaling)
    arguments = inputs["hidden_states"], layer.ids.cuda(), inputs["topk_weights"], layer.packed, lora
    grad_out = layer.grad_out.cuda()

    def call():
        if submitted:
            out = submit_experts(*arguments, activation_policy=policy).wait()
        else:
            out = moe_experts(*arguments, activation_policy=policy)
        torch.autograd.backward(out, grad_out)

    names = {span.name for span in profiled(call).host}
    assert names & {"cudaDeviceSynchronize", "cudaStreamSynchronize"} == set()


def test_copies_run_beside_the_caller_s_work():
    """Large hidden states go to the host and come back while the caller's stream multiplies matrices."""
    layer = Case(E=8, T=65536, D=1024, F=64, R=0)
    x, ids, weights = layer.x.detach().cuda(), layer.ids.cuda(), layer.weights.detach().cuda()
    load = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def call():
        pending = submit_experts(x, ids, weights, layer.packed)
        under_way: list[torch.cuda.Event] = []
        while not pending.done() or len(under_way) < 20:  # the last results are sent after the kernels are done
            load @ load
            under_way.append(torch.cuda.current_stream().record_event())
            if len(under_way) > 3:
                under_way[-4].synchronize()  # a few at a time, or the queue would grow as long as the kernels run
        pending.wait()

    device = profiled(call).device
    large = [s for s in device if s.name.startswith("Memcpy")]
    work = [s for s in device if not s.name.startswith(("Memcpy", "Memset")) and s.name != CALL]
    for way in ("DtoH", "HtoD"):
        longest = max((s for s in large if way in s.name), key=lambda s: s.end - s.start)
        assert shared_time([longest], work) > 0.5, way

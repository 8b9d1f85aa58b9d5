"""submit / wait: the bits of the plain call, in the order of the caller, safe at exit and across a fork."""

import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kt_sft.ops import ExpertsLora, overlap, submit_experts
from tests.ops.test_experts import Case


def submit(layer: Case, policy="retain", dropout=0.0):
    lora = ExpertsLora(**layer.factors, scaling=layer.scaling, dropout=dropout) if layer.factors else None
    return submit_experts(layer.x, layer.ids, layer.weights, layer.packed, lora, activation_policy=policy)


def clear(layer: Case):
    for tensor in layer.inputs().values():
        tensor.grad = None


def gradients(layer: Case):
    return {name: tensor.grad for name, tensor in layer.inputs().items()}


def assert_same(layer: Case, out, expected):
    assert torch.equal(out, expected["out"])
    for name, grad in gradients(layer).items():
        assert torch.equal(grad, expected[name]), name


@pytest.fixture
def busy_worker():
    """The worker is kept busy until the event that this gives is set."""
    release = threading.Event()
    overlap._start(SimpleNamespace(run=lambda: release.wait(60)))
    yield release
    release.set()


@pytest.mark.parametrize("policy", ["retain", "recompute"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", [{}, {"R": 0}, {"dtype": torch.float32}, {"T": 1}], ids=str)
def test_equals_the_plain_call_bit_for_bit(policy, dropout, case):
    layer = Case(**case)
    torch.manual_seed(5)
    expected = layer.run(policy, dropout)
    clear(layer)
    torch.manual_seed(5)
    out = submit(layer, policy, dropout).wait()
    out.backward(layer.grad_out)
    assert_same(layer, out, expected)


def test_several_in_flight_waited_for_in_any_order():
    layers = [Case(T=t) for t in (70, 3, 33)]
    expected = [layer.run() for layer in layers]
    for layer in layers:
        clear(layer)
    pending = [submit(layer) for layer in layers]
    outs = [p.wait() for p in reversed(pending)][::-1]
    torch.autograd.backward(outs, [layer.grad_out for layer in layers])
    for layer, out, want in zip(layers, outs, expected, strict=True):
        assert_same(layer, out, want)


def test_the_caller_goes_on_while_the_kernels_run(busy_worker):
    layer = Case()
    pending = submit(layer)
    assert not pending.done()
    busy_worker.set()
    out = pending.wait()
    assert pending.done() and pending.wait() is out
    assert torch.equal(out, layer.forward())


def test_backward_starts_the_kernels_before_and_waits_after_the_shared_expert(monkeypatch):
    events = []

    class Shared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            events.append("shared")
            return 2 * grad

    start, result = overlap._start, overlap.input_gradients
    monkeypatch.setattr(overlap, "_start", lambda work: events.append("start") or start(work))
    monkeypatch.setattr(overlap, "input_gradients", lambda grads: events.append("gradients") or result(grads))
    layer = Case()
    pending = submit(layer)
    shared = Shared.apply(layer.x)
    out = pending.wait() + shared
    events.clear()
    out.backward(layer.grad_out)
    assert events == ["start", "shared", "gradients"]
    total = layer.x.grad
    assert torch.equal(total, layer.run()["hidden_states"] + 2 * layer.grad_out)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    layer = Case(dtype=torch.float32)
    shared = torch.nn.Linear(64, 64)

    def block(x, *_):
        pending = submit(layer)
        beside = shared(x)
        return pending.wait() + beside

    block(layer.x).backward(layer.grad_out)
    expected = gradients(layer)
    clear(layer)
    checkpoint(block, layer.x, *layer.factors.values(), use_reentrant=use_reentrant).backward(layer.grad_out)
    for name, grad in gradients(layer).items():
        if name != "topk_weights" or not use_reentrant:  # reentrant: gradients only reach what was passed in
            assert torch.equal(grad, expected[name]), name


def test_backward_twice_through_a_retained_graph():
    layer = Case()
    once = layer.run()["hidden_states"]
    clear(layer)
    out = submit(layer).wait()
    for _ in range(2):
        out.backward(layer.grad_out, retain_graph=True)
    assert torch.equal(layer.x.grad, 2 * once)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    layer = Case()
    expected = layer.forward().detach()
    with mode():
        out = submit(layer).wait()
    assert torch.equal(out, expected) and not out.requires_grad


def test_errors_come_at_wait_every_time_and_leave_the_worker_alive():
    layer = Case(K=4)
    expected, good = layer.run()["out"], layer.ids
    layer.ids = good + 1
    bad = submit(layer)
    layer.ids = good
    after = submit(layer)
    for _ in range(2):
        with pytest.raises(ValueError, match="topk_ids: expected expert ids 0 to 3, got 4"):
            bad.wait()
    assert torch.equal(after.wait(), expected)


def test_errors_of_the_backward_come_in_backward(monkeypatch):
    out = submit(Case()).wait()

    def fail(self):
        raise MemoryError("no room")

    monkeypatch.setattr(overlap.Backward, "run", fail)
    with pytest.raises(MemoryError, match="no room"):
        out.sum().backward()


def test_arguments_are_checked_at_once(busy_worker):
    layer = Case()
    layer.x = layer.x[:, :-1]
    with pytest.raises(ValueError, match="hidden_states: expected a float tensor of shape"):
        submit(layer)


def test_arguments_changed_before_wait_are_noticed(busy_worker):
    layer = Case()
    layer.weights = layer.weights.detach()
    pending = submit(layer)
    layer.weights.mul_(2)
    busy_worker.set()
    with pytest.raises(ValueError, match="modified in place"):
        pending.wait()


def test_double_backward_is_refused():
    layer = Case()
    (grad,) = torch.autograd.grad(submit(layer).wait().sum(), layer.x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


def test_a_finished_call_holds_no_inputs():
    layer = Case()
    with torch.no_grad():
        pending = submit(layer)
    pending.wait()
    x = weakref.ref(layer.x)
    del layer
    assert x() is None


SCRIPT = """
import os, sys, torch
from tests.ops.test_experts import Case
from tests.ops.test_overlap import submit
layer = Case(T=int(sys.argv[2]), R=0)
first = submit(layer).wait()
if sys.argv[1] == "fork":
    if (child := os.fork()) == 0:
        os._exit(0 if torch.equal(submit(layer).wait(), first) else 1)
    assert os.waitpid(child, 0)[1] == 0
else:
    pending = [submit(layer) for _ in range(3)]
print("end")
"""


@pytest.mark.parametrize(("what", "tokens"), [("exit", 20000), ("fork", 33)])
def test_exit_and_fork(what, tokens):
    """Calls may be in flight when the interpreter ends; a forked child has a worker of its own."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, what, str(tokens)],
        capture_output=True, text=True, cwd=root, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")

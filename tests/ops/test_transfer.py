"""Copies between device and host in the right order, on a device that does everything as late as it may."""

from __future__ import annotations

import torch

from kt_sft.ops import ExpertsLora
from kt_sft.ops.experts import checked_arguments
from kt_sft.ops.passes import Backward, Forward
from kt_sft.ops.transfer import Transfer
from tests.ops.simulated_device import DEVICE, SimulatedDevice, Stream, device  # noqa: F401 (a fixture)
from tests.ops.test_experts import Case


def read(device: SimulatedDevice, tensor) -> torch.Tensor:  # noqa: F811
    """What the caller's next operation sees."""
    seen = device.computed(lambda: tensor.value, tensor.shape, tensor.dtype)
    device.current.synchronize()
    return seen.value


def test_inputs_are_there_after_wait_and_nothing_else_is_waited_for(device):  # noqa: F811
    values = torch.randn(5, 3)
    x = device.tensor(values)  # the device has not computed it yet
    moved = Transfer(DEVICE)
    host = moved.to_host(x, torch.bfloat16)
    later = device.tensor(values)
    moved.staged()
    assert host.isnan().all()
    moved.wait()
    assert torch.equal(host, values.bfloat16())
    assert later.value.isnan().all()  # what the caller's stream got afterwards goes on
    assert x.recorded == [moved._down]  # its memory is not given away before the copy has been made


def test_results_are_ordered_before_the_caller_s_next_operation(device):  # noqa: F811
    moved = Transfer(DEVICE)
    values = torch.randn(4, 2)
    result = moved.to_device(values, DEVICE, torch.bfloat16)
    moved.sent()
    moved.deliver(result, None, values)
    assert result.value.isnan().all()  # the host has not waited
    assert torch.equal(read(device, result), values.bfloat16())
    assert result.recorded == [device.current]


def test_without_deliver_the_results_are_not_there(device):  # noqa: F811
    """The device of these tests notices a missing order."""
    moved = Transfer(DEVICE)
    result = moved.to_device(torch.ones(3), DEVICE, torch.float32)
    moved.sent()
    assert read(device, result).isnan().all()


def test_each_direction_has_a_stream(device):  # noqa: F811
    first, second = Transfer(DEVICE), Transfer(DEVICE)
    streams: list[Stream] = [first._down, first._up, device.current]
    assert len(set(map(id, streams))) == 3
    assert (first._down, first._up) == (second._down, second._up)


def test_passes_equal_those_of_the_cpu(device):  # noqa: F811
    """Forward and backward of a layer whose tensors, factors included, are on the device."""
    layer = Case()
    expected = layer.run()
    lora = ExpertsLora(**layer.factors, scaling=layer.scaling)
    call, tensors = checked_arguments(layer.x, layer.ids, layer.weights, layer.packed, lora)
    x, ids, weights, _, *factors = tensors
    moved = [device.tensor(t) for t in (x, ids, weights)]
    factors = [device.tensor(t) for t in factors]
    forward = Forward(call, *moved, None, *factors)
    out = forward.run()
    forward.transfer.deliver(out)
    saved = (*forward.saved(), *factors)
    assert torch.equal(read(device, out), expected["out"])
    backward = Backward(call, weights.dtype, saved, device.tensor(layer.grad_out))
    grads = backward.run()
    backward.transfer.deliver(*grads)
    names = ["hidden_states", "topk_weights", None, *call.factor_names]
    for name, grad in zip(names, grads, strict=True):
        assert (grad is None) == (name is None)
        if grad is not None:
            assert torch.equal(read(device, grad), expected[name]), name

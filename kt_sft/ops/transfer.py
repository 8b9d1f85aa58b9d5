"""Tensors of one call on their way between a device and the host.

A CUDA device copies on two streams of its own, one per direction, through pinned memory. Events order them against the
caller's stream, so that neither the device nor the caller's stream is ever waited for as a whole:

    caller's stream   x ready ─┐                                   ┌─ out used
    copy stream                └─ copy ─ arrived ┐   ┌─ copy ─ sent ┘
    host                                         └ compute

Other devices copy at once, the CPU not at all.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def _copy_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


class Transfer:
    """Inputs go ``to_host`` in the caller's thread; ``wait`` and ``to_device`` belong to the thread that computes, and
    ``deliver`` to the caller's again."""

    def __init__(self, device: torch.device) -> None:
        """What the caller's current stream holds so far is what the copies wait for."""
        self._device = device
        self._down: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._down, self._up = _copy_streams(device)
            self._down.wait_stream(torch.cuda.current_stream(device))

    def to_host(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor without autograd history; its values are there after :meth:`wait`."""
        if tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous():
            return tensor
        tensor = tensor.detach()
        if self._down is None or tensor.device != self._device:
            return tensor.to("cpu", dtype).contiguous()
        with torch.cuda.stream(self._down):
            host = torch.empty(tensor.shape, dtype=dtype, pin_memory=True)
            host.copy_(tensor.to(dtype), non_blocking=True)
        tensor.record_stream(self._down)
        return host

    def staged(self) -> None:
        """All inputs are on their way."""
        if self._down is not None:
            self._arrived = self._down.record_event()

    def wait(self) -> None:
        """Wait for the inputs, nothing else."""
        if self._down is not None:
            self._arrived.synchronize()

    def to_device(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Start sending a result, converted on the host; it may be used after :meth:`deliver`."""
        if tensor.dtype is dtype and device.type == "cpu":
            return tensor
        if self._down is None or device != self._device:
            return tensor.to(device, dtype)
        with torch.cuda.stream(self._up):
            pinned = torch.empty(tensor.shape, dtype=dtype, pin_memory=True).copy_(tensor)
            return pinned.to(device, non_blocking=True)

    def sent(self) -> None:
        """All results are on their way."""
        if self._down is not None:
            self._sent = self._up.record_event()

    def deliver(self, *results: Tensor | None) -> None:
        """Make the caller's current stream wait for the results."""
        if self._down is None:
            return
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._sent)
        for tensor in results:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(stream)

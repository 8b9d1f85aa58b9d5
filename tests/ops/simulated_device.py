"""A device whose streams run as late as they may: what nobody waits for has not happened, and reads as NaN.

Stands in for torch.cuda in kt_sft.ops.transfer, so that the order of copies is tested where there is no GPU. Of an
allocator it knows nothing but which streams a tensor was recorded on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from kt_sft.ops import transfer

DEVICE = torch.device("cuda", 0)


class Stream:
    """Operations in order, done up to some point."""

    def __init__(self, device: Any = None) -> None:
        self.queue: list[Callable[[], Any]] = []
        self.done = 0

    def enqueue(self, operation: Callable[[], Any]) -> None:
        self.queue.append(operation)

    def run(self, until: int) -> None:
        while self.done < until:
            self.done += 1
            self.queue[self.done - 1]()

    def synchronize(self) -> None:
        self.run(len(self.queue))

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.enqueue(event.synchronize)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


class Event:
    """The point up to which a stream is filled."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.until = stream, len(stream.queue)

    def synchronize(self) -> None:
        self.stream.run(self.until)


class DeviceTensor:
    """What transfers ask of a CUDA tensor. ``value`` is NaN (or 0) until the stream that computes it has run."""

    is_cpu, is_cuda, device = False, True, DEVICE

    def __init__(self, device: SimulatedDevice, shape: torch.Size, dtype: torch.dtype) -> None:
        self._device, self.shape, self.dtype = device, shape, dtype
        self.value = torch.full(shape, float("nan") if dtype.is_floating_point else 0, dtype=dtype)
        self.recorded: list[Stream] = []

    def detach(self) -> DeviceTensor:
        return self

    def to(self, dtype: torch.dtype) -> DeviceTensor:
        return self if dtype is self.dtype else self._device.computed(lambda: self.value.to(dtype), self.shape, dtype)

    def record_stream(self, stream: Stream) -> None:
        self.recorded.append(stream)


class SimulatedDevice:
    """``current`` is the caller's stream; each thread may enter another."""

    def __init__(self) -> None:
        self.current, self._entered = Stream(), threading.local()

    def stream(self) -> Stream:
        return getattr(self._entered, "stream", self.current)

    @contextmanager
    def entered(self, stream: Stream) -> Iterator[None]:
        self._entered.stream = stream
        yield
        del self._entered.stream

    def computed(self, function: Callable[[], Tensor], shape: torch.Size, dtype: torch.dtype) -> DeviceTensor:
        """The result of an operation in the stream that is entered now."""
        made = DeviceTensor(self, shape, dtype)
        self.stream().enqueue(lambda: made.value.copy_(function()))
        return made

    def tensor(self, value: Tensor) -> DeviceTensor:
        return self.computed(value.detach().clone, value.shape, value.dtype)

    def pinned(self, *shape: Any, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        device = self

        class Pinned(Tensor):
            def copy_(self, source: Any, non_blocking: bool = False) -> Tensor:
                if not isinstance(source, DeviceTensor):
                    return super().copy_(source)
                assert non_blocking
                device.stream().enqueue(lambda: super(Pinned, self).copy_(source.value))
                return self

            def to(self, target: torch.device, non_blocking: bool = False) -> Any:
                assert target == DEVICE and non_blocking
                return device.computed(lambda: self.as_subclass(Tensor), self.shape, self.dtype)

        return (
            torch.zeros(*shape, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else 0).as_subclass(Pinned)
        )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedDevice]:
    made = SimulatedDevice()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: made.stream())
    monkeypatch.setattr(torch.cuda, "stream", made.entered)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.pinned(*a, **k) if "pin_memory" in k else empty(*a, **k))
    transfer._copy_streams.cache_clear()
    yield made
    transfer._copy_streams.cache_clear()

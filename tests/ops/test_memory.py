"""Recycled buffers: no two living tensors share memory, and what is kept never exceeds what was in use."""

from __future__ import annotations

import gc
import os
import platform
import random
import threading
import time

import psutil
import pytest
import torch

from kt_sft import native
from kt_sft.ops import ExpertsLora, memory, moe_experts, pack_experts

MIB = 1 << 20
SIZES = (1, 2, 3, 5)  # MiB


@pytest.fixture
def recycler(monkeypatch):
    """One of the test's own."""
    own = memory.Recycler()
    monkeypatch.setattr(memory, "_recycler", own)
    return own


def buffer(mib: int = 2) -> torch.Tensor:
    return memory.recycled((mib, MIB // 4), torch.float32)


def test_memory_is_used_again(recycler):
    first = buffer()
    address = first.data_ptr()
    assert first.shape == (2, MIB // 4) and first.dtype == torch.float32 and recycler.held_bytes() == (2 * MIB, 0)
    second = buffer()
    assert second.data_ptr() != address
    del first
    assert recycler.held_bytes() == (2 * MIB, 2 * MIB)
    assert buffer().data_ptr() == address


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t[1, 5:7],
        lambda t: t.untyped_storage(),
        lambda t: t.numpy(),
        lambda t: t.view(torch.bfloat16),
        lambda t: torch.nn.Parameter(t),
    ],
    ids=["view", "storage", "numpy", "dtype", "parameter"],
)
def test_whatever_refers_to_a_tensor_keeps_its_memory(recycler, keep):
    tensor = buffer()
    kept = keep(tensor)
    address = tensor.data_ptr()
    del tensor
    gc.collect()
    assert buffer().data_ptr() != address
    del kept
    gc.collect()
    assert address in {b.data_ptr() for b in [buffer(), buffer()]}


def test_a_buffer_up_to_a_quarter_larger_is_used_again(recycler):
    smaller, larger = buffer(8), buffer(10)
    addresses = smaller.data_ptr(), larger.data_ptr()
    del smaller, larger
    first, second = buffer(8), buffer(8)
    assert (first.data_ptr(), second.data_ptr()) == addresses
    assert recycler.held_bytes() == (18 * MIB, 0)
    del first, second
    assert buffer(6).data_ptr() not in addresses


def test_small_buffers_are_left_to_torch(recycler):
    assert memory.recycled((3, 5), torch.float32).shape == (3, 5)
    assert memory.recycled((0, 5), torch.float32).numel() == 0
    assert recycler.held_bytes() == (0, 0)


def churn(seed: int, rounds: int) -> None:
    """Tensors of random sizes that live for a random time: each holds its own number to the end."""
    choose = random.Random(seed)
    living: list[tuple[torch.Tensor, float]] = []
    for number in range(rounds):
        tensor = buffer(choose.choice(SIZES)).fill_(seed + number)
        living.append((choose.choice((tensor, tensor[0], tensor.T)), float(seed + number)))
        while living and choose.random() < 0.55:
            tensor, expected = living.pop(choose.randrange(len(living)))
            assert (tensor == expected).all()
    for tensor, expected in living:
        assert (tensor == expected).all()


def test_random_lifetimes(recycler):
    most = 0
    take = recycler.take

    def checked_take(nbytes):
        nonlocal most
        view = take(nbytes)
        used, kept = recycler.held_bytes()
        most = max(most, used)
        assert used + kept <= most
        return view

    recycler.take = checked_take
    for seed in range(5):
        churn(1000 * seed, 60)
    assert recycler.held_bytes()[0] == 0 < recycler.held_bytes()[1] <= most


def test_threads(recycler):
    errors = []

    def work(seed):
        try:
            churn(seed, 60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(10_000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and recycler.held_bytes()[0] == 0


def test_a_forked_child_has_its_own(recycler):
    held, given_back = buffer().fill_(1), buffer().fill_(2)
    del given_back
    with recycler._lock:  # as if another thread were at it
        child = os.fork()
    if child == 0:
        memory._recycler.replace_lock()
        again = buffer().numpy()  # torch's threads did not come along
        again.fill(3)
        os._exit(0 if (held.numpy() == 1).all() and (again == 3).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (held == 1).all()


def layer():
    """Factors of 1 and 2 MiB; half of the experts get no rows."""
    E, D, F, R = 8, 512, 256, 128
    packed = pack_experts(torch.randn(E, F, D), torch.randn(E, F, D), torch.randn(E, D, F), weight_format="int8")
    shapes = {"gate_a": (R, D), "gate_b": (F, R), "up_a": (R, D), "up_b": (F, R), "down_a": (R, F), "down_b": (D, R)}
    lora = ExpertsLora(**{name: torch.randn(E, *shape).requires_grad_() for name, shape in shapes.items()})
    ids = torch.tensor([[0, 3], [5, 0], [5, 6]])
    return packed, lora, torch.randn(3, D), ids, torch.rand(3, 2)


def gradients(packed, lora, x, ids, weights) -> list[torch.Tensor]:
    out = moe_experts(x, ids, weights, packed, lora)
    return list(torch.autograd.grad(out, list(lora.factors().values()), torch.ones_like(out)))


def test_gradients_of_several_steps_are_kept_apart(recycler, monkeypatch):
    packed, lora, x, ids, weights = layer()
    inputs = [x * (step + 1) for step in range(4)]
    with monkeypatch.context() as plain:
        plain.setattr(memory, "recycled", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
        expected = [gradients(packed, lora, x, ids, weights) for x in inputs]
    assert recycler.held_bytes() == (0, 0)
    for grad in gradients(packed, lora, x, ids, weights):  # what a later step gets to overwrite
        grad.fill_(float("nan"))
    del grad
    got = []
    for i, x in enumerate(inputs):
        got.append(gradients(packed, lora, x, ids, weights))
        if i == 2:
            got[0] = expected[0]  # one step is forgotten, the next may have its memory
    for grads, others in zip(got, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))
    assert recycler.held_bytes()[0] == sum(-(-g.nbytes // (2 * MIB)) * 2 * MIB for grads in got[1:] for g in grads)


def test_accumulated_gradients(recycler):
    packed, lora, x, ids, weights = layer()
    single = gradients(packed, lora, x, ids, weights)
    for _ in range(3):
        moe_experts(x, ids, weights, packed, lora).sum().backward()
    for factor, grad in zip(lora.factors().values(), single, strict=True):
        assert torch.allclose(factor.grad, 3 * grad, rtol=1e-6)
        assert not factor.grad[[1, 2, 4, 7]].any()


def test_pages_are_asked_for_ahead_and_keep_what_is_written():
    if len(native.nodes()) > 1:
        pytest.skip("pages belong to the thread that writes them first")
    if tuple(int(n) for n in platform.release().split(".")[:2]) < (5, 14):
        pytest.skip("before Linux 5.14 nobody can ask")
    nbytes = 64 << 20
    stretch = memory.zeros_for_matrices(nbytes, 1)
    before = psutil.Process().memory_info().rss
    with memory.populated_ahead(stretch):
        for i in range(0, nbytes, 16 * MIB):  # at most four huge pages
            stretch[i : i + 8].fill_(1 + i // MIB)
        deadline = time.monotonic() + 20
        while any(t.name == "kt_sft-populate" for t in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not any(t.name == "kt_sft-populate" for t in threading.enumerate())
    assert psutil.Process().memory_info().rss - before > 0.9 * nbytes
    assert [stretch[i].item() for i in range(0, nbytes, 16 * MIB)] == [1, 17, 33, 49]
    assert not stretch.view(-1, 16 * MIB)[:, 8:].any()


def test_asking_ahead_ends_with_the_work():
    stretch = memory.zeros_for_matrices(256 << 20, 1)
    with pytest.raises(RuntimeError, match="no more"), memory.populated_ahead(stretch):
        raise RuntimeError("no more")
    assert not any(t.name == "kt_sft-populate" for t in threading.enumerate())

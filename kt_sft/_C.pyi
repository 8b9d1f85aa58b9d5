"""Types of the compiled kernels (csrc/binding/module.cc). Tensors are contiguous and on the CPU."""

from typing import Any

from torch import Tensor

def isa() -> str: ...
def isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def formats() -> list[str]: ...
def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def peak_flops(iterations: int) -> float: ...
def workspace_bytes() -> int: ...
def set_workspace_poison(on: bool) -> None: ...
def packed_bytes(experts: int, hidden: int, intermediate: int, weight_format: str, group_size: int) -> int: ...
def sort_by_expert(ids: Tensor, experts: int, counts: Tensor, order: Tensor) -> None: ...

class PackedHandle:
    """Packed experts of one layer: a storage and its sizes, checked once. Keeps the storage alive."""

    def __init__(
        self, storage: Tensor, experts: int, hidden: int, intermediate: int, weight_format: str, group_size: int
    ) -> None: ...

# projection: 0 gate, 1 up, 2 down
def pack(packed: PackedHandle, expert: int, projection: int, weights: Tensor, /) -> None: ...
def unpack(packed: PackedHandle, expert: int, projection: int, out: Tensor, /) -> None: ...
def product(
    packed: PackedHandle, expert: int, projection: int, transposed: bool, act: Tensor, out: Tensor, /
) -> None: ...

# lora: factors and settings by name; backward also takes grad_<factor>
def forward(
    packed: PackedHandle,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    lora: dict[str, Any],
    gate: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    /,
) -> None: ...
def backward(
    packed: PackedHandle,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    lora: dict[str, Any],
    gate: Tensor | None,
    up: Tensor | None,
    grad_out: Tensor,
    grad_x: Tensor,
    grad_lora_x: Tensor | None,
    grad_weights: Tensor,
    /,
) -> None: ...

"""Large host buffers on transparent huge pages where the system has them: fewer page faults and TLB misses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kt_sft import native

_LARGE = 4 << 20  # bytes: a buffer with whole huge pages in it


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU."""
    return _on_huge_pages(torch.empty(shape, dtype=dtype))


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.zeros`` on the CPU, which leaves the first touch of a large buffer to its user."""
    return _on_huge_pages(torch.zeros(shape, dtype=dtype))


def _on_huge_pages(tensor: Tensor) -> Tensor:
    if tensor.nbytes >= _LARGE:
        native.wish_huge_pages(tensor)
    return tensor

"""Packed frozen experts of one layer: one flat buffer of codes and scales that forward and backward both read.

The layout (csrc/kernels/panel.h) does not depend on instruction set, threads or NUMA nodes; expert e is the e-th of E
equal slices of ``storage``. Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kt_sft import native

from . import memory
from .quantize import resolve_group_size

_GATE, _UP, _DOWN = range(3)


class PackedExperts:
    """E experts of shapes gate (F, D), up (F, D), down (D, F) in ``weight_format`` bf16, int8 or int4.

    ``group_size`` is the number of input features that share a scale: 32, 64, 128, or 0 for one scale per output
    channel; None takes the format's default (int8: 0, int4: 32). ``storage`` may be any buffer of the right size, for
    example a mapped cache file; nothing is copied.
    """

    def __init__(
        self,
        storage: Tensor,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: str = "int8",
        group_size: int | None = None,
    ) -> None:
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.weight_format, self.group_size = weight_format, resolve_group_size(weight_format, group_size)
        expected = self.nbytes_for(num_experts, hidden_size, intermediate_size, weight_format, group_size)
        if storage.dtype != torch.uint8 or storage.shape != (expected,) or storage.device.type != "cpu":
            raise ValueError(
                f"storage: expected a CPU uint8 tensor of {expected} bytes, "
                f"got {storage.dtype} {tuple(storage.shape)} on {storage.device}"
            )
        self._storage = storage
        self._handle = native.PackedHandle(
            storage, num_experts, hidden_size, intermediate_size, weight_format, self.group_size
        )

    @property
    def storage(self) -> Tensor:
        """The codes and scales, uint8: one buffer that the kernels read where it lies."""
        return self._storage

    @staticmethod
    def nbytes_for(
        num_experts: int, hidden_size: int, intermediate_size: int, weight_format: str, group_size: int | None = None
    ) -> int:
        """Bytes of the storage."""
        group = resolve_group_size(weight_format, group_size)
        return native.packed_bytes(num_experts, hidden_size, intermediate_size, weight_format, group)

    @classmethod
    def empty(
        cls,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: str = "int8",
        group_size: int | None = None,
    ) -> PackedExperts:
        """Unfilled storage in anonymous memory; fill it with :meth:`pack_expert_`."""
        sizes = (num_experts, hidden_size, intermediate_size, weight_format, group_size)
        return cls(memory.empty((cls.nbytes_for(*sizes),), torch.uint8), *sizes)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and padding."""
        return self.storage.numel()

    def native_args(self) -> tuple[native.PackedHandle]:
        """The leading arguments by which the kernels know these experts."""
        return (self._handle,)

    def __reduce__(self) -> tuple:
        sizes = (self.num_experts, self.hidden_size, self.intermediate_size, self.weight_format, self.group_size)
        return PackedExperts, (self._storage, *sizes)

    def _shape(self, projection: int) -> tuple[int, int]:
        D, F = self.hidden_size, self.intermediate_size
        return (D, F) if projection == _DOWN else (F, D)

    def pack_expert_(self, index: int, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
        """Quantise and pack one expert in place. Raises ValueError on a wrong shape and on NaN or Inf."""
        for projection, (name, weight) in enumerate((("gate", gate_FD), ("up", up_FD), ("down", down_DF))):
            if tuple(weight.shape) != self._shape(projection) or not weight.is_floating_point():
                raise ValueError(
                    f"{name}_proj of expert {index}: expected a float tensor of shape {self._shape(projection)}, "
                    f"got {weight.dtype} {tuple(weight.shape)}"
                )
            source = weight.detach().cpu()
            source = source.to(torch.bfloat16 if source.dtype == torch.bfloat16 else torch.float32).contiguous()
            try:
                native.pack(*self.native_args(), index, projection, source)
            except ValueError as error:
                raise ValueError(f"{name}_proj of expert {index}: {error}") from None

    def pack_codes_(self, index: int, matrices: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Pack one expert in place from (codes, scales) of gate, up and down, without a loss: int4 only.

        codes (N, K / 2) uint8, code + 8 in four bits, the even column low; scales (N, ceil(K / group_size)) bf16.
        Raises ValueError on a wrong dtype or shape, and on scales that are NaN or Inf.
        """
        for projection, (name, (codes, scales)) in enumerate(zip(("gate", "up", "down"), matrices, strict=True)):
            if scales is None or not torch.isfinite(scales).all():
                raise ValueError(f"{name}_proj of expert {index}: scales: expected finite values, got NaN or Inf")
            try:
                native.pack_codes(*self.native_args(), index, projection, codes.contiguous(), scales.contiguous())
            except ValueError as error:
                raise ValueError(f"{name}_proj of expert {index}: {error}") from None

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights rounded to bf16, as they enter products: gate (E, F, D), up (E, F, D), down (E, D, F).

        Products of at most four rows of an expert take code * scale without that rounding.
        """
        return self._unpack(_GATE), self._unpack(_UP), self._unpack(_DOWN)

    def _unpack(self, projection: int) -> Tensor:
        weights = torch.empty(self.num_experts, *self._shape(projection), dtype=torch.bfloat16)
        for e in range(self.num_experts):
            native.unpack(*self.native_args(), e, projection, weights[e])
        return weights

    def __repr__(self) -> str:
        return (
            f"PackedExperts(E={self.num_experts}, D={self.hidden_size}, F={self.intermediate_size}, "
            f"{self.weight_format}, group_size={self.group_size}, {self.nbytes / 2**20:.1f} MiB)"
        )


def pack_experts(
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weight_format: str = "int8",
    group_size: int | None = None,
) -> PackedExperts:
    """Pack frozen experts: gate_proj (E, F, D), up_proj (E, F, D), down_proj (E, D, F), any float dtype.

    weight_format is bf16, int8 or int4; group_size 32, 64, 128, 0 (per channel) or None (the format's default).
    Raises ValueError on shapes that do not fit together, NaN or Inf, an unknown format or group size.
    """
    if gate_proj.dim() != 3:
        raise ValueError(f"gate_proj: expected shape (E, F, D), got {tuple(gate_proj.shape)}")
    E, F, D = gate_proj.shape
    for name, weight, shape in (("up_proj", up_proj, (E, F, D)), ("down_proj", down_proj, (E, D, F))):
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape} to fit gate_proj, got {tuple(weight.shape)}")
    packed = PackedExperts.empty(E, D, F, weight_format, group_size)
    for e in range(E):
        packed.pack_expert_(e, gate_proj[e], up_proj[e], down_proj[e])
    return packed

"""Packed frozen experts of one layer: one flat buffer of codes and scales that forward and backward both read.

The layout (csrc/kernels/panel.h) does not depend on instruction set, threads or NUMA nodes; expert e is the e-th of E
equal slices of ``storage``. Shape suffixes: E experts, D hidden, F intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from kt_sft import native

from . import memory
from .activation import SILU, Activation, ExpertBiases
from .layout import Layout, MatrixFormat, name_of, uniform

_GATE, _UP, _DOWN = range(3)
_NAMES = ("gate", "up", "down")


class PackedExperts:
    """E experts of shapes gate (F, D), up (F, D), down (D, F), packed in ``weight_format``.

    ``weight_format`` is one format for all (bf16, int8, int4), with ``group_size`` input features per scale: 32, 64,
    128, 0 for one scale per output channel, or None for the format's default (int8: 0, int4: 32). Or it is a Layout
    that names format and group size of each of the three matrices. ``storage`` may be any buffer of the right size, for
    example a mapped cache file; nothing is copied. ``activation`` and ``biases`` are what the experts compute besides
    their products; ``biases`` are copied to fp32.
    """

    def __init__(
        self,
        storage: Tensor,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: str | Layout = "int8",
        group_size: int | None = None,
        activation: Activation = SILU,
        biases: ExpertBiases | None = None,
    ) -> None:
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.layout = _layout(weight_format, group_size)
        expected = self.nbytes_for(num_experts, hidden_size, intermediate_size, self.layout)
        if storage.dtype != torch.uint8 or storage.shape != (expected,) or storage.device.type != "cpu":
            raise ValueError(
                f"storage: expected a CPU uint8 tensor of {expected} bytes, "
                f"got {storage.dtype} {tuple(storage.shape)} on {storage.device}"
            )
        self._storage = storage
        self._handle = native.PackedHandle(storage, num_experts, hidden_size, intermediate_size, self.layout)
        self.activation = activation
        self._handle.set_activation(activation.kind, activation.alpha, activation.limit)
        self.biases: ExpertBiases | None = None
        if biases is not None:
            self.biases = biases.as_kernels_take_them(num_experts, hidden_size, intermediate_size)
            self._handle.set_biases(self.biases.gate, self.biases.up, self.biases.down)

    @property
    def storage(self) -> Tensor:
        """The codes and scales, uint8: one buffer that the kernels read where it lies."""
        return self._storage

    @property
    def weight_format(self) -> str:
        """The format's name, or the three names where the matrices differ: q4_k/q4_k/q6_k."""
        return name_of(self.layout)

    @property
    def group_size(self) -> int:
        """Of the gate: see ``layout`` for all."""
        return self.layout[_GATE].group_size

    @staticmethod
    def nbytes_for(
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: str | Layout,
        group_size: int | None = None,
    ) -> int:
        """Bytes of the storage."""
        layout = _layout(weight_format, group_size)
        return native.packed_bytes(num_experts, hidden_size, intermediate_size, layout)

    @classmethod
    def empty(
        cls,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        weight_format: str | Layout = "int8",
        group_size: int | None = None,
    ) -> PackedExperts:
        """Unfilled storage in anonymous memory; fill it with :meth:`pack_expert_` or :meth:`pack_codes_`."""
        layout = _layout(weight_format, group_size)
        nbytes = cls.nbytes_for(num_experts, hidden_size, intermediate_size, layout)
        return cls(memory.empty_matrices(nbytes, 3 * num_experts), num_experts, hidden_size, intermediate_size, layout)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales and padding."""
        return self.storage.numel()

    def native_args(self) -> tuple[native.PackedHandle]:
        """The leading arguments by which the kernels know these experts."""
        return (self._handle,)

    def with_(self, *, activation: Activation | None = None, biases: ExpertBiases | None = None) -> PackedExperts:
        """The same packed weights with another activation or other biases; None leaves what is there."""
        return PackedExperts(self._storage, *self._sizes(), activation or self.activation, biases or self.biases)

    def _sizes(self) -> tuple[int, int, int, Layout, None]:
        return self.num_experts, self.hidden_size, self.intermediate_size, self.layout, None

    def __reduce__(self) -> tuple:
        return PackedExperts, (self._storage, *self._sizes(), self.activation, self.biases)

    def in_memory(self, storage: Tensor) -> PackedExperts:
        """Experts of the same sizes and format in other memory, as it is."""
        return PackedExperts(storage, *self._sizes(), self.activation, self.biases)

    def one(self, index: int) -> PackedExperts:
        """One of the experts, where it lies, without its biases."""
        slot = self.nbytes // self.num_experts
        storage = self._storage[index * slot : (index + 1) * slot]
        return PackedExperts(storage, 1, self.hidden_size, self.intermediate_size, self.layout, None, self.activation)

    def copy(self) -> PackedExperts:
        """The same experts in anonymous memory of the NUMA nodes that compute with them."""
        copied = self.in_memory(memory.empty_matrices(self.nbytes, 3 * self.num_experts))
        copied.copy_(self)
        return copied

    def copy_(self, other: PackedExperts) -> None:
        """Copy the codes and scales of ``other``, each block row by a thread of the NUMA node that computes with it."""
        native.copy(*self.native_args(), *other.native_args())

    def _shape(self, projection: int) -> tuple[int, int]:
        D, F = self.hidden_size, self.intermediate_size
        return (D, F) if projection == _DOWN else (F, D)

    def pack_expert_(self, index: int, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor) -> None:
        """Quantise and pack one expert in place. Raises ValueError on a wrong shape and on NaN or Inf."""
        for projection, weight in enumerate((gate_FD, up_FD, down_DF)):
            self.pack_matrix_(index, projection, weight)

    def pack_matrix_(self, index: int, projection: int, weight: Tensor) -> None:
        """Quantise and pack gate (0), up (1) or down (2) of one expert; its format is bf16, int8 or int4."""
        if tuple(weight.shape) != self._shape(projection) or not weight.is_floating_point():
            raise ValueError(
                f"{_NAMES[projection]}_proj of expert {index}: expected a float tensor of shape "
                f"{self._shape(projection)}, got {weight.dtype} {tuple(weight.shape)}"
            )
        source = weight.detach().cpu()
        source = source.to(torch.bfloat16 if source.dtype == torch.bfloat16 else torch.float32).contiguous()
        with _named(projection, index):
            native.pack(*self.native_args(), index, projection, source)

    def pack_codes_(self, index: int, projection: int, codes: Tensor, planes: Sequence[Tensor]) -> None:
        """Pack gate (0), up (1) or down (2) of one expert in place from what is quantised already, without a loss.

        codes: uint8 (N, K), or (N, K / 2) for formats of 4 bits, the even column low and signed codes as code + 8, or
        GGUF's super-blocks (N, K / 256 * bytes).
        planes: the format's scale planes (csrc/kernels/pack.h) as uint8. Raises ValueError on a wrong dtype or shape.
        """
        with _named(projection, index):
            native.pack_codes(
                *self.native_args(), index, projection, codes.contiguous(), [plane.contiguous() for plane in planes]
            )

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
        """The weights: gate (E, F, D), up (E, F, D), down (E, D, F).

        In bf16 they are what enters products; at most four rows of an expert are multiplied with the fp32 values.
        """
        gate, up, down = (self._unpack(projection, dtype) for projection in (_GATE, _UP, _DOWN))
        return gate, up, down

    def matrix(self, index: int, projection: int) -> Tensor:
        """The weights of one expert's gate (F, D), up (F, D) or down (D, F): projection 0, 1 or 2; fp32."""
        weights = memory.recycled(self._shape(projection), torch.float32)
        native.unpack(*self.native_args(), index, projection, weights)
        return weights

    def _unpack(self, projection: int, dtype: torch.dtype) -> Tensor:
        weights = memory.recycled((self.num_experts, *self._shape(projection)), dtype)
        for e in range(self.num_experts):
            weights[e] = self.matrix(e, projection)
        return weights

    def __repr__(self) -> str:
        return (
            f"PackedExperts(E={self.num_experts}, D={self.hidden_size}, F={self.intermediate_size}, "
            f"{self.weight_format}, group_size={self.group_size}, {self.nbytes / 2**20:.1f} MiB)"
        )


def _layout(weight_format: str | Layout, group_size: int | None) -> Layout:
    if isinstance(weight_format, str):
        return uniform(weight_format, group_size)
    gate, up, down = (MatrixFormat(*matrix) for matrix in weight_format)
    return gate, up, down


@contextmanager
def _named(projection: int, index: int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_NAMES[projection]}_proj of expert {index}: {error}") from None


def pack_experts(
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weight_format: str = "int8",
    group_size: int | None = None,
    *,
    activation: Activation = SILU,
    biases: ExpertBiases | None = None,
) -> PackedExperts:
    """Pack frozen experts: gate_proj (E, F, D), up_proj (E, F, D), down_proj (E, D, F), any float dtype.

    activation: what they compute from gate and up, biases (gate (E, F), up (E, F), down (E, D)) are added to products.
    weight_format is bf16, int8 or int4; group_size 32, 64, 128, 0 (per channel) or None (the format's default).
    Raises ValueError on shapes that do not fit together, NaN or Inf, an unknown format or group size.
    """
    if gate_proj.dim() != 3:
        raise ValueError(f"gate_proj: expected shape (E, F, D), got {tuple(gate_proj.shape)}")
    E, F, D = gate_proj.shape
    for name, weight, shape in (("up_proj", up_proj, (E, F, D)), ("down_proj", down_proj, (E, D, F))):
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape} to fit gate_proj, got {tuple(weight.shape)}")
    packed = PackedExperts.empty(E, D, F, weight_format, group_size).with_(activation=activation, biases=biases)
    for e in range(E):
        packed.pack_expert_(e, gate_proj[e], up_proj[e], down_proj[e])
    return packed

"""The experts of a checkpoint, whatever its format, one expert at a time.

A format is a class with ``matches``, ``require`` and ``read`` of one matrix; ``FORMATS`` lists them. The tensors
themselves decide which format a matrix has (companions and dtypes), so that checkpoints which keep some layers
unquantised need no list of exceptions; config.json's quantization_config gives what tensors do not say and must agree
with them. Codes stay what they are: nothing is dequantised while reading.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..ops.activation import ExpertBiases
from .checkpoint import Checkpoint, ExpertTensors
from .formats_float import Float, Fp8
from .formats_gguf import Gguf
from .formats_int4 import Awq, CompressedInt4, Gptq
from .formats_mxfp4 import Mxfp4
from .gguf import GgufCheckpoint
from .quantized import QuantizedWeight
from .stored import Stored, partner


class Format(Protocol):
    """How one matrix is stored."""

    name: str

    @staticmethod
    def matches(stored: Stored) -> bool:
        """Whether the matrix is stored this way."""

    @staticmethod
    def tensors(stored: Stored) -> list[str]:
        """The suffixes of the tensors that hold it."""

    @staticmethod
    def shape(stored: Stored) -> tuple[int, ...]:
        """(N, K) as its tensors have it, unchecked."""

    @staticmethod
    def require(stored: Stored, shape: tuple[int, int]) -> None:
        """Raise ValueError unless all of them are there with the dtypes and shapes of a matrix (N, K)."""

    @staticmethod
    def read(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
        """Read it. Raises ValueError on values that no quantiser writes (NaN, scales that cannot be)."""


FORMATS: tuple[type[Format], ...] = (Gguf, Float, Fp8, Mxfp4, CompressedInt4, Gptq, Awq)
MAIN = ("weight", "weight_packed", "qweight", "blocks")  # a tensor that every format has
_BIAS_DTYPES = ("BF16", "F16", "F32")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """One expert: gate (F, D), up (F, D), down (D, F)."""

    gate: QuantizedWeight
    up: QuantizedWeight
    down: QuantizedWeight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, up and down."""
        return self.gate.dequantize(dtype), self.up.dequantize(dtype), self.down.dequantize(dtype)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A folder of safetensors, a GGUF file, or a folder with GGUF files only."""
    path = Path(path)
    is_gguf = path.suffix == ".gguf" and path.is_file()
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        is_gguf = any(path.glob("*.gguf"))
    return GgufCheckpoint(path) if is_gguf else Checkpoint(path)


def is_stored(name: str, available: Container[str]) -> bool:
    """Whether the matrix ``name`` is among the tensor names, in whatever format."""
    return any(partner(name, suffix) in available for suffix in MAIN)


def format_of(stored: Stored) -> type[Format]:
    """Raises ValueError, naming what was found, if the matrix is missing or in no format known here."""
    for candidate in FORMATS:
        if candidate.matches(stored):
            return candidate
    if not is_stored(stored.name, stored.checkpoint):
        stored.checkpoint.entry(stored.name)  # names the nearest
    stem = stored.name.removesuffix("weight")
    found = [f"{name} ({stored.checkpoint.dtype(name)})" for name in stored.checkpoint.names() if name.startswith(stem)]
    method = stored.checkpoint.quantization_config.get("quant_method")
    raise ValueError(
        f"{stored.checkpoint.folder}: expected {stored.name!r} in a supported format "
        f"({'; '.join(f.name for f in FORMATS)}), found {', '.join(found[:6])}"
        + (f" with quant_method {method!r}" if method else "")
        + "; use another version of the model"
    )


class ExpertReader:
    """The experts of one layer: E experts of shapes gate (F, D), up (F, D), down (D, F)."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: ExpertTensors, num_experts: int, hidden_size: int, intermediate_size: int
    ) -> None:
        self._checkpoint, self._tensors, self._experts = checkpoint, tensors, num_experts
        D, F = hidden_size, intermediate_size
        shapes = [(2 * F, D), (D, F)] if tensors.fused else [(F, D), (F, D), (D, F)]
        self._matrices = list(zip(tensors.names(), shapes, strict=True))
        widths = [2 * F, D] if tensors.fused else [F, F, D]
        found = zip(tensors.bias_names(), widths, strict=True)
        self._biases = [(name, width) for name, width in found if name is not None]

    def _stored(self, expert: int) -> Iterator[tuple[Stored, tuple[int, int]]]:
        """Every matrix of an expert and its shape in the file."""
        for name, (rows, columns) in self._matrices:
            shape = (columns, rows) if self._tensors.transposed else (rows, columns)
            if self._tensors.stacked:
                yield Stored(self._checkpoint, name, expert), shape
            else:
                yield Stored(self._checkpoint, name.replace("{expert}", str(expert))), shape

    def require(self) -> None:
        """Check names, dtypes and shapes of every expert's tensors, without reading data.

        Raises ValueError with file, tensor, expected and got.
        """
        for expert in (0,) if self._tensors.stacked else range(self._experts):
            for stored, shape in self._stored(expert):
                chosen = format_of(stored)
                chosen.require(stored, shape)
                for suffix in chosen.tensors(stored) if self._tensors.stacked else ():
                    self._require_stack(partner(stored.name, suffix))
        for name, length in self._biases:
            Stored(self._checkpoint, name, 0).require("weight", _BIAS_DTYPES, (length,))
            self._require_stack(name)

    def _require_stack(self, name: str) -> None:
        entry = self._checkpoint.entry(name)
        if entry.shape[0] != self._experts:
            raise ValueError(
                f"{entry.file}: tensor {name!r}: expected {self._experts} experts, got shape {list(entry.shape)}"
            )

    def names_of(self, expert: int) -> list[str]:
        """The tensors that hold this expert, biases included; the first is the first in its file's order."""
        names = [partner(s.name, suffix) for s, _ in self._stored(expert) for suffix in format_of(s).tensors(s)]
        return names + [name for name, _ in self._biases]

    def arrangement(self, layer: str) -> list[tuple[object, ...]]:
        """How the matrices are to be read, where names and shapes alone do not tell; part of the cache's identity."""
        flags = [name for name in ("interleaved", "transposed") if getattr(self._tensors, name)]
        return [(layer, *flags)] if flags else []

    def matrix_names(self, expert: int) -> tuple[str, str, str]:
        """What the checkpoint calls this expert's gate, up and down; a fused tensor is named twice."""
        names = [stored.name for stored, _ in self._stored(expert)]
        return names[0], names[-2], names[-1]

    def nbytes(self, expert: int) -> int:
        """Bytes of this expert in its files."""
        count = self._experts if self._tensors.stacked else 1
        return sum(self._checkpoint.entry(name).nbytes for name in self.names_of(expert)) // count

    def read(self, expert: int, *, values: bool = True) -> ExpertWeights:
        """Read one expert: the bytes of its tensors, or of its slices of stacked ones, and no others.

        ``values=False``: only to see formats. What is stored as values then is a ``float`` on the meta device.
        """

        def part(stored: Stored, shape: tuple[int, int]) -> QuantizedWeight:
            stored_as = format_of(stored)
            if stored_as is Float and not values:
                return QuantizedWeight(kind="float", shape=shape, codes=torch.empty(shape, device="meta"))
            return stored_as.read(stored, shape)

        parts = [part(stored, shape) for stored, shape in self._stored(expert)]
        if self._tensors.transposed:
            parts = [part.transposed() for part in parts]
        if not self._tensors.fused:
            return ExpertWeights(gate=parts[0], up=parts[1], down=parts[2])
        of_gate, of_up = self._gate_and_up(parts[0].shape[0])
        return ExpertWeights(gate=parts[0].rows(of_gate), up=parts[0].rows(of_up), down=parts[1])

    def _gate_and_up(self, rows: int) -> tuple[slice, slice]:
        """Which of the rows of a fused matrix are the gate's and up's."""
        if self._tensors.interleaved:
            return slice(0, rows, 2), slice(1, rows, 2)
        return slice(0, rows // 2), slice(rows // 2, rows)

    def biases(self, experts: range) -> ExpertBiases | None:
        """The biases of some experts, in their stored dtype; None if the checkpoint has none."""
        if not self._biases:
            return None
        *parts, down = (self._bias(name, experts) for name, _ in self._biases)
        if self._tensors.fused:
            parts = [parts[0][:, columns] for columns in self._gate_and_up(parts[0].shape[1])]
        return ExpertBiases(gate=parts[0], up=parts[1], down=down)

    def _bias(self, name: str, experts: range) -> Tensor:
        rows = []
        for expert in experts:
            stored = Stored(self._checkpoint, name, expert)
            rows.append(stored.read("weight"))
            stored.require_finite("weight", rows[-1])
        return torch.stack(rows)

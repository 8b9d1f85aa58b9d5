"""Safetensors checkpoints: which tensors there are, and reads of whole tensors or of one expert of a fused tensor.

    file = u64 header length | JSON {name: {dtype, shape, data_offsets}} | data

Everything that a file claims is checked against what it is before a tensor is read, so that a download that stopped or
a wrong file is named before training. Reads go through reading.py, never through a mapping: pages of the checkpoint do
not count as memory of this process. Pickled files are refused; gguf.py reads GGUF.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reading

INDEX = "model.safetensors.index.json"
MAX_HEADER = 100 << 20  # the format's own limit, in bytes

_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **{"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32},
    **{"I64": 64, "U64": 64, "F64": 64, "C64": 64},
}
_TORCH = {
    **{"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64},
    **{"U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64},
    **{"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    "F8_E8M0": torch.uint8,  # the exponents' bytes: older torch has no such type
}


@dataclass(frozen=True, kw_only=True)
class ExpertTensors:
    """Where a layer's experts are: ``gate``, ``up``, ``down``, or fused ``gate_up`` (E, 2F, D) and ``down`` (E, D, F).

    Names with ``{expert}`` are one tensor per expert, names without it stacks of all experts. In a fused tensor gate
    comes first, or its rows alternate with up's (``interleaved``). Matrices may be stored with inputs before outputs
    (``transposed``: stacks (E, D, 2F) and (E, F, D)). The names are those of an unquantised checkpoint
    (``...weight``, or ``...gate_up_proj``); formats.py finds what stands in their place. Biases are optional stacks
    of all experts: ``gate_bias`` and ``up_bias`` (E, F), or ``gate_up_bias`` (E, 2F) in the order of ``gate_up``, and
    ``down_bias`` (E, D).
    """

    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    down: str
    interleaved: bool = False
    transposed: bool = False
    gate_bias: str | None = None
    up_bias: str | None = None
    gate_up_bias: str | None = None
    down_bias: str | None = None

    def __post_init__(self) -> None:
        separate = self.gate is not None and self.up is not None and self.gate_up is None
        fused = self.gate_up is not None and self.gate is None and self.up is None
        if not (separate or fused):
            raise ValueError(f"ExpertTensors: expected gate, up and down, or gate_up and down; got {self}")
        if len({"{expert}" in name for name in self.names()}) > 1:
            raise ValueError(
                f"ExpertTensors: expected '{{expert}}' in every name or in none, got {', '.join(self.names())}"
            )
        if (self.interleaved or self.gate_up_bias) and not fused:
            raise ValueError(f"ExpertTensors: expected interleaved and gate_up_bias with gate_up only; got {self}")
        biases = [name is not None for name in self.bias_names()]
        if any(biases) != all(biases):
            raise ValueError(f"ExpertTensors: expected biases of all projections or of none; got {self}")

    @property
    def fused(self) -> bool:
        return self.gate_up is not None

    @property
    def stacked(self) -> bool:
        return "{expert}" not in self.down

    @property
    def has_biases(self) -> bool:
        return self.down_bias is not None

    def bias_names(self) -> list[str | None]:
        of_gate_up = [self.gate_up_bias] if self.fused else [self.gate_bias, self.up_bias]
        return [*of_gate_up, self.down_bias]

    def names(self) -> list[str]:
        return [name for name in (self.gate, self.up, self.gate_up, self.down) if name is not None]

    def names_of(self, expert: int) -> list[str]:
        """The tensors that hold this expert."""
        return [name.replace("{expert}", str(expert)) for name in self.names()]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard; ``start`` counts from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(file: Path) -> tuple[dict[str, TensorEntry], bytes]:
    """The tensors of one safetensors file, and the header's bytes.

    Raises:
        ValueError: the file is cut off, is not safetensors, or claims what cannot be.
    """
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if length < 0 or size < 8 + min(length, MAX_HEADER):
                raise ValueError(f"{file}: expected a whole safetensors header, got a file of {size} bytes{_CUT_OFF}")
            if length < 2 or length > MAX_HEADER:
                raise ValueError(f"{file}: expected a safetensors header of 2 bytes to 100 MiB, got {length} bytes")
            header = f.read(length)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from error
    try:
        table = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a safetensors header in JSON, got {header[:40]!r} ({error})") from None
    if not isinstance(table, dict):
        raise ValueError(f"{file}: expected a safetensors header that is a JSON object, got {type(table).__name__}")
    data = 8 + length
    entries = {n: _entry(file, n, row, data) for n, row in table.items() if n != "__metadata__"}
    end = data
    for name in sorted(entries, key=lambda n: entries[n].start):
        if entries[name].start != end:
            raise ValueError(f"{file}: tensor {name!r}: expected its data at byte {end}, got {entries[name].start}")
        end += entries[name].nbytes
        if end > size:
            raise ValueError(f"{file}: tensor {name!r}: expected data up to byte {end}, got {size} bytes{_CUT_OFF}")
    if end < size:
        raise ValueError(f"{file}: expected {end} bytes by its header, got {size}; download the file again")
    return entries, header


_CUT_OFF = "; the file is cut off, download it again"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
    return table


def _entry(file: Path, name: str, row: Any, data: int) -> TensorEntry:
    where = f"{file}: tensor {name!r}"
    row = row if isinstance(row, Mapping) else {}
    dtype, shape, offsets = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{where}: expected a safetensors dtype, got {dtype!r}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape) or len(shape) > 16:
        raise ValueError(f"{where}: expected a shape, got {shape!r}")
    valid = (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(n) is int and 0 <= n < 1 << 62 for n in offsets)
    )
    if not valid or offsets[0] > offsets[1]:
        raise ValueError(f"{where}: expected data_offsets [begin, end], got {offsets!r}")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * _BITS[dtype] != nbytes * 8:
        raise ValueError(f"{where}: {dtype} {shape} needs {math.prod(shape) * _BITS[dtype] // 8} bytes, got {nbytes}")
    return TensorEntry(file, dtype, tuple(shape), data + offsets[0], nbytes)


class Checkpoint:
    """The tensors of a folder with ``model.safetensors.index.json``, or with safetensors files and no index."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Read and check every shard's header (no data)."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"checkpoint {self.folder}: expected a folder with safetensors files, found none there")
        weight_map = _read_index(self.folder)
        self.shards: list[Path] = (
            _unindexed(self.folder)
            if weight_map is None
            else [_shard(self.folder, s) for s in sorted(set(weight_map.values()))]
        )
        self.headers: dict[Path, bytes] = {}
        self._entries: dict[str, TensorEntry] = {}
        for shard in self.shards:
            entries, self.headers[shard] = read_header(shard)
            for name, entry in entries.items():
                place = shard.name if weight_map is None else weight_map.get(name)
                if place is None:
                    continue
                if place != shard.name:
                    raise ValueError(
                        f"{shard}: tensor {name!r}: expected in {place} only, as {INDEX} says, got it here; "
                        "files of two versions of the model may be mixed: download it again"
                    )
                if name in self._entries:
                    raise ValueError(f"{shard}: tensor {name!r} is also in {self._entries[name].file.name}")
                self._entries[name] = entry
        for name, file in (weight_map or {}).items():
            if name not in self._entries:
                raise ValueError(f"{self.folder / file}: {INDEX} places tensor {name!r} there, but the file lacks it")

    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def entry(self, name: str) -> TensorEntry:
        """Raises ValueError, with the nearest names, if the checkpoint has no such tensor."""
        if name not in self._entries:
            near = difflib.get_close_matches(name, list(self._entries)[:20000], n=3, cutoff=0.3)
            found = f"the nearest are {', '.join(near)}" if near else "nothing like it"
            raise ValueError(
                f"{self.folder}: expected tensor {name!r}, found {found}; "
                "check that all shards are there and that the checkpoint is of this model"
            )
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> str:
        """The dtype in safetensors' spelling, e.g. ``BF16``."""
        return self.entry(name).dtype

    def read(self, name: str) -> Tensor:
        entry = self.entry(name)
        return _read(name, entry, entry.start, entry.nbytes, entry.shape)

    def read_slice(self, name: str, index: int) -> Tensor:
        """``tensor[index]`` along the first dimension; only its bytes are read."""
        entry = self.entry(name)
        if not entry.shape or not 0 <= index < entry.shape[0]:
            raise ValueError(f"{entry.file}: tensor {name!r}: no slice {index} in shape {list(entry.shape)}")
        nbytes = entry.nbytes // entry.shape[0]
        return _read(name, entry, entry.start + index * nbytes, nbytes, entry.shape[1:])

    def sample(self, name: str, nbytes: int = 4096) -> bytes:
        """Up to ``nbytes`` from the middle of a tensor: a cheap sign of its content."""
        entry = self.entry(name)
        count = min(nbytes, entry.nbytes)
        bytes_entry = replace(entry, dtype="U8")
        return _read(name, bytes_entry, entry.start + (entry.nbytes - count) // 2, count, (count,)).numpy().tobytes()

    def read_bytes(self, name: str, index: int | None = None) -> Tensor:
        """The bytes of a tensor, or of ``tensor[index]``, as they are in the file: uint8, one dimension."""
        entry = self.entry(name)
        count = 1 if index is None else entry.shape[0]
        nbytes = entry.nbytes // count
        return _read(name, replace(entry, dtype="U8"), entry.start + (index or 0) * nbytes, nbytes, (nbytes,))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.json; empty if there is none. Raises ValueError if it is not a JSON object."""
        return read_settings(self.folder)

    @cached_property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says about the quantisation; empty if nothing.

        Raises ValueError if config.json is not a JSON object.
        """
        config = self.settings
        text = config.get("text_config")
        for owner in (config, text if isinstance(text, dict) else {}):
            found = owner.get("quantization_config") or owner.get("compression_config")
            if isinstance(found, dict):
                return found
        return {}


def read_settings(folder: Path) -> dict[str, Any]:
    """The folder's config.json; empty if there is none.

    Raises ValueError if it, or the text_config in it, is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    text = config.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise ValueError(f"{path}: text_config: expected a JSON object, got {text!r}")
    return config


def _read(name: str, entry: TensorEntry, start: int, nbytes: int, shape: tuple[int, ...]) -> Tensor:
    if entry.dtype not in _TORCH:
        raise ValueError(f"{entry.file}: tensor {name!r}: dtype {entry.dtype} cannot be read")
    try:
        values = reading.read(entry.file, start, nbytes)
    except EOFError:
        raise ValueError(f"{entry.file}: tensor {name!r}: the file ended while it was read") from None
    except OSError as error:
        raise ValueError(f"{entry.file}: tensor {name!r}: cannot be read: {error.strerror or error}") from error
    return values.view(_TORCH[entry.dtype]).view(shape)


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object with weight_map, got {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: expected a JSON object with weight_map, got {str(index)[:60]}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise ValueError(f"{path}: tensor {name!r}: expected the name of a shard, got {file!r}")
    return weight_map


def _shard(folder: Path, file: str) -> Path:
    # Only the written name matters: the hub's cache keeps shards as links to files elsewhere.
    if file != os.path.basename(file) or file in (".", "..") or "\0" in file or "\\" in file:
        raise ValueError(f"{folder / INDEX}: expected shards in its own folder, got {file!r}")
    if not (folder / file).is_file():
        raise ValueError(f"{folder / INDEX}: shard {file!r} is not there; download it again")
    return folder / file


def _unindexed(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if found:
        return found
    other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in folder.glob(pattern))
    what = f"only {other[0]}" if other else "no weights"
    raise ValueError(
        f"checkpoint {folder}: expected *.safetensors, found {what}; "
        "pickled files can run code when they are opened and never are: convert them to safetensors first"
    )

"""GGUF files: which tensors there are, and reads of one expert's raw blocks.

    file = "GGUF" | u32 version | u64 tensors | u64 keys | keys: name, type, value | tensors: name, dimensions, type,
           offset | padding | data                   (docs/gguf.md of ggml; all little-endian)

Only the header is read here, and only what is needed of it: the reader of the ``gguf`` package builds an object per
token of the vocabulary, and loops for as long as a damaged count says. Every length is checked against what is left of
the file before it is used. Tensors keep their blocks; formats_gguf.py knows what they mean.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from .checkpoint import Checkpoint, TensorEntry

MAX_HEADER = 256 << 20  # bytes; vocabularies of 256k tokens with merges take about 10 MiB
_MAX_DEPTH = 4  # of arrays in arrays
_ALIGNMENT = 32
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

# ggml_type -> name, weights per block, bytes per block (ggml.h; gguf.GGML_QUANT_SIZES)
_TYPES = {
    **{0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22)},
    **{7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110)},
    **{12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292)},
    **{16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50)},
    **{20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136)},
    **{24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8)},
    **{29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66)},
    **{39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36)},
}


class _Cursor:
    """Reads forward in the header of a file; a ValueError names the file and what was expected where."""

    def __init__(self, file: Path, stream: BinaryIO) -> None:
        self.file, self._stream = file, stream
        self.size = os.fstat(stream.fileno()).st_size
        self.position = 0

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{self.file}: {what}; the file is cut off or damaged, download it again")

    def require(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.position:
            raise self.fail(f"{what}: expected {nbytes} more bytes at byte {self.position} of {self.size}")
        if self.position + nbytes > MAX_HEADER:
            raise self.fail(
                f"{what}: expected a header below {MAX_HEADER >> 20} MiB, got {self.position + nbytes} bytes"
            )

    def read(self, nbytes: int, what: str) -> bytes:
        self.require(nbytes, what)
        self.position += nbytes
        data = self._stream.read(nbytes)
        if len(data) != nbytes:
            raise self.fail(f"{what}: the file ended while it was read")
        return data

    def skip(self, nbytes: int, what: str) -> None:
        self.require(nbytes, what)
        self.position += nbytes
        self._stream.seek(nbytes, os.SEEK_CUR)

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.read(struct.calcsize(layout), what))[0]

    def count(self, least: int, what: str) -> int:
        """A u64 that counts things of at least ``least`` bytes each."""
        value = self.number("<Q", what)
        self.require(value * least, f"{what} ({value})")
        return value

    def text(self, what: str) -> str:
        data = self.read(self.count(1, f"length of {what}"), what)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.fail(f"{what}: expected UTF-8 text, got {data[:40]!r}") from None


def _value(cursor: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    """The value of a key; None for arrays, which are passed over."""
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind == _STRING:
        return cursor.text(what)
    if kind != _ARRAY or depth == _MAX_DEPTH:
        raise cursor.fail(f"{what}: expected a GGUF value type, got {kind} at depth {depth}")
    element = cursor.number("<I", what)
    if element in _SCALARS:
        width = struct.calcsize(_SCALARS[element])
        cursor.skip(cursor.count(width, f"elements of {what}") * width, what)
    elif element == _STRING:
        for _ in range(cursor.count(8, f"elements of {what}")):
            cursor.skip(cursor.count(1, f"length in {what}"), what)
    else:
        for _ in range(cursor.count(12, f"elements of {what}")):
            _value(cursor, element, what, depth + 1)
    return None


def read_gguf_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    """The tensors of one GGUF file, with shapes as torch has them, and its keys (arrays as None).

    Raises:
        ValueError: the file is cut off, is not GGUF, or claims what cannot be.
    """
    try:
        with open(file, "rb", buffering=1 << 20) as stream:
            cursor = _Cursor(file, stream)
            return _read_header(cursor)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror or error}") from error


def _read_header(cursor: _Cursor) -> tuple[dict[str, TensorEntry], dict[str, Any]]:
    magic, version = cursor.read(4, "magic"), cursor.number("<I", "version")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"{cursor.file}: expected a GGUF file of version 2 or 3, got {magic!r}, version {version}")
    tensors, keys = cursor.number("<Q", "number of tensors"), cursor.number("<Q", "number of keys")
    # A tensor takes at least 24 bytes of header, a key 13.
    cursor.require(tensors * 24 + keys * 13, f"{tensors} tensors and {keys} keys")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        name = cursor.text("name of a key")
        if name in metadata:
            raise cursor.fail(f"key {name!r}: expected once, got it twice")
        metadata[name] = _value(cursor, cursor.number("<I", f"type of key {name!r}"), f"key {name!r}")
    entries: dict[str, TensorEntry] = {}
    for _ in range(tensors):
        name, entry = _tensor(cursor)
        if name in entries:
            raise cursor.fail(f"tensor {name!r}: expected once, got it twice")
        entries[name] = entry
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.fail(f"general.alignment: expected a power of two, got {alignment!r}")
    return _placed(cursor, entries, alignment), metadata


def _tensor(cursor: _Cursor) -> tuple[str, TensorEntry]:
    """One tensor; its ``start`` still counts from the beginning of the data."""
    name = cursor.text("name of a tensor")
    where = f"tensor {name!r}"
    rank = cursor.number("<I", where)
    if not 1 <= rank <= 4:
        raise cursor.fail(f"{where}: expected 1 to 4 dimensions, got {rank}")
    shape = tuple(reversed([cursor.number("<Q", where) for _ in range(rank)]))
    kind, offset = cursor.number("<I", where), cursor.number("<Q", where)
    if kind not in _TYPES:
        raise ValueError(f"{cursor.file}: {where}: expected a type of ggml, got {kind}; a newer kt_sft may know it")
    dtype, block, nbytes = _TYPES[kind]
    if any(n < 1 for n in shape) or math.prod(shape) >= 1 << 48:
        raise cursor.fail(f"{where}: expected a shape, got {list(shape)}")
    if shape[-1] % block:
        raise cursor.fail(f"{where}: {dtype} expected rows of a multiple of {block}, got shape {list(shape)}")
    return name, TensorEntry(cursor.file, dtype, shape, offset, math.prod(shape) // block * nbytes)


def _placed(cursor: _Cursor, entries: dict[str, TensorEntry], alignment: int) -> dict[str, TensorEntry]:
    """The entries with ``start`` from the beginning of the file, checked to lie apart in it."""
    data = -(-cursor.position // alignment) * alignment
    placed = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start % alignment or entry.start < end:
            expected = f"an offset from {end}, a multiple of {alignment}"
            raise cursor.fail(f"tensor {name!r}: expected {expected}, got {entry.start}")
        end = entry.start + entry.nbytes
        if data + end > cursor.size:
            raise cursor.fail(f"tensor {name!r}: expected data up to byte {data + end}, got {cursor.size} bytes")
        placed[name] = TensorEntry(entry.file, entry.dtype, entry.shape, data + entry.start, entry.nbytes)
    return placed


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file, of all parts of a split one, or of a folder that holds one of these.

    Shapes are torch's (the slowest dimension first); dtypes have ggml's names. ``read_bytes`` gives raw blocks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read and check every part's header (no data)."""
        self.folder, self.shards = _parts(Path(path))
        self.headers, self._entries = {}, {}
        for shard in self.shards:
            entries, metadata = read_gguf_header(shard)
            table = {name: (e.dtype, e.shape, e.start) for name, e in entries.items()}
            self.headers[shard] = json.dumps(table).encode()
            for name, entry in entries.items():
                if name in self._entries:
                    raise ValueError(f"{shard}: tensor {name!r} is also in {self._entries[name].file.name}")
                self._entries[name] = entry
            parts = metadata.get("split.count", len(self.shards))
            if parts not in (0, len(self.shards)):
                raise ValueError(f"{shard}: expected {parts} parts beside it by its header, got {len(self.shards)}")

    @property
    def quantization_config(self) -> dict[str, Any]:
        return {}


def _parts(path: Path) -> tuple[Path, list[Path]]:
    """The folder, and the files to read: one, or all parts of a split model."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise ValueError(f"checkpoint {path}: expected *.gguf, found none")
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(f"checkpoint {path}: expected a GGUF file or a folder with one, found none there")
    first = _SPLIT.fullmatch(files[0].name)
    if first is None:
        if len(files) > 1:
            raise ValueError(f"checkpoint {path}: expected one GGUF model, found {files[0].name} and {files[1].name}")
        return files[0].parent, files
    stem, count = first[1], int(first[3])
    others = [f.name for f in files if not f.name.startswith(f"{stem}-")]
    if others or count > 100_000:
        raise ValueError(f"checkpoint {path}: expected one GGUF model, found {files[0].name} and {others or count}")
    names = [f"{stem}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
    missing = [name for name in names if not (files[0].parent / name).is_file()]
    if missing:
        raise ValueError(f"checkpoint {path}: part {missing[0]!r} is not there; download it again")
    return files[0].parent, [files[0].parent / name for name in names]

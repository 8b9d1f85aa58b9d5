"""In which formats the three matrices of an expert are packed.

The kernels know more formats than the quantiser makes (``QUANTISED``): the others hold what checkpoints store, bit for
bit. csrc/kernels/registry.inc lists them all. FORMATS says what each is for.
"""

from __future__ import annotations

from typing import NamedTuple

from kt_sft import native

QUANTISED = ("bf16", "int8", "int4")  # made from values
GROUP_SIZES = (0, 32, 64, 128)  # that the quantiser offers; 0: per channel
# Columns that share a scale where nothing else is said; 0: one scale per row.
_DEFAULT_GROUP_SIZE = {"bf16": 0, "int8": 0, "int4": 32, "fp8": 128, "fp8_channel": 0}
_STORED_GROUP_SIZE = 32  # of the other formats: that of MXFP4 and of GGUF's blocks


class MatrixFormat(NamedTuple):
    """A packed format and the columns (input features) that share a scale; 0 is one scale per row."""

    name: str
    group_size: int

    def __str__(self) -> str:
        return self.name


Layout = tuple[MatrixFormat, MatrixFormat, MatrixFormat]  # of gate, up and down


def uniform(weight_format: str, group_size: int | None = None) -> Layout:
    """All three matrices alike; ValueError on an unknown format or group size."""
    matrix = MatrixFormat(weight_format, resolve_group_size(weight_format, group_size))
    return matrix, matrix, matrix


def name_of(layout: Layout) -> str:
    """int8, or q4_k/q4_k/q6_k where the matrices differ."""
    names = [matrix.name for matrix in layout]
    return names[0] if len(set(names)) == 1 else "/".join(names)


def resolve_group_size(weight_format: str, group_size: int | None) -> int:
    """The group size in force: None is the format's default; ValueError unless the quantiser offers it."""
    if weight_format not in native.formats():
        raise ValueError(f"weight_format: expected one of {', '.join(native.formats())}; got {weight_format!r}")
    if group_size is None:
        return _DEFAULT_GROUP_SIZE.get(weight_format, _STORED_GROUP_SIZE)
    if weight_format == "bf16" and group_size != 0:
        raise ValueError(f"group_size: bf16 weights have no scales; expected None, got {group_size}")
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size: expected 32, 64, 128 or 0 (per channel), got {group_size}")
    return group_size

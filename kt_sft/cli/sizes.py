"""Sizes on the command line: ``24GB`` is 24e9 bytes, ``24GiB`` is 24 * 2^30, a bare number counts GB."""

from __future__ import annotations

import re

from .errors import CommandError

_UNITS = {
    **{"": 1e9, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    **{"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
}


def parse_size(option: str, text: str) -> int:
    """Bytes (or bytes per second: ``3GB/s``). Raises CommandError naming the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*?)(?:/s)?\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise CommandError(f"{option}: expected a size such as 24GB or 1.5TiB, got {text!r}")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def gb(nbytes: float) -> str:
    """Three digits at least: ``0.123 GB``, ``1,234 GB``."""
    return f"{_three_digits(nbytes / 1e9)} GB"


def billions(count: float) -> str:
    """``0.693 B``, ``1,026 B``."""
    return f"{_three_digits(count / 1e9)} B"


def _three_digits(value: float) -> str:
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """``0.12 s``, ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"

"""What ``kt-sft doctor`` reports: one finding per line, with a remedy where there is something to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """``name``: what was looked at; ``found``: in words; ``remedy``: what to type or set, never empty unless ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.status != "ok" and not self.remedy:
            raise ValueError(f"finding {self.name!r}: expected a remedy with status {self.status}, got none")


def ok(name: str, found: str) -> Finding:
    return Finding(name, "ok", found)


def warning(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "warning", found, remedy)


def problem(name: str, found: str, remedy: str) -> Finding:
    return Finding(name, "problem", found, remedy)

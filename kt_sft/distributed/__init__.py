"""Experts shared by the ranks of a host, or of all hosts (docs/architecture.md, "Several processes")."""

from .sharing import Sharing, active, start

__all__ = ["Sharing", "active", "start"]

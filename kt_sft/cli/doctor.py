"""``kt-sft doctor``: is this machine, and are its Python packages, ready; each finding with a remedy."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from .findings import Finding

HELP = """Check this machine and the installed packages; say what to do about what is not right.

Looks at the kernels' instruction set, AMX permission, cores and limits, memory, NUMA nodes, huge pages, memory
bandwidth (measured), disk space of the cache, GPUs, package versions and their conflicts, and kt_sft's hooks. Takes
some seconds. The exit status is 1 if there is a problem; warnings do not count.
"""
_STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def register(app: typer.Typer) -> None:
    app.command("doctor", help=HELP)(doctor)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON, for scripts.")] = False) -> None:
    found = findings()
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        _show(found)
    if any(finding.status == "problem" for finding in found):
        raise typer.Exit(1)


def findings() -> list[Finding]:
    from .doctor_machine import machine_findings
    from .doctor_packages import package_findings

    return [*machine_findings(), *package_findings()]


def _show(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(3):
        table.add_column()
    for finding in found:
        text = escape(finding.found) + (f"\n[bold]→ {escape(finding.remedy)}[/]" if finding.remedy else "")
        table.add_row(f"[{_STYLE[finding.status]}]{finding.status}[/]", finding.name, text)
    console.print(table, highlight=False)
    counts = {status: sum(finding.status == status for finding in found) for status in _STYLE}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()), highlight=False)

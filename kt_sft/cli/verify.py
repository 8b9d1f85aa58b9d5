"""``kt-sft verify``: whether a checkpoint or packed experts are whole."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .errors import CommandError


def register(app: typer.Typer) -> None:
    app.command("verify", help="Read a checkpoint (safetensors, GGUF) or packed experts once and check all of it.")(run)


def run(
    path: Annotated[Path, typer.Argument(help="Folder of a model, GGUF file, or folder of packed experts")],
) -> None:
    """Print what is there and whole; one line and status 1 if something is not."""
    from kt_sft.weights.verify import verify

    start = time.monotonic()
    try:
        found = verify(path)
    except ValueError as error:
        raise CommandError(str(error)) from None
    seconds = time.monotonic() - start
    for item in found:
        typer.echo(f"{item.path}: whole")
        for kind, count in sorted(item.formats.items()):
            typer.echo(f"  {count:>8} x {kind}")
    size = sum(item.nbytes for item in found) / 1e9
    typer.echo(f"{size:.2f} GB in {seconds:.1f} s ({size / max(seconds, 1e-9):.2f} GB/s)")

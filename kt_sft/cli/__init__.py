"""The ``kt-sft`` command: one file per group of verbs. Without a verb it prints versions."""

from __future__ import annotations

import sys

import typer

from . import convert, doctor, llamafactory, plan, planned, verify, version
from .errors import CommandError

app = typer.Typer(
    name="kt-sft",
    help="Fine-tune Mixture-of-Experts models with the frozen experts on the CPU.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
version.register(app)
plan.register(app)
doctor.register(app)
llamafactory.register(app)
verify.register(app)
convert.register(app)
planned.register(app)


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        version.show()


def main() -> None:
    """Console entry point; a CommandError is one line, anything else keeps its traceback."""
    try:
        app()
    except CommandError as error:
        sys.stderr.write(f"kt-sft: {error}\n")
        sys.exit(1)

"""The verbs of ``llamafactory-cli`` with kt_sft's hooks installed explicitly and ``use_kt`` on by default.

``llamafactory-cli`` itself works as well: torch loads the hooks. These verbs also work where that is turned off
(TORCH_DEVICE_BACKEND_AUTOLOAD=0), except for runs that spawn torchrun, whose workers need it.
"""

from __future__ import annotations

import os
import sys

import typer

from .errors import CommandError

VERBS = {
    "train": "Train: kt-sft train FILE.yaml \\[key=value ...]",
    "chat": "Chat in the terminal: kt-sft chat FILE.yaml",
    "api": "Serve an OpenAI-style API: kt-sft api FILE.yaml",
    "webchat": "Chat in the browser: kt-sft webchat FILE.yaml",
    "export": "Merge an adapter into the model (not possible on packed experts yet; says what to do instead).",
}


def register(app: typer.Typer) -> None:
    for verb, text in VERBS.items():
        app.command(
            verb,
            help=text,
            add_help_option=False,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(_command(verb))


def _command(verb: str):
    def command(context: typer.Context) -> None:
        run(verb, context.args)

    return command


def run(verb: str, args: list[str]) -> None:
    """Run ``llamafactory-cli verb args`` in this process.

    Raises:
        CommandError: llamafactory is missing, or torchrun's workers could not load the hooks.
    """
    from kt_sft.integrations import hooks

    hooks.install()
    os.environ.setdefault("USE_KT", "1")
    try:
        import llamafactory  # noqa: F401
    except ImportError as error:
        raise CommandError(f"{verb} needs LLaMA-Factory ({error}): pip install 'kt-sft[llamafactory]'") from error
    spawns = os.environ.get("FORCE_TORCHRUN", "0").lower() in ("1", "true", "y")
    if spawns and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        raise CommandError("FORCE_TORCHRUN needs TORCH_DEVICE_BACKEND_AUTOLOAD unset: its workers load kt_sft by it.")
    sys.argv = ["llamafactory-cli", verb, *args]
    from llamafactory.launcher import launch

    launch()

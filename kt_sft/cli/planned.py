"""Verbs that users of KTransformers know and that kt-sft does not have yet: one line each on what to do instead."""

from __future__ import annotations

import typer

from .errors import CommandError

INSTEAD = {
    "eval": "kt-sft train with do_train: false and do_eval: true (compute_accuracy) or do_predict: true "
    "(predict_with_generate); LLaMA-Factory 0.9.5 has no eval verb any more.",
    "quant": "kt-sft convert MODEL --to int8|int4 --output DIR; or just train: the first start packs and caches.",
    "run": "write a YAML with model_name_or_path, template and use_kt: true, then: kt-sft chat FILE.yaml",
    "bench": "from a source checkout run: python -m benchmarks.bench_experts",
    "config": "settings are keys of the training YAML (use_kt, kt_config); see docs/configuration.md.",
    "model": "model_name_or_path takes a folder or a hub name.",
    "download": "use huggingface-cli download, then put the folder into model_name_or_path.",
}


def register(app: typer.Typer) -> None:
    for verb in INSTEAD:
        app.command(
            verb,
            hidden=True,
            add_help_option=False,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(_refusal(verb))


def _refusal(verb: str):
    def command() -> None:
        raise CommandError(f"{verb} is not available yet: {INSTEAD[verb]}")

    return command

"""Every YAML in examples/ is understood by stock LLaMA-Factory and turns kt_sft on."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_examples_parse(workspace):
    settings = [yaml.safe_load(path.read_text()) for path in EXAMPLES]
    results = workspace.drive(*({"verb": "parse", "args": s} for s in settings))
    for path, wanted, result in zip(EXAMPLES, settings, results, strict=True):
        weight_format = wanted.get("kt_config", wanted)["kt_expert_weight_format"]
        assert result == {"weight_format": weight_format, "template_known": True}, path.name


def test_training_and_chat_use_the_same_expert_settings():
    pairs = [
        (path, path.with_name(path.name.replace("_lora_sft", "_chat"))) for path in EXAMPLES if "_sft" in path.name
    ]
    assert len(pairs) >= 4
    for train, chat in pairs:
        if not chat.exists():
            continue
        settings = [yaml.safe_load(path.read_text()) for path in (train, chat)]
        formats = [s.get("kt_config", s)["kt_expert_weight_format"] for s in settings]
        assert formats[0] == formats[1], train.name
        assert settings[0]["model_name_or_path"] == settings[1]["model_name_or_path"]
        assert settings[0]["output_dir"] == settings[1]["adapter_name_or_path"]


def test_every_example_is_in_the_table():
    table = (ROOT / "examples/README.md").read_text()
    assert [path.name for path in EXAMPLES if f"`{path.name}`" not in table] == []

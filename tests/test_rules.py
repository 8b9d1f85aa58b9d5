"""Family rules: what a rule says, what is refused, and how rules travel from a YAML file to a worker."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from kt_sft.config import KtConfig
from kt_sft.rules import FamilyRule, parse_rules

RULE = {
    "module": r"model\.layers\.(?P<layer>\d+)\.ffn\.bank",
    "gate": "layers.{layer}.bank.{expert}.wg.weight",
    "up": "{module}.{expert}.wu.weight",
    "down": "{module}.{expert}.wd.weight",
}
YAML = r"""
family_rules:
  - module: 'model\.layers\.(?P<layer>\d+)\.ffn\.bank'
    gate: 'layers.{layer}.bank.{expert}.wg.weight'
    up: '{module}.{expert}.wu.weight'
    down: '{module}.{expert}.wd.weight'
"""


def test_names_of_a_module() -> None:
    rule = FamilyRule(**RULE)
    assert rule.tensors("model.layers.12.ffn.bank") == {
        "gate": "layers.12.bank.{expert}.wg.weight",
        "up": "model.layers.12.ffn.bank.{expert}.wu.weight",
        "down": "model.layers.12.ffn.bank.{expert}.wd.weight",
    }
    assert rule.tensors("model.layers.12.ffn.bank.0") is None
    assert rule.tensors("visual.model.layers.12.ffn.bank") is None


@pytest.mark.parametrize(
    ("name", "owned"),
    [
        ("layers.3.bank.17.wg.weight", True),
        ("layers.3.bank.17.wg.weight_scale_inv", True),
        ("layers.3.bank.17.wg.qweight", True),
        ("layers.3.bank.x.wg.weight", False),
        ("layers.3.bank.17.wgx.weight", False),
        ("layers.3.bank.17.router.weight", False),
    ],
)
def test_whose_a_tensor_is(name: str, owned: bool) -> None:
    assert FamilyRule(**RULE).owns(name) is owned


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({**RULE, "gates": "x"}, r"unknown key 'gates'; valid are module, down"),
    "nothing for down": ({k: v for k, v in RULE.items() if k != "down"}, "expected down, which is missing"),
    "no module": ({k: v for k, v in RULE.items() if k != "module"}, "expected module, which is missing"),
    "no up": ({k: v for k, v in RULE.items() if k != "up"}, ".*or of gate_up and down; got gate, down"),
    "both": ({**RULE, "gate_up": "{module}.{expert}.w"}, ".*got gate, up, gate_up, down"),
    "no text": ({**RULE, "up": 3}, "up: expected a text, got 3"),
    "no regular expression": ({**RULE, "module": "model.(layers"}, "module: expected a regular expression"),
    "unknown field": (
        {**RULE, "up": "{layr}.{expert}.wu"},
        "up: expected the fields expert, layer, .* got 'layr'",
    ),
    "a brace too many": ({**RULE, "up": "{module}.{expert.wu"}, "up: expected a name with {expert}"),
    "experts apart and stacked": ({**RULE, "up": "{module}.wu"}, "expected {expert} in every name or in none"),
    "another activation": ({**RULE, "activation": "relu6"}, "activation: expected .*silu.*, got 'relu6'"),
    "interleaved matrices": ({**RULE, "interleaved": True}, "interleaved: expected with gate_up only"),
    "a flag as text": ({**RULE, "transposed": "yes"}, "transposed: expected true or false, got 'yes'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    rule, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"file.yaml: family_rules: rule 2: {message}"):
        KtConfig.from_dict({"family_rules": [RULE, rule]}, source="file.yaml")


@pytest.mark.parametrize("value", ["model", 3, [RULE, "x"]])
def test_no_rules_at_all(value: Any) -> None:
    with pytest.raises(ValueError, match=r"family_rules: .*expected a (list of rules|mapping)"):
        KtConfig.from_dict({"kt_family_rules": value})


def test_from_yaml_to_a_worker() -> None:
    config = KtConfig.from_dict(yaml.safe_load(YAML))
    assert config.family_rules == (FamilyRule(**RULE),) == parse_rules(RULE)
    assert KtConfig.from_env(config.to_env()) == config
    assert KtConfig.from_dict({"family_rules": [RULE], "kt_family_rules": [RULE]}) == config
    with pytest.raises(ValueError, match="contradict each other"):
        KtConfig.from_dict({"family_rules": [RULE], "kt_family_rules": [{**RULE, "method": "route"}]})

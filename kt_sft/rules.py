"""Rules by which a user names the routed experts of a model that kt_sft does not know.

    family_rules:
      - module: 'model\\.layers\\.(?P<layer>\\d+)\\.ffn\\.bank'    # regular expression for the experts modules' paths
        gate: 'layers.{layer}.ffn.bank.{expert}.w_gate.weight'  # names in the checkpoint
        up: 'layers.{layer}.ffn.bank.{expert}.w_up.weight'
        down: 'layers.{layer}.ffn.bank.{expert}.w_down.weight'

A name may use ``{expert}`` (the expert's number; without it the tensor is a stack of all experts), ``{module}`` (the
module's path in the model) and the named groups of ``module``. It is that of the unquantised matrix. Standard library
only; what a rule finds in a model is in models/ruled.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from string import Formatter
from typing import Any

ACTIVATIONS = ("silu",)
_TENSORS = ("gate", "up", "gate_up", "down")
_FLAGS = ("interleaved", "transposed")
_NOT_A_REGEX = "expected a regular expression for the paths of the experts modules"


@dataclass(frozen=True, kw_only=True)
class FamilyRule:
    """Where the routed experts of a model are, and how they are called.

    Attributes:
        module: regular expression that matches the whole path of every experts module.
        gate, up, down: names of an expert's matrices (F, D), (F, D), (D, F); or gate_up (2F, D) and down.
        interleaved: the rows of gate and up alternate in gate_up; otherwise gate comes first.
        transposed: the matrices are stored with inputs before outputs.
        activation: down(activation(gate(x)) * up(x)).
        method: of the parent module, called with (hidden_states, topk_ids, topk_weights) and computing all routed
            experts. Without it the experts module itself is called so, or, if it is a ModuleList, expert by expert.
    """

    module: str
    down: str
    gate: str | None = None
    up: str | None = None
    gate_up: str | None = None
    interleaved: bool = False
    transposed: bool = False
    activation: str = "silu"
    method: str | None = None

    def __post_init__(self) -> None:
        for name in ("module", *_TENSORS, "method"):
            value = getattr(self, name)
            optional = name not in ("module", "down")
            if not (optional and value is None) and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}: expected a text, got {value!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected {' or '.join(ACTIVATIONS)}, got {self.activation!r}")
        separate, fused = bool(self.gate and self.up and not self.gate_up), bool(self.gate_up)
        if fused == separate or (fused and (self.gate or self.up)):
            given = ", ".join(name for name in _TENSORS if getattr(self, name))
            raise ValueError(f"expected names of gate, up and down, or of gate_up and down; got {given}")
        if self.interleaved and not fused:
            raise ValueError("interleaved: expected with gate_up only")
        self._check_names()

    def _check_names(self) -> None:
        try:
            known = {"expert", "module", *re.compile(self.module).groupindex}
        except re.error as error:
            raise ValueError(f"module: {_NOT_A_REGEX}, got {self.module!r} ({error})") from None
        stacked = set()
        for name, template in self.templates().items():
            try:
                used = {field for _, field, _, _ in Formatter().parse(template) if field is not None}
            except ValueError as error:
                raise ValueError(f"{name}: expected a name with {{expert}}, got {template!r} ({error})") from None
            if unknown := used - known:
                raise ValueError(
                    f"{name}: expected the fields {', '.join(sorted(known))} (named groups of module are fields), "
                    f"got {sorted(unknown)[0]!r} in {template!r}"
                )
            stacked.add("expert" not in used)
        if len(stacked) > 1:
            raise ValueError(
                f"expected {{expert}} in every name or in none, got {', '.join(self.templates().values())}"
            )

    @classmethod
    def from_dict(cls, settings: Any) -> FamilyRule:
        """Raises ValueError on a key that no rule has, and on what the class refuses."""
        if not isinstance(settings, Mapping):
            raise ValueError(f"expected a mapping with module, gate, up and down, got {settings!r}")
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in settings if key not in known]:
            raise ValueError(f"unknown key {unknown[0]!r}; valid are {', '.join(known)}")
        if missing := [name for name in ("module", "down") if name not in settings]:
            raise ValueError(f"expected {missing[0]}, which is missing")
        return cls(**settings)

    def templates(self) -> dict[str, str]:
        """The names given, by gate, up, gate_up, down."""
        return {name: getattr(self, name) for name in _TENSORS if getattr(self, name)}

    def tensors(self, path: str) -> dict[str, str] | None:
        """The names for the experts module at ``path``, with ``{expert}`` left in; None if the rule is not for it."""
        match = re.fullmatch(self.module, path)
        if match is None:
            return None
        values = {**match.groupdict(""), "module": path, "expert": "{expert}"}
        return {name: template.format(**values) for name, template in self.templates().items()}

    def owns(self, tensor: str) -> bool:
        """Whether a tensor of a checkpoint belongs to the experts that the rule names, whatever it is quantised as."""
        return any(re.fullmatch(pattern, tensor) for pattern in self.patterns())

    def patterns(self) -> list[str]:
        """Regular expressions for the names of these tensors, whatever they are quantised as."""
        return [_pattern(template) for template in self.templates().values()]


def _pattern(template: str) -> str:
    parts = []
    for text, field, _, _ in Formatter().parse(template.removesuffix(".weight")):
        parts.append(re.escape(text))
        if field is not None:
            parts.append(r"\d+" if field == "expert" else ".+")
    return "".join(parts) + r"(?:[._].*)?"


def parse_rules(value: Any) -> tuple[FamilyRule, ...]:
    """A rule or a list of rules, as mappings. Raises ValueError that says which rule is wrong, and how."""
    rules = [value] if isinstance(value, Mapping | FamilyRule) else value
    if not isinstance(rules, list | tuple) or not rules:
        raise ValueError(f"expected a list of rules, got {value!r}")
    parsed = []
    for number, rule in enumerate(rules, start=1):
        try:
            parsed.append(rule if isinstance(rule, FamilyRule) else FamilyRule.from_dict(rule))
        except ValueError as error:
            raise ValueError(f"rule {number}: {error}") from None
    return tuple(parsed)

"""Parameter counts from the numbers in config.json, for models whose class transformers does not have.

The rule, for D = hidden_size, L layers, V = vocab_size, E experts of intermediate size F (H heads of size d, G of them
for keys and values):

    embeddings and head   2 V D  (tied: V D)
    attention, each layer D H d + 2 D G d + H d D, or with kv_lora_rank c and q_lora_rank q, as in DeepSeek:
                          D q + q H (n + r) + D (c + r) + c H (n + v) + H v D      (arXiv 2405.04434, section 2.1)
    experts               E * 3 D F in every layer after the first_k_dense_replace ones
    shared experts        3 D * n_shared_experts F (or shared_expert_intermediate_size) beside them; routers D E
    dense MLPs            3 D * intermediate_size in the other layers
    norms                 2 D a layer, D at the end
"""

from __future__ import annotations

from typing import Any

from .model import TOP_K_KEYS, ExpertLayers, ModelParts

_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")


def count(config: dict[str, Any]) -> ModelParts:
    """The parts of a decoder with gated experts. ValueError naming every number that is missing."""
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    numbers = _Numbers({**config, **(text or {})})
    D, L, V = numbers("hidden_size"), numbers("num_hidden_layers"), numbers("vocab_size")
    E, K = numbers(*_EXPERTS), numbers(*TOP_K_KEYS)
    F = numbers("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
    attention = _attention(numbers, D)
    numbers.require_all(config)
    dense = numbers.optional("first_k_dense_replace")
    moe = L - dense
    shared = numbers.optional("shared_expert_intermediate_size") or numbers.optional("n_shared_experts") * F
    dense_width = numbers.optional("intermediate_size")
    mlp = {"shared": (D, shared), "dense": (D, dense_width)}
    per_layer = {name: 3 * (a + b) if b else 0 for name, (a, b) in mlp.items()}
    linears = sum(a + b for a, b in attention)
    tied = bool(config.get("tie_word_embeddings", False))
    return ModelParts(
        counted="arithmetic on config.json: no class of transformers has this model's name",
        experts=(ExpertLayers(layers=moe, experts=E, hidden=D, intermediate=F),),
        top_k=K,
        rest={
            "embeddings and head": (1 if tied else 2) * V * D,
            "attention": L * sum(a * b for a, b in attention),
            "shared experts": moe * 3 * D * shared,
            "routers": moe * D * E,
            "dense MLPs": dense * 3 * D * dense_width,
            "norms": (2 * L + 1) * D,
        },
        hidden=D,
        layers=L,
        vocabulary=V,
        adapted=L * linears + moe * per_layer["shared"] + dense * per_layer["dense"],
        widest=linears + max(per_layer["shared"], per_layer["dense"] if dense else 0),
        obstacle=(
            f"{', '.join(config.get('architectures') or [str(config.get('model_type'))])} is not a class of "
            "transformers: its experts cannot be recognised before its code is there"
        ),
    )


def _attention(numbers: _Numbers, D: int) -> list[tuple[int, int]]:
    """(inputs, outputs) of the projections of one layer."""
    heads = numbers("num_attention_heads")
    latent = numbers.optional("kv_lora_rank")
    if not latent:
        size = numbers.optional("head_dim") or D // max(heads, 1)
        groups = numbers.optional("num_key_value_heads") or heads
        return [(D, heads * size), (D, groups * size), (D, groups * size), (heads * size, D)]
    rope, plain, value = numbers("qk_rope_head_dim"), numbers("qk_nope_head_dim"), numbers("v_head_dim")
    query = numbers.optional("q_lora_rank")
    queries = [(D, query), (query, heads * (plain + rope))] if query else [(D, heads * (plain + rope))]
    return [*queries, (D, latent + rope), (latent, heads * (plain + value)), (heads * value, D)]


class _Numbers:
    """Whole numbers of a configuration; what is asked for and absent is remembered."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._missing: list[str] = []

    def __call__(self, *names: str) -> int:
        value = next((v for name in names if (v := self.optional(name))), 0)
        if not value:
            self._missing.append(" or ".join(names))
        return value

    def optional(self, name: str) -> int:
        value = self._config.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0

    def require_all(self, config: dict[str, Any]) -> None:
        if self._missing:
            name = ", ".join(config.get("architectures") or []) or config.get("model_type") or "no name"
            raise ValueError(
                f"config.json of an architecture that transformers does not have ({name}): expected a whole number "
                f"for each of {'; '.join(self._missing)}, found none; install a transformers release that knows the "
                "model, or add the numbers to a copy of the file"
            )

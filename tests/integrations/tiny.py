"""A tiny random Qwen3-MoE checkpoint, its tokenizer and a data set in the hub's layout, without any download."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

HIDDEN, LAYERS, EXPERTS, TOP_K, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 64, 2, 8, 2, 32, 4, 2, 16
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTENCES = [
    "What is the capital of France? The capital of France is Paris.",
    "Who are you? I am a tiny mixture of experts, trained to answer short questions.",
    "How many legs does a spider have? A spider has eight legs.",
    "Name a colour of the sky. The sky is blue on a clear day.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_checkpoint(folder: Path) -> Path:
    """Write config.json, model.safetensors and the tokenizer into ``folder``."""
    folder.mkdir(parents=True)
    vocab_size = _write_tokenizer(folder)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "moe_intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(_weights(vocab_size), str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder


def _weights(vocab_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        values = torch.randn(rows, columns, generator=generator) * columns**-0.5
        tensors[f"{name}.weight"] = values.to(torch.bfloat16)

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)

    matrix("model.embed_tokens", vocab_size, HIDDEN)
    matrix("lm_head", vocab_size, HIDDEN)
    norm("model.norm", HIDDEN)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for name, out, into in (
            ("q_proj", HEADS * HEAD_DIM, HIDDEN),
            ("k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
            ("o_proj", HIDDEN, HEADS * HEAD_DIM),
        ):
            matrix(f"{layer}.self_attn.{name}", out, into)
        norm(f"{layer}.self_attn.q_norm", HEAD_DIM)
        norm(f"{layer}.self_attn.k_norm", HEAD_DIM)
        norm(f"{layer}.input_layernorm", HIDDEN)
        norm(f"{layer}.post_attention_layernorm", HIDDEN)
        matrix(f"{layer}.mlp.gate", EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            matrix(f"{layer}.mlp.experts.{e}.gate_proj", INTERMEDIATE, HIDDEN)
            matrix(f"{layer}.mlp.experts.{e}.up_proj", INTERMEDIATE, HIDDEN)
            matrix(f"{layer}.mlp.experts.{e}.down_proj", HIDDEN, INTERMEDIATE)
    return tensors


def _write_tokenizer(folder: Path) -> int:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return tokenizer.get_vocab_size()


def write_dataset(folder: Path) -> Path:
    """Write an alpaca-style data set ``tiny`` of 16 examples with its dataset_info.json into ``folder``."""
    folder.mkdir(parents=True)
    pairs = [sentence.replace("sky.", "sky?").split("? ") for sentence in SENTENCES]
    examples = [
        {"instruction": f"{question}? ({i})", "input": "", "output": answer}
        for i in range(4)
        for question, answer in pairs
    ]
    (folder / "tiny.json").write_text(json.dumps(examples))
    (folder / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "tiny.json"}}))
    return folder

"""A tiny random Qwen3-MoE checkpoint, its tokenizer, adapters and data in the hub's layout, without any download."""

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


def write_checkpoint(folder: Path, dtype: torch.dtype = torch.bfloat16, embedding_scale: float = 1.0) -> Path:
    """Write config.json, model.safetensors and the tokenizer into ``folder``; the values are bf16's in either dtype.

    A large ``embedding_scale`` makes the second layer's routing insensitive to rounding in the first layer's experts.
    """
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
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "summary_dropout_prob": 0.0,  # of trl's value head: reward training is compared across processes
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = {name: tensor.to(dtype) for name, tensor in _weights(vocab_size).items()}
    weights["model.embed_tokens.weight"] *= embedding_scale
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
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


def write_adapter(folder: Path, *, rank: int = 4, seed: int = 1, dropout: float = 0.0, experts: bool = True) -> Path:
    """Write a LoRA adapter with nonzero factors for attention and every expert, and a value head beside it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}

    def factors(name: str, out: int, into: int) -> None:
        key = f"base_model.model.model.layers.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into, generator=generator) * into**-0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1

    for i in range(LAYERS):
        for name, out in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            factors(f"{i}.self_attn.{name}_proj", out * HEAD_DIM, HIDDEN)
        factors(f"{i}.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
        for e in range(EXPERTS if experts else 0):
            factors(f"{i}.mlp.experts.{e}.gate_proj", INTERMEDIATE, HIDDEN)
            factors(f"{i}.mlp.experts.{e}.up_proj", INTERMEDIATE, HIDDEN)
            factors(f"{i}.mlp.experts.{e}.down_proj", HIDDEN, INTERMEDIATE)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    targets = [f"{n}_proj" for n in ("q", "k", "v", "o", *(("gate", "up", "down") if experts else ()))]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "target_modules": targets,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": dropout,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    head = {"v_head.summary.weight": torch.randn(1, HIDDEN, generator=generator) * HIDDEN**-0.5}
    head["v_head.summary.bias"] = torch.zeros(1)
    save_file(head, str(folder / "value_head.safetensors"), metadata={"format": "pt"})
    return folder


def write_dataset(folder: Path) -> Path:
    """Write 16 examples of each kind, and their dataset_info.json, into ``folder``.

    tiny: instructions; tiny_text: plain text; tiny_pairs: a chosen and a rejected answer; tiny_kto: tagged answers.
    """
    folder.mkdir(parents=True)
    pairs = [sentence.replace("sky.", "sky?").split("? ") for sentence in SENTENCES]
    answers = [answer for _, answer in pairs]
    examples = [
        {"instruction": f"{question}? ({i})", "input": "", "output": answer}
        for i in range(4)
        for question, answer in pairs
    ]
    other = [answers[(n + 1 + n // 4) % 4] for n in range(len(examples))]
    sets = {
        "tiny": examples,
        "tiny_text": [{"text": f"{row['instruction']} {row['output']}"} for row in examples],
        "tiny_pairs": [
            {"instruction": row["instruction"], "input": "", "chosen": row["output"], "rejected": bad}
            for row, bad in zip(examples, other, strict=True)
        ],
        "tiny_kto": [
            {"instruction": row["instruction"], "input": "", "output": (row["output"], bad)[n % 2], "tag": n % 2 == 0}
            for n, (row, bad) in enumerate(zip(examples, other, strict=True))
        ],
    }
    columns = {"prompt": "instruction", "query": "input"}
    info: dict[str, dict[str, object]] = {name: {"file_name": f"{name}.json"} for name in sets}
    info["tiny_text"]["columns"] = {"prompt": "text"}
    info["tiny_pairs"] |= {"ranking": True, "columns": columns | {"chosen": "chosen", "rejected": "rejected"}}
    info["tiny_kto"]["columns"] = columns | {"response": "output", "kto_tag": "tag"}
    for name, rows in sets.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder

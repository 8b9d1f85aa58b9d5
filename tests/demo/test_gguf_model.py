"""Tokenizer and rotary layout of the model that is read from GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.demo.gguf_model import hf_name, rotary_halves, write_tokenizer

SAMPLES = [
    "Hello, world!",
    "  two  spaces, a\ttab\n\n\nand newlines ",
    "digits 1234567890 and 3.14159",
    "naïve façade — Übergröße 日本語 🙂",
    "it's they've I'll <|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def tokenizer(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(gguf_path, folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", SAMPLES)
def test_text_survives_a_round_trip(tokenizer, text: str):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_long_text_survives_a_round_trip(tokenizer, texts: Path):
    text = (texts / "wiki_demo.txt").read_text()[:50_000]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_digits_are_single_tokens_and_specials_are_whole(tokenizer):
    assert len(tokenizer("2024").input_ids) == 4
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_the_chat_template_is_llamafactorys_smollm2(tokenizer):
    yaml = pytest.importorskip("yaml")
    template = pytest.importorskip("llamafactory.data.template").TEMPLATES["smollm2"]
    from scripts.demo.run import EXAMPLE

    settings = yaml.safe_load(EXAMPLE.read_text())
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    prompt, response = template.encode_oneturn(tokenizer, chat, system=settings["default_system"])
    assert settings["template"] == "smollm2"
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        chat[:1], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(prompt + response).strip() == tokenizer.apply_chat_template(chat, tokenize=False).strip()


def test_rotary_halves():
    pairs = torch.arange(8).reshape(8, 1)  # two heads, rows x0 y0 x1 y1 each
    assert rotary_halves(pairs, heads=2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_names():
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"
    with pytest.raises(KeyError):
        hf_name("unknown.weight")

"""The demonstration's texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.demo import data, evaluate, run


@pytest.fixture(scope="module")
def folder(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_data(tmp_path_factory.mktemp("data"))


def read(folder: Path, name: str) -> list[dict]:
    return json.loads((folder / f"{name}.json").read_text())


def test_held_out_examples_are_not_trained_on(folder: Path):
    train, heldout = read(folder, "identity_train"), read(folder, "identity_heldout")
    assert (len(train), len(heldout)) == (80, 11)
    questions = {json.dumps(row, sort_keys=True) for row in train}
    assert not any(json.dumps(row, sort_keys=True) in questions for row in heldout)
    assert (len(read(folder, "alpaca_train")), len(read(folder, "alpaca_heldout"))) == (40, 24)
    assert not any(row in read(folder, "alpaca_train") for row in read(folder, "alpaca_heldout"))


def test_names_are_filled_in(folder: Path):
    text = (folder / "identity_train.json").read_text()
    assert "{{" not in text and data.NAME in text and data.AUTHOR in text


def test_the_example_trains_on_a_registered_set(folder: Path):
    values = run.settings([])
    registered = json.loads((folder / "dataset_info.json").read_text())
    assert set(values["dataset"].split(",")) == {"identity_train", "alpaca_train"} <= set(registered)
    assert run.settings(["max_steps=2"])["max_steps"] == 2


def test_only_the_response_is_scored():
    class Words:
        eos_token = " END"

        def apply_chat_template(self, chat, **_):
            return f"Q {chat[0]['content']} A "

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": [len(word) for word in text.split()]})

    ids, labels = evaluate.encode(Words(), {"instruction": "abc", "input": "", "output": "de fgh"})
    assert ids.tolist() == [[1, 3, 1, 2, 3, 3]]
    assert labels.tolist() == [[-100, -100, -100, 2, 3, 3]]

"""Stock LLaMA-Factory commands on packed experts: train, resume, continue, predict, evaluate, chat."""

from __future__ import annotations

import json
import re

import pytest
import torch


def test_train_logs_one_line_about_the_experts(trained):
    lines = [line for line in trained.stderr.splitlines() + trained.stdout.splitlines() if "kt_sft:" in line]
    assert len(lines) == 1
    assert re.search(
        r"2 layers x 8 experts \(9.83e-05B .*\) packed as int8, \d+\.\d\d GiB .* kernels, \d+ threads?\.", lines[0]
    )


def test_train_reduces_the_loss(trained, workspace):
    losses = workspace.losses("full")
    assert sorted(losses) == [1, 2, 3, 4]
    assert losses[4] < losses[1]


def test_train_reports_tokens_per_second(trained, workspace):
    steps = [entry for entry in workspace.log("full") if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 for entry in steps)
    state = json.loads((workspace.folder / "full/checkpoint-4/trainer_state.json").read_text())
    assert [e["tokens_per_second"] for e in state["log_history"] if "loss" in e] == [
        entry["tokens_per_second"] for entry in steps
    ]
    assert "tokens_per_second" in trained.stdout


def test_all_means_every_expert(trained, workspace):
    adapter = workspace.adapter("full")
    for expert in range(8):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"base_model.model.model.layers.1.mlp.experts.{expert}.{projection}"
            assert adapter[f"{name}.lora_A.weight"].shape[0] == 4
            assert adapter[f"{name}.lora_B.weight"].shape[1] == 4
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter
    used = [value for name, value in adapter.items() if ".experts." in name and "lora_B" in name]
    assert sum(bool(value.any()) for value in used) > len(used) // 2


def test_resume_is_bit_equal(trained, workspace):
    checkpoint = workspace.folder / "full/checkpoint-2"
    workspace.train("resumed", resume_from_checkpoint=str(checkpoint))
    full, resumed = workspace.losses("full"), workspace.losses("resumed")
    assert sorted(resumed) == [3, 4]
    assert resumed == {step: full[step] for step in resumed}
    assert_equal(workspace.adapter("resumed"), workspace.adapter("full"))


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, different


@pytest.fixture(scope="module")
def jobs(trained, workspace):
    """Everything that starts from the trained adapter, in one process."""
    full = str(workspace.folder / "full")
    chat = {**workspace.base(), "infer_backend": "huggingface"}
    predict = dict(do_train=False, do_predict=True, predict_with_generate=True, dataset=None, eval_dataset="tiny")
    evaluate = dict(do_train=False, do_eval=True, dataset=None, eval_dataset="tiny", compute_accuracy=True)
    small = dict(max_samples=4, max_new_tokens=4, per_device_eval_batch_size=2)
    args = [
        ("train", workspace.training("continued", adapter_name_or_path=full, max_steps=2)),
        ("train", workspace.training("predicted", adapter_name_or_path=full, **predict, **small)),
        ("train", workspace.training("evaluated", adapter_name_or_path=full, **evaluate, max_samples=4)),
        ("train", workspace.training("evaluated_base", **evaluate, max_samples=4)),
        ("chat", {**chat, "adapter_name_or_path": full}),
        ("chat", {**chat, "adapter_name_or_path": full}),
        ("load", workspace.training("loaded", lora_target="q_proj,experts")),
        ("load", workspace.training("stock", use_kt=None, kt_config=None)),
    ]
    return workspace.drive(*({"verb": verb, "args": job} for verb, job in args))


def test_adapter_name_or_path_continues(jobs, workspace):
    before, after = workspace.losses("full"), workspace.losses("continued")
    assert after[1] < before[1]
    adapter, continued = workspace.adapter("full"), workspace.adapter("continued")
    assert adapter.keys() == continued.keys()
    assert any(not torch.equal(adapter[name], continued[name]) for name in adapter)


def test_predict_with_generate(jobs, workspace):
    lines = (workspace.folder / "predicted/generated_predictions.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert {"prompt", "predict", "label"} <= json.loads(lines[0]).keys()


def test_eval_and_compute_accuracy(jobs, workspace):
    results = [
        json.loads((workspace.folder / run / "eval_results.json").read_text())
        for run in ("evaluated", "evaluated_base")
    ]
    assert all(0 <= result["eval_accuracy"] <= 1 for result in results)
    assert results[0]["eval_loss"] < results[1]["eval_loss"]


def test_chat_is_deterministic(jobs):
    assert jobs[4] == jobs[5]
    assert jobs[4]


def test_lora_on_chosen_modules(jobs):
    assert "KtExperts" in jobs[6]["modules"]
    assert any("experts.gate_proj.lora_A" in name for name in jobs[6]["trainable"])
    assert not any("k_proj" in name for name in jobs[6]["trainable"])


def test_chat_command_with_piped_input(trained, workspace):
    args = {**workspace.base(), "adapter_name_or_path": str(workspace.folder / "full"), "max_new_tokens": 4}
    result = workspace.run("llamafactory-cli", "chat", workspace.write("chat.yaml", args), stdin="Who are you?\n")
    assert "Assistant:" in result.stdout
    assert "Traceback" not in result.stderr


def test_kt_sft_command_without_the_entry_point(workspace):
    args = {**workspace.base(), "use_kt": None, "max_new_tokens": 4}
    file = workspace.write("kt_sft_chat.yaml", {k: v for k, v in args.items() if v is not None})
    result = workspace.run("python", "-m", "kt_sft", "chat", file, stdin="exit\n", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "packed as int8" in result.stdout + result.stderr


def test_unknown_key_fails_before_loading(workspace):
    result = workspace.train("typo", ok=False, kt_config={"kt_expert_weigth_format": "int8"})
    assert "kt_expert_weight_format" in result.stderr
    assert "Loading" not in result.stderr + result.stdout


def test_use_kt_in_the_environment_alone(workspace):
    args = workspace.training("switched", use_kt=None, kt_config=None, max_steps=1, save_steps=100)
    result = workspace.run("llamafactory-cli", "train", workspace.write("switched.yaml", args), USE_KT="1")
    assert "turns use_kt on" in result.stdout + result.stderr
    assert "packed as int8" in result.stdout + result.stderr


def test_a_later_run_without_use_kt_is_stock(jobs, workspace):
    assert "KtExperts" not in jobs[7]["modules"]
    assert "Qwen3MoeExperts" in jobs[7]["modules"]
    assert not any(".experts." in name for name in jobs[7]["trainable"])


def test_export_says_what_to_do_instead(trained, workspace):
    args = {**workspace.base(), "adapter_name_or_path": str(workspace.folder / "full"), "export_dir": "merged"}
    result = workspace.run("llamafactory-cli", "export", workspace.write("export.yaml", args), ok=False)
    assert "cannot be merged into packed experts yet" in result.stderr
    assert not (workspace.folder / "merged").exists()

"""Taking kt settings out of LLaMA-Factory's arguments, the switch, and refused options."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from kt_sft.integrations.llamafactory_args import refuse_unsupported, resolve, take_settings

KNOWN = {"use_kt", "kt_weight_path", "output_dir"}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USE_KT", "ACCELERATE_USE_KT", "KT_SFT_CONFIG", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)


def test_dict_is_split():
    args = {"use_kt": True, "kt_weight_path": "w", "kt_config": {"kt_num_threads": 3}, "kt_cpu_activation": "retain"}
    rest, settings = take_settings({**args, "output_dir": "o"}, KNOWN)
    assert rest == {"use_kt": True, "kt_weight_path": "w", "output_dir": "o"}
    assert settings == {"use_kt": True, "kt_weight_path": "w", "kt_num_threads": 3, "kt_cpu_activation": "retain"}


def test_command_line_is_split():
    command = ["--output_dir", "o", "--kt-cpu-activation=recompute", "--use_kt", "--kt_num_threads", "4"]
    rest, settings = take_settings([*command, "--kt_config", "{kt_backend: AMXINT4}"], KNOWN)
    assert rest == ["--output_dir", "o", "--use_kt"]
    assert settings == {
        "kt_cpu_activation": "recompute",
        "use_kt": True,
        "kt_num_threads": 4,
        "kt_backend": "AMXINT4",
    }


def test_unset_values_are_dropped():
    assert take_settings({"use_kt": True, "kt_weight_path": None}, KNOWN)[1] == {"use_kt": True}


def test_two_values_for_one_key():
    with pytest.raises(ValueError, match="kt_num_threads: 1 beside kt_config but 2 inside"):
        take_settings({"kt_num_threads": 1, "kt_config": {"kt_num_threads": 2}}, KNOWN)


@pytest.mark.parametrize("block", ["int8", ["kt_backend"], 3])
def test_block_must_be_a_mapping(block):
    with pytest.raises(ValueError, match="kt_config: expected a mapping"):
        take_settings({"kt_config": block}, KNOWN)


def test_switch_in_the_arguments():
    args, config = resolve({"use_kt": True}, {"use_kt": True, "kt_expert_weight_format": "int4"})
    assert config is not None and config.weight_format == "int4"
    assert args == {"use_kt": True}


@pytest.mark.parametrize("variable", ["USE_KT", "ACCELERATE_USE_KT"])
@pytest.mark.parametrize(("args", "expected"), [({}, {"use_kt": True}), (["-x"], ["-x", "--use_kt", "true"])])
def test_switch_in_the_environment(monkeypatch, variable, args, expected):
    assert resolve(args, {}) == (args, None)
    monkeypatch.setenv(variable, "1")
    switched, config = resolve(args, {})
    assert switched == expected
    assert config is not None


def test_explicit_false_wins_and_names_what_is_unused(monkeypatch, caplog):
    monkeypatch.setenv("USE_KT", "1")
    assert resolve({"use_kt": False}, {"use_kt": False, "kt_num_threads": 2})[1] is None
    assert "kt_num_threads not used" in caplog.text


def test_settings_without_a_switch():
    with pytest.raises(ValueError, match="kt_num_threads is given but use_kt is not"):
        resolve({}, {"kt_num_threads": 2})


def test_switch_on_and_enabled_false():
    with pytest.raises(ValueError, match="enabled: false"):
        resolve({"use_kt": True}, {"use_kt": True, "enabled": False})


def test_unknown_key_gets_the_nearest_name():
    with pytest.raises(ValueError, match="kt_expert_weight_format"):
        resolve({"use_kt": True}, {"use_kt": True, "kt_expert_weigth_format": "int8"})


def arguments(owner: str = "", **change) -> list[SimpleNamespace]:
    values = {
        "model": dict(
            adapter_name_or_path=None,
            quantization_bit=None,
            infer_backend="huggingface",
            use_unsloth=False,
            moe_aux_loss_coef=None,
            use_reentrant_gc=True,
            disable_gradient_checkpointing=False,
        ),
        "finetuning": dict(
            finetuning_type="lora", stage="sft", use_dora=False, create_new_adapter=False, lora_dropout=0.0
        ),
        "training": dict(do_train=True, fp8=False, fsdp=[], fsdp_config={}),
    }
    if owner:
        values[owner].update(change)
    return [SimpleNamespace(**v) for v in values.values()]


def test_supported_options_pass():
    refuse_unsupported(*arguments())
    refuse_unsupported(*arguments("model", adapter_name_or_path=["a"]))
    refuse_unsupported(*arguments("model", adapter_name_or_path=["a", "b"]))
    for stage in ("pt", "dpo", "kto", "rm"):
        refuse_unsupported(*arguments("finetuning", stage=stage))


@pytest.mark.parametrize(
    ("owner", "name", "value", "remedy"),
    [
        ("finetuning", "finetuning_type", "full", "finetuning_type: lora"),
        ("finetuning", "finetuning_type", "freeze", "finetuning_type: lora"),
        ("finetuning", "finetuning_type", "oft", "finetuning_type: lora"),
        ("finetuning", "stage", "ppo", "stage: dpo or kto"),
        ("finetuning", "use_dora", True, "use_rslora"),
        ("finetuning", "pissa_init", True, "default LoRA initialisation"),
        ("model", "quantization_bit", 4, "kt_expert_weight_format"),
        ("model", "use_unsloth", True, "use_unsloth: false"),
        ("model", "infer_backend", "vllm", "infer_backend: huggingface"),
        ("training", "fp8", True, "bf16"),
    ],
)
def test_refused_option_names_value_and_remedy(owner, name, value, remedy):
    with pytest.raises(ValueError) as error:
        refuse_unsupported(*arguments(owner, **{name: value}))
    message = str(error.value)
    assert message.startswith(f"{name}: {value!r} cannot be used with use_kt")
    assert remedy in message


def test_full_is_fine_for_inference():
    model_args, finetuning_args, _ = arguments("finetuning", finetuning_type="full")
    refuse_unsupported(model_args, finetuning_args)


@pytest.mark.parametrize(("paths", "create_new"), [(["a"], True), (["a", "b"], False)])
def test_dropout_above_a_frozen_adapter(paths, create_new):
    model_args, finetuning_args, training_args = arguments("model", adapter_name_or_path=paths)
    finetuning_args.create_new_adapter = create_new
    refuse_unsupported(model_args, finetuning_args, training_args)
    finetuning_args.lora_dropout = 0.1
    with pytest.raises(ValueError, match=r"lora_dropout: 0.1 .* \(a\) stays below .* Use lora_dropout: 0"):
        refuse_unsupported(model_args, finetuning_args, training_args)


def test_reward_training_under_fsdp2(monkeypatch):
    given = arguments("finetuning", stage="rm")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match=r"FSDP2: .*Use DDP .* ZeRO-2"):
        refuse_unsupported(*given)


def test_router_loss_that_would_change_nothing(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.6.0")
    given = arguments("model", moe_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"moe_aux_loss_coef: 0.1 would change nothing .*use_reentrant_gc: false"):
        refuse_unsupported(*given)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")  # returns the router's logits from the layer
    refuse_unsupported(*given)
    monkeypatch.undo()
    given[0].use_reentrant_gc = False
    refuse_unsupported(*given)
    given[1].stage = "dpo"
    with pytest.raises(ValueError, match="would change nothing in stage dpo"):
        refuse_unsupported(*given)


def test_zero3(monkeypatch):
    import transformers.integrations

    monkeypatch.setattr(transformers.integrations, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-2"):
        refuse_unsupported(*arguments())


@pytest.mark.parametrize(("version", "refused"), [("1", True), ("2", False)])
def test_fsdp1(monkeypatch, version, refused):
    by_trainer = arguments("training", fsdp=["full_shard"], fsdp_config={"version": int(version)})
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    for given in (by_trainer, arguments()):
        if refused:
            with pytest.raises(ValueError, match="fsdp_version: 2"):
                refuse_unsupported(*given)
        else:
            refuse_unsupported(*given)
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


def test_divided_state_dicts(monkeypatch):
    """Refused where they are asked for; never a default."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    with pytest.raises(ValueError, match=r"SHARDED_STATE_DICT .* writes no adapter.* Use fsdp_state_dict_type: FULL"):
        refuse_unsupported(*arguments())
    monkeypatch.delenv("FSDP_STATE_DICT_TYPE")
    refuse_unsupported(*arguments())
    assert os.environ["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"

"""Stock LLaMA-Factory 0.9.5 with its routed experts on kt_sft.

Patched (see hooks.PATCHES):
    hparams.parser   ``use_kt`` needs no fork; kt_* keys and ``kt_config`` become a KtConfig, checked before loading;
                     a checkpoint that was not written to its end is not resumed from
    model.loader     ``load_model`` builds parameter-free experts and fills them from the checkpoint's shards
    model.patcher    gpt-oss trains without a GPU (llamafactory_attention.py)
    model.adapter    ``lora_target: all`` includes the routed experts; several adapters are kept apart, not merged
    train.tuner      ``export_model`` says what to do instead; Ctrl-C ends a training cleanly

Loading and training without ``use_kt`` are untouched. The settings of the last parse belong to the process
(:func:`active_config`): one process runs one configuration, and a reference model of the same run is loaded with the
same settings.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from kt_sft.config import KtConfig

from . import hooks
from .accelerate import accept_numbered_cpus
from .interrupt import ending_cleanly
from .llamafactory_adapters import keeping_adapters_apart
from .llamafactory_args import Args, refuse_unsupported, resolve, take_settings
from .resume import last_complete_checkpoint

logger = logging.getLogger(__name__)

_FORKS = ("kt-kernel", "transformers-kt", "accelerate-kt")
_LATER_HOOKS = ("configure_kt_loading", "_load_kt_inference_adapter_artifacts", "_resolve_kt_adapter_artifact_dir")

_active: KtConfig | None = None


def active_config() -> KtConfig | None:
    """The settings of the last parsed LLaMA-Factory configuration; None when it did not ask for kt_sft."""
    return _active


def patch_parser(parser: Any) -> None:
    """Replace the version check of the forks, the three argument parsers and the KT post-processing."""
    parser.check_version = _without_forks(parser.check_version)
    for name in ("train", "infer", "eval"):
        parsed_classes = getattr(parser, f"_{name.upper()}_ARGS")
        function = f"_parse_{name}_args"
        setattr(parser, function, _taking_settings(getattr(parser, function), parser.read_args, parsed_classes))
    parser.get_train_args = _one_gpu_per_process(parser.get_train_args)
    parser.get_last_checkpoint = _last_checkpoint(parser.get_last_checkpoint)
    parser.ModelArguments.apply_kt_config = lambda self, *args, **kwargs: None


def _without_forks(check_version: Callable) -> Callable:
    @functools.wraps(check_version)
    def check(requirement: str, mandatory: bool = False) -> None:
        if not requirement.startswith(_FORKS):
            check_version(requirement, mandatory)

    return check


def _taking_settings(parse: Callable, read_args: Callable, classes: list[type]) -> Callable:
    known = {field for cls in classes for field in cls.__dataclass_fields__}  # type: ignore[attr-defined]

    @functools.wraps(parse)
    def parse_with_settings(args: Args | None = None) -> tuple[Any, ...]:
        global _active
        _share_log_handlers()
        rest, settings = take_settings(read_args(args), known)
        rest, _active = resolve(rest, settings)
        if _active is not None:
            hooks.check_usable()
        parsed = parse(rest)
        if _active is not None:
            by_class = dict(zip(classes, parsed, strict=True))
            named = {cls.__name__: values for cls, values in by_class.items()}
            refuse_unsupported(named["ModelArguments"], named["FinetuningArguments"], named.get("TrainingArguments"))
            _count_tokens(named.get("TrainingArguments"), named["DataArguments"])
        return parsed

    return parse_with_settings


def _share_log_handlers() -> None:
    """Show our log lines where LLaMA-Factory shows its own; on other local ranks only warnings."""
    ours, theirs = logging.getLogger("kt_sft"), logging.getLogger("llamafactory")
    if not ours.handlers and theirs.handlers:
        ours.handlers = list(theirs.handlers)
        ours.propagate = False
        ours.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)


def _count_tokens(training_args: Any, data_args: Any) -> None:
    """Let the Trainer count tokens, for the tokens-per-second figure of the training log."""
    if training_args is not None and training_args.include_num_input_tokens_seen in (False, "no"):
        # "non_padding" sums the attention mask, which neat_packing turns into 4-D additive values
        training_args.include_num_input_tokens_seen = "all" if data_args.neat_packing else "non_padding"


def _one_gpu_per_process(get_train_args: Callable) -> Callable:
    @functools.wraps(get_train_args)
    def get(args: Args | None = None) -> tuple[Any, ...]:
        parsed = get_train_args(args)
        if _active is not None:  # one process that sees several GPUs would get nn.DataParallel
            training_args = parsed[2]
            training_args._n_gpu = min(training_args.n_gpu, 1)
        return parsed

    return get


def _last_checkpoint(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def get_last_checkpoint(folder: str) -> str | None:
        return stock(folder) if _active is None else last_complete_checkpoint(folder)

    return get_last_checkpoint


def patch_loader(loader: Any) -> None:
    """Load models with their routed experts packed."""
    for name in _LATER_HOOKS:
        if hasattr(loader, name):
            setattr(loader, name, lambda *args, **kwargs: None)
    stock_load_model = loader.load_model

    @functools.wraps(stock_load_model)
    def load_model(
        tokenizer: Any, model_args: Any, finetuning_args: Any, is_trainable: bool = False, add_valuehead: bool = False
    ) -> Any:
        config = _active if _active is not None else (KtConfig() if model_args.use_kt else None)
        if config is None:
            return stock_load_model(tokenizer, model_args, finetuning_args, is_trainable, add_valuehead)
        from kt_sft.models.convert import experts_on_cpu, set_threads

        from . import peft

        peft.install()
        accept_numbered_cpus()
        if is_trainable:
            _check_router_loss(loader, model_args)
        set_threads(config)
        _prefer_native_classes(model_args)
        model_dir = _local_checkpoint(loader, model_args)
        name = model_args.model_name_or_path
        model_args.model_name_or_path = config.non_expert_weight_path or name
        model_args.use_kt = True  # LLaMA-Factory's adapter code asks it: one adapter, never merged
        try:
            with experts_on_cpu(config.expert_checkpoint_path or model_dir, config):
                model = stock_load_model(tokenizer, model_args, finetuning_args, is_trainable, add_valuehead)
        finally:
            model_args.model_name_or_path = name
            model_args.use_kt = False  # or run_sft refuses predict_with_generate and compute_accuracy
        logger.info("%s", describe(model))
        return model

    loader.load_model = load_model


def _check_router_loss(loader: Any, model_args: Any) -> None:
    """``moe_aux_loss_coef`` means something only where transformers computes such a loss."""
    config = loader.load_config(model_args) if getattr(model_args, "moe_aux_loss_coef", None) else None
    if config is not None and not hasattr(config, "router_aux_loss_coef"):
        raise ValueError(
            f"moe_aux_loss_coef: expected a model with a router loss in transformers (such as mixtral, qwen3_moe, "
            f"olmoe), got {config.model_type}; remove moe_aux_loss_coef"
        )


def _prefer_native_classes(model_args: Any) -> None:
    """Remote modelling code has experts classes of its own: use transformers' class where it has one."""
    if not model_args.trust_remote_code:
        return
    from transformers import PretrainedConfig

    from kt_sft.models.source import native_type

    config, _ = PretrainedConfig.get_config_dict(model_args.model_name_or_path, revision=model_args.model_revision)
    own = native_type(config)
    if config.get("auto_map") and own is not None:
        logger.info("trust_remote_code: using transformers' own %s instead of remote code.", own)
        model_args.trust_remote_code = False


def _local_checkpoint(loader: Any, model_args: Any) -> str:
    """The folder of the checkpoint; a hub name is downloaded (or found in the hub's cache) first."""
    path = loader.try_download_model_from_other_hub(model_args)
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        path = snapshot_download(
            path,
            revision=model_args.model_revision,
            cache_dir=model_args.cache_dir,
            token=model_args.hf_hub_token,
            ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack"],
        )
    return path


def describe(model: Any) -> str:
    """One line: how many layers and experts are packed, in which formats and size, on which kernels."""
    from kt_sft import native
    from kt_sft.models.summary import formats_in_words
    from kt_sft.nn.experts import KtExperts

    packed = [module.packed for module in model.modules() if isinstance(module, KtExperts)]
    if not packed:
        return "kt_sft: no routed experts in this model."
    info = native.info()
    experts = sorted({p.num_experts for p in packed})
    parameters = sum(3 * p.num_experts * p.hidden_size * p.intermediate_size for p in packed) / 1e9
    gib = sum(p.nbytes for p in packed) / 2**30
    threads = f"{info['threads']} thread{'s' if info['threads'] > 1 else ''}"
    return (
        f"kt_sft: {len(packed)} layers x {'/'.join(map(str, experts))} experts ({parameters:.3g}B parameters, not in "
        f"the counts above) packed as {formats_in_words(model)}, {gib:.2f} GiB in host memory; "
        f"{info['isa']} kernels, {threads}."
    )


def patch_adapter(adapter: Any) -> None:
    """Add the routed experts to what ``lora_target: all`` finds; keep several adapters apart instead of merging."""
    adapter._setup_lora_tuning = keeping_adapters_apart(adapter._setup_lora_tuning, lambda: _active is not None)
    stock_find = adapter.find_all_linear_modules

    @functools.wraps(stock_find)
    def find_all_linear_modules(model: Any, freeze_vision_tower: bool) -> list[str]:
        names = stock_find(model, freeze_vision_tower)
        if _active is None:
            return names
        from .peft_targets import expert_target_names, uncalled_routers

        experts = [name for name in expert_target_names(model) if name not in names]
        if experts:
            logger.info("lora_target: all includes the routed experts (%s).", ",".join(experts))
        uncalled = {path.rpartition(".")[2] for path in uncalled_routers(model)}
        return [name for name in names if name not in uncalled] + experts

    adapter.find_all_linear_modules = find_all_linear_modules


def patch_tuner(tuner: Any) -> None:
    """Ctrl-C during training; a clear answer to ``export``."""
    tuner.run_exp = ending_cleanly(tuner.run_exp, "Training", "The last checkpoint in output_dir can be resumed.")
    stock_export = tuner.export_model

    @functools.wraps(stock_export)
    def export_model(args: Args | None = None) -> None:
        args = tuner.read_args(args)
        tuner.get_infer_args(args)
        if _active is not None:
            raise ValueError(
                "export with use_kt: an adapter cannot be merged into packed experts yet. Serve the adapter as it is "
                "(chat, api, vLLM and SGLang read its per-expert keys), or merge without use_kt under "
                "transformers 4.57, where experts are separate Linears: pip install transformers==4.57.6, "
                "use_kt: false, then `llamafactory-cli export` again."
            )
        stock_export(args)

    tuner.export_model = export_model

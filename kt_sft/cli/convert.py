"""``kt-sft convert``: pack the experts of a checkpoint once, for ``kt_weight_path``."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import CommandError

if TYPE_CHECKING:
    from kt_sft.config import KtConfig
    from kt_sft.models.pack import Packed

HELP = """Pack the experts of a checkpoint into a folder, for kt_weight_path.

MODEL is a folder or a hub name whose files are here. Interrupted or killed, the same command continues where it ended.
The files do not depend on instruction set, threads or NUMA nodes, and are used on any machine that has the checkpoint.

    kt-sft convert ~/models/Qwen3-30B-A3B --to int8 --output ~/packed/qwen3

    kt-sft convert ~/models/Qwen3-30B-A3B --to int4 --calibration text.txt --output ~/packed/qwen3-int4
"""
_CALIBRATION = "INT4 by error-compensated rounding"


def register(app: typer.Typer) -> None:
    app.command("convert", help=HELP)(run)


def run(
    model: Annotated[str, typer.Argument(help="Folder or hub name.")],
    output: Annotated[Path, typer.Option(help="Folder for the packed experts; made if it is not there.")],
    to: Annotated[str, typer.Option(help="int8, int4, bf16, fp8, mxfp4; auto: as stored, else int8.")] = "int8",
    group_size: Annotated[
        int | None, typer.Option(help="Input features per scale: 32, 64, 128, or 0 per output channel.")
    ] = None,
    experts: Annotated[
        Path | None, typer.Option(help="GGUF file, or folder, of the experts, if not MODEL's own.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Default: the physical cores.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text file that the model reads meanwhile.", rich_help_panel=_CALIBRATION)
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="How much of it.", rich_help_panel=_CALIBRATION)] = 65536,
    trust_remote_code: Annotated[bool, typer.Option(help="As in transformers.")] = False,
) -> None:
    from kt_sft.config import KtConfig

    settings = {"weight_format": to, "group_size": group_size, "num_threads": threads, "weight_path": str(output)}
    if experts is not None:
        settings["expert_checkpoint_path"] = str(experts)
    start = time.monotonic()
    try:
        config = KtConfig.from_dict(settings, source="kt-sft convert")
        packed = _pack(model, config, calibration, calibration_tokens, trust_remote_code)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        raise CommandError("interrupted; the same command continues where it ended") from None
    seconds = time.monotonic() - start
    for file in packed.files:
        typer.echo(f"{file}: whole")
    typer.echo(f"{packed.layers} layers, {packed.nbytes / 1e9:.2f} GB, in {seconds:.1f} s. In the training YAML:")
    typer.echo(_yaml(config, output))


def _pack(model: str, config: KtConfig, calibration: Path | None, tokens: int, trust_remote_code: bool) -> Packed:
    from tqdm.contrib.logging import logging_redirect_tqdm

    logger = logging.getLogger("kt_sft")
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with logging_redirect_tqdm():
        if calibration is None:
            from kt_sft.models.pack import pack_checkpoint

            return pack_checkpoint(model, config, **options)
        from kt_sft.models.calibrate import pack_calibrated

        return pack_calibrated(model, config, calibration.read_text(), tokens=tokens, **options)


def _yaml(config: KtConfig, output: Path) -> str:
    lines = [f"kt_weight_path: {output.resolve()}", f"kt_expert_weight_format: {config.weight_format}"]
    if config.group_size is not None:
        lines.append(f"kt_group_size: {config.group_size}")
    return "\n".join(["kt_config:", *(f"  {line}" for line in lines)])

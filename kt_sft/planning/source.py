"""Find config.json, and the size of the checkpoint, of a folder, a file or a hub name; never a weight."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """config.json's content; ``nbytes`` of the checkpoint where its index or files say it; one shard, if there is."""

    name: str
    config: dict[str, Any]
    nbytes: int | None
    nbytes_from: str
    shard: Path | None


def find(model: str | os.PathLike[str]) -> Source:
    """``model``: a folder with config.json, a config.json, or a hub name (two small files are downloaded).

    Raises:
        ValueError: there is no config.json, or it is not a JSON object.
    """
    path = Path(model)
    if path.is_dir():
        config_file, index_file = path / "config.json", path / INDEX
    elif path.is_file():
        config_file, index_file = path, path.with_name(INDEX)
    else:
        config_file, index_file = _from_hub(os.fspath(model))
    config = _read_object(config_file)
    shards = sorted(config_file.parent.glob("*.safetensors"))
    nbytes, nbytes_from = _size(index_file, shards)
    name = path.resolve().name if path.is_dir() else os.fspath(model)
    return Source(name=name, config=config, nbytes=nbytes, nbytes_from=nbytes_from, shard=shards[0] if shards else None)


def _size(index_file: Path, shards: list[Path]) -> tuple[int | None, str]:
    if index_file.exists():
        total = (_read_object(index_file).get("metadata") or {}).get("total_size")
        if isinstance(total, int | float) and total > 0:
            return int(total), f"total_size in {INDEX}"
    if shards:
        return sum(shard.stat().st_size for shard in shards), f"{len(shards)} safetensors files"
    return None, ""


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{file}: expected a model's config.json, found no such file; download it first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a JSON object, got {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def _from_hub(name: str) -> tuple[Path, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    hint = "give a folder or a config.json (hf download MODEL config.json model.safetensors.index.json)"
    try:
        config_file = Path(hf_hub_download(name, "config.json"))
    except HFValidationError:
        raise ValueError(
            f"{name}: expected a folder, a config.json or a hub name, found none of them; {hint}"
        ) from None
    except Exception as error:  # offline, unknown, gated: the hub's own errors have no common base
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name}: no such folder or file, and the hub gave no config.json ({reason}); {hint}"
        ) from None
    try:
        return config_file, Path(hf_hub_download(name, INDEX))
    except (EntryNotFoundError, OSError):
        return config_file, config_file.with_name(INDEX)

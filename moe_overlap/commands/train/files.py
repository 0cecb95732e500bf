"""safetensors and JSON, as files that are either whole or not there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import read_regular, write_atomically

MOST_JSON_BYTES = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written atomically."""
    data = save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    write_atomically(path, data)


def read_tensors(path: Path, *, field: str = "file") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors, metadata). ConfigError, naming `field`, for a file that is missing, truncated or something else."""
    if not path.is_file():
        raise ConfigError(field, str(path), "an existing safetensors file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ConfigError(field, str(path), f"a whole safetensors file ({error})") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path, *, field: str) -> dict[str, Any]:
    """A JSON object. ConfigError, naming `field`, for a file that is missing, truncated or something else."""
    try:
        value = json.loads(read_regular(path, most_bytes=MOST_JSON_BYTES))
    except OSError as error:
        raise ConfigError(field, str(path), f"an existing JSON file ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise ConfigError(field, str(path), "a whole JSON file") from None
    if not isinstance(value, dict):
        raise ConfigError(field, str(path), "a JSON object")
    return value

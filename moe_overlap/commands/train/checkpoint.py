"""Checkpoints that resume a run bit for bit: one safetensors shard per rank and one JSON that makes them count.

    OUT/checkpoints/step-000020/rank-0.safetensors   dense parameters, rank 0's experts, optimizer state, RNG state
                                rank-1.safetensors   rank 1's experts, their optimizer state, RNG state
                                checkpoint.json      written last: step, run, size and SHA-256 of each shard

A folder without `checkpoint.json` is no checkpoint. The data position is the step (see `Corpus.batch`). Equal bits need
the same number of threads too, since matmuls split their sums by it; that is not checked. All ranks read rank 0's
shard: on several machines the folder has to be shared.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from moe_overlap.commands.train.files import read_json, read_tensors, write_json, write_tensors
from moe_overlap.commands.train.model import LanguageModel, split_parameters
from moe_overlap.commands.train.options import IDENTITY, TrainOptions
from moe_overlap.commands.train.text import Corpus
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import World
from moe_overlap.layer.experts import old_name

FORMAT = 1
MANIFEST = "checkpoint.json"
FIELD = "--resume"
_RNG = "rng.torch"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk, whose shards have been found whole."""

    folder: Path
    step: int


def identity(options: TrainOptions, corpus: Corpus) -> dict[str, object]:
    """What a run must share with the checkpoint it resumes: everything that decides its numbers."""
    return {"text": corpus.key} | {name: getattr(options, name) for name in IDENTITY}


def save_checkpoint(
    folder: Path,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    *,
    run: dict[str, object],
    world: World,
    step: int,
) -> Path:
    """Write the state after `step` steps to folder/step-<step>; collective. `run`: see `identity`."""
    target = folder / f"step-{step:06d}"
    if world.rank == 0:
        (target / MANIFEST).unlink(missing_ok=True)  # While shards are replaced this is no checkpoint.
    world.barrier()
    shard = target / _shard_name(world.rank)
    state = _state(model, optimizer, rank=world.rank)
    state[_RNG] = torch.get_rng_state()
    write_tensors(shard, state, {"step": str(step)})
    size_bytes, sha256 = _fingerprint(shard)
    # Every rank vouches for its own shard; the digest travels as bytes.
    mine = torch.tensor([*size_bytes.to_bytes(8, "little"), *bytes.fromhex(sha256)], dtype=torch.uint8)
    shards = [bytes(part.tolist()) for part in world.gather(mine)]
    if world.rank == 0:
        manifest = {
            "format": FORMAT,
            "step": step,
            "run": run,
            "shards": [
                {"bytes": int.from_bytes(part[:8], "little"), "file": _shard_name(rank), "sha256": part[8:].hex()}
                for rank, part in enumerate(shards)
            ],
        }
        write_json(target / MANIFEST, manifest)
    world.barrier()
    return target


def find_checkpoint(path: str, run: dict[str, object]) -> Checkpoint:
    """The checkpoint at `path`, or the newest complete one in it, after checking that it belongs to `run`.

    ConfigError naming --resume when there is none, when it belongs to another run, or when a shard is missing,
    truncated or altered.
    """
    root = Path(path)
    folder = root if (root / MANIFEST).is_file() else _newest(root)
    if folder is None:
        raise ConfigError(FIELD, path, f"a checkpoint folder ({MANIFEST} and its shards) or a folder of them")
    manifest = read_json(folder / MANIFEST, field=FIELD)
    if manifest.get("format") != FORMAT:
        raise ConfigError(FIELD, str(folder), f"a checkpoint of format {FORMAT} (it has {manifest.get('format')!r})")
    _check_run(manifest.get("run"), run, folder)
    step, shards = manifest.get("step"), manifest.get("shards")
    if not isinstance(step, int) or not isinstance(shards, list) or len(shards) != run["ranks"]:
        raise ConfigError(FIELD, str(folder), f"a {MANIFEST} with a step and {run['ranks']} shards")
    for rank, shard in enumerate(shards):
        file = folder / _shard_name(rank)
        if not file.is_file():
            raise ConfigError(FIELD, str(file), "an existing shard")
        if not isinstance(shard, dict) or _fingerprint(file) != (shard.get("bytes"), shard.get("sha256")):
            raise ConfigError(FIELD, str(file), f"the whole shard, {_expected_bytes(shard)} with its SHA-256")
    return Checkpoint(folder=folder, step=step)


def load_checkpoint(
    checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Put a checkpoint's state into `model`, `optimizer` and torch's random generator. Every rank reads two shards."""
    state: dict[str, torch.Tensor] = {}
    for rank in sorted({0, world.rank}):
        file = checkpoint.folder / _shard_name(rank)
        tensors, _ = read_tensors(file, field=FIELD)
        state.update(tensors if rank == world.rank else {k: v for k, v in tensors.items() if k.startswith("dense.")})
    dense, expert = split_parameters(model)
    names = {id(p): f"dense.{n}" for n, p in dense.items()} | {id(p): f"expert.{n}" for n, p in expert.items()}
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                parameter.copy_(_take(state, name, parameter, checkpoint))
                optimizer.state[parameter] = {
                    key: _take(state, f"{name}/{key}", parameter if key != "step" else None, checkpoint).clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
    torch.set_rng_state(_take(state, _RNG, None, checkpoint))


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, *, rank: int) -> dict[str, torch.Tensor]:
    """This rank's tensors by name: `dense.<parameter>` on rank 0, `expert.<parameter>` everywhere, `/<moment>` each."""
    dense, expert = split_parameters(model)
    named = {f"expert.{name}": parameter for name, parameter in expert.items()}
    if rank == 0:
        named |= {f"dense.{name}": parameter for name, parameter in dense.items()}
    state: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        state[name] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"{name}/{key}"] = value
    return state


def _take(state: dict[str, torch.Tensor], name: str, like: torch.Tensor | None, checkpoint: Checkpoint) -> torch.Tensor:
    tensor = state.get(name, state.get(old_name(name)))
    if tensor is None or (like is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype)):
        raise ConfigError(FIELD, str(checkpoint.folder), f"a checkpoint of this model (tensor {name})")
    return tensor


def _check_run(saved: object, run: dict[str, object], folder: Path) -> None:
    if not isinstance(saved, dict):
        raise ConfigError(FIELD, str(folder), f"a {MANIFEST} that says which run it is of")
    for name, value in run.items():
        if name not in saved or saved[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(flag, value, f"{saved.get(name)!r}, as in the checkpoint {folder}")


def _newest(root: Path) -> Path | None:
    complete = (manifest.parent for manifest in root.glob(f"step-*/{MANIFEST}"))
    return max(complete, key=lambda folder: (len(folder.name), folder.name), default=None)


def _shard_name(rank: int) -> str:
    return f"rank-{rank}.safetensors"


def _fingerprint(file: Path) -> tuple[int, str]:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return file.stat().st_size, digest.hexdigest()


def _expected_bytes(shard: object) -> str:
    return f"{shard.get('bytes')} bytes" if isinstance(shard, dict) else "listed"

"""Checkpoints that resume a run bit for bit: one safetensors shard per rank and one JSON that makes them count.

    OUT/checkpoints/step-000020/rank-0.safetensors   dense parameters, rank 0's experts, optimizer state, RNG state
                                rank-1.safetensors   rank 1's experts, their optimizer state, RNG state
                                checkpoint.json      written last: step, run; size, SHA-256 and experts of each shard;
                                                     a digest of all that

A folder without `checkpoint.json` is no checkpoint. Where a step is saved again, its shards get other names, and the
old ones stay until the new `checkpoint.json` has taken their place: whenever a run dies, one of both is whole. The data
position is the step (see `Corpus.batch`). Equal bits need the same number of ranks, and of threads too, since matmuls
split their sums by it. On another number of ranks a run goes on with the same batches: a rank takes its experts from
the shards that have them. Its numbers are then the same but for rounding, and for the loss that balances the experts
where that is one of a rank's own tokens (--balance micro). With more steps than before the rest of the run follows the
learning rates of the longer run.

Experts that were moved (--placement) are in order in the shards; the manifest says where each layer had them, and a run
that moves experts goes on from there, if it has as many ranks and slots, and else from the experts in order.

A rank reads rank 0's shard and those with its experts: on several machines the folder has to be shared. Shards of
format 1 do not say their experts, and have them in order.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from moe_overlap.commands.train.files import read_json, read_tensors, write_json, write_tensors
from moe_overlap.commands.train.model import LanguageModel, moe_layers, router_biases, split_parameters
from moe_overlap.commands.train.options import IDENTITY, TrainOptions
from moe_overlap.commands.train.text import Corpus
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import World
from moe_overlap.layer.experts import old_name
from moe_overlap.layer.moving import experts_in_order
from moe_overlap.placement import Placement

FORMATS = (1, 2)  # the last one is written
MANIFEST = "checkpoint.json"
MOST_STEPS = 10**9
FIELD = "--resume"
CHECKPOINTS = "checkpoints"  # the folder of them in --out
_RNG = "rng.torch"
# Of runs that were saved before there was a choice.
_BEFORE: dict[str, object] = {"balance": "micro", "balance_coef": None, "router": "linear", "mu": 0.0,
                              "locality_bias": False, "text_by": "even"}  # fmt: skip
_MISSING = object()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk, whose shards, `files`, have been found whole; `experts`: those that each has;
    `placements`: of each MoE layer of the run, none where experts stayed in order."""

    folder: Path
    step: int
    experts: tuple[tuple[int, ...], ...]
    files: tuple[Path, ...]
    placements: tuple[Placement, ...]


def identity(options: TrainOptions, corpus: Corpus) -> dict[str, object]:
    """What decides a run's numbers; what it must share with the checkpoint it resumes is checked in `_check_run`."""
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
    """Write the state after `step` steps to folder/step-<step>; collective. `run`: see `identity`. Experts are in order
    while it is written, whatever their placements, which the manifest has; gradients have to be gone where they move.
    """
    placements = [layer.dispatcher.placement for layer in moe_layers(model)]
    if all(one.is_identity for one in placements):
        return _save(folder, model, optimizer, [], run=run, world=world, step=step)
    with experts_in_order(model, optimizer):
        return _save(folder, model, optimizer, [one.to_json() for one in placements], run=run, world=world, step=step)


def _save(
    folder: Path,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    placements: list[dict[str, Any]],
    *,
    run: dict[str, object],
    world: World,
    step: int,
) -> Path:
    target = folder / f"step-{step:06d}"
    times = torch.zeros((), dtype=torch.int64)
    if world.rank == 0:
        for left in target.glob(".*.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)
        times.fill_(_times_saved(target))
    times = world.gather(times)[0]
    shard = target / _shard_name(world.rank, int(times))
    state = _state(model, optimizer, rank=world.rank)
    state[_RNG] = torch.get_rng_state()
    write_tensors(shard, state, {"step": str(step)})
    size_bytes, sha256 = _fingerprint(shard)
    # Every rank vouches for its own shard; the digest travels as bytes.
    mine = torch.tensor([*size_bytes.to_bytes(8, "little"), *bytes.fromhex(sha256)], dtype=torch.uint8)
    shards = [bytes(part.tolist()) for part in world.gather(mine)]
    experts = world.gather(torch.tensor(_experts_of(model)))
    if world.rank == 0:
        manifest: dict[str, Any] = {
            "format": FORMATS[-1],
            "step": step,
            "run": run,
            "placements": placements,
            "shards": [
                {
                    "bytes": int.from_bytes(part[:8], "little"),
                    "experts": experts[rank].tolist(),
                    "file": _shard_name(rank, int(times)),
                    "sha256": part[8:].hex(),
                }
                for rank, part in enumerate(shards)
            ],
        }
        write_json(target / MANIFEST, sealed(manifest))
        kept = {shard["file"] for shard in manifest["shards"]}
        for old in target.glob("rank-*.safetensors"):
            if old.name not in kept:
                old.unlink(missing_ok=True)
    world.barrier()
    return target


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with a digest of all else that it says: one flipped bit would resume at another step."""
    said = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return {**said, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def find_folder(path: str) -> Path:
    """The folder of the checkpoint that `path` means; nothing in it is looked at. ConfigError where there is none."""
    if not path:
        raise ConfigError(FIELD, path, "a folder")
    root = Path(path)
    folder = root if (root / MANIFEST).is_file() else _newest(root) or _newest(root / CHECKPOINTS)
    if folder is None:
        expected = f"a checkpoint folder ({MANIFEST} and its shards), a folder of them, or an --out with some"
        raise ConfigError(FIELD, path, f"{expected} (a run saves them with --checkpoint-every)")
    return folder


def find_checkpoint(path: str, run: dict[str, object]) -> Checkpoint:
    """The checkpoint at `path`, or the newest complete one in it or in the --out that it is, after checking that it
    belongs to `run`.

    ConfigError naming --resume when there is none, when it belongs to another run, or when a shard is missing,
    truncated or altered.
    """
    folder = find_folder(path)
    manifest = read_json(folder / MANIFEST, field=FIELD)
    if not _is_whole(manifest.get("format")) or manifest["format"] not in FORMATS:
        expected = f"a checkpoint of format {' or '.join(map(str, FORMATS))} (it has {manifest.get('format')!r})"
        raise ConfigError(FIELD, str(folder), expected)
    if manifest["format"] > 1 and sealed(manifest) != manifest:
        raise ConfigError(FIELD, str(folder / MANIFEST), "what was written: its digest is another one's")
    ranks = _check_run(manifest.get("run"), run, folder)
    step, shards = manifest.get("step"), manifest.get("shards")
    if not _is_whole(step) or not 0 <= step <= MOST_STEPS:
        raise ConfigError(FIELD, str(folder), f"a {MANIFEST} with a step from 0 to {MOST_STEPS}")
    if not isinstance(shards, list) or len(shards) != ranks:
        raise ConfigError(FIELD, str(folder), f"a {MANIFEST} with a step and {ranks} shards")
    files = []
    for rank, shard in enumerate(shards):
        name = shard.get("file") if isinstance(shard, dict) else None
        if not isinstance(name, str) or not re.fullmatch(rf"rank-{rank}(-\d+)?\.safetensors", name):
            raise ConfigError(FIELD, str(folder), f"a {MANIFEST} that names the shard of rank {rank}")
        file = folder / name
        files.append(file)
        if not file.is_file():
            raise ConfigError(FIELD, str(file), "an existing shard")
        if not isinstance(shard, dict) or _fingerprint(file) != (shard.get("bytes"), shard.get("sha256")):
            raise ConfigError(FIELD, str(file), f"the whole shard, {_expected_bytes(shard)} with its SHA-256")
    experts = _experts_in(shards, run["experts"], folder)
    placements = _placements_in(manifest.get("placements", []), folder)
    return Checkpoint(folder=folder, step=step, experts=experts, files=tuple(files), placements=placements)


def load_checkpoint(
    checkpoint: Checkpoint, model: LanguageModel, optimizer: torch.optim.Optimizer, world: World
) -> None:
    """Put a checkpoint's state into `model`, `optimizer` and torch's random generator. A rank reads the shards that it
    needs."""
    shards = _Shards(checkpoint, _experts_of(model))
    dense, expert = split_parameters(model)
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = next((f"dense.{n}" for n, p in dense.items() if p is parameter), None)
                name = name or next(f"expert.{n}" for n, p in expert.items() if p is parameter)
                parameter.copy_(shards.take(name, parameter))
                optimizer.state[parameter] = {
                    key: shards.take(f"{name}/{key}", parameter if key != "step" else None)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
        for name, bias in router_biases(model).items():
            bias.copy_(shards.take(f"dense.{name}", bias))
    # Nothing in this job draws from it, so that a rank that was not there before may take another one's.
    torch.set_rng_state(shards.read(world.rank % len(checkpoint.experts))[_RNG])


class _Shards:
    """What one rank, with experts `own`, takes from the shards of a checkpoint; each one is read when it is needed."""

    def __init__(self, checkpoint: Checkpoint, own: tuple[int, ...]) -> None:
        self.checkpoint, self.own = checkpoint, own
        self.where = {
            expert: (rank, row) for rank, held in enumerate(checkpoint.experts) for row, expert in enumerate(held)
        }
        self._read: dict[int, dict[str, torch.Tensor]] = {}

    def take(self, name: str, like: torch.Tensor | None) -> torch.Tensor:
        """A tensor of its own: a dense one, or the rows of this rank's experts. ConfigError unless it is as `like`."""
        first = self.where[self.own[0]][0] if name.startswith("expert.") else 0
        tensor = self._named(first, name)
        if name.startswith("expert.") and tensor.dim():
            tensor = torch.stack([self._row(name, expert) for expert in self.own])
        if like is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype):
            raise self._other_model(name)
        return tensor.clone()

    def read(self, rank: int) -> dict[str, torch.Tensor]:
        if rank not in self._read:
            self._read[rank], _ = read_tensors(self.checkpoint.files[rank], field=FIELD)
        return self._read[rank]

    def _row(self, name: str, expert: int) -> torch.Tensor:
        rank, row = self.where[expert]
        tensor = self._named(rank, name)
        if len(tensor) != len(self.checkpoint.experts[rank]):
            raise self._other_model(name)
        return tensor[row]

    def _named(self, rank: int, name: str) -> torch.Tensor:
        state = self.read(rank)
        tensor = state.get(name, state.get(old_name(name)))
        if tensor is None:
            raise self._other_model(name)
        return tensor

    def _other_model(self, name: str) -> ConfigError:
        return ConfigError(FIELD, str(self.checkpoint.folder), f"a checkpoint of this model (tensor {name})")


def _experts_of(model: nn.Module) -> tuple[int, ...]:
    """The experts of this rank, which are the same in each of its layers."""
    return moe_layers(model)[0].ownership.expert_ids


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
    if rank == 0:
        state |= {f"dense.{name}": bias for name, bias in router_biases(model).items()}
    return state


def _check_run(saved: object, run: dict[str, object], folder: Path) -> int:
    """Raises ConfigError unless the checkpoint is of this run, or of one with fewer steps or other ranks. The ranks."""
    if not isinstance(saved, dict) or not _is_whole(saved.get("ranks")) or not _is_whole(saved.get("steps")):
        raise ConfigError(FIELD, str(folder), f"a {MANIFEST} that says which run it is of")
    for name, value in run.items():
        if name == "steps":
            assert isinstance(value, int)
            if value < saved[name]:
                raise ConfigError("--steps", value, f"at least {saved[name]}, as in the checkpoint {folder}")
        elif name != "ranks" and (_BEFORE | saved).get(name, _MISSING) != value:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(flag, value, f"{saved.get(name)!r}, as in the checkpoint {folder}")
    return int(saved["ranks"])


def _is_whole(value: object) -> TypeGuard[int]:
    """Whether JSON says an integer: its true is an int of Python's too."""
    return isinstance(value, int) and not isinstance(value, bool)


def _experts_in(shards: list[dict[str, Any]], total: object, folder: Path) -> tuple[tuple[int, ...], ...]:
    """The experts of each shard. ConfigError unless these are each of `total` experts once."""
    assert isinstance(total, int)
    in_order = torch.arange(total).chunk(len(shards))
    listed = [shard.get("experts", part.tolist()) for shard, part in zip(shards, in_order, strict=True)]
    every = [expert for held in listed if isinstance(held, list) for expert in held]
    if not all(map(_is_whole, every)) or sorted(every) != list(range(total)):
        raise ConfigError(FIELD, str(folder), f"a {MANIFEST} whose shards have each of {total} experts once")
    return tuple(tuple(held) for held in listed)


def _placements_in(said: object, folder: Path) -> tuple[Placement, ...]:
    try:
        return tuple(Placement.from_json(one) for one in said)  # type: ignore[attr-defined]
    except (TypeError, ConfigError):
        raise ConfigError(FIELD, str(folder), f"a {MANIFEST} whose placements are some") from None


def _newest(root: Path) -> Path | None:
    complete = (manifest.parent for manifest in root.glob(f"step-*/{MANIFEST}"))
    return max(complete, key=lambda folder: (len(folder.name), folder.name), default=None)


def _shard_name(rank: int, times: int) -> str:
    """`times`: how often this step was saved in this folder before."""
    return f"rank-{rank}-{times}.safetensors" if times else f"rank-{rank}.safetensors"


def _times_saved(target: Path) -> int:
    """One more than the shards in `target` say, whole or not."""
    said = [re.fullmatch(r"rank-\d+(?:-(\d+))?\.safetensors", file.name) for file in target.glob("rank-*.safetensors")]
    return max((int(one[1] or 0) + 1 for one in said if one), default=0)


def _fingerprint(file: Path) -> tuple[int, str]:
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    return file.stat().st_size, digest.hexdigest()


def _expected_bytes(shard: object) -> str:
    return f"{shard.get('bytes')} bytes" if isinstance(shard, dict) else "listed"

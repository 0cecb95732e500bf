"""Whole models in safetensors files, of which a rank reads only what it has, and which one rank writes.

    FOLDER/model.safetensors                                              or, of larger models,
    FOLDER/model-00001-of-00003.safetensors, ..., model.safetensors.index.json with {"weight_map": {name: file}}

Names are those of the model's own state dict, tensors are whole: files do not depend on the number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from moe_overlap.errors import ConfigError
from moe_overlap.parallel.ownership import Ownership, owned_tensors
from moe_overlap.parallel.state import IDS, tensors_of

SINGLE, INDEX, FORMAT = "model.safetensors", "model.safetensors.index.json", "model-{:05}-of-{:05}.safetensors"
SOURCE, FOLDER = "source", "folder"
HIDDEN = "_checkpoint_wrapped_module."  # by torch's checkpoint_wrapper, from state dicts only
MAX_SHARD_BYTES = 5_000_000_000
Slices = tuple[slice, ...]


@dataclass(frozen=True)
class _Wanted:
    """What this rank has of one tensor: its own rows, the shape of the whole, and which slices go where. `key`: equal
    for names that share a tensor, which a file has by one of them only."""

    key: int
    local: torch.Tensor
    shape: tuple[int, ...]
    pieces: tuple[tuple[Slices, Slices], ...]  # (in `local`, in the whole)


def load_safetensors(model: nn.Module, source: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
    """Fill the parameters and buffers of `model` from safetensors files of the whole model. Each rank reads its own
    experts only, and of what fully_shard has sharded its own part; nothing is sent.

    source: a folder with `model.safetensors` or an index of several files, an index, a file, or several files. Names
    are those of `model.state_dict()`: give the model as it is before DistributedDataParallel and torch.compile. Dtypes
    may differ and are converted. Raises ConfigError for what is missing, unknown or of another shape, before anything
    is written.
    """
    safe_open = _library().safe_open
    wanted = _wanted(model)
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file, names in _files(source):
            try:
                opened = stack.enter_context(safe_open(str(file), framework="pt"))
            except Exception as error:  # the library has a class of its own, and raises others too
                raise ConfigError(SOURCE, str(file), f"a whole safetensors file ({error})") from None
            there = set(opened.keys())
            if names is not None and not names <= there:
                raise ConfigError(SOURCE, str(file), f"what the index says is in it: {_some(names - there)}")
            names = there if names is None else names
            if names & where.keys():
                raise ConfigError(SOURCE, str(file), f"each tensor in one file: {_some(names & where.keys())}")
            where.update(dict.fromkeys(names, opened))
        _check(wanted, where)
        with torch.no_grad():
            for name, one in wanted.items():
                for mine, theirs in one.pieces if name in where else ():
                    one.local[mine].copy_(_read(where[name], name, theirs))


def save_safetensors(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the whole model into a new folder, on all ranks that have parts of it: they gather one tensor after the
    other, and rank 0 writes. A file holds at most `max_shard_bytes`, or one tensor that is larger.

    The folder is there when all of it is written, and not before. Raises ConfigError, on all ranks alike, for one that
    is there already or cannot be written, and for experts that no process group knows.
    """
    target = Path(folder)
    state = model.state_dict()
    parts = [name for name, value in state.items() if hasattr(value, IDS) and not hasattr(value, "device_mesh")]
    if parts:
        expected = ("experts in order, equally many on all ranks of torch.distributed (where a placement has moved "
                    "them: inside of moe_overlap.experts_in_order(model))")  # fmt: skip
        raise ConfigError("model", f"a part of the experts ({_some(parts)})", expected)
    writer = _Writer(target, max_shard_bytes) if _is_first() else None
    _agree(target, None if writer is None else writer.begin())
    seen: set[int] = set()
    tensors = _named(model)
    with _cleaning_up(writer):
        for name, value in state.items():
            if not isinstance(value, torch.Tensor) or id(tensors.get(name, value)) in seen:
                continue  # an extra state, or a parameter that is there by another name
            seen.add(id(tensors.get(name, value)))
            whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
            if writer is not None:
                writer.add(name, whole.detach().to("cpu", copy=True).contiguous())
        _agree(target, None if writer is None else writer.end())


# ---------------------------------------------------------------- reading


def _wanted(model: nn.Module) -> dict[str, _Wanted]:
    """What this rank has of each tensor of the state dict."""
    owned, tensors, found = owned_tensors(model), _named(model), {}
    for name in model.state_dict():
        if name not in tensors:
            raise ConfigError("model", f"{name} in its state dict", "parameters and buffers only")
        if tensors[name].is_meta:
            raise ConfigError("model", f"{name} on the meta device", "model.to_empty(device=...) first")
        found[name] = _part(tensors[name], owned.get(tensors[name]))
    return found


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the names that the state dict has for them."""
    return {name.replace(HIDDEN, ""): tensor for name, tensor in tensors_of(model).items()}


def _part(tensor: Any, owner: Ownership | None) -> _Wanted:
    """The slices of the whole that `tensor` is: experts by their numbers, a DTensor of fully_shard by its place."""
    local, offsets = tensor.detach(), [0] * tensor.dim()
    if hasattr(tensor, "device_mesh"):
        (chunk,) = tensor.__create_chunk_list__()
        local, offsets = local.to_local(), list(chunk.offsets)
    shape = tuple(tensor.shape)
    runs = [(0, offsets[0], local.shape[0])] if shape else []
    if owner is not None and shape:
        each, left = divmod(shape[0], max(1, len(owner.expert_ids)))
        if left:
            raise ConfigError("model", f"a tensor {shape} beside experts", "stacks over the experts")
        shape = (each * owner.num_experts, *shape[1:])
        runs = list(_runs(owner.expert_ids, each, offsets[0], local.shape[0]))
    if not shape:
        return _Wanted(id(tensor), local, shape, (((), ()),))
    rest = [slice(start, start + size) for start, size in zip(offsets[1:], local.shape[1:], strict=True)]
    pieces = [((slice(mine, mine + rows),), (slice(start, start + rows), *rest)) for mine, start, rows in runs]
    return _Wanted(id(tensor), local, shape, tuple(piece for piece in pieces if piece[0][0].start < piece[0][0].stop))


def _runs(ids: tuple[int, ...], each: int, first: int, count: int) -> Iterator[tuple[int, int, int]]:
    """(own row, row of the whole, number of rows): the own rows from `first` on, in runs that the whole has too."""
    rows = [ids[row // each] * each + row % each for row in range(first, first + count)]
    begin = 0
    for at in range(1, count + 1):
        if at == count or rows[at] != rows[at - 1] + 1:
            yield begin, rows[begin], at - begin
            begin = at


def _read(file: Any, name: str, slices: Slices) -> torch.Tensor:
    """These slices of a tensor in a file; no more of it is read."""
    if not slices:
        return file.get_tensor(name)
    return file.get_slice(name)[slices]


def _files(source: Any) -> list[tuple[Path, set[str] | None]]:
    """The files, each with the names that an index says are in it."""
    if not isinstance(source, str | os.PathLike):
        return [(Path(one), None) for one in source]
    path = Path(source)
    if path.is_dir():
        index = path / INDEX
        path = index if index.is_file() else path / SINGLE
    if not path.is_file():
        raise ConfigError(SOURCE, str(path), f"a file, or a folder with {SINGLE} or {INDEX}")
    if path.suffix != ".json":
        return [(path, None)]
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in names.items():
            files.setdefault(path.parent / Path(file).name, set()).add(name)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(SOURCE, str(path), f"an index with a weight_map of names and files ({error!r})") from None
    return list(files.items())


def _check(wanted: dict[str, _Wanted], where: dict[str, Any]) -> None:
    """Raises ConfigError unless names and shapes in the files are those of the model."""
    there = {one.key for name, one in wanted.items() if name in where}
    missing = [name for name, one in wanted.items() if name not in where and one.key not in there]
    if missing:
        raise ConfigError(SOURCE, f"files without {_some(missing)}", "all tensors of the model")
    extra = where.keys() - wanted.keys()
    if extra:
        raise ConfigError(SOURCE, f"files with {_some(extra)}", "no others than the tensors of the model")
    for name in wanted.keys() & where.keys():
        shape = tuple(where[name].get_slice(name).get_shape())
        if shape != wanted[name].shape:
            raise ConfigError(SOURCE, f"{name} {shape}", f"{wanted[name].shape}, the whole tensor of this model")


# ---------------------------------------------------------------- writing


class _Writer:
    """Rank 0's side of saving: files in a folder beside the target, which takes its name at the end. Errors of the disk
    are kept until all ranks can learn of them."""

    def __init__(self, target: Path, max_shard_bytes: int) -> None:
        self.target, self.max_bytes = target, max_shard_bytes
        self.folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        self.pending: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []
        self.bytes = self.total = 0
        self.error: OSError | None = None

    def begin(self) -> OSError | None:
        try:
            if self.target.exists() and (not self.target.is_dir() or any(self.target.iterdir())):
                raise FileExistsError("it is there already")
            self.folder.mkdir(parents=True)
        except OSError as error:
            self.error = error
        return self.error

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self.pending and self.bytes + tensor.nbytes > self.max_bytes:
            self._flush()
        self.pending[name] = tensor
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes

    def end(self) -> OSError | None:
        self._flush()
        try:
            if self.error is None:
                self._name_files()
                _sync(self.folder)
                os.replace(self.folder, self.target)
                _sync(self.target.parent)
        except OSError as error:
            self.error = error
        return self.error

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        pending, self.pending, self.bytes = self.pending, {}, 0
        if self.error is not None:
            return
        file = self.folder / f"{len(self.shards)}"
        try:
            save_file(pending, str(file), metadata={"format": "pt"})
            _sync(file)
        except (OSError, SafetensorError) as error:
            self.error = error if isinstance(error, OSError) else OSError(str(error))
        self.shards.append(list(pending))

    def _name_files(self) -> None:
        count = len(self.shards)
        names = [SINGLE] if count == 1 else [FORMAT.format(at + 1, count) for at in range(count)]
        for at, name in enumerate(names):
            os.replace(self.folder / f"{at}", self.folder / name)
        if count > 1:
            found = {tensor: name for name, shard in zip(names, self.shards, strict=True) for tensor in shard}
            index = {"metadata": {"total_size": self.total}, "weight_map": found}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
            _sync(self.folder / INDEX)


@contextmanager
def _cleaning_up(writer: _Writer | None) -> Iterator[None]:
    try:
        yield
    finally:
        if writer is not None:
            shutil.rmtree(writer.folder, ignore_errors=True)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _agree(target: Path, error: OSError | None) -> None:
    """Raises ConfigError on all ranks where rank 0 has an error."""
    expected = "a new folder that rank 0 can write"
    if dist.is_initialized() and dist.get_world_size() > 1:
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        failed = torch.tensor([int(error is not None)], device=device)
        dist.broadcast(failed, 0)
        if int(failed) and error is None:
            raise ConfigError(FOLDER, str(target), expected)
    if error is not None:
        raise ConfigError(FOLDER, str(target), f"{expected} ({error})") from None


def _sync(path: Path) -> None:
    """What is written survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _some(names: Iterable[str]) -> str:
    """The first of these names, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def _library() -> Any:
    try:
        import safetensors
    except ModuleNotFoundError:
        raise ModuleNotFoundError("safetensors files need the package safetensors: pip install safetensors") from None
    return safetensors

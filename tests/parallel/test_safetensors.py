"""Models in safetensors files: written whole by one rank, read in part by each."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_overlap import ConfigError, MoELayer, load_safetensors, save_safetensors
from moe_overlap.parallel import sharded_files
from tests.parallel.saved import E, F, Job, model_of, whole
from tests.parallel.test_state import Adapted, placed
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import same_bits

WORLD = 2


def contents(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors in the files of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def write(path: Path, **changes: Any) -> Path:
    """The model's file with other tensors; None takes one away."""
    tensors = {**model_of(None).state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: value.contiguous() for name, value in tensors.items() if value is not None}, str(path))
    return path


def check_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        same_bits(got[name], value)


def saved(folder: str, wrap: str, grid: tuple[int, int] | None, max_shard_bytes: int) -> list[str]:
    save_safetensors(Job(wrap, "sgd", grid=grid).model, folder, max_shard_bytes=max_shard_bytes)
    return sorted(path.name for path in Path(folder).iterdir())


def loaded(source: str, wrap: str, grid: tuple[int, int] | None = None) -> tuple[dict[str, torch.Tensor], int]:
    """The whole state after loading, and how many numbers of experts were read."""
    read, count = sharded_files._read, 0

    def counted(file: Any, name: str, slices: Any) -> torch.Tensor:
        nonlocal count
        part = read(file, name, slices)
        count += part.numel() if "experts." in name else 0
        return part

    job = Job(wrap, "sgd", seed=8, grid=grid)
    sharded_files._read = counted
    try:
        load_safetensors(job.model, source)
    finally:
        sharded_files._read = read
    return whole(job.model.state_dict()), count


CASES = [("plain", 1, None), ("plain", 2, None), ("ddp", 3, None), ("fsdp", 2, None), ("fsdp_replicas", 4, (2, 2))]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 6000])
@pytest.mark.parametrize(("wrap", "world", "grid"), CASES)
def test_one_rank_writes_the_whole_model(wrap, world, grid, max_shard_bytes, tmp_path):
    folder = tmp_path / "new" / "model"
    names = gloo_pool(world).run(saved, str(folder), wrap, grid, max_shard_bytes)
    assert names[0] == names[-1]
    check_same(contents(folder), model_of(None).state_dict())
    if max_shard_bytes == 10**9:
        assert names[0] == ["model.safetensors"]
        return
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == model_of(None).state_dict().keys() and len(set(index.values())) == len(names[0]) - 1 > 2
    (other,) = {path.name for path in folder.parent.iterdir()}
    assert other == "model", "nothing else is left"


@pytest.mark.parametrize(("wrap", "world", "grid"), CASES)
def test_a_rank_reads_its_own_experts_only(wrap, world, grid, tmp_path):
    gloo_pool(2).run(saved, str(tmp_path / "model"), "plain", None, 6000)
    want = model_of(None).state_dict()
    total = sum(value.numel() for name, value in want.items() if "experts." in name)
    for state, count in gloo_pool(world).run(loaded, str(tmp_path / "model"), wrap, grid):
        check_same(state, want)
        assert count == total // world, "a part of equal size each, also of replicas that are sharded"


def other_orders(path: str) -> None:
    torch.manual_seed(3)
    want = MoELayer(8, 12, 4, 2).state_dict()
    for slots in ((1, 0, 3, 2), (0, 2, 1, 3), (3, 2, 1, 0)):
        layer = placed(slots)
        layer.load_state_dict(want)
        before = layer.experts.down_proj.detach().clone()
        with torch.no_grad():
            layer.experts.down_proj.zero_()
        load_safetensors(layer, path)
        same_bits(layer.experts.down_proj.detach(), before)


def test_experts_in_another_order(tmp_path):
    torch.manual_seed(3)
    save_file(MoELayer(8, 12, 4, 2).state_dict(), str(tmp_path / "file.safetensors"))
    gloo_pool(WORLD).run(other_orders, str(tmp_path / "file.safetensors"))


def test_virtual_ranks(tmp_path):
    torch.manual_seed(3)
    want = MoELayer(8, 12, E, 2)
    save_safetensors(want, tmp_path / "model")

    def rank(me: Any) -> None:
        layer = MoELayer(8, 12, E, 2, transport=me.transport())
        load_safetensors(layer, tmp_path / "model")
        same_bits(layer.experts.down_proj, want.experts.down_proj[list(layer.ownership.expert_ids)])
        with pytest.raises(ConfigError, match="on all ranks of torch.distributed"):
            save_safetensors(layer, tmp_path / "other")

    virtual_world(WORLD).run(rank)


def test_sources(tmp_path):
    """A folder, a file, an index, several files; other dtypes are converted; shared parameters are there once."""
    want = model_of(None).state_dict()
    file = write(tmp_path / "model.safetensors")
    names = sorted(want)
    for at, part in enumerate((names[:3], names[3:])):
        save_file({name: want[name].float() for name in part}, str(tmp_path / f"part{at}.safetensors"))
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    parts = [tmp_path / "part0.safetensors", tmp_path / "part1.safetensors"]
    for source in (tmp_path, str(file), file, tmp_path / "index.json", parts):
        model = model_of(None, 8)
        load_safetensors(model, source)
        for name, value in model.state_dict().items():
            same_bits(value, want[name].float().double() if source is parts else want[name])


def test_shared_parameters_and_single_numbers(tmp_path):
    """A parameter with two names is there by one of them."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
    model[1].weight = model[0].weight
    model(torch.randn(3, 8))
    save_safetensors(model, tmp_path / "tied")
    assert contents(tmp_path / "tied").keys() == model.state_dict().keys() - {"1.weight"}
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    load_safetensors(model, tmp_path / "tied")
    check_same(model.state_dict(), before)
    assert int(before["2.num_batches_tracked"]) == 1


def in_a_wrapper(folder: str) -> None:
    """Whose state dict and parameters do without its name."""
    want = model_of(dist.group.WORLD)
    for at, wrap in enumerate((checkpoint_wrapper, partial(torch.compile, backend="eager"))):
        model, other = (model_of(dist.group.WORLD, seed) for seed in (3, 8))
        model[1], other[1] = wrap(model[1]), wrap(other[1])
        save_safetensors(model, f"{folder}/{at}")
        load_safetensors(other, f"{folder}/{at}")
        for got, expected in zip(other.parameters(), want.parameters(), strict=True):
            same_bits(got.detach(), expected.detach())


def with_adapters(folder: str) -> None:
    """Two rows of an adapter for each expert."""
    model, other = (model_of(dist.group.WORLD, seed) for seed in (3, 8))
    for one in (model, other):
        one[1].experts = Adapted(one[1].experts)
    save_safetensors(model, folder)
    assert contents(folder)["1.experts.lora_A"].shape == (2 * E, F)
    load_safetensors(other, folder)
    same_bits(other[1].experts.lora_A.detach(), model[1].experts.lora_A.detach())
    same_bits(other[1].experts.down_proj.detach(), model[1].experts.down_proj.detach())


def test_tensors_with_several_rows_for_each_expert(tmp_path):
    gloo_pool(WORLD).run(with_adapters, str(tmp_path / "model"))


def test_layers_in_wrappers(tmp_path):
    gloo_pool(WORLD).run(in_a_wrapper, str(tmp_path))


# ---------------------------------------------------------------- what is refused


def refused(path: str, words: str) -> None:
    """Alike on every rank, and nothing is written."""
    model = model_of(dist.group.WORLD if dist.get_world_size() > 1 else None, 8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ConfigError, match=words):
        load_safetensors(model, path)
    for name, parameter in model.named_parameters():
        same_bits(parameter.detach(), before[name])


WRONG = {
    "missing": ({"1__experts__down_proj": None}, "files without 1.experts.down_proj"),
    "several_missing": (dict.fromkeys(("0__weight", "0__bias", "2__weight", "2__bias")), "0.weight, 2.bias and 1 more"),
    "extra": ({"1__experts__up_proj": torch.zeros(2)}, "files with 1.experts.up_proj"),
    "part": ({"1__experts__down_proj": torch.zeros(6, 8, 12)}, r"1.experts.down_proj \(6, 8, 12\).*\(12, 8, 12\)"),
    "dense_shape": ({"2__weight": torch.zeros(8, 9)}, r"2.weight \(8, 9\)"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_files_are_refused_and_nothing_is_written(wrong, tmp_path):
    changes, words = WRONG[wrong]
    file = write(tmp_path / "model.safetensors", **changes)
    gloo_pool(WORLD).run(refused, str(file), words)


def break_off(folder: Path) -> Path:
    file = write(folder / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    return folder


def index_of(text: str) -> Any:
    def make(folder: Path) -> Path:
        write(folder / "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)
        return folder

    return make


BROKEN = {
    "nothing": (lambda folder: folder, "a file, or a folder with"),
    "truncated": (break_off, "a whole safetensors file"),
    "no_json": (index_of("{"), "weight_map"),
    "no_map": (index_of("[]"), "weight_map"),
    "no_file": (index_of('{"weight_map": {"0.weight": "gone.safetensors"}}'), "a whole safetensors file"),
    "not_in_it": (index_of('{"weight_map": {"other": "model.safetensors"}}'), "what the index says is in it: other"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_sources_are_refused(kind, tmp_path):
    make, words = BROKEN[kind]
    gloo_pool(1).run(refused, str(make(tmp_path)), words)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files = [write(tmp_path / "a.safetensors"), write(tmp_path / "b.safetensors")]
    with pytest.raises(ConfigError, match="each tensor in one file"):
        load_safetensors(model_of(None), files)


def test_a_model_without_memory_is_refused(tmp_path):
    file = write(tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = model_of(None)
    with pytest.raises(ConfigError, match="to_empty"):
        load_safetensors(model, file)


def disturbed(folder: str, fault: str) -> str:
    """What each rank says where rank 0 cannot write."""
    if fault == "there":
        if dist.get_rank() == 0:
            Path(folder).mkdir()
            (Path(folder) / "file").touch()
        dist.barrier()
    if fault == "disk_full" and dist.get_rank() == 0:
        sharded_files.os.replace, replace = full, sharded_files.os.replace
    try:
        with pytest.raises(ConfigError, match="a new folder that rank 0 can write") as caught:
            save_safetensors(model_of(dist.group.WORLD), folder)
    finally:
        if fault == "disk_full" and dist.get_rank() == 0:
            sharded_files.os.replace = replace
    return caught.value.field


def full(*_: object) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize("fault", ["there", "disk_full"])
def test_a_folder_that_cannot_be_written_is_refused_on_all_ranks(fault, tmp_path):
    folder = tmp_path / "model"
    assert gloo_pool(WORLD).run(disturbed, str(folder), fault) == ["folder"] * WORLD
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if fault == "there" else [])

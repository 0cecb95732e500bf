"""Checkpoints of the job: resumed bit for bit, refused where damaged or of another run."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_overlap.commands.train import command, model
from moe_overlap.commands.train.checkpoint import MANIFEST, find_checkpoint, load_checkpoint, save_checkpoint, sealed
from moe_overlap.commands.train.command import run_rank
from moe_overlap.commands.train.files import read_tensors, write_atomically, write_json, write_tensors
from moe_overlap.commands.train.options import parse
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import World
from tests.commands.train.jobs import arguments, events, losses, run, run_on_two
from tests.ranks import gloo_pool
from tests.tolerances import close, same_bits


@pytest.fixture(scope="session")
def whole_run(text, tmp_path_factory):
    """20 steps more than its first checkpoint, two ranks."""
    out = tmp_path_factory.mktemp("whole")
    assert run_on_two(text, out, "--steps", 40, "--checkpoint-every", 20) == [0, 0]
    return out


def copy_of_checkpoint(whole_run, tmp_path):
    target = tmp_path / "checkpoint"
    target.mkdir()
    for file in (whole_run / "checkpoints" / "step-000020").iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def give_old_names(folder):
    """The checkpoint as it was written while the layer itself held the expert weights: the experts' names, and so the
    manifest, are other ones."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for shard in manifest["shards"]:
        file = folder / shard["file"]
        tensors, metadata = read_tensors(file)
        renamed = {name.replace(".moe.experts.", ".moe."): tensor for name, tensor in tensors.items()}
        # Two weights, each with two moments and a step.
        assert len(renamed.keys() - tensors.keys()) == 8 and not any("experts" in name for name in renamed)
        write_tensors(file, renamed, metadata)
        data = file.read_bytes()
        shard |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_json(folder / MANIFEST, sealed(manifest))


def give_format_1(folder):
    """The checkpoint as it was written before shards said which experts they have."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert [shard.pop("experts") for shard in manifest["shards"]] == [[0, 1], [2, 3]]
    write_json(folder / MANIFEST, manifest | {"format": 1})


@pytest.mark.parametrize("made", ["now", "with_old_names", "in_format_1", "without_balance"])
def test_resume_at_step_20_continues_bit_for_bit(made, text, whole_run, tmp_path):
    """Also from names that expert weights had before; what is written then has the new ones."""
    checkpoint = copy_of_checkpoint(whole_run, tmp_path)
    if made == "with_old_names":
        give_old_names(checkpoint)
    if made == "in_format_1":
        give_format_1(checkpoint)
    if made == "without_balance":
        give_no_balance(checkpoint)
    options = ("--steps", 40, "--checkpoint-every", 20, "--resume", checkpoint)
    assert run_on_two(text, tmp_path, *options) == [0, 0]
    assert losses(tmp_path) == losses(whole_run)[20:]
    for rank in range(2):
        shard = f"checkpoints/step-000040/rank-{rank}.safetensors"
        assert (tmp_path / shard).read_bytes() == (whole_run / shard).read_bytes()
    for key in ("held_out_loss", "expert_load"):
        assert events(tmp_path, "end")[0][key] == events(whole_run, "end")[0][key]


RESHARDED = ("--experts", 12, "--batch", 6, "--kind", "top2", "--checkpoint-every", 4)


def one_of_several(argv):
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=dist.get_rank(), group=dist.group.WORLD)
    return run_rank(world, argv)


def run_on(ranks, text, out, *options):
    argv = arguments(text, out, *RESHARDED, *options)
    assert gloo_pool(ranks).run(one_of_several, argv) == [0] * ranks


@pytest.mark.parametrize("balance", ["sequence", "global", "loss-free"])
def test_a_run_goes_on_with_other_ranks(balance, text, tmp_path):
    """2 -> 1 -> 3 ranks: the same batches and losses, but for rounding; and the same balance, as none of these is that
    of a rank's own tokens."""
    chosen = ("--balance", balance, "--steps", 12)
    run_on(2, text, tmp_path / "whole", *chosen)
    checkpoints = tmp_path / "whole" / "checkpoints"
    run_on(1, text, tmp_path / "b", *chosen, "--resume", checkpoints / "step-000004")
    run_on(3, text, tmp_path / "c", *chosen, "--resume", tmp_path / "b" / "checkpoints" / "step-000008")
    for column in ("loss", "aux_loss"):
        whole, b, c = (
            torch.tensor([event[column] for event in events(tmp_path / name, "step")]) for name in ("whole", "b", "c")
        )
        assert [len(b), len(c)] == [8, 4]
        close(b, whole[4:])
        close(c, whole[8:])
    manifest = json.loads((tmp_path / "c" / "checkpoints" / "step-000012" / MANIFEST).read_text())
    assert [shard["experts"] for shard in manifest["shards"]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    biases = [tensor for name, tensor in merged(tmp_path / "c/checkpoints/step-000012").items() if "bias" in name]
    assert len(biases) == (balance == "loss-free") and all(bias.any() for bias in biases)


def give_no_balance(folder):
    """The checkpoint as it was written when every run had the loss of a rank's own tokens."""
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (manifest["run"].pop("balance"), manifest["run"].pop("balance_coef")) == ("micro", None)
    write_json(folder / MANIFEST, sealed(manifest))


def merged(folder):
    """All tensors of a checkpoint, experts of all shards together."""
    found = {}
    for file in sorted(folder.glob("rank-*.safetensors")):
        for name, tensor in read_tensors(file)[0].items():
            if tensor.dim() and name.startswith("expert.") and name in found:
                found[name] = torch.cat([found[name], tensor])
            else:
                found.setdefault(name, tensor)
    return found


@pytest.mark.parametrize(("first", "then"), [(1, 3), (2, 1), (3, 2)])
def test_other_ranks_have_the_same_state(first, then, text, tmp_path):
    """Resumed where nothing is left to do but to save again."""
    run_on(first, text, tmp_path / "a", "--steps", 4)
    checkpoint = find_checkpoint(str(tmp_path / "a" / "checkpoints"), json.loads(
        (tmp_path / "a/checkpoints/step-000004" / MANIFEST).read_text())["run"])  # fmt: skip
    gloo_pool(then).run(saved_again, checkpoint, arguments(text, tmp_path, *RESHARDED), str(tmp_path / "b"))
    before, after = merged(checkpoint.folder), merged(tmp_path / "b" / "step-000004")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same_bits(after[name], tensor)


def saved_again(checkpoint, argv, folder):
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=dist.get_rank(), group=dist.group.WORLD)
    options = parse(argv, ranks=world.size)
    fresh = model.LanguageModel(options, world.group)
    optimizer = torch.optim.AdamW(model.decay_groups(fresh, 0.1))
    load_checkpoint(checkpoint, fresh, optimizer, world)
    save_checkpoint(Path(folder), fresh, optimizer, run={}, world=world, step=checkpoint.step)


def test_more_steps_follow_the_learning_rates_of_the_longer_run(text, tmp_path):
    run_on(1, text, tmp_path / "a", "--steps", 4)
    run_on(1, text, tmp_path / "b", "--steps", 8, "--resume", tmp_path / "a" / "checkpoints")
    run_on(1, text, tmp_path / "whole", "--steps", 8)
    rates = [[event["lr"] for event in events(tmp_path / name, "step")] for name in ("b", "whole")]
    assert rates[0] == rates[1][4:] and len(rates[0]) == 4


def test_the_newest_complete_checkpoint_is_taken(text, whole_run, tmp_path):
    run_identity = json.loads((whole_run / "checkpoints/step-000040" / MANIFEST).read_text())["run"]
    folder = whole_run / "checkpoints"
    assert find_checkpoint(str(folder), run_identity).step == 40
    (folder / "step-000099").mkdir()  # a run that was ended while it wrote its shards
    assert find_checkpoint(str(folder), run_identity).step == 40
    (folder / "step-000099").rmdir()


def test_shards_hold_what_each_rank_owns(whole_run):
    shards = [read_tensors(whole_run / f"checkpoints/step-000020/rank-{rank}.safetensors")[0] for rank in range(2)]
    assert any(name.startswith("dense.") for name in shards[0])
    assert not any(name.startswith("dense.") for name in shards[1])
    experts = [name for name in shards[1] if name.endswith("gate_up_proj")]
    assert experts and all(shards[0][name].shape[0] == shards[1][name].shape[0] == 2 for name in experts)
    assert all({name, f"{name}/exp_avg", f"{name}/exp_avg_sq", f"{name}/step"} <= set(shards[1]) for name in experts)


def saved_twice(folder, fail):
    """The same step again, in the folder that has it; `fail`: all ranks die when rank 0's shard is there."""
    from moe_overlap.commands.train import checkpoint

    world = World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=dist.get_rank(), group=dist.group.WORLD)
    argv = arguments(Path(folder) / "text", Path(folder), *RESHARDED)
    options = parse(argv, ranks=world.size)
    made = model.LanguageModel(options, world.group)
    optimizer = torch.optim.AdamW(model.decay_groups(made, 0.1))
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run = {"ranks": world.size, "steps": 4, "experts": options.experts}
    where = save_checkpoint(Path(folder), made, optimizer, run=run, world=world, step=4)
    if fail:
        write = checkpoint.write_tensors

        def failing(path, *rest):
            if world.rank == 0:
                write(path, *rest)
            raise OSError("no space left")

        checkpoint.write_tensors = failing
        try:
            with pytest.raises(OSError):
                save_checkpoint(Path(folder), made, optimizer, run=run, world=world, step=4)
        finally:
            checkpoint.write_tensors = write
    else:
        (where / ".rank-0.safetensors.1.abcd.tmp").write_bytes(b"left by a run that was killed")
        world.barrier()
        save_checkpoint(Path(folder), made, optimizer, run=run, world=world, step=4)
    world.barrier()
    found = find_checkpoint(folder, run)
    return found.step, sorted(file.name for file in where.iterdir()), [file.name for file in found.files]


@pytest.mark.parametrize("fail", [False, True])
def test_a_step_that_is_saved_again_never_leaves_none(fail, tmp_path):
    for step, names, files in gloo_pool(2).run(saved_twice, str(tmp_path), fail):
        assert step == 4
        if fail:
            assert files == ["rank-0.safetensors", "rank-1.safetensors"] and set(files) < set(names)
        else:
            assert files == ["rank-0-1.safetensors", "rank-1-1.safetensors"]
            assert names == ["checkpoint.json", *files]


def truncate(folder):
    file = folder / "rank-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def flip_a_bit(folder):
    data = bytearray((folder / "rank-0.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / "rank-0.safetensors").write_bytes(bytes(data))


def remove_a_shard(folder):
    (folder / "rank-1.safetensors").unlink()


def truncate_manifest(folder):
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])


def remove_manifest(folder):
    (folder / MANIFEST).unlink()


def other_format(folder):
    (folder / MANIFEST).write_text('{"format": 99}')


def true_format(folder):
    """No format 1, though true == 1."""
    give_format_1(folder)
    write_json(folder / MANIFEST, json.loads((folder / MANIFEST).read_text()) | {"format": True})


def true_steps(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["run"]["steps"] = True
    write_json(folder / MANIFEST, sealed(manifest))


def true_expert(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["experts"] = [0, True]
    write_json(folder / MANIFEST, sealed(manifest))


def experts_twice(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][1]["experts"] = manifest["shards"][0]["experts"]
    write_json(folder / MANIFEST, sealed(manifest))


def another_step(folder):
    """One flipped bit: it would resume at another place in the data."""
    text = (folder / MANIFEST).read_text()
    assert '"step": 20' in text
    (folder / MANIFEST).write_text(text.replace('"step": 20', '"step": 21'))


def impossible_step(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, sealed(manifest | {"step": 10**30}))


def negative_step(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    write_json(folder / MANIFEST, sealed(manifest | {"step": -1}))


def shard_elsewhere(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["file"] = "../step-000040/rank-0.safetensors"
    write_json(folder / MANIFEST, sealed(manifest))


def not_an_object(folder):
    (folder / MANIFEST).write_text("[]")


def test_a_folder_without_a_checkpoint_is_refused_before_the_text_is_read(text, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_corpus", None)
    with pytest.raises(ConfigError, match="--checkpoint-every") as caught:
        run(text, tmp_path / "new", "--ranks", 2, "--resume", tmp_path)
    assert caught.value.field == "--resume"


DAMAGES = [truncate, flip_a_bit, remove_a_shard, truncate_manifest, remove_manifest, other_format, true_format,
           true_steps, true_expert, experts_twice, another_step,
           impossible_step, negative_step, shard_elsewhere, not_an_object]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused(damage, text, whole_run, tmp_path):
    checkpoint = copy_of_checkpoint(whole_run, tmp_path)
    damage(checkpoint)
    with pytest.raises(ConfigError) as caught:
        run(text, tmp_path, "--ranks", 2, "--steps", 40, "--resume", checkpoint)
    assert caught.value.field == "--resume" and str(checkpoint) in caught.value.value


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--lr", 0.001),
        ("--steps", 39),
        ("--batch", 8),
        ("--seed", 1),
        ("--kind", "top2"),
        ("--balance", "global"),
        ("--balance-coef", 0.5),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(option, value, text, whole_run, tmp_path):
    options = {"--ranks": 2, "--steps": 40, "--resume": whole_run / "checkpoints", option: value}
    with pytest.raises(ConfigError) as caught:
        run(text, tmp_path, *(word for pair in options.items() for word in pair))
    assert (caught.value.field, caught.value.value) == (option, value)


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [child.name for child in path.parent.iterdir()] == ["file"]

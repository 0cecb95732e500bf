"""Checkpoints of the job: resumed bit for bit, refused where damaged or of another run."""

import hashlib
import json
import os

import pytest

from moe_overlap.commands.train.checkpoint import MANIFEST, find_checkpoint
from moe_overlap.commands.train.files import read_tensors, write_atomically, write_json, write_tensors
from moe_overlap.errors import ConfigError
from tests.commands.train.jobs import events, losses, run, run_on_two


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
    write_json(folder / MANIFEST, manifest)


@pytest.mark.parametrize("names", ["new", "old"])
def test_resume_at_step_20_continues_bit_for_bit(names, text, whole_run, tmp_path):
    """Also from names that expert weights had before; what is written then has the new ones."""
    checkpoint = copy_of_checkpoint(whole_run, tmp_path)
    if names == "old":
        give_old_names(checkpoint)
    options = ("--steps", 40, "--checkpoint-every", 20, "--resume", checkpoint)
    assert run_on_two(text, tmp_path, *options) == [0, 0]
    assert losses(tmp_path) == losses(whole_run)[20:]
    for rank in range(2):
        shard = f"checkpoints/step-000040/rank-{rank}.safetensors"
        assert (tmp_path / shard).read_bytes() == (whole_run / shard).read_bytes()
    for key in ("held_out_loss", "expert_load"):
        assert events(tmp_path, "end")[0][key] == events(whole_run, "end")[0][key]


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


def not_an_object(folder):
    (folder / MANIFEST).write_text("[]")


DAMAGES = [truncate, flip_a_bit, remove_a_shard, truncate_manifest, remove_manifest, other_format, not_an_object]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused(damage, text, whole_run, tmp_path):
    checkpoint = copy_of_checkpoint(whole_run, tmp_path)
    damage(checkpoint)
    with pytest.raises(ConfigError) as caught:
        run(text, tmp_path, "--ranks", 2, "--steps", 40, "--resume", checkpoint)
    assert caught.value.field == "--resume" and str(checkpoint) in caught.value.value


@pytest.mark.parametrize(
    ("option", "value"), [("--lr", 0.001), ("--steps", 50), ("--ranks", 1), ("--seed", 1), ("--kind", "top2")]
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

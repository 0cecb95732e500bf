"""State dicts that would lose experts, or mix those of different ranks, are refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from moe_overlap import ConfigError, MoELayer, mark_experts, save_safetensors
from tests.parallel.saved import D, E, F, model_of, through_files, wrapped
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import same_bits

WORLD = 2


def file_of_one_rank(path: str, kind: str) -> None:
    """torch.save on rank 0, loaded everywhere."""
    model = wrapped(kind)
    state = model.state_dict()
    if dist.get_rank() == 0:
        torch.save(state, path)
    dist.barrier()
    read = torch.load(path, weights_only=True)
    if dist.get_rank() == 0:
        model.load_state_dict(read)
        return
    with pytest.raises(ConfigError, match=r"experts \(0, 1, 2, 3, 4, 5\).*\(6, 7, 8, 9, 10, 11\)"):
        model.load_state_dict(read)


@pytest.mark.parametrize("kind", ["bare", "ddp", "compiled", "averaged"])
def test_the_file_of_rank_0_is_refused_on_rank_1(kind, tmp_path):
    gloo_pool(WORLD).run(file_of_one_rank, str(tmp_path / "file"), kind)


def plain_parts() -> None:
    """State dicts of experts as they were before they said who they are."""
    model = model_of(dist.group.WORLD)
    state = model.state_dict()
    old = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in state.items()}
    other = model_of(dist.group.WORLD, 8)
    with pytest.raises(ConfigError, match="mark_experts"):
        other.load_state_dict(old)
    renamed = {name.replace("experts.", ""): value for name, value in old.items()}
    with pytest.raises(ConfigError, match="mark_experts"):
        other.load_state_dict(renamed)
    for state in (old, renamed):
        experts = [value for name, value in state.items() if "_proj" in name]
        for ids in ((0, 1, 2, 3, 4, 5), other[1]):
            marked = {n: mark_experts(v.clone(), ids) if "_proj" in n else v for n, v in state.items()}
            other = model_of(dist.group.WORLD, 8)
            if dist.get_rank() == 0 or isinstance(ids, MoELayer):
                other.load_state_dict(marked)
                same_bits(other[1].experts.down_proj, model[1].experts.down_proj)
            else:
                with pytest.raises(ConfigError, match="another rank's file"):
                    other.load_state_dict(marked)
        assert len(experts) == 2
    with pytest.raises(ConfigError, match="rows for 5 experts"):
        mark_experts(old["1.experts.down_proj"], range(5))
    with pytest.raises(ConfigError, match="numbers of experts"):
        mark_experts(old, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({**model.state_dict(), "1.experts.down_proj": torch.zeros(E, D, F + 1)})


def test_a_part_is_refused_unless_it_is_marked():
    gloo_pool(WORLD).run(plain_parts)


def one_rank(path: str) -> None:
    state = model_of(dist.group.WORLD).state_dict()
    if dist.get_rank() == 0:
        torch.save(state, path)


def test_the_file_of_one_rank_is_refused_by_a_layer_of_all_experts(tmp_path):
    """In a process that knows nothing of ranks."""
    gloo_pool(WORLD).run(one_rank, str(tmp_path / "file"))
    model = model_of(None)
    with pytest.raises(ConfigError, match="experts"):
        model.load_state_dict(torch.load(tmp_path / "file", weights_only=True))


def mixed_ranks(folder: str) -> None:
    """The plain parameters, as they were saved before: torch.distributed.checkpoint keeps one of each name."""
    model = model_of(dist.group.WORLD)
    dcp.save({name: parameter.detach() for name, parameter in model.named_parameters()}, checkpoint_id=folder)
    state = model_of(dist.group.WORLD, 8).state_dict()
    with pytest.raises(dcp.CheckpointException, match=r"[Ss]ize|shape"):
        dcp.load(state, checkpoint_id=folder)


def test_old_checkpoints_of_mixed_ranks_are_refused(tmp_path):
    gloo_pool(WORLD).run(mixed_ranks, str(tmp_path))


def raw_parameters(folder: str) -> None:
    for model in (model_of(dist.group.WORLD), copy.deepcopy(model_of(dist.group.WORLD))):
        with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
            dcp.save(dict(model.named_parameters()), checkpoint_id=folder)
    file = io.BytesIO()
    torch.save(dict(model.named_parameters()), file)
    file.seek(0)
    with pytest.raises(ConfigError, match="mark_experts"):
        model.load_state_dict(torch.load(file, weights_only=True))


def test_parameters_instead_of_a_state_dict(tmp_path):
    gloo_pool(WORLD).run(raw_parameters, str(tmp_path))


def undivided(folder: str) -> None:
    model = nn.Sequential(MoELayer(8, 16, num_experts=WORLD + 1, top_k=1, group=dist.group.WORLD))
    with pytest.raises(dcp.CheckpointException, match="equally many on all ranks"):
        dcp.save(model.state_dict(), checkpoint_id=f"{folder}/step")
    with pytest.raises(ConfigError, match="equally many on all ranks"):
        save_safetensors(model, f"{folder}/model")


def test_experts_that_the_ranks_do_not_divide(tmp_path):
    gloo_pool(WORLD).run(undivided, str(tmp_path))


def pickled() -> None:
    layer = model_of(dist.group.WORLD)[1]
    for part in (layer, nn.Sequential(layer), layer.experts, AveragedModel(layer)):
        with pytest.raises(ConfigError, match=r"torch.distributed.checkpoint"):
            torch.save(part, io.BytesIO())


def test_a_layer_of_several_ranks_is_not_pickled():
    gloo_pool(WORLD).run(pickled)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    torch.save(model, io.BytesIO())
    return model.state_dict()


def test_a_layer_of_one_rank_is_pickled():
    """And goes to another process so."""
    model = model_of(None)
    (got,) = gloo_pool(1).run(state_of, model)
    for name, value in model.state_dict().items():
        assert type(value) is torch.Tensor
        same_bits(got[name], value)


def test_virtual_ranks_are_plain_and_refused(tmp_path):
    def rank(me: Any) -> None:
        torch.manual_seed(3)
        layer = MoELayer(D, F, E, 2, transport=me.transport())
        state = through_files(layer.state_dict())
        assert all(type(value) is torch.Tensor for value in state.values())
        layer.load_state_dict(state)
        for name in ("experts.down_proj", "experts.gate_up_proj"):
            assert state[name].expert_ids == layer.ownership.expert_ids
        states.append((layer, layer.state_dict()))

    states: list[Any] = []
    virtual_world(WORLD).run(rank)
    (first, _), (_, other) = states
    with pytest.raises(ConfigError, match="another rank's file"):
        first.load_state_dict(other)
    for state in (other, through_files(other), copy.deepcopy(other)):
        with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
            dcp.save(state, checkpoint_id=str(tmp_path / "new"))
    with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
        dcp.async_save(other, checkpoint_id=str(tmp_path / "new")).result()
    dcp.save(MoELayer(D, F, E, 2).state_dict(), checkpoint_id=str(tmp_path / "whole"))
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        dcp.load(other, checkpoint_id=str(tmp_path / "whole"))


def after_the_group() -> Any:
    """A job that ends torch.distributed before it saves."""
    model = model_of(dist.new_group([0, 1]))
    dist.destroy_process_group(model[1].transport.group)
    state = model.state_dict()
    assert type(state["1.experts.down_proj"]) is torch.Tensor
    model.load_state_dict(through_files(state))
    return state["1.experts.down_proj"].expert_ids


def test_a_group_that_is_destroyed():
    assert gloo_pool(WORLD).run(after_the_group) == [(0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11)]

"""The optimizer's state of experts says which ones they are, whichever function it is asked by."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

import moe_overlap
from moe_overlap import ConfigError, MoELayer, mark_experts, prepare
from tests.parallel.saved import D, E, F, Job, model_of, optimizer_of, whole
from tests.ranks import gloo_pool, virtual_world
from tests.tolerances import same_bits

WORLD = 2
KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
WAYS = ("ours", "torch", "torch_flat", "torch_full", "torch_broadcast", "plain")
OTHERS = r"another rank's file"


def stepped(wrap: str, kind: str, seed: int = 3, steps: int = 2) -> Job:
    job = Job(wrap, kind, seed=seed)
    for number in range(steps):
        job.step(number)
    return job


def states(job: Job) -> dict[str, torch.Tensor]:
    """This rank's own tensors, by the name of the parameter and their key."""
    found = {}
    for name, parameter in job.model.named_parameters():
        for key, value in job.optimizer.state[parameter].items():
            found[f"{name}/{key}"] = (value.to_local() if isinstance(value, DTensor) else value).clone()
    return found


def check_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        same_bits(got[name], value)


def shown(wrap: str, kind: str) -> None:
    """By every function that gives a state, tensors of experts are DTensors of all experts."""
    job = stepped(wrap, kind)
    for key in KEYS[kind]:
        name = f"1.experts.down_proj.{key}"
        flat = moe_overlap.optimizer_state_dict(job.model, job.optimizer)[f"state.{name}"]
        nested = get_optimizer_state_dict(job.call, job.optimizer)["state"]["1.experts.down_proj"][key]
        full = get_optimizer_state_dict(job.call, job.optimizer, options=StateDictOptions(full_state_dict=True))
        index = [id(p) for group in job.optimizer.param_groups for p in group["params"]].index(
            id(job.model[1].experts.down_proj)
        )
        own = job.optimizer.state_dict()["state"][index][key]
        for value in (flat, nested, own):
            assert (
                isinstance(value, DTensor) and tuple(value.shape) == (E, D, F) and len(value.expert_ids) == E // WORLD
            )
            same_bits(value.full_tensor(), full["state"]["1.experts.down_proj"][key])
        assert type(job.optimizer.state[job.model[1].experts.down_proj][key]) is torch.Tensor


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("wrap", ["plain", "ddp", "fsdp"])
def test_states_of_experts_are_shown_whole(wrap, kind):
    gloo_pool(WORLD).run(shown, wrap, kind)


def round_trip(way: str, wrap: str, kind: str, path: str) -> None:
    """Into a new optimizer; `plain`: optimizer.state_dict() by a file of each rank."""
    job = stepped(wrap, kind)
    want = states(job)
    other = Job(wrap, kind, seed=8)
    full = StateDictOptions(full_state_dict=True)
    if way == "ours":
        state = moe_overlap.optimizer_state_dict(job.model, job.optimizer)
        moe_overlap.load_optimizer_state_dict(other.model, other.optimizer, copy.deepcopy(state))
    elif way == "plain":
        file = f"{path}/rank-{job.rank}"
        torch.save(job.optimizer.state_dict(), file)
        other.optimizer.load_state_dict(torch.load(file, weights_only=True))
        other.step(2)  # what a new optimizer has loaded is looked at here
        job.step(2)
        want = states(job)
    elif way in ("torch", "torch_flat"):
        options = StateDictOptions(flatten_optimizer_state_dict=way == "torch_flat")
        state = copy.deepcopy(get_optimizer_state_dict(job.model, job.optimizer, options=options))
        set_optimizer_state_dict(other.model, other.optimizer, state, options=options)
    else:
        state = copy.deepcopy(get_optimizer_state_dict(job.model, job.optimizer, options=full))
        if way == "torch_broadcast":
            full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            state = state if job.rank == 0 else {}
        set_optimizer_state_dict(other.model, other.optimizer, state, options=full)
    if way == "plain":
        return
    check_same(states(other), want)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("wrap", ["plain", "ddp", "fsdp"])
@pytest.mark.parametrize("way", WAYS)
def test_states_go_into_another_optimizer(way, wrap, kind, tmp_path):
    gloo_pool(WORLD).run(round_trip, way, wrap, kind, str(tmp_path))


def by_torch(folder: str) -> list[dict[str, Any]]:
    """Saved by torch's own functions, which once kept the state of one rank."""
    job = stepped("plain", "adamw")
    dcp.save({"optimizer": get_optimizer_state_dict(job.model, job.optimizer)}, checkpoint_id=folder)
    return job.whole()["optimizer"]


def loaded_by_torch(folder: str) -> dict[str, Any]:
    job = Job("plain", "adamw", seed=8)
    state = {"optimizer": get_optimizer_state_dict(job.model, job.optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(job.model, job.optimizer, state["optimizer"])
    return job.whole()["optimizer"]


@pytest.mark.parametrize("m", [1, 2, 3])
def test_torchs_own_functions_lose_no_rank(m, tmp_path):
    want = gloo_pool(WORLD).run(by_torch, str(tmp_path))[0]
    for got in gloo_pool(m).run(loaded_by_torch, str(tmp_path)):
        check_same({n: v for n, v in got.items() if isinstance(v, torch.Tensor)},
                   {n: v for n, v in want.items() if isinstance(v, torch.Tensor)})  # fmt: skip


def from_one_process() -> None:
    """The file of a process with all experts, in a new optimizer and in one that has stepped."""
    whole_model = model_of(None)
    of_all = torch.optim.AdamW(whole_model.parameters())
    for parameter in whole_model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    of_all.step()
    for fresh in (True, False):
        model = moe_overlap.prepare(model_of(dist.group.WORLD, 8))
        optimizer = torch.optim.AdamW(model.parameters())
        for steps in range(2 - fresh):
            if steps == 1 - fresh:
                optimizer.load_state_dict(copy.deepcopy(of_all.state_dict()))
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
        first = dist.get_rank() * E // WORLD
        want = of_all.state[whole_model[1].experts.down_proj]["exp_avg"][first : first + E // WORLD]
        got = optimizer.state[model[1].experts.down_proj]["exp_avg"]
        same_bits(got, want * 0.9)
        assert got.untyped_storage().nbytes() == got.nbytes


def test_whole_states_by_the_optimizers_own_function():
    gloo_pool(WORLD).run(from_one_process)


# ---------------------------------------------------------------- what is refused


def file_of_rank_0(kind: str, path: str, fresh: bool) -> None:
    job = stepped("plain", kind)
    if job.rank == 0:
        torch.save(job.optimizer.state_dict(), path)
    dist.barrier()
    read = torch.load(path, weights_only=True)
    other = Job("plain", kind) if fresh else stepped("plain", kind, steps=1)
    before = copy.deepcopy(other.model.state_dict())
    if job.rank == 0:
        other.optimizer.load_state_dict(read)
    elif fresh:
        other.optimizer.load_state_dict(read)
        for parameter in other.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(ConfigError, match=OTHERS):
            other.optimizer.step()
    else:
        with pytest.raises(ConfigError, match=OTHERS):
            other.optimizer.load_state_dict(read)
    check_local(other.model.state_dict(), before)


def check_local(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name, value in want.items():
        same_bits(*(one.to_local() if isinstance(one, DTensor) else one for one in (got[name], value)))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("kind", KEYS)
def test_the_file_of_rank_0_is_refused_on_rank_1(kind, fresh, tmp_path):
    """By an optimizer that has stepped when it loads it, by a new one when it steps, before a weight has changed."""
    gloo_pool(WORLD).run(file_of_rank_0, kind, str(tmp_path / "file"), fresh)


def plain_parts() -> None:
    """States from before they said which experts they are of."""
    job = stepped("plain", "adamw")
    old = copy.deepcopy(job.optimizer.state_dict())
    for state in old["state"].values():
        state.update({k: v.to_local() for k, v in state.items() if isinstance(v, DTensor)})
    with pytest.raises(ConfigError, match="mark_experts"):
        job.optimizer.load_state_dict(old)
    experts = [i for i, state in old["state"].items() if state["exp_avg"].dim() == 3]
    assert len(experts) == 2
    for index in experts:
        mark_experts(old["state"][index], job.model[1])
    want = states(job)
    job.step(5)
    job.optimizer.load_state_dict(old)
    check_same(states(job), want)
    for index in experts:
        mark_experts(old["state"][index], [(one + 6) % E for one in job.model[1].ownership.expert_ids])
    with pytest.raises(ConfigError, match=OTHERS):
        job.optimizer.load_state_dict(old)


def test_a_part_is_refused_unless_it_is_marked():
    gloo_pool(WORLD).run(plain_parts)


class Rows(torch.optim.Optimizer):
    """Keeps a state of a form of its own for each parameter: a mean for each row, or one flat block."""

    def __init__(self, parameters: Any, form: str) -> None:
        super().__init__(parameters, {})
        self.form = form

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    value = parameter.grad.mean(-1, keepdim=True)
                    self.state[parameter]["kept"] = value if self.form == "rows" else value.reshape(-1)[:5].clone()


def other_forms(folder: str) -> None:
    job = Job("plain", "sgd")
    job.optimizer = Rows(job.model.parameters(), "rows")
    job.step(0)
    job.save(folder)
    want = states(job)
    other = Job("plain", "sgd", seed=8)
    other.optimizer = Rows(other.model.parameters(), "rows")
    other.step(1)
    other.load(folder)
    check_same(states(other), want)
    job.optimizer = Rows(job.model.parameters(), "flat")
    job.step(0)
    with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
        job.save(f"{folder}/flat")
    want = states(job)
    job.optimizer.load_state_dict(job.optimizer.state_dict())
    check_same(states(job), want)
    job.step(0)


def test_states_of_another_form(tmp_path):
    """With a row for each expert, or not: those are of this rank alone, and torch.distributed.checkpoint refused."""
    gloo_pool(WORLD).run(other_forms, str(tmp_path))


def test_virtual_ranks(tmp_path):
    def rank(me: Any) -> None:
        torch.manual_seed(3)
        layer = MoELayer(D, F, E, 2, transport=me.transport())
        optimizer = torch.optim.AdamW(layer.parameters())
        layer(torch.randn(5, D)).sum().backward()
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        kept.append((layer, optimizer, moe_overlap.optimizer_state_dict(layer, optimizer)))

    kept: list[Any] = []
    virtual_world(WORLD).run(rank)
    (layer, optimizer, mine), (_, other, others) = kept
    fresh = torch.optim.AdamW(layer.parameters())
    fresh.load_state_dict(other.state_dict())
    with pytest.raises(ConfigError, match=OTHERS):
        fresh.step()
    moe_overlap.load_optimizer_state_dict(layer, optimizer, mine)
    with pytest.raises(ConfigError, match=OTHERS):
        moe_overlap.load_optimizer_state_dict(layer, optimizer, others)
    with pytest.raises(dcp.CheckpointException, match="a part of the experts"):
        dcp.save(mine, checkpoint_id=str(tmp_path))


# ---------------------------------------------------------------- where nothing changes


def test_one_rank_is_left_alone():
    job = stepped("plain", "adamw")
    assert not job.optimizer._optimizer_state_dict_post_hooks
    assert all(
        type(v) is torch.Tensor for state in job.optimizer.state_dict()["state"].values() for v in state.values()
    )


def half_precision() -> None:
    """A new optimizer's first step, which torch makes of zeros, where gradients are kept in float32."""
    layer = MoELayer(D, F, E, 2, group=dist.group.WORLD, dtype=torch.bfloat16)
    model = prepare(nn.Sequential(layer), accumulate_fp32=True)
    optimizer = optimizer_of(model, "adamw")
    state = moe_overlap.optimizer_state_dict(model, optimizer)
    assert state["state.0.experts.down_proj.exp_avg"].shape[0] == E
    moe_overlap.load_optimizer_state_dict(model, optimizer, state)
    assert {parameter.grad_dtype for parameter in layer.experts.parameters()} == {torch.float32}


def test_gradients_that_are_kept_in_float32():
    gloo_pool(WORLD).run(half_precision)


def deep_copies() -> None:
    job = stepped("plain", "adamw")
    model, optimizer = copy.deepcopy((job.model, job.optimizer))
    want = whole(moe_overlap.optimizer_state_dict(job.model, job.optimizer))
    got = whole(moe_overlap.optimizer_state_dict(model, optimizer))
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            same_bits(got[name], value)


def test_deep_copies():
    gloo_pool(WORLD).run(deep_copies)

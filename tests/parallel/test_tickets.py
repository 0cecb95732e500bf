"""Tickets under wrappers and checkpoints: a layer whose three stages the user calls, with own ops between them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_overlap import MoELayer, prepare
from moe_overlap.measure.timeline import record
from tests.parallel.expected import WORLD, run_once
from tests.parallel.model import CALLS, EXPERTS, MODES, D, E, F, Op, Shell, gradients, meshes, tokens
from tests.ranks import gloo_pool
from tests.tolerances import same_bits


class Staged(nn.Module):
    """h + op(op(h)) with the layer's exchanges beside both ops."""

    def __init__(self, mode: str, group, dedup: str) -> None:
        super().__init__()
        self.moe = MoELayer(D, F, E, 2, schedule="chunked(2)", group=group, dedup=dedup, dtype=torch.float64)
        self.first, self.second = Op(mode), Op(mode)

    def forward(self, h):
        ticket = self.moe.begin(h)
        h = self.first(h)
        self.moe.run_experts(ticket)
        h = self.second(h)
        return h + self.moe.finish(ticket)


def run(wrapper, mode, dedup):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(D, D, dtype=torch.float64), Shell(Staged(mode, dist.group.WORLD, dedup), mode))
    staged, call = model[1].block, model
    prepare(model)
    if wrapper == "ddp":
        call = DistributedDataParallel(model, bucket_cap_mb=0.001)
    if wrapper == "fsdp":
        for unit in (staged, model):
            fully_shard(unit, mesh=meshes()["data"], ignored_params=set(staged.moe.expert_weights))
    with record() as events:
        call(tokens(dist.get_rank())).square().mean().backward()
    assert [staged.first.calls, staged.second.calls] == [CALLS[mode]] * 2
    order = [event.action for event in events if event.phase == "backward" and event.lane == "comp"]
    return gradients(model), order, Counter((event.phase, event.action) for event in events if event.lane == "wire")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", ["bare", "ddp", "fsdp"])
@pytest.mark.parametrize("dedup", ["off", "on"])
def test_tickets(dedup, wrapper, mode):
    plain = run_once(run, "bare", "none", dedup)
    assert (("backward", "Mt") in plain[0][2]) == (dedup == "on")
    own = [grads for grads, _, _ in plain]
    for rank, (got, order, wire) in enumerate(gloo_pool(WORLD).run(run, wrapper, mode, dedup)):
        assert order == plain[rank][1]
        forward = {action: n for (phase, action), n in plain[rank][2].items() if phase == "forward"}
        again = {("recompute", action): n for action, n in forward.items()} if mode in ("block", "selective") else {}
        assert wire == plain[rank][2] + Counter(again)
        for name in own[rank]:
            averaged = wrapper != "bare" and not name.endswith(EXPERTS)
            same_bits(got[name], (own[0][name] + own[1][name]) / WORLD if averaged else own[rank][name])

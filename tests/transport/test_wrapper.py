"""Transports and the contract: everything that the Protocol names is there, and a wrapper hands all of it on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ExchangePlan
from moe_overlap.errors import ConfigError, TransportClosed
from moe_overlap.transport import (
    EmulatedLinkTransport,
    LocalTransport,
    NoCommTransport,
    ProcessGroupTransport,
    Transport,
    VirtualTransport,
)
from moe_overlap.transport.base import TransportStats
from moe_overlap.transport.wrapper import Wrapper
from tests.transport.worlds import F32, agreed, header, plan_of, rows_of

METHODS = sorted(name for name, value in vars(Transport).items() if not name.startswith("_") and callable(value))
ATTRIBUTES = sorted({name for name in vars(Transport) if not name.startswith("_")} - set(METHODS)) + sorted(
    Transport.__annotations__
)


class Plain(Wrapper):
    name = "plain"


class Recording:
    """Keeps what each method was called with, and returns something of its own for it."""

    name, rank, world_size, global_ranks, timeout_s = "inner", 2, 4, (5, 6, 7, 8), 9.5

    def __init__(self) -> None:
        self.stats = TransportStats(exchanges=3)
        self.openings, self.group, self.exchange_sms = 2, object(), 16
        self.calls: list[tuple[str, inspect.BoundArguments, object]] = []

    def __getattr__(self, name: str) -> Any:
        if name not in METHODS:
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> object:
            bound = inspect.signature(getattr(Transport, name)).bind(self, *args, **kwargs)
            bound.apply_defaults()
            self.calls.append((name, bound, object()))
            return self.calls[-1][2]

        return call


def test_the_names_were_found() -> None:
    assert {"open", "agree", "start", "all_reduce", "close", "reopen"} <= set(METHODS)
    assert {"name", "rank", "world_size", "global_ranks", "timeout_s", "stats"} <= set(ATTRIBUTES)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", ["all", "needed"])
def test_a_wrapper_hands_every_method_on(name: str, given: str) -> None:
    inner = Recording()
    parameters = list(inspect.signature(getattr(Transport, name)).parameters.values())[1:]
    values = {p.name: object() for p in parameters if given == "all" or p.default is p.empty}
    args = [values[p.name] for p in parameters if p.name in values and p.kind is not p.KEYWORD_ONLY]
    options = {p.name: values[p.name] for p in parameters if p.name in values and p.kind is p.KEYWORD_ONLY}
    returned = getattr(Plain(inner), name)(*args, **options)  # type: ignore[arg-type]
    ((called, bound, result),) = inner.calls
    expected = {p.name: values.get(p.name, p.default) for p in parameters}
    assert called == name and {key: bound.arguments[key] for key in expected} == expected
    assert returned is (None if name in ("close", "reopen", "call_it") else result)


def test_a_wrapper_has_the_attributes_of_the_inner_one() -> None:
    inner = Recording()
    wrapper = Plain(inner)  # type: ignore[arg-type]
    for name in set(ATTRIBUTES) - {"name"}:
        assert getattr(wrapper, name) == getattr(inner, name), name
    inner.stats = TransportStats()
    assert wrapper.stats is inner.stats


@pytest.mark.parametrize(
    "transport", [LocalTransport, VirtualTransport, ProcessGroupTransport, EmulatedLinkTransport, NoCommTransport]
)
def test_every_transport_is_called_as_the_contract_says(transport: type) -> None:
    for name in METHODS:
        signatures = [inspect.signature(getattr(one, name)) for one in (transport, Transport)]
        assert signatures[0] == signatures[1], name


def test_a_wrapper_of_a_wrapper_is_a_transport() -> None:
    transport = Plain(NoCommTransport(LocalTransport()))
    assert isinstance(transport, Transport)
    plan = agreed(transport, slots=2, seed=0).chunked(2)
    rows = rows_of(0, plan, 1, F32)
    assert torch.equal(transport.start(rows, plan, F32, 1, action="D1").wait(), rows)
    assert transport.stats.exchanges == 1 and transport.stats.agreements == 1
    transport.close("enough")
    transport.reopen()
    assert transport.open(header(2))


def test_a_chunk_that_does_not_exist_is_for_the_inner_transport_to_refuse() -> None:
    inner = LocalTransport()
    plan = plan_of(1, 2, 0).chunked(2)
    with pytest.raises(ConfigError, match="chunk = 2"):
        Plain(inner).start(rows_of(0, plan, 1, F32), plan, F32, 2)
    with pytest.raises(TransportClosed, match="chunk = 2"):
        inner.open(header(2))


@pytest.mark.parametrize("reverse", [False, True])
def test_nocomm_has_own_rows_first_and_zeros_behind(reverse: bool) -> None:
    """More rows are to come than this rank has: 1 of 1 + 3, or 3 of 3 + 1."""
    counts = torch.zeros(2, 16, 2, dtype=torch.int64)
    counts[0, 0] = torch.tensor([1, 0] if not reverse else [0, 1])
    counts[1, 0] = torch.tensor([3, 0])
    plan = ExchangePlan(rank=0, world_size=2, step=1, phase="forward", grad_enabled=False, x_requires_grad=False,
                        counts=Counts.of(counts.numpy(), 0)).chunked(1)  # fmt: skip
    sent, come = (plan.recv_rows[0], plan.send_rows[0]) if reverse else (plan.send_rows[0], plan.recv_rows[0])
    rows, out = torch.ones(sent, 3), torch.full((come, 3), float("nan"))
    got = NoCommTransport(LocalTransport()).start(rows, plan, F32, reverse=reverse, out=out).wait()
    assert got is out and (got[:sent] == 1).all() and not got[sent:].any()

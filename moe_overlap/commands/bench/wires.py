"""What carries the rows of a benchmark: the real group, the same behind an emulated link, and local copies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from moe_overlap.agreement.node_plan import NodePlan, rows_plan
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.phases import HALVES, has
from moe_overlap.commands.bench.shaped import shape
from moe_overlap.commands.bench.timing import Runner, Variant
from moe_overlap.errors import ConfigError
from moe_overlap.launch.launch import World
from moe_overlap.measure.overlap import comm_share, median
from moe_overlap.schedule.builders import SchedulePair, serial
from moe_overlap.schedule.distinct_maps import weights_dtype
from moe_overlap.schedule.distinct_rows import gradient_layout, metadata_layout
from moe_overlap.schedule.lanes import RETURNING
from moe_overlap.transport.accounting import CommCpu
from moe_overlap.transport.base import Transport
from moe_overlap.transport.emulated_link import EmulatedLinkTransport
from moe_overlap.transport.link import LinkSpec, NodeTopology
from moe_overlap.transport.local import LocalTransport
from moe_overlap.transport.nocomm import NoCommTransport
from moe_overlap.transport.process_group import ProcessGroupTransport

SHARE_TOLERANCE = 0.02
PROBE_REPEATS = 4
ISOLATED_REPEATS = 3


@dataclass(kw_only=True)
class Wires:
    """The transports of one case. `link` is the real group where nothing is emulated. device: the network device of
    this node whose rate is set instead, by the one rank of the node that has it; other ranks have "" and `shaped`."""

    core: Transport
    nocomm: Transport
    link: Transport
    device: str = ""
    shaped: bool = False

    @classmethod
    def open(cls, world: World, timeout_s: float, device: str = "") -> Wires:
        """`device`: see the options. The transports of the group, or local ones."""
        if world.group is None:
            local = LocalTransport()
            return cls(core=local, nocomm=local, link=local)
        core = ProcessGroupTransport(world.group, timeout_s=timeout_s)
        mine = device if world.local_rank == 0 else ""
        return cls(core=core, nocomm=NoCommTransport(core), link=core, device=mine, shaped=bool(device))

    def name_of(self, link: LinkSpec | None) -> str:
        """What rows call it."""
        if link is None:
            return "none"
        return f"tcp {link}" if self.shaped else f"emulated {link}"

    def emulate(self, link: LinkSpec | None, ranks_per_node: int) -> None:
        """Put `link` between the nodes from now on; None: the core as it is. A device is set by the next barrier."""
        if self.device:
            shape(self.device, link, ranks_per_node)
        if self.shaped:
            return
        if link is None or self.core.world_size == 1:
            self.link = self.core
        else:
            assert isinstance(self.core, ProcessGroupTransport), "one rank has no link"
            topology = NodeTopology(world_size=self.core.world_size, ranks_per_node=ranks_per_node)
            self.link = EmulatedLinkTransport(self.core, link, topology)


@dataclass(frozen=True, kw_only=True)
class Exchanges:
    """The exchanges of one step, each measured alone from a common barrier; seconds, maximum over ranks.

    Means over the chunks of a dispatch and of a combine, the agreement's extra time over the core, and the sum of all
    that a step of the phase has (backward: as many bytes again). cpu_s: CPU time of this process in that sum, the
    largest over ranks. payload and meta: bytes that the busiest rank sends to others; row_meta those beside rows, and
    inter_node those of the payload that go to other nodes.
    """

    dispatch_s: float
    combine_s: float
    agree_s: float
    total_s: float
    cpu_s: float
    payload_bytes: int
    meta_bytes: int
    row_meta_bytes: int = 0
    inter_node_bytes: int = 0

    def with_backward(self, other: Exchanges) -> Exchanges:
        """The sums of a training step whose backward is cut as `other`: half of the exchanges are of either kind."""
        return replace(
            self,
            total_s=(self.total_s + other.total_s) / 2,
            cpu_s=(self.cpu_s + other.cpu_s) / 2,
            payload_bytes=(self.payload_bytes + other.payload_bytes) // 2,
            inter_node_bytes=(self.inter_node_bytes + other.inter_node_bytes) // 2,
        )


def plan_of(model: BlockPair, pair: SchedulePair, transport: Transport) -> ChunkPlan:
    """Agree on a step by hand. Collective."""
    model.use(pair, transport)
    router = model.moe.router
    rows_TD = torch.empty(model.sizes.tokens, model.sizes.hidden, dtype=model.dtype)
    exchange = model.moe.dispatcher.plan(router.ids_TK, rows_TD, pair)  # type: ignore[arg-type]
    return (ExchangePlan.chunked if model.dedup == "off" else rows_plan)(exchange, pair.chunks, pair.by)


def isolated(world: World, model: BlockPair, pair: SchedulePair, wires: Wires, phase: str) -> Exchanges:
    """Measure every exchange of a step of `pair` alone. Collective."""
    if world.size == 1:
        return Exchanges(dispatch_s=0.0, combine_s=0.0, agree_s=0.0, total_s=0.0, cpu_s=0.0, payload_bytes=0,
                         meta_bytes=0)  # fmt: skip
    plan = plan_of(model, pair, wires.link)
    layout = RowLayout(width=model.sizes.hidden, dtype=model.dtype)
    beside = metadata_layouts(model, phase)
    probes = {name: _Probe(world) for name in ("N", "core", "D", "C", *beside)}
    before = replace(wires.link.stats)
    for _ in range(ISOLATED_REPEATS):
        for name, transport in (("N", wires.link), ("core", wires.nocomm)):
            with probes[name].measured():
                plan_of(model, pair, transport)
        for verb in ("D", "C"):
            for chunk in range(plan.chunks):
                _exchange(probes[verb], wires.link, plan, layout, chunk, verb)
        for verb, words in beside.items():
            _exchange(probes[verb], wires.link, plan.cut(1, "tokens"), words, 0, verb)
    names = ("payload_bytes", "meta_bytes", "row_meta_bytes", "inter_node_bytes")
    sent = [getattr(wires.link.stats, name) - getattr(before, name) for name in names]
    most = torch.stack(world.gather(torch.tensor(sent))).amax(dim=0) // ISOLATED_REPEATS
    rounds, chunks = len(HALVES[phase]), plan.chunks
    dispatch, combine = probes["D"].means(chunks), probes["C"].means(chunks)
    others = [probes[verb].means(1) for verb in beside]
    agree, core = probes["N"].means(1), probes["core"].means(1)
    agree_s = max(0.0, agree.seconds - core.seconds) if has(phase, "forward") else 0.0
    return Exchanges(
        dispatch_s=dispatch.seconds,
        combine_s=combine.seconds,
        agree_s=agree_s,
        total_s=agree_s + rounds * chunks * (dispatch.seconds + combine.seconds) + sum(one.seconds for one in others),
        cpu_s=rounds * chunks * (dispatch.cpu_s + combine.cpu_s) + sum(one.cpu_s for one in others),
        payload_bytes=rounds * int(most[0]),
        meta_bytes=int(most[1]) // 2,
        row_meta_bytes=int(most[2]),
        inter_node_bytes=rounds * int(most[3]),
    )


def metadata_layouts(model: BlockPair, phase: str) -> dict[str, RowLayout]:
    """By verb, what goes beside the rows in a step of the phase."""
    if model.dedup == "off":
        return {}
    top_k, dtype = model.moe.dispatcher.top_k, weights_dtype(model.dtype)
    found = {"M": metadata_layout(top_k, dtype)} if has(phase, "forward") else {}
    return found | {"Mt": gradient_layout(top_k, dtype)} if has(phase, "backward") else found


def _exchange(probe: _Probe, link: Transport, plan: ChunkPlan, layout: RowLayout, chunk: int, verb: str) -> None:
    """One exchange alone: across nodes and inside them where it is two."""
    reverse = verb in RETURNING
    parts = [plan, plan.inside] if isinstance(plan, NodePlan) else [plan]
    if reverse:
        parts.reverse()
    with probe.measured() as started:
        for part in parts:
            rows = torch.zeros(sum(part.counts(chunk, reverse=reverse)[0]), layout.width, dtype=layout.dtype)
            work = link.start(rows, part, layout, chunk, reverse=reverse, action=f"{verb}{chunk}")
            if part is parts[0]:  # later ones begin with the end of a wait
                started()
            work.wait()


@dataclass(frozen=True, kw_only=True)
class _Means:
    seconds: float
    cpu_s: float


class _Probe:
    """Times of one kind of exchange. CPU: of starting it on this thread, and of all other threads until it is over
    (gloo's); looking at the clock at the end of a wait is not counted, as nothing could run then anyway."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.seconds: list[float] = []
        self.cpu_s: list[float] = []

    @contextmanager
    def measured(self) -> Iterator[Callable[[], None]]:
        self.world.barrier()
        thread_s, start_s = time.thread_time(), time.perf_counter()
        starting = [0.0]

        def started() -> None:
            starting[0] = time.thread_time() - thread_s

        with CommCpu() as others:
            yield started
            self.seconds.append(time.perf_counter() - start_s)
        self.cpu_s.append(others.seconds + starting[0])

    def means(self, chunks: int) -> _Means:
        """Maximum over ranks, median over repeats, mean over chunks; measured in the order repeat, chunk."""
        both = torch.tensor([self.seconds, self.cpu_s], dtype=torch.float64)
        most = torch.stack(self.world.gather(both)).amax(dim=0).view(2, -1, chunks)
        means = [sum(median(column.tolist()) for column in part.unbind(1)) / chunks for part in most]
        return _Means(seconds=means[0], cpu_s=means[1])


def link_bytes(world: World, plan: ChunkPlan, layout: RowLayout, ranks_per_node: int) -> int:
    """Bytes that a dispatch and a combine put on the link, each at its busiest rank."""
    node = world.rank // ranks_per_node
    away = [dst for dst in range(world.size) if dst // ranks_per_node != node]
    mine = [sum(plan.counts(c, reverse=reverse)[0][dst] for c in range(plan.chunks) for dst in away)
            for reverse in (False, True)]  # fmt: skip
    most = torch.stack(world.gather(torch.tensor(mine))).amax(dim=0)
    return int(most.sum()) * layout.row_bytes


def solve_link(
    runner: Runner, model: BlockPair, wires: Wires, *, share: float, latency_s: float, ranks_per_node: int, rounds: int
) -> LinkSpec:
    """The rate at which communication is `share` of the serial step of `model`, found by measuring. Collective.

    The first guess is the time of the bytes; each further round corrects it by what the step really took. Raises
    ConfigError where no rate gives that share: the latency alone, or what the core itself takes, is too much.
    """
    world, pair = runner.world, model.as_asked(serial())
    layout = RowLayout(width=model.sizes.hidden, dtype=model.dtype)
    payload = link_bytes(world, plan_of(model, pair, wires.core), layout, ranks_per_node)
    halves = len(HALVES[runner.phase])
    payload *= halves
    if payload == 0:
        raise ConfigError("--comm-share", share, "routing that sends rows to another node")
    nocomm = Variant(name="nocomm", model=model, pair=pair, transport=wires.nocomm)
    bare_s = runner.interleave([nocomm], [PROBE_REPEATS], warmup=2)[0].time_s
    nocomm_s = median(bare_s)
    transfer_s = nocomm_s * share / (1 - share) - 2 * halves * latency_s
    if transfer_s <= 0:
        raise ConfigError(
            "--comm-share", share, f"a larger share: latencies alone take more of {nocomm_s * 1e3:.3g} ms"
        )
    link = None
    for round_ in range(rounds):
        # Four digits: the rate stands in the rows, and whoever gives it to --link gets the same link.
        link = LinkSpec(bytes_per_s=125e3 * float(f"{payload / transfer_s / 125e3:.4g}"), latency_s=latency_s)
        wires.emulate(link, ranks_per_node)
        if round_ == rounds - 1:
            break
        slow = Variant(name="serial", model=model, pair=pair, transport=wires.link)
        times = runner.interleave([slow, nocomm], [PROBE_REPEATS] * 2)
        bare_s += times[1].time_s
        serial_s, nocomm_s = median(times[0].time_s), median(bare_s)
        if abs(comm_share(serial_s, nocomm_s) - share) <= SHARE_TOLERANCE:
            break
        missing_s = nocomm_s * share / (1 - share) - (serial_s - nocomm_s)
        # Bounded, so that one disturbed measurement cannot throw the rate away.
        transfer_s = min(max(transfer_s + missing_s, transfer_s / 3), transfer_s * 3)
    assert link is not None
    return link

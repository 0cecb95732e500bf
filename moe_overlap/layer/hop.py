"""One exchange of context-coherent inference (`coherent.py`): which tokens a rank has, how they get to the next.

On the wire a token is one row, with its identity behind it, of

    D s + 16 bytes      h [D] in its own dtype of s bytes; int64: home rank * 2^32 + place there; float64: its weight
    D s + 8 bytes       on its way home: h; int64: place

all of which a transport counts as payload. `home` sums int64 [W, 2W + 3] over the ranks beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from moe_overlap.agreement.loads import ChunkBy
from moe_overlap.agreement.plan import ExchangePlan, RowLayout
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import AnySchedule
from moe_overlap.layer.latent import project
from moe_overlap.layer.layer import MoELayer
from moe_overlap.ops import raw
from moe_overlap.ops.expert_mlp_contract import Forward
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.actions import Action, Schedule
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.clocks import clock_for
from moe_overlap.schedule.expert_copies import StepCopies
from moe_overlap.schedule.lanes import Lanes, autocast_off
from moe_overlap.schedule.rows import experts_sms
from moe_overlap.schedule.user_ops import check_result
from moe_overlap.schedule.weights import ExpertWeights

Norm = Callable[[torch.Tensor], torch.Tensor]
WORD = 8  # bytes


@dataclass(frozen=True, eq=False, kw_only=True)
class CoherentTokens:
    """The tokens that are on this rank now.

    h_ND: their rows [N, D]. source_N, index_N: int64 [N], the home rank of each and its place among that rank's tokens.
    rank: this one; shape: of the x [..., D] that this rank brought, in which its own tokens come home.
    """

    h_ND: torch.Tensor
    source_N: torch.Tensor
    index_N: torch.Tensor
    rank: int
    shape: torch.Size

    @classmethod
    def at_home(cls, x: torch.Tensor, rank: int) -> CoherentTokens:
        """This rank's own tokens, x [..., D], before the first layer."""
        if not isinstance(x, torch.Tensor) or x.dim() < 1:
            raise ConfigError("x", type(x).__name__, "a tensor [..., D]")
        h_ND = x.reshape(-1, x.shape[-1])
        index_N = torch.arange(h_ND.shape[0], device=x.device)
        return cls(h_ND=h_ND, source_N=torch.full_like(index_N, rank), index_N=index_N, rank=rank, shape=x.shape)

    def with_rows(self, h_ND: torch.Tensor) -> CoherentTokens:
        """The same tokens after a dense part of the model. h_ND: [N, D], in the order of these."""
        check_result("h_ND", h_ND, self.h_ND)
        return replace(self, h_ND=h_ND)

    @property
    def own(self) -> int:
        """T: tokens that this rank brought."""
        return self.shape[:-1].numel()


class Hop:
    """One layer's exchange, and its experts on what it brought: the walk of a schedule P D0 .. E0 .. .

    After `run`: rows [R, D and 16 bytes] as they travelled and y [R, D or latents] as the experts made it, both in the
    experts' order; stays: int64, which of the tokens that were here before had no expert.
    """

    def __init__(
        self,
        layer: MoELayer,
        read: Norm,
        tokens: CoherentTokens,
        routing: RoutingDecision,
        exchange: ExchangePlan,
        pair: SchedulePair,
        weights: ExpertWeights,
    ) -> None:
        dispatcher, h = layer.dispatcher, tokens.h_ND
        self.layer, self.read, self.tokens, self.routing = layer, read, tokens, routing
        self.weights, self.pair = weights, pair
        self.plan = exchange.chunked(pair.chunks, pair.by)
        self.lanes = Lanes(layer.transport, "forward", clock_for(h.device), probe=False, caller=dispatcher.caller)
        self.lanes.step = dispatcher.steps
        layout = RowLayout(width=h.shape[1] + 2 * WORD // h.element_size(), dtype=h.dtype)
        self.lanes.bind(self.plan, self.plan, layout, joined=pair.joined)
        seats = exchange.seats
        ids_TK = routing.topk_ids_TK
        self.slots_TK = ids_TK if seats is None else seats.of_ids(ids_TK, exchange.rank)
        self.copies: StepCopies | None = None
        if seats is not None and seats.has_copies:
            self.copies = StepCopies(exchange, weights, dispatcher.copy_store, relayed=False)
        count = sum(self.plan.recv_rows)
        self.rows = h.new_empty(count, layout.width)
        self.x = weights.w_out.new_empty(count, dispatcher.hidden)
        self.y = torch.empty_like(self.x)
        self.pre = weights.w_in.new_empty(count, weights.w_in.shape[1])

    def run(self) -> None:
        """Walk the schedule. What fails on this rank alone closes the transport."""
        lanes, device_type = self.lanes, self.rows.device.type
        with autocast_off(device_type):
            send = lanes.act(Action("P"), self._pack)
        lanes.act(Action("Wf", 0), self._fetch)
        for action in self.pair.forward.actions[1:]:
            chunk = action.number
            if action.verb == "D":
                begin, end = self.plan.send_offsets[chunk : chunk + 2]
                lanes.act(action, lanes.start, action, send[begin:end])
            else:
                lanes.act(action, self._arrived, chunk, timed=False)
                if chunk == 0:
                    lanes.act(Action("Wf", 0), self._fetched)
                with autocast_off(device_type):
                    lanes.act(action, self._experts, chunk)

    def _pack(self) -> torch.Tensor:
        """P: the rows that an expert takes, as they travel, in send order."""
        tokens, plan, device = self.tokens, self.plan, self.rows.device
        table = plan.key_table(len(tokens.h_ND)).to(device) if plan.chunks > 1 else None
        keys_TK, _ = plan.send_keys(self.slots_TK, table)
        order = torch.argsort(keys_TK[:, 0], stable=True)  # -1 first: those stay
        self.stays, leaves = order.tensor_split([len(order) - plan.send_offsets[-1]])
        home = (tokens.source_N[leaves] << 32) | tokens.index_N[leaves]
        weight = self.routing.topk_weights_TK[leaves, 0].double().view(torch.int64)
        return joined(tokens.h_ND[leaves], torch.stack([home, weight], dim=1))

    def _fetch(self) -> None:
        """Wf: the weights of copies that are not valid any more."""
        if self.copies is not None and self.copies.groups:
            rows = self.copies.outgoing(0)
            self.lanes.start(Action("Wf", 0), rows, layout=self.copies.layout, plan=self.copies.fetch)

    def _fetched(self) -> None:
        """The copies are there, before the first experts compute."""
        if self.copies is not None and self.copies.groups:
            self.copies.arrived(0, self.lanes.wait(Action("Wf", 0)))

    def _arrived(self, chunk: int) -> None:
        """The rows of a chunk, and what the experts read of them, to their places. Computed as the caller computes
        (autocast), as the sending side did."""
        layer = self.layer
        rows = self.lanes.wait(Action("D", chunk))
        h_RD, words = parted(rows, layer.hidden_size)
        x_RD = project("latent_in", layer.latent_in, self.read(h_RD), self.x.shape[1]).to(self.x.dtype)
        if layer.weights_at == "input":
            x_RD = x_RD * words[:, 1:].view(torch.float64).to(x_RD.dtype)
        order = self.plan.buffer_order(chunk).to(rows.device)
        self.rows.index_copy_(0, order, rows)
        self.x.index_copy_(0, order, x_RD)

    def _experts(self, chunk: int) -> None:
        """E: the experts of a chunk's rows."""
        sms = experts_sms(self.rows.device, 0 if self.pair.joined else self.lanes.transport.exchange_sms)
        starts, ends = (one.to(self.rows.device) for one in self.plan.expert_rows(chunk))
        for w_in, w_out, seats in self.weights.parts(chunk):
            raw.expert_mlp_forward(Forward(self.x, w_in, w_out, ends[seats], starts[seats], self.weights.kind,
                                           self.y, self.pre, sms))  # fmt: skip


def pair_of(schedule: AnySchedule) -> SchedulePair:
    """The schedule of a layer without its way back, whose digest is another one: a rank that calls the layer itself is
    a PlanMismatch."""
    if isinstance(schedule, AutoSchedule):
        return _pair(1, "tokens", not schedule.overlap)
    return _pair(schedule.chunks, schedule.by, schedule.joined)


@lru_cache(maxsize=64)
def _pair(chunks: int, by: ChunkBy, joined: bool) -> SchedulePair:
    forward = Schedule((Action("P"), *(Action(verb, chunk) for verb in ("D", "E") for chunk in range(chunks))))
    return SchedulePair(name="coherent", forward=forward, backward=Schedule(()), chunks=chunks, by=by,
                        backward_chunks=chunks, backward_by=by, joined=joined)  # fmt: skip


def joined(h_ND: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """[N, D and more]: rows and, behind each, the bits of its int64 words [N, n], as elements of h's dtype."""
    return torch.cat([h_ND, words.contiguous().view(h_ND.dtype)], dim=1)


def parted(rows: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(h [N, width], a view; int64 [N, n]) of what `joined` made."""
    return rows[:, :width], rows[:, width:].clone(memory_format=torch.contiguous_format).view(torch.int64)

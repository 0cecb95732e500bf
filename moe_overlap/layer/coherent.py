"""Context-coherent inference: one exchange a layer, from expert to expert, and home once, at the end.

Source: ExFlow (arXiv 2401.08383). Where every rank holds the context of all tokens (the keys and values of attention,
which is the model's business and not ours), a token need not come home after an expert: dense parts can compute it on
any rank. So a layer has a dispatch and no combine, and with experts placed by affinity (`placement.Affinity`) most
tokens are where they have to be.

Only h travels, and 16 bytes beside it (`hop.py`). The norm in front of router and experts is applied to h on both ends;
what follows the experts (weight, shared expert, residual) is computed where they are. A token that no expert takes (id
-1) stays where it is.

Letters: N tokens on this rank now, T of its own, R of these N that an expert here has just computed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from moe_overlap import ops
from moe_overlap.agreement.counts import BLOCKS
from moe_overlap.agreement.loads import Counts
from moe_overlap.agreement.plan import ChunkPlan, ExchangePlan, RowLayout
from moe_overlap.agreement.record import DTYPES, dtype_code
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import NOT_TRACEABLE
from moe_overlap.layer.hop import CoherentTokens, Hop, Norm, joined, pair_of, parted
from moe_overlap.layer.latent import project
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.shared_expert import shared_of
from moe_overlap.routing.decision import Identity, RoutingDecision
from moe_overlap.schedule.dispatch import check_routing
from moe_overlap.schedule.static_dispatch import StaticDispatcher
from moe_overlap.schedule.user_ops import check_result
from moe_overlap.schedule.weights import ExpertWeights
from moe_overlap.transport.closing import closing_on_error

MIX = -0x61C8864680B583EB  # odd: 2^64 over the golden ratio, as int64


class CoherentLayer:
    """A layer's part in context-coherent inference: `tokens = coherent(tokens)`, and `home(tokens)` at the end.

    layer: a MoELayer with top_k 1, whose router, experts, shared expert, placement (copies too) and schedule are used:
    its chunks, and whether exchanges overlap; "auto" is one chunk. norm: what the layer's input goes through, applied
    on both sides of the exchange, so it has to treat each row by itself. residual: h + y is what stays, else y.

    All ranks call the same layers in the same order, as ever. Results are to tolerance those of h + layer(norm(h)),
    where a router's choice follows from the token alone: one that looks at all tokens of a call (capacity, Sinkhorn,
    BASE, expert choice) looks here at those that are on the rank. Hooks and watchers of the layer (`stats()`,
    TrafficMonitor) hear nothing of it; the transport's counters and `record()` do.

    Raises ConfigError for a layer with top_k above 1, deduplicated (hierarchical), of fixed shapes, with experts in
    host memory or a payload_dtype, which would round the residual in every layer.
    """

    def __init__(self, layer: MoELayer, *, norm: Norm | None = None, residual: bool = True) -> None:
        check_layer(layer)
        if norm is not None and not callable(norm):
            raise ConfigError("norm", type(norm).__name__, "None or a callable, [N, D] -> [N, D]")
        self.layer, self.norm, self.residual = layer, norm, residual

    def begin(self, x: torch.Tensor) -> CoherentTokens:
        """This rank's tokens, x [..., D], at home; nothing is sent."""
        return CoherentTokens.at_home(x, self.layer.transport.rank)

    @torch.compiler.disable(reason=NOT_TRACEABLE)
    def __call__(self, tokens: CoherentTokens) -> CoherentTokens:
        """Every token to its expert's rank, where it stays: first those that an expert computed, in the experts' order,
        then those that stayed. No gradients.

        Raises ConfigError on all ranks where one refuses (gradients, a recorded or replayed routing, a router with a
        state, bad rows or logits); nothing was sent then. MoeTransportError and its subclasses.
        """
        layer, pair = self.layer, pair_of(self.layer.schedule)
        try:
            if torch.is_grad_enabled():
                raise ConfigError("gradients", "enabled", "torch.no_grad() or torch.inference_mode(): no row goes back")
            x_ND, w_in, w_out = layer._entry(self._input(self._checked(tokens).h_ND))
            routing = self._decision(x_ND)
        except BaseException as error:
            layer.dispatcher.refuse(error, pair)
        dispatcher = layer.dispatcher
        exchange = dispatcher.finish(dispatcher.begin(routing.topk_ids_TK, tokens.h_ND, pair, status=routing.status,
                                                      router_state=routing.agreed, common=layer._common))  # fmt: skip
        with closing_on_error(layer.transport, "P"):
            weights = ExpertWeights(w_in=w_in.detach(), w_out=w_out.detach(), kind=dispatcher.activation)
            hop = Hop(layer, self._input, tokens, routing, exchange, pair, weights)
        hop.run()
        with closing_on_error(layer.transport, "what follows the experts"):
            return self._left_here(hop, tokens, routing, x_ND)

    def home(self, tokens: CoherentTokens) -> torch.Tensor:
        """Every row to the rank that brought it: h [..., D] of the x that this rank began with, in order.

        The ranks tell each other which rows of whom they have (a sum over ranks, int64 [W, 2W + 3]), then there is one
        exchange. Raises ConfigError on all ranks where rows are missing, are there twice in place of others, or have
        several dtypes; nothing was sent.
        """
        transport = self.layer.transport
        with closing_on_error(transport, "home"):
            width = self._checked(tokens).h_ND.shape[1]
            self.layer.dispatcher.open()
            table = self._said(tokens)
        check_table(table)
        with closing_on_error(transport, "home"), torch.no_grad():
            plan = self._way_home(table[:, : transport.world_size])
            order = torch.argsort(tokens.source_N, stable=True)
            rows = joined(tokens.h_ND[order], tokens.index_N[order, None])
            layout = RowLayout(width=rows.shape[1], dtype=rows.dtype)
            h_TD, places = parted(transport.start(rows, plan, layout, action="home").wait(), width)
            return h_TD.new_empty(tokens.own, width).index_copy_(0, places[:, 0], h_TD).reshape(tokens.shape)

    def _checked(self, tokens: object) -> CoherentTokens:
        """Raises ConfigError for what are no tokens of this rank and width."""
        rank, width = self.layer.transport.rank, self.layer.hidden_size
        if not isinstance(tokens, CoherentTokens):
            raise ConfigError("tokens", type(tokens).__name__, "CoherentTokens: begin(x), or what a layer returned")
        if tokens.rank != rank:
            raise ConfigError("tokens.rank", tokens.rank, f"{rank}, this rank")
        shape, count = tuple(tokens.h_ND.shape), tokens.index_N.numel()
        if shape != (count, width) or tokens.source_N.shape != tokens.index_N.shape:
            raise ConfigError("tokens.h_ND", shape, f"{(count, width)}, and as many of source_N and index_N")
        if {tokens.source_N.dtype, tokens.index_N.dtype} != {torch.int64}:
            raise ConfigError("tokens.source_N", tokens.source_N.dtype, "torch.int64, and index_N too")
        dtype_code(tokens.h_ND.dtype)  # raises for one that rows cannot have
        return tokens

    def _input(self, h_ND: torch.Tensor) -> torch.Tensor:
        """What router, experts and shared expert read."""
        if self.norm is None:
            return h_ND
        x_ND = self.norm(h_ND)
        check_result("norm", x_ND, h_ND)
        return x_ND

    def _decision(self, x_ND: torch.Tensor) -> RoutingDecision:
        """The router's, for the tokens that are here. Raises ConfigError."""
        layer = self.layer
        if layer._tape.runs:
            raise ConfigError("replay", "under way", "no recorder and no replay: tokens are not in their order here")
        routing = layer._route(x_ND, x_ND, layer._told(x_ND, {}))
        if routing.state is not None:
            raise ConfigError("router", type(layer.router).__name__, "one without a state, which would stay behind")
        check_routing(routing.topk_ids_TK, routing.topk_weights_TK, x_ND)
        return routing

    def _left_here(
        self, hop: Hop, tokens: CoherentTokens, routing: RoutingDecision, x_ND: torch.Tensor
    ) -> CoherentTokens:
        """The tokens of the experts here, and those that stayed, with weight, shared expert and residual."""
        layer, stays, device = self.layer, hop.stays, tokens.h_ND.device
        h_RD, words = parted(hop.rows, layer.hidden_size)
        home, weights_R1 = words[:, 0], words[:, 1:].view(torch.float64)
        weights_R1 = torch.ones_like(weights_R1) if layer.weights_at == "input" else weights_R1
        taken = torch.arange(h_RD.shape[0], dtype=torch.int32, device=device)
        row_of = torch.cat([taken, taken.new_full(stays.shape, -1)])[:, None]
        weights_N1 = torch.cat([weights_R1, weights_R1.new_zeros(len(stays), 1)]).to(routing.topk_weights_TK.dtype)
        y_ND = ops.combine(hop.y, row_of, weights_N1)
        y_ND = project("latent_out", layer.latent_out, y_ND, layer.hidden_size)
        h_ND = torch.cat([h_RD, tokens.h_ND[stays]])
        if layer.shared_expert is not None:
            y_ND = y_ND + shared_of(layer.shared_expert, self._input(h_ND))
        if routing.identity is not None:  # a token whose only expert is the token itself has stayed
            y_ND = torch.cat([y_ND[: len(taken)], _of(routing.identity, stays, x_ND).added_to(y_ND[len(taken) :])])
        return replace(
            tokens,
            h_ND=h_ND + y_ND if self.residual else y_ND,
            source_N=torch.cat([home >> 32, tokens.source_N[stays]]),
            index_N=torch.cat([home & (2**32 - 1), tokens.index_N[stays]]),
        )

    def _said(self, tokens: CoherentTokens) -> np.ndarray:
        """int64 [W, 2W + 3]: of each rank how many rows of each other it has, the sums of their marks, how many tokens
        it brought, the sum of theirs, its rows' dtype."""
        transport, world, device = self.layer.transport, self.layer.transport.world_size, tokens.h_ND.device
        known = (tokens.source_N >= 0) & (tokens.source_N < world)
        source_N, index_N = tokens.source_N[known], tokens.index_N[known]
        table = torch.zeros(world, 2 * world + 3, dtype=torch.int64, device=device)
        mine = table[transport.rank]
        mine[:world] = torch.bincount(source_N, minlength=world)
        mine[world : 2 * world].index_add_(0, source_N, marks(index_N))
        mine[-3], mine[-2] = tokens.own, marks(torch.arange(tokens.own, device=device)).sum()
        mine[-1] = dtype_code(tokens.h_ND.dtype)
        found: np.ndarray = transport.all_reduce(table, action="home").wait().cpu().numpy()
        return found

    def _way_home(self, held: np.ndarray) -> ChunkPlan:
        """An exchange like any other, with the home ranks for slots. held: int64 [W, W], rows by (where, whose)."""
        dispatcher, rank = self.layer.dispatcher, self.layer.transport.rank
        counts = np.zeros((len(held), BLOCKS, len(held)), dtype=np.int64)
        counts[:, 0] = held
        return ExchangePlan(
            rank=rank, world_size=len(held), step=dispatcher.steps, phase="forward", grad_enabled=False,
            x_requires_grad=False, counts=Counts.of(counts, rank), ranks_per_node=dispatcher.ranks_per_node,
        ).chunked(1)  # fmt: skip


def _of(identity: Identity, which: torch.Tensor, x_ND: torch.Tensor) -> Identity:
    """Of some of the tokens."""
    return Identity(weights_T1=identity.weights_T1[which], used_T1=identity.used_T1[which], x_TD=x_ND[which])


def marks(index_N: torch.Tensor) -> torch.Tensor:
    """int64 [N]: a number for each place, such that other places than 0 .. T-1 do not have their sum but by chance."""
    mixed_N = (index_N + 1) * MIX
    mixed_N = (mixed_N ^ (mixed_N >> 29)) * MIX
    return mixed_N ^ (mixed_N >> 32)


def check_layer(layer: object) -> None:
    """Raises ConfigError for what cannot be run context-coherent."""
    if not isinstance(layer, MoELayer):
        raise ConfigError("layer", type(layer).__name__, "a MoELayer")
    dispatcher = layer.dispatcher
    if dispatcher.top_k != 1:
        raise ConfigError("top_k", dispatcher.top_k, "1: a token with several experts has no single place to stay at")
    if dispatcher.dedup:
        raise ConfigError("dedup", "on or auto", '"off": a token with one expert is one row')
    if isinstance(dispatcher, StaticDispatcher):
        raise ConfigError("mode", "static", '"host": how many tokens a rank has changes with each layer')
    if layer.host_link is not None:
        raise ConfigError("expert_offload", "set", "None: experts on the device")
    if dispatcher.payload_dtype is not None:
        raise ConfigError("payload_dtype", dispatcher.payload_dtype, "None: every layer would round the residual")


def check_table(table: np.ndarray) -> None:
    """Raises ConfigError, alike on all ranks, where tokens cannot go home. table: what `_said` gives."""
    world = len(table)
    held, found = table[:, :world].sum(axis=0), table[:, world : 2 * world].sum(axis=0)
    brought, marked, dtypes = table[:, -3:].T
    wrong = (held != brought) | (found != marked)
    if wrong.any():
        rank = int(wrong.argmax())
        twice = ", some of them twice" if held[rank] == brought[rank] else ""
        raise ConfigError("tokens", f"{held[rank]} of rank {rank}{twice}", f"the {brought[rank]} that it brought, "
                          "each once")  # fmt: skip
    if (dtypes != dtypes[0]).any():
        codes = sorted(set(dtypes.tolist()))
        raise ConfigError("tokens.h_ND", [DTYPES[code] for code in codes], "one dtype on all ranks")

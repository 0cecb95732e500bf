"""The layer: router -> plan -> schedule -> y. This file is the table of contents of the library.

Letters: T tokens on this rank, D hidden size, F expert hidden size, E experts, K experts per token, e experts here.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.record import PHASES
from moe_overlap.auto.auto import AutoSchedule
from moe_overlap.auto.probes import ProbeInputs
from moe_overlap.errors import ConfigError
from moe_overlap.layer import assembly
from moe_overlap.layer.arguments import (
    NOT_TRACEABLE,
    AnySchedule,
    Beside,
    Given,
    check_choices,
    check_options,
    check_positive,
    check_router_input,
    rows_dtype,
)
from moe_overlap.layer.choosing import Chooses
from moe_overlap.layer.copies import Copies
from moe_overlap.layer.experts import check_weights, homes_held, reset, warn_of_hooks, weights_of
from moe_overlap.layer.latent import Tie, Tokens, late_rows, make_projections, project
from moe_overlap.layer.offload import Offload, Offloads, make_host_link
from moe_overlap.layer.one_rank import one_rank
from moe_overlap.layer.shared_expert import shared_of
from moe_overlap.layer.static import Static, static_options
from moe_overlap.layer.tickets import Ticket
from moe_overlap.layer.told import Routes
from moe_overlap.ops.checks import check_transform
from moe_overlap.parallel.entering import entered
from moe_overlap.placement.placement import Placement
from moe_overlap.routing.decision import RoutingDecision
from moe_overlap.schedule.builders import Schedules
from moe_overlap.schedule.dispatch import Dispatcher, check_routing, current_phase
from moe_overlap.schedule.run import Step
from moe_overlap.schedule.weights import ExpertWeights
from moe_overlap.transport.base import Transport


class MoELayer(Static, Copies, Routes, Chooses, Offloads):
    """A Mixture-of-Experts layer whose experts lie spread over the ranks of a group.

    hidden_size D; ffn_hidden_size F; num_experts E in total (not per rank); top_k K.
    group: None (one rank, no collective), a ProcessGroup or a one-dimensional DeviceMesh; or `transport` instead.
    replicate_group: the ranks that hold the same experts as this one (expert parallel in data parallel), likewise; or
    one DeviceMesh of two dimensions as `group`, replicas first and experts second. Gradients of experts are reduced
    over them when backward is over, unless fully_shard has sharded the experts over them, which does it then.
    schedule: "serial", "chunked(r)", "chunked(r,experts)" with r from 1 to 16, "shared_expert", a SchedulePair, or
    "auto": the first forward call measures (at most 20 s, or eight steps where these take longer; kept in a cache),
    then the fastest one found runs, of those whose exchanges under way hold at most max_in_flight_bytes on a rank.
    overlap=False: the same schedule with every exchange joined right after its start; equal results, bit for bit.
    dedup: "on": one row for each (token, rank), with its ids and weights beside it, and one partial sum back, however
    many of the token's experts are there; "auto": in the steps in which that pays (with schedule="auto": in which it is
    predicted to be faster); results are equal to tolerance. One rank sends nothing, so there it changes nothing.
    ranks_per_node: so many ranks in a row share a node, where the transport does not know. hierarchical, beside dedup:
    one row for each (token, node) crosses nodes and is passed on there; equal results, bit for bit in float32/64. On
    one node, or where each rank is a node of its own, rows go directly.
    router: None or a score ("softmax", "topk_softmax", "sigmoid") for a LinearRouter, or a module with its contract.
    activation: "swiglu" (the default), "gelu", "relu", or a name of `ops/activation_kinds.py`.
    weights_at: "input": with top_k 1, experts read weight * token and their results are left as they are (Llama4).
    shared_expert_size: hidden size of a shared expert, or None.
    latent_size: L, for latent experts (LatentMoE, arXiv 2601.18089): x is projected to L before dispatch, and the sum
    back to D after combine; experts and rows on the wire have width L, also given ones and a given dispatcher. None: D.
    payload_dtype: torch.bfloat16: float32 rows travel as bfloat16, which rounds each row once on each way (2^-9 of its
    value at most), and are computed in float32. None: as they are.
    aux_loss_coef, balance, bad_logits, and what else a LinearRouter takes (capacity_factor, z_loss_coef, renormalize,
    scale, n_group, ...): see there (refused beside a router module).
    mode: "host" (exact row counts, read by the host once a step), or "static": fixed shapes, no read by the host, for
    CUDA graphs; rows that do not fit raise CapacityExceeded at the next call (see docs/design.md, "Fixed shapes"). All
    ranks have one number of tokens, in all steps. static_capacity: room for each expert over its mean share of a rank's
    choices (1.25, say), or "no_drop", for all of them; max_in_flight_bytes: the most bytes that such rows may take.

    Parts that can be given instead of built: router, experts (a module with the attributes of `Experts`: its weights
    and its activation are used, not its forward), shared_expert (a module [T, D] -> [T, D]), transport, schedule (an
    AutoSchedule too), placement (homes of the experts, copies elsewhere), dispatcher (with transport and placement).
    expert_offload: "host", or a HostLink: experts' weights lie in host memory and come up for their chunk's rows;
    schedule="auto" measures and plans these copies too, on one rank as well.

    forward(x [..., D]) -> one tensor of x's shape; dtype of the experts' weights, or autocast's. The parameters are
    those of `router`, `experts` (this rank's only), `shared_expert`, `latent_in` [L, D] and `latent_out` [D, L]; state
    dicts from before the experts were a module of their own can be loaded.

    Gradient convention: an expert's gradient is that of the sum over all ranks (replicas too) of the ranks' losses;
    after `prepare(model)` that of their mean, which is what DDP and FSDP2 make of every other gradient.
    """

    _ticket: weakref.ref[Ticket] | None = None

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        group: Any = None,
        replicate_group: Any = None,
        schedule: str | AnySchedule = "serial",
        overlap: bool = True,
        dedup: str = "off",
        ranks_per_node: int | None = None,
        hierarchical: bool = False,
        max_in_flight_bytes: int | None = None,
        router: str | nn.Module | None = None,
        experts: nn.Module | None = None,
        expert_offload: Offload = None,
        activation: str | None = None,
        weights_at: str = "output",
        shared_expert: nn.Module | None = None,
        shared_expert_size: int | None = None,
        latent_size: int | None = None,
        payload_dtype: torch.dtype | None = None,
        aux_loss_coef: float = 0.0,
        balance: str = "micro",
        bad_logits: str = "raise",
        transport: Transport | None = None,
        dispatcher: Dispatcher | None = None,
        placement: Placement | None = None,
        mode: str = "host",
        static_capacity: float | str | None = None,
        timeout_s: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size, "num_experts": num_experts}
        check_positive(**sizes, optional={"shared_expert_size": shared_expert_size, "latent_size": latent_size})
        self.weights_at = check_choices(num_experts, top_k, dtype, weights_at)
        activation = assembly.activation_of(experts, activation)
        check_options(mode, dedup, max_in_flight_bytes, schedule, payload_dtype)
        static = static_options(mode, static_capacity, max_in_flight_bytes, dedup=dedup, schedule=schedule,
                                dispatcher=dispatcher)  # fmt: skip
        factory = assembly.factory_of(experts, device, dtype)
        self.host_link, experts_factory = make_host_link(expert_offload, factory)
        options = {"aux_loss_coef": aux_loss_coef, "balance": balance, "bad_logits": bad_logits} | router_options
        self.transport, replicas = assembly.make_transport(
            transport, dispatcher, group, replicate_group, timeout_s=timeout_s, device=device,
            experts_device=device if self.host_link is None else experts_factory["device"])  # fmt: skip
        self.rows = assembly.make_rows(self.transport, dedup, ranks_per_node, hierarchical)
        # First among the parameters, as states of optimizers go by position; built last: the router draws first.
        self.add_module("experts", None)
        self.router = assembly.make_router(router, hidden_size, num_experts, top_k, options, factory)
        self.shared_expert = assembly.make_shared_expert(shared_expert, hidden_size, shared_expert_size, activation,
                                                         factory)  # fmt: skip
        self.latent_in, self.latent_out = make_projections(latent_size, hidden_size, factory)
        self.hidden_size, row_width = hidden_size, latent_size or hidden_size
        self.schedule: AnySchedule = assembly.make_schedule(
            schedule, shared=self.shared_expert is not None, ranks=self.transport.world_size, overlap=overlap,
            rows=self.rows, max_in_flight_bytes=max_in_flight_bytes, plans=self.plans, link=self.host_link)  # fmt: skip
        placement = assembly.make_placement(dispatcher, placement, num_experts, self.transport.world_size)
        self.ownership = assembly.make_ownership(placement, self.transport, replicas, group)
        self.experts = assembly.make_experts(experts, row_width, ffn_hidden_size, ownership=self.ownership,
                                             activation=activation, factory=experts_factory)  # fmt: skip
        if replicas is not None:
            replicas.watch(self.experts.parameters(), self.ownership.expert_ids)
        self.dispatcher = assembly.make_dispatcher(
            dispatcher, placement, self.transport, bad_logits, self.rows, static, hidden=row_width,
            ffn_hidden=ffn_hidden_size, top_k=top_k, activation=activation, payload_dtype=payload_dtype,
            dtype=factory["dtype"] or torch.get_default_dtype(), weights_at=weights_at,
        )  # fmt: skip
        self._check_router()
        self._forget()

    # ---------------------------------------------------------------- the layer as a sentence

    def forward(
        self, x: torch.Tensor, beside: Beside | None = None, router_input: torch.Tensor | None = None,
        **given: torch.Tensor | None,
    ) -> Any:  # fmt: skip
        """x: [..., D] of this rank's tokens (any number, zero included) -> y of the same shape.

        router_input: what the router reads instead of x, such as an earlier state of the model; of x's shape. given:
        what the router takes beside it, its first sizes those of x or [T]: `token_mask` (bool, True = a token,
        False = padding, routed nowhere and counted nowhere), `state` of the router of the layer before; a router with a
        state makes the result (y, state). With `beside`, which is ShortcutBlock's, backbone ops run beside the
        exchanges: (their result, y).
        Raises ConfigError (bad argument, bad logits; on every rank alike), MoeTransportError and its subclasses.
        """
        if beside is not None:
            return self._forward_beside(x, beside, given)
        run = self._forward_one_rank if self._runs_inline else self._forward_scheduled
        return run(x, given, router_input)

    @torch.compiler.disable(reason=NOT_TRACEABLE)
    def _forward_scheduled(self, x: torch.Tensor, given: Given, router_input: torch.Tensor | None) -> Any:
        """The sentence: route and agree, run the schedule, add the shared expert."""
        step, routing, x_shared = self._begin(x, self.schedule, given, router_input=router_input)
        y_TD = step.run(shared=lambda: shared_of(self.shared_expert, x_shared))
        return self._end(step, routing, y_TD, x.shape, step.take_shared())

    @torch.compiler.disable(reason=NOT_TRACEABLE)
    def _forward_beside(self, x: torch.Tensor, beside: Beside, given: Given) -> tuple[torch.Tensor, Any]:
        """The same with backbone ops: part of the layer's own call, so that hooks and wrappers of the layer see it."""
        step, routing, _ = self._begin(x, beside.schedule, given, beside)
        y_TD = step.run(backbone=beside.backbone)
        return step.take_hidden(), self._end(step, routing, y_TD, x.shape)

    def _begin(
        self, x: torch.Tensor, schedule: AnySchedule, given: Given, beside: Beside | None = None, *,
        router_input: torch.Tensor | None = None,
    ) -> tuple[Step, RoutingDecision, torch.Tensor]:  # fmt: skip
        """Route and begin to agree: up to the point where the schedule can run."""
        late = None if beside is None else beside.late
        known: Schedules = schedule.unplanned if isinstance(schedule, AutoSchedule) else schedule
        try:
            phase = current_phase()
            x_TD, w_in, w_out = self._entry(x)
            told = self._told(x, given)
            tokens = Tokens.of(x_TD, self.latent_in if late is None else None, self.dispatcher.hidden, w_out.dtype)
            read_TD = None if router_input is None else check_router_input(router_input, x)
            host_link = self._offload(known, w_in, w_out)
        except BaseException as error:
            self.dispatcher.refuse(error, known)
        if isinstance(schedule, AutoSchedule):
            ops, h = ((), None) if beside is None else (beside.backbone, beside.hidden)
            inputs = ProbeInputs(dispatcher=self.dispatcher, router=self.router, told=told, x_TD=x_TD, w_in=w_in,
                                 w_out=w_out, latents=tokens.latents, h=h, backbone=ops, shared=self.shared_expert,
                                 router_input=read_TD, host_link=host_link, common=self._common)  # fmt: skip
            known = self._planned(schedule, inputs, phase)
        try:
            weights = ExpertWeights(w_in=w_in.detach(), w_out=w_out.detach(), kind=self.dispatcher.activation,
                                    grad_scale=self.ownership.grad_scale)  # fmt: skip
            step = Step(self.transport, weights, phase=PHASES[phase], caller=self.dispatcher.caller,
                        payload_dtype=self.dispatcher.payload_dtype, host_link=host_link)  # fmt: skip
        except BaseException as error:
            self.dispatcher.refuse(error, known)
        with step.releasing_on_error():
            try:
                x_router, x_rows, x_shared = tokens.enter(step, w_in, w_out)
                x_router = x_router if read_TD is None else Tie.apply(read_TD, x_router)
                routing = self._route(x_router, x_shared, told)
                check_routing(routing.topk_ids_TK, routing.topk_weights_TK, x_TD)
                rows_TD = (x_rows if late is None else step.anchor).to(w_out.dtype)
                rows_TD, weights_TK = self._weigh(rows_TD, routing)
            except BaseException as error:
                self.dispatcher.refuse(error, known)
            agreement = self.dispatcher.begin(routing.topk_ids_TK, rows_TD, known, status=routing.status,
                                              router_state=routing.agreed, common=self._common)  # fmt: skip
            step.ask(known, self.dispatcher, agreement)
            step.hidden = None if beside is None else beside.hidden
            if late is not None:
                rows_TD = late_rows(step, late, self.latent_in, self.dispatcher.hidden, w_out.dtype)
            step.give(rows_TD, routing.topk_ids_TK, weights_TK, entered=late is None)
        return step, routing, x_shared

    def _forward_one_rank(self, x: torch.Tensor, given: Given, router_input: torch.Tensor | None) -> Any:
        """One rank and nothing to overlap: the ops in a row, which torch.compile can see through."""
        x_TD, w_in, w_out = self._entry(x)
        read_TD = x_TD if router_input is None else check_router_input(router_input, x)
        routing = self._route(read_TD, x_TD, self._told(x, given))
        check_routing(routing.topk_ids_TK, routing.topk_weights_TK, x_TD)
        self._check_choice(routing)
        ids_TK = self.dispatcher.placement.to_physical(routing.topk_ids_TK)
        rows_TD = project("latent_in", self.latent_in, x_TD, self.dispatcher.hidden)
        rows_TD, weights_TK = self._weigh(rows_TD, routing)
        y_TD, slot_to_row = one_rank(rows_TD, ids_TK, weights_TK, w_in, w_out, self.dispatcher.activation)
        y_TD = project("latent_out", self.latent_out, y_TD, self.hidden_size)
        if self.shared_expert is not None:
            y_TD = y_TD + shared_of(self.shared_expert, x_TD)
        return self._end_inline(routing, y_TD, x.shape, slot_to_row)

    def reset_parameters(self) -> None:
        """Every part as it starts, in the order in which they are built (after `to_empty`)."""
        for part in (self.router, self.shared_expert, self.latent_in, self.latent_out, self.experts):
            reset(part)

    def extra_repr(self) -> str:
        d = self.dispatcher
        return f"top_k={d.top_k}, schedule={self.schedule.name}, transport={self.transport.name}"

    # ---------------------------------------------------------------- details

    def _entry(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x as [T, D], w_in, w_out in the dtype of the rows); the weights are read here, once in a call."""
        d, activation = self.dispatcher, self.experts.activation
        if activation != d.activation:
            raise ConfigError("experts.activation", activation, f"{d.activation!r}, with which the layer was made")
        check_transform(inline=self._runs_inline)
        self._look_back()
        if not torch.compiler.is_compiling():  # a graph that writes an attribute cannot be inside a checkpoint
            self.ownership = entered(self.experts, self.ownership)
        w_in, w_out = weights_of(self.experts)
        d.look_at_weights(w_in, w_out)
        dtype = rows_dtype(x, w_out, self.hidden_size, self.host_link)
        count = homes_held(self.ownership, d)
        check_weights(w_in, w_out, d.activation, count=count, hidden=d.hidden, ffn=d.ffn_hidden)
        warn_of_hooks(self.experts)
        return x.reshape(-1, x.shape[-1]), w_in.to(dtype), w_out.to(dtype)

"""ScMoE's shortcut: the experts read an earlier activation, so that backbone ops run beside both exchanges.

Source: "Shortcut-connected Expert Parallelism for Accelerating Mixture of Experts", ICML 2025 (arXiv 2404.05019),
section 3.1 (positions), equations 7 to 10 (wiring) and 14 to 17 (combining with the shared expert).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_overlap.agreement.plan import ChunkBy
from moe_overlap.auto.auto import ONE_RANK, AutoSchedule
from moe_overlap.auto.beside import Op, as_module
from moe_overlap.errors import ConfigError
from moe_overlap.layer.arguments import NOT_TRACEABLE, AnySchedule, Beside, check_budget
from moe_overlap.layer.experts import reset
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.static import is_static
from moe_overlap.layer.stats import LayerStats
from moe_overlap.schedule.builders import SchedulePair, agree_ahead, serial, window
from moe_overlap.schedule.check import check
from moe_overlap.schedule.nodes import Tap
from moe_overlap.schedule.user_ops import check_result
from moe_overlap.transport.closing import closing_on_error

COMBINE = ("add", "gated")


def block_schedule(
    schedule: str | SchedulePair | None, slot: int | None, of_layer: AnySchedule, *, num_ops: int
) -> str | SchedulePair | None:
    """What a block runs: "auto", a pair, or None for the window of its `slot`; of_layer: its layer's schedule, which
    nothing would run. Raises ConfigError where nothing was said, too much, or a layer's fixed schedule besides."""
    asks_auto = isinstance(of_layer, AutoSchedule) or of_layer.name == ONE_RANK
    if schedule is None and slot is None and asks_auto:
        return "auto"
    if asks_auto and schedule != "auto":
        expected = 'a layer without schedule="auto", which the block\'s own slot or schedule would replace'
        raise ConfigError("moe.schedule", "auto", expected)
    if isinstance(of_layer, SchedulePair) and of_layer.name not in (serial().name, ONE_RANK):
        expected = "a layer without a schedule of its own: the block's schedule orders its exchanges"
        raise ConfigError("moe.schedule", of_layer.name, expected)
    if isinstance(schedule, SchedulePair):
        if slot is not None or schedule.num_ops != num_ops:
            expected = f"one with {num_ops} backbone ops (B0 to B{num_ops - 1}), and no slot= beside it"
            raise ConfigError("schedule", schedule.forward.text, expected)
    elif schedule not in (None, "auto") or (schedule is None) != (slot is not None):
        expected = "'auto', a SchedulePair, or None beside a slot= (how many ops after the tap come before the experts)"
        raise ConfigError("schedule", schedule, expected)
    return schedule


class SharedExpertOp(nn.Module):
    """The shared expert as the last backbone op: h + branch(h), or h + sigmoid(h w) * branch(h) (the paper's CG-1).

    The coefficient reads the op's own input, so that it never waits for the experts.
    """

    def __init__(self, branch: Op, hidden_size: int, *, gated: bool, reference: torch.Tensor) -> None:
        super().__init__()
        self.branch = as_module(branch)
        self.gate = (
            nn.Linear(hidden_size, 1, bias=False, device=reference.device, dtype=reference.dtype) if gated else None
        )

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.branch(h)
        check_result("shared_expert", y, h)
        return h + (y if self.gate is None else torch.sigmoid(self.gate(h)) * y)


class ShortcutBlock(nn.Module):
    """Backbone ops with a MoE layer beside them.

    backbone: callables h -> h [..., D], norm and residual inside (modules are registered). tap: how many of them run
    before the point that feeds the experts (Pos-1, 2, 3 of a block pair: 2, 1, 0; see `tap_of_position`).
    shared_expert: a branch h -> [..., D] with its norm inside and no residual, run as the last backbone op; `combine`
    says how it joins: "add" or "gated". slot: how many of the ops after the tap are issued before the experts.
    chunks, by: chunk the exchanges as well. backward_slot, backward_chunks: the same for backward, where the best
    ones differ. schedule="auto" instead of all these: measured at the first forward call (at most 20 s, or eight steps
    where these take longer), then the fastest one found. max_in_flight_bytes: as in MoELayer. pre_norm, post_norm: on
    the experts' input and on their output. overlap=False: every exchange joined. ahead: so many of the ops after the
    tap run while the ranks agree on the counts, before the first dispatch; the same model, the same bits.
    router_tap: how many ops run before the point that feeds the router, at most `tap`: with fewer the ranks agree while
    the rest runs up to the tap, in another model, whose router reads pre_norm of an earlier state, as the pre-gating
    router of Read-ME (arXiv 2410.19123) does.

    y = backbone(h) + post_norm(moe(pre_norm(h at the tap))).
    """

    def __init__(
        self,
        backbone: Sequence[Op],
        moe: MoELayer,
        *,
        tap: int,
        slot: int | None = None,
        shared_expert: Op | None = None,
        combine: str = "add",
        backward_slot: int | None = None,
        pre_norm: Op | None = None,
        post_norm: Op | None = None,
        chunks: int = 1,
        backward_chunks: int | None = None,
        by: ChunkBy = "tokens",
        schedule: str | SchedulePair | None = None,
        overlap: bool = True,
        max_in_flight_bytes: int | None = None,
        ahead: int = 0,
        router_tap: int | None = None,
    ) -> None:
        super().__init__()
        if combine not in COMBINE:
            raise ConfigError("combine", combine, f"one of {COMBINE}")
        if combine == "gated" and shared_expert is None:
            raise ConfigError("combine", combine, "a shared_expert, whose output the gate multiplies")
        if moe.shared_expert is not None:
            raise ConfigError("moe", "a layer with a shared expert", "a layer without one: give it as shared_expert")
        ops = list(backbone)
        if shared_expert is not None:
            _, weight = moe.expert_weights
            ops.append(SharedExpertOp(shared_expert, moe.hidden_size, gated=combine == "gated", reference=weight))
        if not isinstance(tap, int) or not 0 <= tap <= len(ops):
            raise ConfigError("tap", tap, f"an integer from 0 to {len(ops)}, the number of backbone ops")
        router_tap = tap if router_tap is None else router_tap
        if not isinstance(router_tap, int) or not 0 <= router_tap <= tap:
            raise ConfigError("router_tap", router_tap, f"None or an integer from 0 to {tap}, the tap of the experts")
        if router_tap < tap and moe.latent_in is not None and schedule == "auto":
            raise NotImplementedError('router_tap before the tap of latent experts, with schedule="auto"')
        if router_tap < tap and bool(getattr(moe.router, "zero_experts", False)):
            raise NotImplementedError("router_tap before the tap, with zero-computation experts")
        if router_tap < tap and moe.weights_at == "input":
            raise NotImplementedError('router_tap before the tap, with weights_at="input"')
        self.moe = moe
        self.tap, self.router_tap = tap, router_tap
        self.backbone = nn.ModuleList(as_module(op) for op in ops)
        self.pre_norm = pre_norm
        self.post_norm = post_norm
        num_ops = len(ops) - tap
        schedule = block_schedule(schedule, slot, moe.schedule, num_ops=num_ops)
        check_budget(max_in_flight_bytes, schedule)
        if not isinstance(ahead, int) or not 0 <= ahead <= num_ops:
            raise ConfigError("ahead", ahead, f"an integer from 0 to {num_ops}, the number of ops after the tap")
        self.schedule: AnySchedule
        planned = schedule == "auto"
        if planned and is_static(moe.dispatcher):
            raise ConfigError("schedule", schedule, 'None and a slot=, with mode="static"')
        if planned and moe.plans:
            self.schedule = AutoSchedule(op_verb="B", num_ops=num_ops, overlap=overlap, dedup=moe.rows.dedup,
                                         max_in_flight_bytes=max_in_flight_bytes, num_ahead=ahead,
                                         offload=moe.host_link is not None)  # fmt: skip
        else:
            pair = schedule if isinstance(schedule, SchedulePair) else window(
                num_ops, slot or 0, chunks=chunks, by=by, backward_slot=backward_slot,
                backward_chunks=backward_chunks)  # fmt: skip
            pair = agree_ahead(pair, ahead) if ahead else pair
            pair = moe.rows.pair(pair)
            check(pair)
            pair = replace(pair, name=ONE_RANK) if planned else pair
            self.schedule = pair if overlap else pair.join()

    def explain(self, *, verbose: bool = False) -> str:
        """As MoELayer.explain, of the schedule that orders this block's ops and its layer's exchanges."""
        return self.moe.explain_schedule(self.schedule, verbose=verbose)

    def stats(self) -> LayerStats:
        """As MoELayer.stats: of the last forward call."""
        return self.moe.stats()

    def reset_parameters(self) -> None:
        """The layer's and the gate's; the backbone and the norms are the caller's."""
        self.moe.reset_parameters()
        for op in self.backbone:
            if isinstance(op, SharedExpertOp):
                reset(op.gate)

    @torch.compiler.disable(reason=NOT_TRACEABLE)
    def forward(self, h: torch.Tensor, **given: torch.Tensor | None) -> Any:
        """h: [..., D] -> the same shape, or (that, state). `given` and errors as MoELayer.forward."""
        with closing_on_error(self.moe.transport, "the backbone before the tap"):
            if not isinstance(h, torch.Tensor):
                raise ConfigError("h", type(h).__name__, f"a tensor [..., {self.moe.hidden_size}]")
            hidden, tapped = self._tap(h, range(self.router_tap))
        rest = range(self.router_tap, self.tap)
        beside = Beside(hidden=hidden, schedule=self.schedule, backbone=list(self.backbone[self.tap :]),
                        late=partial(self._tap, hidden, rest) if rest else None)  # fmt: skip
        h, routed = self.moe(tapped, beside, **given)
        routed, state = routed if isinstance(routed, tuple) else (routed, None)
        if self.post_norm is not None:
            with closing_on_error(self.moe.transport, "post_norm"):
                before, routed = routed, self.post_norm(routed)
            check_result("post_norm", routed, before)  # alike on all ranks, and nothing is under way
        return h + routed if state is None else (h + routed, state)

    def _tap(self, h: torch.Tensor, before: range) -> tuple[torch.Tensor, torch.Tensor]:
        """(for the backbone, for the experts or their router): h after these ops, and its pre_norm."""
        for index in before:
            last, h = h, self.backbone[index](h)
            check_result(f"backbone op {index} before the tap", h, last)
        hidden, tapped = Tap.apply(h) if torch.is_grad_enabled() and h.requires_grad else (h, h)
        if self.pre_norm is not None:
            tapped = self.pre_norm(tapped)
            check_result("pre_norm", tapped, hidden)
        if self.schedule.ahead and tapped is hidden:
            tapped = tapped.clone()  # an op may work in place, and P reads it after those ahead
        return hidden, tapped

"""Latent experts: what is sent to the experts is a projection of each token, and what they return is projected back.

Source: LatentMoE (NVIDIA, arXiv 2601.18089): rows on the wire and the experts' widths are L instead of D, while the
router and the shared expert see the full width. Both projections are dense layers without bias, shared by all experts.

Saved for backward beside what the step saves: x [T, D] and the combined sum [T, L].

They stand outside the schedule: before P, on each token once and not on its K copies, and after U. In backward that of
latent_out comes before Ut, and that of latent_in after the node of the step's entry (`Fork`), which therefore takes the
latents instead of x. So x has another node that sums its gradients in a fixed order, made of two `Tap`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.schedule.nodes import Tap, only_once
from moe_overlap.schedule.run import Step
from moe_overlap.transport.closing import closing_on_error


def make_projections(
    latent_size: int | None, hidden_size: int, factory: dict[str, Any]
) -> tuple[nn.Module, nn.Module] | tuple[None, None]:
    """(latent_in with a weight [L, D], latent_out with a weight [D, L]), or (None, None) where rows are tokens."""
    if latent_size is None:
        return None, None
    return (
        nn.Linear(hidden_size, latent_size, bias=False, **factory),
        nn.Linear(latent_size, hidden_size, bias=False, **factory),
    )


def project(field: str, projection: nn.Module | None, rows: torch.Tensor, width: int) -> torch.Tensor:
    """projection(rows): [T, any] -> [T, width]; `rows` themselves where there is none.

    Raises ConfigError for a result that does not fit: the module may be one that the user put there.
    """
    if projection is None:
        return rows
    result: torch.Tensor = projection(rows)
    if not isinstance(result, torch.Tensor):
        raise ConfigError(field, type(result).__name__, f"a tensor [T, {width}]")
    if result.dim() != 2 or result.shape[0] != rows.shape[0] or result.shape[1] != width:
        raise ConfigError(field, f"a result of shape {tuple(result.shape)}", f"[T, {width}] with T = {rows.shape[0]}")
    return result


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokens:
    """The tokens of a call on their way into its step. `router`, `shared`: [T, D], as router and shared expert read
    them; `latents`: [T, L] for the experts, None where these read x too."""

    router: torch.Tensor
    shared: torch.Tensor
    latents: torch.Tensor | None

    @classmethod
    def of(cls, x_TD: torch.Tensor, latent_in: nn.Module | None, width: int, dtype: torch.dtype) -> Tokens:
        """`latents` in `dtype`, that of the rows. In backward x gets (router + rows) + shared, as from `Fork`."""
        if latent_in is None:
            return cls(router=x_TD, shared=x_TD, latents=None)
        x_router = x_rows = x_shared = x_TD
        if torch.is_grad_enabled() and x_TD.requires_grad:
            rest, x_shared = Tap.apply(x_TD)
            x_router, x_rows = Tap.apply(rest)
        latents = project("latent_in", latent_in, x_rows, width).to(dtype)
        return cls(router=x_router, shared=x_shared, latents=latents)

    def enter(self, step: Step, w_in: torch.Tensor, w_out: torch.Tensor) -> list[torch.Tensor]:
        """Enter the step: [x for the router, rows, x for the shared expert]."""
        if self.latents is None:
            return step.enter(self.router, w_in, w_out, copies=3)
        rows, entry = step.enter(self.latents, w_in, w_out, copies=2)
        return [Tie.apply(self.router, entry), rows, self.shared]


def late_rows(
    step: Step, late: Callable[[], tuple[torch.Tensor, torch.Tensor]], latent_in: nn.Module | None, width: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """The rows of a step whose router has read something else: what `late` gives, while ranks agree. What it raises
    closes the transport."""
    with closing_on_error(step.transport, "the backbone before the tap"):
        step.hidden, x = late()
        return project("latent_in", latent_in, x.reshape(-1, x.shape[-1]), width).to(dtype)


class Tie(torch.autograd.Function):
    """x unchanged, whose backward reaches the node of `entry` as well, without a gradient for it: a loss of the router
    alone has to run the step's pending exchanges, as it does where the router reads a copy of x made by `Fork`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    @only_once
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        return grad, None

"""Right layers, on all of which the kit has to be silent: other options, and other ways of writing the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.verify.mutants import recipe
from tests.verify.mutants_plain import adapter, layer
from tests.verify.patching import Patch


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A right layer: attributes of the adapter's class beyond its defaults, changes of source that change nothing."""

    name: str
    attributes: Mapping[str, Any] = field(default_factory=dict)
    patches: tuple[Patch, ...] = ()
    ranks: int = 2
    dtype: torch.dtype = torch.float64

    @property
    def soak(self) -> bool:
        """Not in CI."""
        return self.name in SOAK


def ours(old: str, new: str) -> Patch:
    return Patch("verify.adapters.ours", old, new)


def _options(name: str, **options: Any) -> Variant:
    return Variant(name=name, attributes={"options": {"aux_coef": 0.01, **options}})


# One of several of a kind.
SOAK = {
    "top 1", "four experts", "capacity 2", "a larger auxiliary loss", "no bias update", "gelu", "shared expert first",
    "dense gradients divided before they are added up", "schedule chunked(16)", "softmax over the winners",
    "tokens with bad logits dropped", "no z loss", "fused optimizer", "chunks",
}  # fmt: skip

PLAIN: tuple[Variant, ...] = (
    Variant(name="as it comes"),
    Variant(name="three ranks", ranks=3),
    Variant(name="float32", dtype=torch.float32),
    Variant(name="top 4", attributes={"top_k": 4}),
    Variant(name="top 1", attributes={"top_k": 1, "options": {"normalize": False, "aux_coef": 0.01}}),
    Variant(name="four experts", attributes={"experts": 4}),
    Variant(name="24 experts, hidden 8", attributes={"experts": 24, "hidden": 8}),
    _options("without normalisation", normalize=False),
    _options("no shared expert", shared=False),
    _options("relu", activation=nn.functional.relu),
    _options("gelu", activation=nn.functional.gelu),
    _options("capacity 0.8", capacity_factor=0.8),
    _options("capacity 2", capacity_factor=2.0),
    _options("a larger auxiliary loss", aux_coef=1.0),
    Variant(name="no bias update", attributes={"bias_rate": 0.0}),
    Variant(
        name="1/EP in the experts' backward",
        patches=(
            recipe("                if parameter.grad is not None:\n                    parameter.grad /= ranks\n", ""),
            layer(
                "        self._again = False\n\n    def forward",
                "        self._again = False\n"
                "        for weight in (self.expert_up, self.expert_down):\n"
                "            weight.register_hook(lambda grad: grad / self.ranks)\n\n"
                "    def forward",
            ),
        ),
    ),
    Variant(
        name="dense gradients divided before they are added up",
        patches=(
            recipe(
                "            dist.all_reduce(parameter.grad, group=self.group)\n            parameter.grad /= ranks\n",
                "            parameter.grad /= ranks\n            dist.all_reduce(parameter.grad, group=self.group)\n",
            ),
        ),
    ),
    Variant(
        name="weights applied by the experts' ranks, after the experts",
        patches=(
            layer(
                "        back = self._exchange(torch.cat(outputs)[order.argsort()], recv, send)\n",
                "        of_row = self._exchange(weights_TK.flatten()[kept_S, None], send, recv)\n"
                "        back = self._exchange(of_row * torch.cat(outputs)[order.argsort()], recv, send)\n",
            ),
            layer("weighted = back * weights_TK.flatten()[kept_S, None]", "weighted = back"),
        ),
    ),
    Variant(
        name="rows by expert from the last to the first within a rank",
        patches=(
            layer(
                "order = expert.argsort(stable=True)",
                "order = torch.arange(len(expert)).flip(0)[expert.flip(0).argsort(stable=True)]",
            ),
        ),
    ),
    Variant(
        name="shared expert first",
        patches=(
            layer(
                "            y_TD = y_TD + self.shared_down(self.activation(self.shared_up(x_TD)))\n",
                "            y_TD = self.shared_down(self.activation(self.shared_up(x_TD))) + y_TD\n",
            ),
        ),
    ),
    Variant(
        name="counts added without a branch",
        patches=(
            layer(
                "        if self.training and not self._again:\n            self.counts += counts_E\n",
                "        self.counts += counts_E * (self.training and not self._again)\n",
            ),
        ),
    ),
    Variant(
        name="torch clips",
        patches=(
            adapter(
                "        for grad in gradients.values():\n"
                "            grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))\n",
                "        torch.nn.utils.clip_grads_with_norm_(self.module.parameters(), max_norm, norm)\n",
            ),
        ),
    ),
    Variant(
        name="fused optimizer",
        patches=(adapter("lr=self.learning_rate)", "lr=self.learning_rate, fused=True)"),),
    ),
    Variant(
        name="bias update by the distance from balance",
        patches=(layer("torch.sign(counts_E.mean() - counts_E)", "(counts_E.mean() - counts_E) / counts_E.sum()"),),
    ),
)


def _schedule(schedule: str) -> Variant:
    return Variant(name=f"schedule {schedule}", attributes={"schedule": schedule})


def _ours(name: str, options: str) -> Variant:
    """options: further arguments of MoELayer."""
    return Variant(name=name, patches=(ours("shared_expert_size=20,", f"shared_expert_size=20, {options},"),))


OURS: tuple[Variant, ...] = (
    Variant(name="as it comes"),
    Variant(name="three ranks", ranks=3),
    Variant(name="float32", dtype=torch.float32),
    Variant(name="top 4", attributes={"top_k": 4}),
    Variant(name="top 1", attributes={"top_k": 1}),
    Variant(name="four experts", attributes={"experts": 4}),
    Variant(name="24 experts, hidden 8", attributes={"experts": 24, "hidden": 8}),
    _schedule("chunked(2)"),
    _schedule("chunked(4,experts)"),
    _schedule("chunked(16)"),
    _schedule("shared_expert"),
    _ours("overlap off", "overlap=False"),
    _ours("sigmoid router", 'router="sigmoid"'),
    _ours("softmax over the winners", 'router="topk_softmax"'),
    _ours("gelu", 'activation="gelu"'),
    _ours("relu", 'activation="relu"'),
    _ours("capacity 0.8 of each rank's tokens", "capacity_factor=0.8"),
    _ours("tokens with bad logits dropped", 'bad_logits="drop"'),
    Variant(name="no shared expert", patches=(ours("shared_expert_size=20,", ""),)),
    Variant(name="no z loss", patches=(ours("z_loss_coef=0.01,", ""),)),
    Variant(
        name="the mean made by the loop, not by backward",
        patches=(
            ours(
                "timeout_s=TIMEOUT_S, dtype=dtype,\n        ))",
                'timeout_s=TIMEOUT_S, dtype=dtype,\n        ), gradients="sum")',
            ),
            ours(
                '            if self.group is not None and self.kind_of(name) != "experts":',
                '            if self.group is not None and self.kind_of(name) == "experts":\n'
                "                parameter.grad /= size_of(self.group)\n"
                "            elif self.group is not None:",
            ),
        ),
    ),
    Variant(name="fused optimizer", patches=(ours("lr=1e-2)", "lr=1e-2, fused=True)"),)),
)
DEDUPLICATED: tuple[Variant, ...] = (
    Variant(name="as it comes"),
    Variant(name="three ranks", ranks=3),
    Variant(name="float32", dtype=torch.float32),
    Variant(name="top 1", attributes={"top_k": 1}),
    Variant(name="all experts", attributes={"top_k": 12}),
    _schedule("chunked(4,experts)"),
    _schedule("shared_expert"),
    Variant(name="where it pays", attributes={"dedup": "auto"}),
    _ours("overlap off", "overlap=False"),
    _ours("capacity 0.8 of each rank's tokens", "capacity_factor=0.8"),
)
IN_DDP: tuple[Variant, ...] = (
    Variant(name="as it comes"),
    Variant(name="three ranks", ranks=3),
    Variant(name="chunks", attributes={"schedule": "chunked(3)"}),
    Variant(name="static graph", patches=(ours("process_group=group)", "process_group=group, static_graph=True)"),)),
)

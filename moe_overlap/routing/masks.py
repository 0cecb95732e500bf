"""Masks: experts that are never chosen, and tokens that are routed nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moe_overlap.errors import ConfigError
from moe_overlap.routing.choice import Choice, count_choices

GROUP_BEST = 2  # so many experts count for a group's worth where there is a bias (`ops.gate`), else one
TOGETHER = "which selects the experts of all tokens of a call together"


class ExpertMask(nn.Module):
    """A router some of whose experts may be masked: they exist and are never chosen (pruned experts: MoE-Pruner,
    arXiv 2410.12013; expert pruning, arXiv 2402.14800).

    Buffer: `masked_experts_E`, bool, True = never chosen; None, and in no state dict, as long as no expert is masked. A
    state dict with a mask brings it along. One entry for each logit. Beside it stand num_experts, top_k, n_group,
    topk_group and expert_bias_E of the router that is derived from this class.
    """

    masked_experts_E: torch.Tensor | None
    expert_bias_E: torch.Tensor | None
    num_experts: int
    top_k: int
    n_group: int
    topk_group: int
    selects_together = False
    """Whether the experts of a token depend on the other tokens of its call: such a router knows no masks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("masked_experts_E", None)
        self.unmasked_share = 1.0  # makes an auxiliary loss 1 where it is balanced over the unmasked experts
        self._mask_seen: tuple[int, int] | None = None

    @property
    def num_logits(self) -> int:
        """How many experts have a logit."""
        return self.num_experts

    def mask_experts(self, ids: Iterable[int]) -> None:
        """From now on these experts, and no others, are never chosen. ids: none: all may be chosen again.

        Raises ConfigError for an id that does not exist, and where fewer than `top_k` experts would be left to a token
        (of the groups that it chooses from, in the worst case).
        """
        masked = set(ids)
        for one in masked:
            if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < self.num_logits:
                raise ConfigError("masked_experts", one, f"experts from 0 to {self.num_logits - 1}")
        flags = [expert in masked for expert in range(self.num_logits)]
        self._note_mask(flags)
        self.masked_experts_E = torch.tensor(flags, device=self._mask_device) if masked else None

    def hide_masked(self, values_TE: torch.Tensor) -> torch.Tensor:
        """Logits, or a bias [E], with -inf for masked experts: no score, and no bias lifts it. Raises ConfigError where
        the mask was changed by other hands and leaves too few experts."""
        if self.masked_experts_E is None:
            return values_TE
        self._look_at_mask(self.masked_experts_E)
        return values_TE.masked_fill(self.masked_experts_E, -torch.inf)

    def refuse_masked(self, choice: Choice) -> Choice:
        """Without the masked experts that a token had to take because its other logits are -inf as well."""
        masked_E = self.masked_experts_E
        if masked_E is None:
            return choice
        return keep_only(choice, ~masked_E[choice.ids_TK.clamp_min(0).long()])

    def _look_at_mask(self, masked_E: torch.Tensor) -> None:
        """One read by the host for each change of the mask; none where torch.compile traces."""
        if torch.compiler.is_compiling() or masked_E.is_meta or masked_E.is_inference():
            return
        now = (masked_E.data_ptr(), masked_E._version)
        if now != self._mask_seen:
            if masked_E.dtype != torch.bool or masked_E.shape != (self.num_logits,):
                raise ConfigError("masked_experts_E", _kind(masked_E), f"torch.bool ({self.num_logits},)")
            self._note_mask(masked_E.tolist())
            self._mask_seen = now

    def _note_mask(self, masked: Sequence[bool]) -> None:
        if any(masked) and self.selects_together:
            raise ConfigError("masked_experts", masked.index(True), f"none in a {type(self).__name__}, {TOGETHER}")
        best = 1 if self.expert_bias_E is None else GROUP_BEST
        left = experts_left(masked, self.n_group, self.topk_group, best)
        if left < self.top_k:
            expected = f"at most {left}, the experts that are left to a token, {sum(masked)} of {len(masked)} masked"
            raise ConfigError("top_k", self.top_k, expected)
        self.unmasked_share = 1 - sum(masked) / len(masked)

    @property
    def _mask_device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        saved_E = state_dict.get(prefix + "masked_experts_E")
        if saved_E is not None and self.masked_experts_E is None:
            self.masked_experts_E = torch.zeros(self.num_logits, dtype=torch.bool, device=self._mask_device)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if saved_E is not None and self.masked_experts_E is not None:
            self._look_at_mask(self.masked_experts_E)


def experts_left(masked: Sequence[bool], n_group: int, topk_group: int, best: int) -> int:
    """How many unmasked experts a token chooses from in the worst case.

    masked: one flag an expert. A group with fewer than `best` unmasked experts is worth -inf: it comes after the
    others, and of such groups those with lower numbers first.
    """
    size = len(masked) // n_group
    left = [size - sum(masked[at : at + size]) for at in range(0, len(masked), size)]
    if topk_group == n_group:
        return sum(left)
    best = min(best, size)
    first = sorted(count for count in left if count >= best)[:topk_group]
    rest = [count for count in left if count < best]
    return sum(first) + sum(rest[: topk_group - len(first)])


def check_token_mask(token_mask: object, x_TD: torch.Tensor) -> torch.Tensor | None:
    """bool [T], True = a token, False = padding; None: all are tokens. Raises ConfigError for anything else."""
    if token_mask is None:
        return None
    given = _kind(token_mask) if isinstance(token_mask, torch.Tensor) else type(token_mask).__name__
    fits = isinstance(token_mask, torch.Tensor) and token_mask.dtype == torch.bool and token_mask.dim() == 1
    # Nothing is printed before it is wrong: a size in a text is a number to torch.compile, no longer any number.
    if not isinstance(token_mask, torch.Tensor) or not fits or token_mask.shape[0] != x_TD.shape[0]:
        raise ConfigError("token_mask", given, f"torch.bool [{x_TD.shape[0]}], True for a token, False for padding")
    if token_mask.device != x_TD.device:
        raise ConfigError("token_mask.device", str(token_mask.device), f"the device of x, {x_TD.device}")
    return token_mask


def without_padding(x_TD: torch.Tensor, token_mask_T: torch.Tensor | None) -> torch.Tensor:
    """x with zeros for padding, whatever stood there, NaN too; no gradient goes back to it."""
    return x_TD if token_mask_T is None else x_TD.masked_fill(~token_mask_T[:, None], 0.0)


def mark_padding(logits_TE: torch.Tensor, token_mask_T: torch.Tensor | None) -> torch.Tensor:
    """Logits with NaN for padding: `ops.gate_topk` gives such a token no expert, weights 0 and no gradient."""
    return logits_TE if token_mask_T is None else logits_TE.masked_fill(~token_mask_T[:, None], float("nan"))


def settle_padding(choice: Choice, token_mask_T: torch.Tensor | None, *, raises: bool) -> Choice:
    """A choice on marked logits, whose padding is no bad token: it raises nothing, is no drop, and counts in no loss.

    raises: whether a bad token does raise; else it is dropped (`drop_bad_tokens` has been there).
    """
    if token_mask_T is None:
        return choice
    refused_T1 = (choice.ids_TK[:, :1] < 0) & token_mask_T[:, None]
    if raises:
        status = refused_T1.any().to(choice.status.dtype).reshape(1)
        return replace(choice, status=status, valid_T1=token_mask_T[:, None])
    top_k = choice.ids_TK.shape[1]
    return replace(choice, dropped=refused_T1.sum() * top_k, valid_T1=token_mask_T[:, None] & ~refused_T1)


def keep_only(choice: Choice, keep_TK: torch.Tensor) -> Choice:
    """The choice without the slots that are False: ids -1, weights 0, not counted, and no drops either."""
    ids_TK = choice.ids_TK.masked_fill(~keep_TK, -1)
    counts_E = count_choices(ids_TK, choice.counts_E.shape[0])
    weights_TK = choice.weights_TK.masked_fill(~keep_TK, 0.0)
    return replace(choice, ids_TK=ids_TK, weights_TK=weights_TK, counts_E=counts_E)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"

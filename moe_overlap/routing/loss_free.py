"""Balance without a loss: a bias on the selection, moved by a fixed step after each batch (arXiv 2408.15664)."""

from __future__ import annotations

import torch


@torch.no_grad()
def update_bias_(
    bias_E: torch.Tensor,
    counts_E: torch.Tensor,
    update_rate: float,
    *,
    recentre: bool = False,
    masked_E: torch.Tensor | None = None,
) -> None:
    """b_i += update_rate * sign(mean(c) - c_i), in place (Algorithm 1 of the paper, with the sign rule of its table 3).

    bias_E: float32 [E]. counts_E: int64 [E], choices of the batch, over all ranks. The sign is that of integers, exact
    for any count; counts that are all equal, or zero, change nothing. recentre: take the mean off afterwards, which
    changes no selection without group limits and keeps biases from drifting together (torchtitan). masked_E: bool [E],
    experts that are never chosen: they keep their bias and are in no mean, or all others would be above it.
    """
    if masked_E is None:
        bias_E += update_rate * torch.sign(counts_E.sum() - counts_E.shape[0] * counts_E).to(bias_E.dtype)
        if recentre:
            bias_E -= bias_E.mean()
        return
    kept_E = bias_E[~masked_E]
    update_bias_(kept_E, counts_E[~masked_E], update_rate, recentre=recentre)
    bias_E[~masked_E] = kept_E


def max_violation(counts_E: torch.Tensor) -> float:
    """MaxVio = (max_i c_i - mean(c)) / mean(c) of counts [E] (the paper's eq. 4): 0 where balanced, E - 1 at most. Of
    the counts of many batches together it is MaxVio_global, of one batch MaxVio_batch. 0 for no choice at all."""
    total = int(counts_E.sum())
    return int(counts_E.max()) * counts_E.shape[0] / total - 1.0 if total else 0.0

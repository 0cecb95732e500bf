"""gate_topk and its backward in Triton: one program holds the scores of a few tokens in registers.

Selection goes by integers that order like the scores, so that -inf, -0.0 and lanes without an expert need no special
care: k times the largest, of equals the first. The counts are made by integer atomics, whose order changes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_overlap.ops.gate import BAD_LOGITS
from moe_overlap.ops.launch_triton import blocks, contiguous, launch, power_of_two

_SCORE_NUMBERS = {"softmax": 0, "topk_softmax": 1, "sigmoid": 2}
_SOFTMAX = tl.constexpr(0)
_TOPK_SOFTMAX = tl.constexpr(1)
_SIGMOID = tl.constexpr(2)
_TINY = tl.constexpr(1e-20)
_BAD_LOGITS = tl.constexpr(BAD_LOGITS)
_INF = tl.constexpr(float("inf"))
_LOWEST_32 = tl.constexpr(-0x7FFFFFFF)
_LOWEST_64 = tl.constexpr(-0x7FFFFFFFFFFFFFFF)


@triton.jit
def _order(x):
    """Integers in the order of the floats: no NaN comes here, -0.0 equals 0.0, and `_lowest` is below all of them."""
    x = tl.where(x == 0, 0.0, x)
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return order


@triton.jit
def _lowest(order):
    """A block like `order`, smaller than the order of -inf by more than one: for experts taken or not there."""
    if order.dtype == tl.int64:
        lowest = tl.full(order.shape, _LOWEST_64, tl.int64)
    else:
        lowest = tl.full(order.shape, _LOWEST_32, tl.int32)
    return lowest


@triton.jit
def _scores(x_TE, inside_E, SCORE: tl.constexpr):
    """The scores of finite rows of logits, whose lanes outside `inside_E` hold -inf."""
    if SCORE == _SOFTMAX:
        power_TE = tl.exp(x_TE - tl.max(x_TE, 1)[:, None])
        scores_TE = power_TE / tl.sum(power_TE, 1)[:, None]
    elif SCORE == _SIGMOID:
        scores_TE = tl.where(inside_E[None, :], tl.sigmoid(x_TE), 0.0)
    else:
        scores_TE = x_TE
    return scores_TE


@triton.jit
def _in_best_groups(
    choice_TE, group_E, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, PAIRS: tl.constexpr
):
    """Which experts are in the best groups; a group is worth its best expert, or its two best (`PAIRS`)."""
    expert_E = tl.arange(0, choice_TE.shape[1])
    group_G = tl.arange(0, GROUP_PAD)
    worth_TG = tl.full((choice_TE.shape[0], GROUP_PAD), -_INF, choice_TE.dtype)
    for group in range(N_GROUP):
        member_TE = tl.where((group_E == group)[None, :], choice_TE, -_INF)
        worth_T = tl.max(member_TE, 1)
        if PAIRS:
            best_T = tl.argmax(_order(member_TE), 1)
            worth_T += tl.max(tl.where(expert_E[None, :] == best_T[:, None], -_INF, member_TE), 1)
        worth_TG = tl.where((group_G == group)[None, :], worth_T[:, None], worth_TG)
    order_TG = _order(worth_TG)
    order_TG = tl.where((group_G < N_GROUP)[None, :], order_TG, _lowest(order_TG))
    kept_TE = tl.zeros(choice_TE.shape, dtype=tl.int1)
    for _ in range(TOPK_GROUP):
        best_T = tl.argmax(order_TG, 1)
        kept_TE = kept_TE | (group_E[None, :] == best_T[:, None])
        order_TG = tl.where(group_G[None, :] == best_T[:, None], _lowest(order_TG), order_TG)
    return kept_TE


@triton.jit
def _weights(chosen_TK, real_K, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr):
    """Weights from the scores of the chosen; lanes outside `real_K` come out as anything."""
    if SCORE == _TOPK_SOFTMAX:
        chosen_TK = tl.where(real_K[None, :], chosen_TK, -_INF)
        power_TK = tl.exp(chosen_TK - tl.max(chosen_TK, 1)[:, None])
        weights_TK = power_TK / tl.sum(power_TK, 1)[:, None]
    elif RENORMALIZE:
        weights_TK = chosen_TK / (tl.sum(tl.where(real_K[None, :], chosen_TK, 0.0), 1) + _TINY)[:, None]
    else:
        weights_TK = chosen_TK
    return weights_TK * SCALE


@triton.jit(do_not_specialize=["tokens"])
def gate_topk_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, counts_ptr, status_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr, GROUP_PAD: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert_E, k_K = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    here_T, inside_E, real_K = token_T < tokens, expert_E < E, k_K < K
    token_T = token_T.to(tl.int64)
    here_TE = here_T[:, None] & inside_E[None, :]
    x_TE = tl.load(logits_ptr + token_T[:, None] * E + expert_E[None, :], mask=here_TE, other=-_INF)
    peak_T = tl.max(x_TE, 1)
    bad_T = (peak_T == _INF) | (peak_T == -_INF) | (tl.max((x_TE != x_TE).to(tl.int32), 1) > 0)
    x_TE = tl.where(bad_T[:, None] & inside_E[None, :], 0.0, x_TE)

    scores_TE = _scores(x_TE, inside_E, SCORE)
    choice_TE = x_TE
    if bias_ptr is not None:
        choice_TE = scores_TE + tl.load(bias_ptr + expert_E, mask=inside_E, other=0.0)[None, :]
    order_TE = _order(choice_TE)
    if TOPK_GROUP < N_GROUP:
        SIZE: tl.constexpr = E // N_GROUP
        PAIRS: tl.constexpr = bias_ptr is not None and SIZE > 1
        kept_TE = _in_best_groups(choice_TE, expert_E // SIZE, N_GROUP, TOPK_GROUP, GROUP_PAD, PAIRS)
        order_TE = tl.where(kept_TE, order_TE, _lowest(order_TE) + 1)  # below -inf in a group that is kept
    order_TE = tl.where(inside_E[None, :], order_TE, _lowest(order_TE))

    ids_TK = tl.full((BLOCK_T, K_PAD), -1, tl.int32)
    chosen_TK = tl.zeros((BLOCK_T, K_PAD), dtype=x_TE.dtype)
    for k in range(K):
        best_T = tl.argmax(order_TE, 1)
        best_TE = expert_E[None, :] == best_T[:, None]
        score_T = tl.sum(tl.where(best_TE, scores_TE, 0.0), 1)
        ids_TK = tl.where((k_K == k)[None, :], best_T[:, None], ids_TK)
        chosen_TK = tl.where((k_K == k)[None, :], score_T[:, None], chosen_TK)
        order_TE = tl.where(best_TE, _lowest(order_TE), order_TE)

    weights_TK = _weights(chosen_TK, real_K, SCORE, RENORMALIZE, SCALE)
    place_TK = token_T[:, None] * K + k_K[None, :]
    here_TK = here_T[:, None] & real_K[None, :]
    tl.store(weights_ptr + place_TK, tl.where(bad_T[:, None], 0.0, weights_TK), mask=here_TK)
    tl.store(ids_ptr + place_TK, tl.where(bad_T[:, None], -1, ids_TK), mask=here_TK)
    taken_TE = (order_TE == _lowest(order_TE)) & here_TE & (~bad_T)[:, None]
    count_E = tl.sum(taken_TE.to(tl.int32), 0)
    tl.atomic_add(counts_ptr + expert_E, count_E, mask=count_E > 0, sem="relaxed")
    any_bad = tl.max((bad_T & here_T).to(tl.int32), 0)
    tl.store(status_ptr, _BAD_LOGITS, mask=any_bad > 0)


@triton.jit(do_not_specialize=["tokens"])
def gate_topk_backward_kernel(
    dweights_ptr, logits_ptr, ids_ptr, dlogits_ptr, tokens,
    E: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr, E_PAD: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert_E, k_K = tl.arange(0, E_PAD), tl.arange(0, K_PAD)
    here_T, inside_E, real_K = token_T < tokens, expert_E < E, k_K < K
    token_T = token_T.to(tl.int64)
    here_TK, here_TE = here_T[:, None] & real_K[None, :], here_T[:, None] & inside_E[None, :]
    place_TK = token_T[:, None] * K + k_K[None, :]
    ids_TK = tl.load(ids_ptr + place_TK, mask=here_TK, other=-1)
    good_TK = here_TK & (ids_TK >= 0)  # a token has all its experts or, where its logits were bad, none
    good_T = tl.max(good_TK.to(tl.int32), 1) > 0
    d_TK = tl.load(dweights_ptr + place_TK, mask=good_TK, other=0.0) * SCALE
    place_TE = token_T[:, None] * E + expert_E[None, :]
    x_TE = tl.load(logits_ptr + place_TE, mask=good_T[:, None] & inside_E[None, :], other=-_INF)
    x_TE = tl.where(good_T[:, None], x_TE, 0.0)
    scores_TE = _scores(x_TE, inside_E, SCORE)
    chosen_TK = tl.zeros((BLOCK_T, K_PAD), dtype=x_TE.dtype)
    for k in range(K):
        id_T = tl.sum(tl.where((k_K == k)[None, :], ids_TK, 0), 1)
        score_T = tl.sum(tl.where(expert_E[None, :] == id_T[:, None], scores_TE, 0.0), 1)
        chosen_TK = tl.where((k_K == k)[None, :], score_T[:, None], chosen_TK)

    if SCORE == _TOPK_SOFTMAX:
        share_TK = tl.where(good_TK, _weights(chosen_TK, real_K, SCORE, False, 1.0), 0.0)
        d_TK = share_TK * (d_TK - tl.sum(d_TK * share_TK, 1)[:, None])
    elif RENORMALIZE:
        total_T = tl.sum(chosen_TK, 1) + _TINY
        d_TK = (d_TK - (tl.sum(d_TK * chosen_TK, 1) / total_T)[:, None]) / total_T[:, None]
    if SCORE == _SIGMOID:
        d_TK = d_TK * chosen_TK * (1 - chosen_TK)
    d_TK = tl.where(good_TK, d_TK, 0.0)

    d_TE = tl.zeros((BLOCK_T, E_PAD), dtype=x_TE.dtype)
    for k in range(K):
        id_T = tl.sum(tl.where((k_K == k)[None, :], ids_TK, 0), 1)
        d_T = tl.sum(tl.where((k_K == k)[None, :], d_TK, 0.0), 1)
        d_TE = tl.where(expert_E[None, :] == id_T[:, None], d_T[:, None], d_TE)
    if SCORE == _SOFTMAX:
        d_TE = scores_TE * (d_TE - tl.sum(d_TK * chosen_TK, 1)[:, None])
    tl.store(dlogits_ptr + place_TE, tl.where(good_T[:, None], d_TE, 0.0), mask=here_TE)


def _block_of_tokens(experts_padded: int) -> int:
    return max(1, 1024 // experts_padded)


def gate_topk(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    k: int,
    n_group: int,
    topk_group: int,
    score: str,
    renormalize: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights, ids, counts, status): see ops/gate.py. Reads T * E scores, writes 2 * T * K words."""
    tokens, experts = logits_TE.shape
    weights_TK = torch.empty((tokens, k), dtype=logits_TE.dtype, device=logits_TE.device)
    ids_TK = torch.empty((tokens, k), dtype=torch.int32, device=logits_TE.device)
    counts_E = torch.zeros((experts,), dtype=torch.int32, device=logits_TE.device)
    status = torch.zeros((1,), dtype=torch.int32, device=logits_TE.device)
    padded = power_of_two(experts)
    block_T = _block_of_tokens(padded)
    launch(
        gate_topk_kernel,
        (blocks(tokens, block_T),),
        logits_TE.contiguous(), contiguous(bias_E), weights_TK, ids_TK, counts_E, status, tokens,
        E=experts, K=k, N_GROUP=n_group, TOPK_GROUP=topk_group, SCORE=_SCORE_NUMBERS[score],
        RENORMALIZE=renormalize, SCALE=scale,
        BLOCK_T=block_T, E_PAD=padded, K_PAD=power_of_two(k), GROUP_PAD=power_of_two(n_group),
    )  # fmt: skip
    return weights_TK, ids_TK, counts_E, status


def gate_topk_backward(
    dweights_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    score: str,
    renormalize: bool,
    scale: float,
) -> torch.Tensor:
    """dlogits: see ops/gate.py. Reads T * E logits, writes as many."""
    (tokens, experts), k = logits_TE.shape, ids_TK.shape[1]
    dlogits_TE = torch.empty((tokens, experts), dtype=logits_TE.dtype, device=logits_TE.device)
    padded = power_of_two(experts)
    block_T = _block_of_tokens(padded)
    launch(
        gate_topk_backward_kernel,
        (blocks(tokens, block_T),),
        dweights_TK.contiguous(), logits_TE.contiguous(), ids_TK.contiguous(), dlogits_TE, tokens,
        E=experts, K=k, SCORE=_SCORE_NUMBERS[score], RENORMALIZE=renormalize, SCALE=scale,
        BLOCK_T=block_T, E_PAD=padded, K_PAD=power_of_two(k),
    )  # fmt: skip
    return dlogits_TE

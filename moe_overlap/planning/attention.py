"""Attention of one layer in numbers: its weights, its FLOPs, what is cached of a token, what backward needs of it.

Grouped-query attention (arXiv 2305.13245): queries, keys and values are projections of the hidden state, and keys and
values have fewer heads. Multi-head latent attention (MLA: DeepSeek-V2, arXiv 2405.04434, 2.1): keys and values are made
of one latent of `kv_lora_rank` numbers, queries of one of `q_lora_rank` (0: of the hidden state), and the part of a key
that turns with its position is one for all heads. Biases and norms are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Attention:
    """`params`: numbers of the weights. `core`: of all heads together, the width of a query plus that of a value.
    `cached`: numbers kept of a token for later ones. `saved`: numbers that backward needs of a token beside the input
    and its norm: what the projections give, and what goes into the last one."""

    params: float
    core: float
    cached: float
    saved: float

    def flops(self, tokens: int, seen: int) -> float:
        """Of forward over sequences of `seen` tokens, causal: half of the scores and of the sums are computed."""
        return 2 * tokens * self.params + tokens * seen * self.core


def grouped_query(*, hidden: int, width: int, kv_share: float) -> Attention:
    """width: of all query heads together. kv_share: heads of keys (and of values) for each query head."""
    return Attention(params=2 * (1 + kv_share) * hidden * width, core=2 * width, cached=2 * kv_share * width,
                     saved=2 * (1 + kv_share) * width)  # fmt: skip


def latent(
    *, hidden: int, heads: int, q_lora_rank: int, kv_lora_rank: int, qk_nope_head_dim: int, qk_rope_head_dim: int,
    v_head_dim: int,
) -> Attention:  # fmt: skip
    """The widths by the names that configs of DeepSeek-V2, V3 and Kimi-K2 have for them. Keys and values of all heads
    are made of the latent, as in prefill and training; the order of products in which a decoder reads the latent itself
    has other FLOPs and is not counted.

    >>> v3 = latent(hidden=7168, heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    ...             qk_rope_head_dim=64, v_head_dim=128)
    >>> v3.params, v3.cached
    (187105280, 576)
    """
    query, value, kept = (
        heads * (qk_nope_head_dim + qk_rope_head_dim),
        heads * v_head_dim,
        kv_lora_rank + qk_rope_head_dim,
    )
    to_query = (hidden + query) * q_lora_rank if q_lora_rank else hidden * query
    from_latent = kv_lora_rank * (heads * qk_nope_head_dim + value)
    return Attention(params=to_query + hidden * kept + from_latent + value * hidden, core=query + value, cached=kept,
                     saved=q_lora_rank + kept + 2 * query + 2 * value)  # fmt: skip

"""Published measurements and, for each, what the planner says to the same question.

A paper is a function from the six free numbers (`Reached`) to a forecast for each of its rows. Shapes are the papers';
what they do not say is assumed and stands in the row. The layer alone is asked for with a backbone of no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from statistics import mean

from moe_overlap.commands.plan.machine import cost_model, local_experts, place, shapes
from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.presets import figures_of
from moe_overlap.commands.plan.sweep import asked
from moe_overlap.planning.attention import latent
from moe_overlap.planning.cost_model import AlphaBeta, window
from moe_overlap.planning.interleaved import interleaved_s
from moe_overlap.planning.machines import MACHINES, Reached
from moe_overlap.planning.search import search
from moe_overlap.planning.shapes import balanced_shape

ALONE = {"backbone": (0.0, 0.0, 0.0), "kind": "top2", "dedup": "off", "sequence": 1}


@dataclass(frozen=True)
class Row:
    """One published figure. unit: "ms" (an absolute time) or "x" (a speed-up). counts: whether it is of a schedule that
    the planner has. cause: why it may miss."""

    case: str
    unit: str
    measured: float
    assumed: str = ""
    cause: str = ""
    counts: bool = True


@dataclass(frozen=True)
class Paper:
    name: str
    source: str
    rows: tuple[Row, ...]
    forecasts: Callable[[Reached], list[float]]


def options(machine: str, reached: Reached, **changes: object) -> PlanOptions:
    dtype = str(changes.get("dtype", "bf16"))
    found = figures_of(replace(MACHINES[machine], reached=reached), dtype)
    return PlanOptions(**(found | changes))  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def point(question: PlanOptions, kind: str = "top2"):  # type: ignore[no-untyped-def]
    return asked(question, kind)


def cut_s(question: PlanOptions, chunks: int, by: str) -> float:
    """Seconds of forward in exactly so many chunks, overlapped."""
    at = place(question, ranks=question.ranks, bytes_per_s=question.bandwidth)
    model = cost_model(question, "top2", at)
    shape = balanced_shape(
        tokens=question.tokens, top_k=question.top_k, hidden=question.hidden, dtype_bytes=question.dtype_bytes,
        ranks=at.group, ranks_per_node=at.per_node, local_experts=local_experts(question, at), chunks=chunks, by=by,
    )  # fmt: skip
    found = search(window(model, [shape], "forward"))
    return model.outside("forward") + min(one.predicted_s for one in found if not one.joined)


# ---------------------------------------------------------------- Tutel


SHAPES = ((4096, 16384, 65536), (1024, 2048, 4096), (1024, 2048, 4096), (1, 2))  # tokens, D, H, experts a GPU


def _tutel(reached: Reached, ranks: int, tokens: int, hidden: int, ffn: int, local: int) -> PlanOptions:
    return options("a100x8", reached, ranks=ranks, tokens=tokens, hidden=hidden, ffn=ffn, experts=local * ranks,
                   matrices=2, dtype="fp32", phase="train", **ALONE)  # fmt: skip


def _degrees(reached: Reached, ranks: int, every: int) -> tuple[float, ...]:
    """Mean over the shapes of table 6: degree 1 over the best, degree 2 and degree 8 over the best."""
    found = []
    for tokens, hidden, ffn, local in list(product(*SHAPES))[::every]:
        one = point(_tutel(reached, ranks, tokens, hidden, ffn, local))
        by_degree = [one.serial_s, *(one.of_chunks(degree, "tokens") for degree in (2, 4, 8))]
        best = min(by_degree)
        found.append((by_degree[0] / best, by_degree[1] / best, by_degree[3] / best))
    return tuple(mean(column) for column in zip(*found, strict=True))


def tutel(reached: Reached, every: int = 1) -> list[float]:
    """every: of the shapes of table 6a, only every n-th, which is how they are fitted."""
    points = [point(_tutel(reached, ranks, 65536, 4096, 4096, 2)) for ranks in (16, 64, 256)]
    layer = [1e3 * one.serial_s for one in points]
    exchanges = [1e3 * (one.serial_s - one.compute_s) for one in points]
    by_ranks = [_degrees(reached, ranks, every) for ranks in (16, 64, 256)]
    return [*layer, *exchanges, *(one[0] for one in by_ranks), by_ranks[0][1], by_ranks[0][2]]


# ---------------------------------------------------------------- EPS-MoE


def eps_moe(reached: Reached) -> list[float]:
    serial, gains = [], []
    for tokens in (3072, 1024, 256):
        question = options("h800x8", reached, ranks=8, tokens=tokens, hidden=5120, ffn=1536, experts=160, top_k=6,
                           phase="infer", **ALONE)  # fmt: skip
        one = point(question)
        serial.append(1e3 * one.serial_s)
        gains.append(one.serial_s / cut_s(question, 5, "experts"))
    return serial + gains


# ---------------------------------------------------------------- DeepSeek-V3's prefill

_V3 = latent(
    hidden=7168,
    heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)  # arXiv 2412.19437, 4.2
MLA = 2 * _V3.params  # matmul FLOPs of its attention for a token
MLA_CORE = 4096 * _V3.core  # and of the attention itself over 4096 tokens, causal


def deepseek(reached: Reached) -> list[float]:
    fp8 = MACHINES["h800x8"].flops["fp8"] * reached.matmul
    bf16 = MACHINES["h800x8"].flops["bf16"] * reached.matmul
    tokens = 8192
    attention_s = tokens * (MLA / fp8 + MLA_CORE / bf16)
    shared_s = tokens * 6 * 7168 * 2048 / fp8
    changes = ALONE | {"dedup": "node", "backbone": (attention_s, shared_s, 0.0), "flops": fp8}
    question = options("h800x8", reached, ranks=32, tokens=tokens, hidden=7168, ffn=2048, experts=256, top_k=8,
                       phase="infer", dispatch_dtype="fp8", **changes)  # fmt: skip
    at = place(question, ranks=32, bytes_per_s=question.bandwidth)
    model = cost_model(question, "top2", at)
    (first, *_) = shapes(question, "top2", at, distinct=True)
    inside = first.distinct.inside
    # DeepEP's kernels pass rows on and add them up within an exchange: both wires are pipelined, and compute does not
    # wait for that.
    model = replace(
        model, distinct=replace(model.distinct, gateway_byte_s=0.0, inside=AlphaBeta(alpha_s=0.0, beta_s=0.0))
    )
    forward = window(model, [first], "forward")

    def both_s(across: Mapping[str, int], passed_on: int) -> float:
        return model.exchange_s({"inter": across["inter"], "intra": across["intra"] + passed_on})

    def of_chunk(by_lane: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        return {lane: sizes[0] for lane, sizes in by_lane.items()}

    dispatch_s = both_s(of_chunk(first.narrow_by_lane), inside.narrow_out[0])
    dispatch_s += both_s(first.distinct.metadata_by_lane, inside.metadata)
    combine_s = both_s(of_chunk(first.distinct.back_by_lane), inside.back[0])
    compute_s = model.deduplicated.outside("forward") + forward.head_s + sum(forward.ops_s)
    compute_s += sum(forward.chunkings[0].experts_s) + forward.tail_s
    overlapped_s = interleaved_s(compute_s, dispatch_s + combine_s, question.slowdown)
    return [1e3 * s for s in (dispatch_s, combine_s, overlapped_s, compute_s + dispatch_s + combine_s)]


# ---------------------------------------------------------------- Megatron-LM


def megatron(reached: Reached) -> list[float]:
    """A layer of 14 of DeepSeek-V3's: forward of one micro-batch beside the backward of another; the forward that is
    run again for the backward is beside nothing."""
    tokens = 4096
    peak = MACHINES["h100x8"].flops["bf16"] * reached.matmul
    attention_s, shared_s = tokens * (MLA + MLA_CORE) / peak, tokens * 6 * 7168 * 2048 / peak
    changes = ALONE | {"backbone": (attention_s, shared_s, 0.0)}
    question = options("h100x8", reached, ranks=16, tokens=tokens, hidden=7168, ffn=2048, experts=256, top_k=8,
                       phase="train", **changes)  # fmt: skip
    one = point(question)
    again = point(replace(question, phase="infer"))
    two_s = interleaved_s(one.compute_s, one.serial_s - one.compute_s, question.slowdown)
    return [(one.serial_s + again.serial_s) / (two_s + again.serial_s)]


# ---------------------------------------------------------------- Comet


def comet(reached: Reached) -> list[float]:
    one = point(options("h800x8", reached, ranks=8, tokens=2048, hidden=4096, ffn=14336, experts=8, top_k=2,
                        phase="infer", **ALONE))  # fmt: skip
    degrees = [one.of_chunks(degree, "tokens") for degree in (2, 4, 8)]
    return [one.serial_s / degrees[0], one.serial_s / min(one.serial_s, *degrees)]


def implied(share_hidden: float, comm_share: float = 0.13) -> float:
    """The speed-up over serial where so much of the communication is hidden: figure 11 gives shares alone."""
    return 1 / (1 - share_hidden * comm_share)


# ---------------------------------------------------------------- ScMoE


def _at_share(question: PlanOptions, share: float, wire: str) -> PlanOptions:
    """The same with that rate of a wire at which the serial top-2 pair of forward is communication to this share."""
    asking = replace(question, phase="infer", kind="top2")
    rate = getattr(question, wire)
    slow, fast = (point(replace(asking, **{wire: each})) for each in (rate, 2 * rate))
    comm = [one.serial_s - one.compute_s for one in (slow, fast)]
    bytes_s = 2 * rate * (comm[0] - comm[1])  # seconds times rate: what travels
    fixed_s = comm[1] - bytes_s / (2 * rate)
    wanted_s = share / (1 - share) * slow.compute_s - fixed_s
    return replace(question, **{wire: bytes_s / wanted_s})


def _scmoe_times(question: PlanOptions, phase: str) -> tuple[float, ...]:
    """Serial top-2, pipelined top-2 (two chunks), the shared expert beside its exchange, ScMoE at Pos-2."""
    asking = replace(question, phase=phase)
    top2, shared, pos2 = (point(replace(asking, kind=kind), kind) for kind in ("top2", "shared1", "scmoe_pos2"))
    return top2.serial_s, top2.of_chunks(2, "tokens"), shared.of_chunks(1), pos2.of_chunks(1)


def scmoe(reached: Reached) -> list[float]:
    swin = options("a30-pcie", reached, ranks=8, tokens=23040, hidden=384, ffn=1536, experts=8, top_k=2, matrices=2,
                   dtype="fp16", sequence=144, dedup="off")  # fmt: skip
    swin = _at_share(swin, 0.60, "intra_bandwidth")
    serial, piped, shared, pos2 = _scmoe_times(swin, "infer")
    train = _scmoe_times(swin, "train")
    gpt = options("a800x8", reached, ranks=16, tokens=8192, hidden=1024, ffn=4096, experts=16, top_k=2, matrices=2,
                  dtype="fp16", sequence=2048, dedup="off")  # fmt: skip
    _, gpt_piped, gpt_shared, gpt_pos2 = _scmoe_times(_at_share(gpt, 0.50, "bandwidth"), "infer")
    return [serial / pos2, train[0] / train[3], shared / pos2, piped / pos2, gpt_shared / gpt_pos2,
            gpt_piped / gpt_pos2]  # fmt: skip


# ---------------------------------------------------------------- the rows

TF32_ONLY = "held out, nothing else is in TF32, which reaches more of its peak than bf16 and fp8 of the others"
WIRE_OF_ALL = "one share for NVLink and every NIC; these 200 Gb/s NICs reach more of theirs than the fit's others"
HOST = ("its serial layer has 0.3 ms that no size explains, and the overlapped one has not: gains at m 256 are more "
        "than hiding all of the exchanges could give")  # fmt: skip
SWIN_REST = "60 % of the pair is taken as communication; in the paper it may be of the MoE part, with less to hide"
FIG8 = "the paper's baselines are other code; it does not say in how many chunks they are cut"
FEW = "figure 11 is a mean over shapes; here one, whose communication is 13 % of the layer"
_TF32 = "fp32 rows, matmuls in TF32"
_SHAPES = "54 shapes: 4K, 16K, 64K tokens, D and H of 1K, 2K, 4K, 1 or 2 experts a GPU"
_SWIN = "23040 tokens a GPU (batch 1024, 144 tokens, capacity 1.25), wire at its 60 % share"
_GPT = "GPT2-MoE-Medium, 8192 tokens a GPU, wire at its 50 % share"
PAPERS = (
    Paper("Tutel", "arXiv 2206.03382, tables 2 and 6a; A100, 200 Gb/s a GPU", (
        Row("layer, 16 GPUs", "ms", 561, _TF32, TF32_ONLY), Row("layer, 64 GPUs", "ms", 699, _TF32, TF32_ONLY),
        Row("layer, 256 GPUs", "ms", 866, _TF32),
        Row("exchanges, 16 GPUs", "ms", 189, "", WIRE_OF_ALL), Row("exchanges, 64 GPUs", "ms", 324, "", WIRE_OF_ALL),
        Row("exchanges, 256 GPUs", "ms", 491, "the first switch joins 16 nodes", WIRE_OF_ALL),
        Row("adaptive degree over 1, 16 GPUs", "x", 1.20, _SHAPES),
        Row("adaptive degree over 1, 64 GPUs", "x", 1.13, _SHAPES),
        Row("adaptive degree over 1, 256 GPUs", "x", 1.20, _SHAPES),
        Row("best degree over 2, 16 GPUs", "x", 1.02, _SHAPES), Row("best degree over 8, 16 GPUs", "x", 1.11, _SHAPES),
    ), tutel),
    Paper("EPS-MoE", "arXiv 2410.12247, table 5; DeepSeek-V2 layer, 8xH800", (
        Row("serial, m 3072", "ms", 5.698, "", HOST), Row("serial, m 1024", "ms", 2.120, "", HOST),
        Row("serial, m 256", "ms", 1.032, "", HOST),
        Row("5 groups overlapped, m 3072", "x", 1.178, "", HOST),
        Row("5 groups overlapped, m 1024", "x", 1.184, "", HOST),
        Row("5 groups overlapped, m 256", "x", 1.511, "", HOST),
    ), eps_moe),
    Paper("DeepSeek-V3 prefill", "deepseek-ai/profile-data; EP32 H800, 8K tokens a micro-batch", (
        Row("dispatch", "ms", 4.56, "fp8 rows, one for each node"), Row("combine", "ms", 8.62, "one row for each node"),
        Row("step of a layer, overlapped", "ms", 18.3, "two micro-batches interleaved; 4096 tokens of attention",
            "DeepSeek keeps 20 of 132 SMs for exchanges, with kernels that leave caches alone: less than `beside`",
            counts=False),
        Row("step of a layer, serial", "ms", 29.7, "matmuls in fp8, 4096 tokens of attention"),
    ), deepseek),
    Paper("Comet", "arXiv 2502.19811, figure 11; Mixtral EP8, 8xH800, 2048 tokens a GPU", (
        Row("degree 2 (29 % hidden)", "x", implied(0.292), "13 % communication", FEW),
        Row("Tutel (69 % hidden)", "x", implied(0.686), "13 % communication", FEW),
    ), comet),
    Paper("Megatron-LM", "NVIDIA/Megatron-LM#6311; 14 layers of DeepSeek-V3, 64xH100, EP16", (
        Row("1F1B overlap under full recompute", "x", 1.08, "4096 tokens a GPU, 4096 of attention",
            "rows for every choice, in the steady state, without the pipeline's ramps and host time", counts=False),
    ), megatron),
    Paper("ScMoE", "arXiv 2404.05019, tables 1 and 2, figure 8; 8xA30 PCIe, 16xA800 on Ethernet", (
        Row("Swin Pos-2 over top-2, infer", "x", 1.66, _SWIN, SWIN_REST),
        Row("Swin Pos-2 over top-2, train", "x", 1.43, _SWIN, SWIN_REST),
        Row("Swin pair over the shared expert", "x", 1.27, _SWIN, FIG8),
        Row("Swin pair over pipelined top-2", "x", 1.42, _SWIN, FIG8),
        Row("16xA800 over the shared expert", "x", 1.24, _GPT, FIG8),
        Row("16xA800 over pipelined top-2", "x", 1.43, _GPT, FIG8),
    ), scmoe),
)  # fmt: skip

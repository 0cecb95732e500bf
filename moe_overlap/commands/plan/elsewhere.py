"""What the same step would take in libraries that people have, with the flags to set. They have other schedules: none
cuts a layer into chunks but Tutel, and none orders actions; what they have is forecast with the same figures, with
rows for every choice, as Megatron's all-to-all, DeepSpeed and Tutel send them.

Flags as of Megatron-LM d98e8a6, DeepSpeed edaa722, Tutel 82af7aa, vLLM 0.11 and SGLang 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_overlap.commands.plan.options import PlanOptions
from moe_overlap.commands.plan.sweep import Prediction
from moe_overlap.planning.interleaved import interleaved_s

TUTEL_DEGREES = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """seconds: of the block pair. what: the schedule, in words. flags: to be set for it."""

    library: str
    what: str
    flags: str
    seconds: float


def elsewhere(options: PlanOptions, point: Prediction) -> list[Elsewhere]:
    """Those that have the phase; for shortcuts none: they are another model there."""
    if point.kind.startswith("scmoe"):
        return []
    beside = _plain_s(point, 1) if point.kind == "shared1" else None
    wire_s = point.serial_s - point.compute_s
    two_s = interleaved_s(point.compute_s, wire_s, point.model.slowdown)
    return _training(point, beside, two_s) if options.phase == "train" else _inference(point, options.tokens, two_s)


def _plain_s(point: Prediction, chunks: int) -> float:
    """Of so many chunks of tokens, whether or not the plan is deduplicated."""
    return sum(phase.of_chunks(chunks, "tokens") for phase in point.plain)


def _training(point: Prediction, beside_s: float | None, two_s: float) -> list[Elsewhere]:
    size = point.at.group
    by_degree = {1: point.serial_s} | {degree: _plain_s(point, degree) for degree in TUTEL_DEGREES}
    degree = min(by_degree, key=lambda each: (by_degree[each], each))
    flags = f"--expert-model-parallel-size {size} --moe-token-dispatcher-type alltoall"
    found = [Elsewhere(library="Megatron-LM", what="serial", flags=flags, seconds=point.serial_s)]
    if beside_s is not None:
        found.append(Elsewhere(library="Megatron-LM", what="shared expert beside the exchanges",
                               flags=flags + " --moe-shared-expert-overlap", seconds=beside_s))  # fmt: skip
    return [
        *found,
        Elsewhere(library="Megatron-LM", what="forward of one micro-batch beside the backward of another, at best",
                  flags=flags + " --overlap-moe-expert-parallel-comm --delay-wgrad-compute, and "
                  "CUDA_DEVICE_MAX_CONNECTIONS above 1", seconds=two_s),
        Elsewhere(library="DeepSpeed", what="serial", flags=f"MoE(ep_size={size})", seconds=point.serial_s),
        Elsewhere(library="Tutel", what=f"degree {degree}", flags=f"moe_layer(a2a_ffn_overlap_degree={degree})",
                  seconds=by_degree[degree]),
    ]  # fmt: skip


def _inference(point: Prediction, tokens: int, two_s: float) -> list[Elsewhere]:
    flags = {"vLLM": "--enable-expert-parallel --all2all-backend deepep_high_throughput",
             "SGLang": f"--ep-size {point.at.group} --moe-a2a-backend deepep"}  # fmt: skip
    two = {"vLLM": " --enable-dbo", "SGLang": " --enable-two-batch-overlap"}
    found = []
    for library, words in flags.items():
        found.append(Elsewhere(library=library, what="serial", flags=words, seconds=point.serial_s))
        if tokens < 2:
            continue  # there is nothing to make two batches of
        found.append(Elsewhere(library=library, what="two batches interleaved, at best", flags=words + two[library],
                               seconds=two_s))  # fmt: skip
    return found


def elsewhere_lines(found: list[Elsewhere], here_s: float) -> list[str]:
    """A line for each, beside what is planned here."""
    if not found:
        return []
    return ["The same step elsewhere, by the same figures (other kernels than theirs are not looked at):"] + [
        f"  {one.library}, {one.what}: {1e3 * one.seconds:.3f} ms ({one.seconds / here_s:.2f}x of the plan); "
        f"{one.flags}"
        for one in found
    ]
